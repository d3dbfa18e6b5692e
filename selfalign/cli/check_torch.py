"""The PyTorch side of `selfalign check`: what is found in a model, and what training steps show."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from selfalign import SRALoss, paths
from selfalign.adapters.torch import SelfAlignment
from selfalign.adapters.torch.blocks import block_lists, find_blocks, read_width
from selfalign.adapters.torch.tokens import Output
from selfalign.adapting import invalid, load_keras

from .output import Report
from .torch_inputs import Batch, make_batch


class Tried(NamedTuple):
    """What is attached: the model, the loss, and where the blocks are.

    Attributes:
        model: in any mode; it is trained for a few steps.
        loss: the settings.
        blocks: paths of the block lists, as for SelfAlignment.
        width: of the tokens, as for SelfAlignment.
    """

    model: nn.Module
    loss: SRALoss
    blocks: list[str] | None
    width: int | None

    def attach(self, checks: str) -> SelfAlignment:
        """The loss on the model."""
        return SelfAlignment(
            self.model, self.loss, blocks=self.blocks, width=self.width, checks=checks
        )


def check(tried: Tried, example: Any, time_scale: float, repeat: int, report: Report) -> None:
    """Fill `report`: what is in the model, then what training steps on the example show.

    Args:
        tried: the model and the loss.
        example: the model's call, (x, t, *condition), or a dict of its arguments that begins with
            the sample and the time; None: no steps.
        time_scale: the model's time is this times the path's.
        repeat: timed steps of each kind.
        report: gets plain values and tables; what was found up to an error stays in it.

    Raises:
        ValueError, TypeError: SelfAlignment's own; a model that does not take the example; a
            gradient that goes astray.
    """
    load_keras("torch")
    blocks = _look(tried, report)
    path = paths.resolve(tried.loss.path)
    batch = None if example is None else make_batch(tried.model, path, example, time_scale)
    if batch is not None:
        _run_alone(tried.model, batch)
    with tried.attach(checks="finite") as align:
        if batch is not None and not align.projector.built:
            with align.recording():
                batch.run(tried.model)
        _look_at_heads(align, report)
        if batch is None:
            report["training_steps"] = "none: give --input or --example"
            return
        _take_gradient(align, blocks, batch, report)
    with tried.attach(checks="on") as align:
        _take_time(align, batch, repeat, report)


# The model at rest


def _look(tried: Tried, report: Report) -> list[str]:
    """What can be said of the model at rest. Returns the paths of its blocks."""
    model = tried.model.train()
    report["trained_parameters"] = _count(p for p in model.parameters() if p.requires_grad)
    report["frozen_parameters"] = _count(p for p in model.parameters() if not p.requires_grad)
    report["block_lists"] = [
        {
            "block_list": path or "the model itself",
            "blocks": len(listed),
            "class": type(listed[0]).__name__,
        }
        for path, listed in block_lists(model).items()
    ]
    found = find_blocks(model, tried.blocks)
    student, teacher = tried.loss.layers(len(found))
    report |= {"depth": len(found), "student_layer": student, "teacher_layer": teacher}
    report |= {"student": found[student - 1], "teacher": found[teacher - 1]}
    report["noise_path"] = paths.resolve(tried.loss.path).name
    read = read_width(model, model.get_submodule(found[student - 1]))
    report["width"] = tried.width or read
    report["width_from"] = "the block" if read else "the first forward"
    if tried.width:
        report["width_from"] = "--width"
    return found


def _look_at_heads(align: SelfAlignment, report: Report) -> None:
    if align.projector.built:
        report["width"] = align.projector.hidden_kernel.shape[0]
        report["projector_parameters"] = _count(align.projector.parameters())
    report["teacher_bytes"] = _teacher_bytes(align)


def _teacher_bytes(align: SelfAlignment) -> int:
    """What the teacher holds beside the model: its own tensors and its averages, each once."""
    teacher: Any = align.teacher
    shared = {tensor.data_ptr() for tensor in _tensors_of(align.model)}
    averages = getattr(align._average, "beside", {})
    held = [*_tensors_of(teacher), *averages.values()]
    own = {tensor.data_ptr(): tensor.nbytes for tensor in held}
    return sum(size for pointer, size in own.items() if pointer not in shared)


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


# Training steps


def _run_alone(model: nn.Module, batch: Batch) -> None:
    """The model alone, so that what fails in it is not taken for ours."""
    try:
        output = _prediction(batch.run(model))
    except Exception as error:
        raise invalid(
            "The model must take the inputs",
            f"{type(error).__name__}: {error}",
            "Pass --example, a function that gives the model's call.",
        ) from error
    if not isinstance(output, torch.Tensor):
        raise invalid(
            "The model must return a tensor, or a tuple or dict that begins with one",
            type(output).__name__,
            "Wrap it in a module that does.",
        )


def _prediction(output: Any) -> Any:
    """The prediction in what a model returns."""
    if isinstance(output, dict):
        output = tuple(output.values())
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _take_gradient(align: SelfAlignment, blocks: list[str], batch: Batch, report: Report) -> None:
    """The term by itself: its value, its tokens, and the blocks that its gradient reaches."""
    with _student_outputs(align) as outputs:
        batch.run(align.model)
    term = align(batch.x0, batch.noise, batch.t)
    term.backward()
    tokens = align._term.parts[0].student(outputs[0], batch.x0)
    report |= {"tokens": list(tokens.shape), "term": term.item()}
    trained = {}
    reached = []
    for number, path in enumerate(blocks, 1):
        parameters = list(align.model.get_submodule(path).parameters())
        trained[number] = any(p.requires_grad for p in parameters)
        if any(p.grad is not None and p.grad.any() for p in parameters):
            reached.append(number)
    wanted = [n for n, trains in trained.items() if trains and n <= report["student_layer"]]
    report["gradient_in_blocks"] = reached
    if reached != wanted:
        raise invalid(
            "The term's gradient must reach the blocks that train up to the student's, and none "
            "after it",
            f"gradient in blocks {reached} instead of {wanted}",
            "Look for detach() or no_grad() between blocks, and for parameters that blocks share.",
        )
    align.model.zero_grad()


@contextlib.contextmanager
def _student_outputs(align: SelfAlignment) -> Iterator[list[Output]]:
    """What the student's block returns in the forwards inside."""
    outputs: list[Output] = []

    def note(module: nn.Module, args: Any, output: Output) -> None:
        outputs.append(output)

    block = align.model.get_submodule(align.taps[0])
    handle = block.register_forward_hook(note)
    try:
        yield outputs
    finally:
        handle.remove()


def _take_time(align: SelfAlignment, batch: Batch, repeat: int, report: Report) -> None:
    """Steps without and with the term in turn, after one of each to warm up.

    The report gets medians, and the median of the pairs' ratios.
    """
    parameters = [*align.model.parameters(), *align.projector.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-5)

    def step(with_term: bool) -> None:
        # what the model is trained for does not matter here
        prediction = _prediction(batch.run(align.model)).float()
        total = (prediction - 1).square().mean()
        if with_term:
            total = total + align(batch.x0, batch.noise, batch.t)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if with_term:
            align.update()

    pairs = []
    for _ in range(repeat + 1):
        aligned = _seconds(lambda: step(True), batch.x0.device)
        pairs.append((_seconds(lambda: step(False), batch.x0.device), aligned))
        align.update()  # outside the clock: the model has moved
    timed = pairs[1:]
    report["plain_step_ms"] = 1000 * statistics.median(plain for plain, _ in timed)
    report["step_with_sra_ms"] = 1000 * statistics.median(aligned for _, aligned in timed)
    report["ratio"] = statistics.median(aligned / plain for plain, aligned in timed)
    report["timed_pairs"] = repeat


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    wait = getattr(torch, device.type).synchronize  # torch.cuda, torch.mps, torch.cpu
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start
