"""A part of `make gpu`: the PyTorch adapter on the GPU against the CPU's numbers in float32.

    python benchmarks/gpu/right_torch.py --out found.jsonl

Some steps of a small SiT with the same weights, batches and draws: each way of training must give
the CPU's terms and gradients, within what its precision allows. Terms and metrics of all steps are
kept on the device and read after the last: a CUDA graph must not have overwritten them. A graph is
recorded at the third run and replayed from the fourth on, and the teacher's first run is eager.
"""

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from found import Figures, attempt, parse
from torch import nn
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from torch_sit import PATH, SiT  # noqa: E402

import selfalign  # noqa: E402
from selfalign.adapters.torch import EMATeacher, SelfAlignment  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 6
MODELS = ("DiTTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")
LOSS = selfalign.SRALoss(student_layer=1, teacher_layer=3, decay=0.9)

# Largest differences that are rounding: of a number to the largest of its kind.
FLOAT32 = 1e-4
BFLOAT16 = 5e-2
FLOAT16 = 1e-2

Prepare = Callable[[nn.Module], nn.Module]  # before attaching
Wrap = Callable[[nn.Module, SelfAlignment], nn.Module]  # after it; what the loop calls


class Training(NamedTuple):
    """A way of training, and how near it must come."""

    tolerance: float
    attach: dict[str, Any] = {}  # noqa: RUF012
    prepare: Prepare = lambda model: model
    wrap: Wrap = lambda model, align: model
    autocast: torch.dtype | None = None
    scaled: bool = False
    compiles: bool = False  # what takes longest, and a rehearsal leaves out


class Numbers(NamedTuple):
    """Of all steps, on the CPU in float64."""

    terms: torch.Tensor
    cosines: torch.Tensor
    validation: torch.Tensor  # denoising loss and term without gradient, in the middle of the steps
    gradients: torch.Tensor  # of the first step, of the model's parameters
    average: torch.Tensor  # the teacher's parameters, after the last step


def make_model() -> SiT:
    """A small SiT whose blocks do something from the first step."""
    torch.manual_seed(0)
    model = SiT(8, 4, 10, patch=2, width=64, depth=4, heads=4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batches(device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """x0, noise, t, y, u of each step, the same on every device."""
    draws = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x0, noise = torch.randn(2, 8, 4, 8, 8, generator=draws)
        t, u = torch.rand(2, 8, generator=draws)
        y = torch.randint(0, 10, (8,), generator=draws)
        yield tuple(part.to(device) for part in (x0, noise, t, y, u))


def flat(tensors: Any) -> torch.Tensor:
    whole = [getattr(part, "full_tensor", lambda part=part: part)() for part in tensors]
    return torch.cat([part.detach().double().cpu().flatten() for part in whole])


def train(way: Training, device: torch.device) -> Numbers:
    """Steps as a user's loop has them, and a validation amid them."""
    model = way.prepare(make_model().to(device))
    align = SelfAlignment(model, LOSS, seed=0, log_metrics=True, **way.attach)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in align.projector.parameters():
            p.copy_(0.1 * torch.randn(p.shape))
    forward = way.wrap(model, align)
    parameters = [*model.parameters(), *align.projector.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, foreach=False)
    scaler = torch.amp.GradScaler(device.type, enabled=way.scaled)
    mixed = functools.partial(torch.autocast, device.type, way.autocast, way.autocast is not None)

    def losses(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        x0, noise, t, y, u = batch
        with mixed():
            prediction = forward(PATH.add_noise(x0, noise, t), t, y)
            term = align(x0, noise, t, u=u)
            return F.mse_loss(prediction.float(), PATH.velocity(x0, noise, t)), term

    terms = []
    cosines = []
    gradients = None
    for batch in batches(device):
        denoising, term = losses(batch)
        scaler.scale(denoising + term).backward()
        scaler.unscale_(optimizer)
        if gradients is None:
            gradients = flat(p.grad for p in model.parameters())
        terms.append(term.detach())
        cosines.append(align.metrics["cosine"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        align.update()
        if len(terms) == STEPS - 1:
            with torch.no_grad():
                validation = flat(losses(batch))
    assert gradients is not None
    assert align.teacher is not None
    average = flat(align.teacher.parameters())
    align.detach()
    return Numbers(flat(terms), flat(cosines), validation, gradients, average)


@functools.cache
def on_the_cpu() -> Numbers:
    return train(Training(0), torch.device("cpu"))


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def against_the_cpu(way: Training) -> Figures:
    """Not for the average where the teacher holds other numbers on purpose."""
    found = train(way, DEVICE)
    wanted = on_the_cpu()
    differences = {
        "term": far(found.terms, wanted.terms),
        "cosine": far(found.cosines, wanted.cosines),
        "validation": far(found.validation, wanted.validation),
        "gradient": far(found.gradients, wanted.gradients),
    }
    if found.average.shape == wanted.average.shape:
        differences["average"] = far(found.average, wanted.average)
    ok = all(difference <= way.tolerance for difference in differences.values())
    return {"ok": ok, "tolerance": way.tolerance} | differences


# --------------------------------------------------------------------------------------------------
# Ways of training


def checkpointed(model: nn.Module) -> nn.Module:
    """Each block recomputes its activations in the backward."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def sharded(model: nn.Module, align: SelfAlignment) -> nn.Module:
    """FSDP2, in a group of one process: the model and its teacher alike."""
    from torch.distributed.fsdp import fully_shard

    for whole in (model, align.teacher):
        for block in whole.blocks:
            fully_shard(block)
        fully_shard(whole)
    return model


def parallel(model: nn.Module, align: SelfAlignment) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: nn.Module, align: SelfAlignment) -> nn.Module:
    return torch.compile(model)


def graphed(model: nn.Module, align: SelfAlignment) -> nn.Module:
    return torch.compile(model, mode="reduce-overhead")


def ways() -> dict[str, Training]:
    """By name."""
    bfloat16 = torch.bfloat16
    return {
        "float32": Training(FLOAT32),
        "autocast, bfloat16": Training(BFLOAT16, autocast=bfloat16),
        "autocast, float16, GradScaler": Training(FLOAT16, autocast=torch.float16, scaled=True),
        "checkpointing": Training(FLOAT32, prepare=checkpointed),
        "EMATeacher(offload=True)": Training(FLOAT32, {"teacher": EMATeacher(offload=True)}),
        "EMATeacher(truncate=True)": Training(FLOAT32, {"teacher": EMATeacher(truncate=True)}),
        "EMATeacher(dtype=torch.bfloat16)": Training(
            BFLOAT16, {"teacher": EMATeacher(dtype=bfloat16)}
        ),
        "DDP": Training(FLOAT32, wrap=parallel),
        "FSDP2": Training(FLOAT32, wrap=sharded),
        "compile=True": Training(FLOAT32, {"compile": True}, compiles=True),
        "compiled model, compile=True": Training(
            FLOAT32, {"compile": True}, wrap=compiled, compiles=True
        ),
        "CUDA graphs": Training(
            FLOAT32, {"compile": {"mode": "reduce-overhead"}}, wrap=graphed, compiles=True
        ),
    }


# --------------------------------------------------------------------------------------------------
# Host syncs, and models of others


@contextlib.contextmanager
def no_syncs() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error."""
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def a_warm_step_waits_for_nothing() -> Figures:
    """The fourth step's align() and update()."""
    model = make_model().to(DEVICE)
    align = SelfAlignment(model, LOSS)
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.05)
    x0, noise, t, y, _ = next(batches(DEVICE))
    for step in range(4):
        with no_syncs() if step == 3 else contextlib.nullcontext():
            prediction = model(PATH.add_noise(x0, noise, t), t, y)
            (prediction.square().mean() + align(x0, noise, t)).backward()
            optimizer.step()
            optimizer.zero_grad()
            align.update()
    return {"ok": True, "judged": DEVICE.type == "cuda"}


def to_device(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {name: to_device(part, device) for name, part in tree.items()}
    return tree


def a_model_of_diffusers(name: str) -> Figures:
    """One step of the class, tiny, as its users call it: the term against the CPU's."""
    from diffusers_models import FAMILIES, UNITS

    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.build().eval()
    x0, condition = family.batch(2)
    noise, t, u = torch.randn_like(x0), torch.rand(2), torch.rand(2)
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=max(2, family.depth - 1))
    terms = []
    for device in (torch.device("cpu"), DEVICE):
        there = copy.deepcopy(model).to(device)
        align = SelfAlignment(there, loss)
        given = [part.to(device) for part in (x0, noise, t)]
        others = to_device(condition, device)
        time = UNITS[family.time](given[2])
        x_t = PATH.add_noise(*given)
        there(hidden_states=x_t, timestep=time, return_dict=False, **others)
        terms.append(align(*given, u=u.to(device)).double().cpu())
    difference = far(terms[1], terms[0])
    return {"ok": difference <= 1e-3, "tolerance": 1e-3, "term": difference}


def join_alone() -> None:
    """A group of one process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ.setdefault("MASTER_PORT", "29531")
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend)


def main() -> None:
    options = parse(__doc__)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    join_alone()
    chosen = ways()
    if options.short:
        chosen = {name: way for name, way in chosen.items() if not way.compiles}
    for name, way in chosen.items():
        attempt(options.out, name, functools.partial(against_the_cpu, way))
    attempt(options.out, "no host sync in a warm step", a_warm_step_waits_for_nothing)
    for name in MODELS[-1:] if options.short else MODELS:
        attempt(options.out, f"diffusers: {name}", functools.partial(a_model_of_diffusers, name))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
