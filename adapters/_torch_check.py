"""What SelfAlignment finds in a model, and what a few training steps show: the PyTorch side of `selfalign check`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from selfalign._backend import load_keras
from selfalign._checks import check_time, invalid
from selfalign.loss import SRALoss
from selfalign.paths import Path

from ._torch_taps import block_lists, find_blocks, read_width
from .torch import SelfAlignment


class Batch(NamedTuple):
    """A clean sample, noise, times on the path, and the model's call on the noised sample, by position and by name."""

    x0: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def check(model: nn.Module, loss: SRALoss, blocks: list[str] | None, width: int | None, example: Any, time_scale: float,
          repeat: int, report: dict[str, Any]) -> None:  # fmt: skip
    """Fill `report`: what is in the model, then, where `example` is not None, what training steps on it show.

    Args:
        model: in any mode; it is trained for a few steps.
        loss: the settings.
        blocks, width: as for SelfAlignment.
        example: the model's call, (x, t, *condition), or a dict of its arguments that begins with the sample and the time.
        time_scale: the model's time is this times the path's.
        repeat: timed steps of each kind.
        report: gets plain values and tables; what was found up to an error stays in it.

    Raises:
        ValueError, TypeError: SelfAlignment's own; a model that does not take the example; a gradient that goes astray.
    """
    load_keras("torch")
    found = _look(model.train(), loss, blocks, width, report)
    batch = None if example is None else _batch(model, loss.path, example, time_scale)
    if batch is not None:
        _run(model, batch)
    unclear = batch is not None and report["width"] is None
    call = (batch.kwargs or batch.args) if unclear and batch is not None else None
    with SelfAlignment(model, loss, blocks=blocks, width=report["width"], example=call, check_finite=True) as align:
        report["width"] = align._width
        report["projector_parameters"] = _count(align.projector.parameters())
        report["teacher_bytes"] = _teacher_bytes(align)
        if batch is None:
            report["training_steps"] = "none: give --input or --example"
            return
        _take_gradient(align, found, batch, report)
        align.check_finite = False
        _take_time(align, batch, repeat, report)


def _look(model: nn.Module, loss: SRALoss, blocks: list[str] | None, width: int | None, report: dict[str, Any]) -> list[str]:
    """What can be said of the model at rest. Returns the paths of its blocks."""
    report["trained_parameters"] = _count(p for p in model.parameters() if p.requires_grad)
    report["frozen_parameters"] = _count(p for p in model.parameters() if not p.requires_grad)
    lists = {path or "the model itself": listed for path, listed in block_lists(model).items()}
    report["block_lists"] = [{"block_list": path, "blocks": len(listed), "class": type(listed[0]).__name__}
                             for path, listed in lists.items()]  # fmt: skip
    found = find_blocks(model, blocks)
    student, teacher = loss.layers(len(found))
    report |= {"depth": len(found), "student_layer": student, "teacher_layer": teacher}
    report |= {"student": found[student - 1], "teacher": found[teacher - 1], "noise_path": loss.path.name}
    read = read_width(model, model.get_submodule(found[student - 1]))
    report["width"] = width or read
    report["width_from"] = "--width" if width else "the block" if read else "a dry run: pass width= to SelfAlignment"
    return found


def drawn(model: nn.Module, path: Path, shape: tuple[int, ...], classes: int | None, time_scale: float) -> tuple[Any, ...]:
    """Random inputs: (x, t), or (x, t, y) with labels below `classes`; in the model's dtype, on its device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.randn(shape, device=like.device, dtype=like.dtype)
    if path.discrete:
        t: torch.Tensor = torch.randint(0, path.span, shape[:1], device=like.device)
    else:
        t = path.clean_at + (path.noise_at - path.clean_at) * torch.rand(shape[:1], device=like.device)
    labels = [torch.randint(0, classes, shape[:1], device=like.device)] if classes else []
    return x, t if time_scale == 1 else t * time_scale, *labels


def _batch(model: nn.Module, path: Path, example: Any, time_scale: float) -> Batch:
    """The example as a batch: its sample counts as clean, and the model is called on a noised one, at the example's time."""
    device = next((p.device for p in model.parameters()), "cpu")
    names = list(example) if isinstance(example, dict) else []
    values = example.values() if isinstance(example, dict) else example if isinstance(example, (tuple, list)) else []
    values = [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]
    if len(values) < 2 or not all(isinstance(value, torch.Tensor) for value in values[:2]):
        raise invalid("An example must be (x, t, *condition), or a dict that begins with the sample and the time",
                      type(example).__name__ if len(values) < 2 else ", ".join(type(value).__name__ for value in values),
                      "Return the sample and the time, two tensors, first.")  # fmt: skip
    x0, t = values[0], values[1].float() / time_scale
    t = t.round().long() if path.discrete else t
    try:
        check_time(path, t.cpu(), batch=len(x0))
    except ValueError as error:
        raise ValueError(f"{error} Or pass --time-scale, or another --path.") from error
    noise = torch.randn_like(x0)
    values[0] = path.add_noise(x0, noise, t)
    return Batch(x0, noise, t, () if names else tuple(values), dict(zip(names, values, strict=True)) if names else {})


def _run(model: nn.Module, batch: Batch) -> None:
    """The model alone, so that what fails in it is not taken for ours."""
    try:
        output = _first(model(*batch.args, **batch.kwargs))
    except Exception as error:
        raise invalid("The model must take the inputs", f"{type(error).__name__}: {error}",
                      "Pass --example, a function that gives the model's call.") from error  # fmt: skip
    if not isinstance(output, torch.Tensor):
        raise invalid("The model must return a tensor, or a tuple or dict that begins with one", type(output).__name__,
                      "Wrap it in a module that does.")  # fmt: skip


def _first(output: Any) -> Any:
    """The prediction in what a model returns."""
    if isinstance(output, dict):
        output = tuple(output.values())
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _take_gradient(align: SelfAlignment, blocks: list[str], batch: Batch, report: dict[str, Any]) -> None:
    """The term by itself: its value, its tokens, and the blocks that its gradient reaches."""
    shapes: list[torch.Size] = []
    handle = align.projector.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    align.model(*batch.args, **batch.kwargs)
    term = align(batch.x0, batch.noise, batch.t)
    handle.remove()
    term.backward()
    layer = report["student_layer"]
    modules = {n: list(align.model.get_submodule(path).parameters()) for n, path in enumerate(blocks, 1)}
    reached = [n for n, parameters in modules.items() if any(p.grad is not None and p.grad.any() for p in parameters)]
    wanted = [n for n, parameters in modules.items() if n <= layer and any(p.requires_grad for p in parameters)]
    report |= {"tokens": list(shapes[0]), "term": term.item(), "gradient_in_blocks": reached}
    if reached != wanted:
        raise invalid("The term's gradient must reach the blocks that train up to the student's, and none after it",
                      f"gradient in blocks {reached} instead of {wanted}",
                      "Look for detach() or no_grad() between blocks, and for parameters that blocks share.")  # fmt: skip
    align.model.zero_grad()
    align.projector.zero_grad()


def _take_time(align: SelfAlignment, batch: Batch, repeat: int, report: dict[str, Any]) -> None:
    """Steps without and with the term in turn, after one of each to warm up; medians, and the median of the pairs' ratios."""
    trained = [p for p in (*align.model.parameters(), *align.projector.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(term: bool) -> None:  # what the model is trained for does not matter here
        total = (_first(align.model(*batch.args, **batch.kwargs)).float() - 1).square().mean()
        if term:
            total = total + align(batch.x0, batch.noise, batch.t)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if term:
            align.update()

    pairs = []
    for _ in range(repeat + 1):
        with_term = _seconds(lambda: step(True), batch.x0.device)
        pairs.append((_seconds(lambda: step(False), batch.x0.device), with_term))
        align.update()  # outside the clock: the model has moved
    plain, with_term = (1000 * statistics.median(times) for times in zip(*pairs[1:], strict=True))
    ratio = statistics.median(b / a for a, b in pairs[1:])
    report |= {"plain_step_ms": plain, "step_with_sra_ms": with_term, "ratio": ratio, "timed_pairs": repeat}


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    wait = getattr(torch, device.type).synchronize  # torch.cuda, torch.mps, torch.cpu
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _teacher_bytes(align: SelfAlignment) -> int:
    """What the teacher holds beside the model: its own tensors, and the averages of those in half precision."""
    shared = {id(p) for p in (*align.model.parameters(), *align.model.buffers())}
    held = [*align.teacher.parameters(), *align.teacher.buffers(), *align._ema.beside.values()]
    return sum(tensor.nbytes for tensor in held if id(tensor) not in shared)


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)
