"""What SelfAlignment adds on the host: `python benchmarks/bench_host.py`.

On a GPU a small model's step takes some milliseconds, and what Python does beside it is felt. So
this runs align() and update() around a model of width 32 and 12 blocks, on a batch of 2, and the
same written by hand in plain PyTorch, in turns.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from torch_sit import SiT

LOSS = selfalign.SRALoss(student_layer=3, teacher_layer=8)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Library:
    """The term by the library."""

    def __init__(self, model: nn.Module) -> None:
        self.align = SelfAlignment(model, LOSS)
        self.parameters = [*model.parameters(), *self.align.projector.parameters()]

    def term(
        self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        return self.align(x0, noise, t, y)

    def update(self) -> None:
        self.align.update()


class Stop(Exception):
    """Ends the teacher's forward after its layer."""


class ByHand:
    """The same in plain PyTorch, without any check."""

    def __init__(self, model: nn.Module) -> None:
        student, teacher = LOSS.layers(len(model.blocks))
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        width = model.head.in_features
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.trained = list(model.parameters())
        self.averages = list(self.teacher.parameters())
        self.parameters = [*self.trained, *self.head.parameters()]
        model.blocks[student - 1].register_forward_hook(self._keep)
        self.teacher.blocks[teacher - 1].register_forward_hook(self._stop)

    def _keep(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        self.student_tokens = output

    def _stop(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        self.teacher_tokens = output
        raise Stop

    def term(
        self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        t_teacher = (t - 0.2 * torch.rand_like(t)).clamp(min=0)
        sigma = t_teacher[:, None, None, None]
        with torch.no_grad(), contextlib.suppress(Stop):
            self.teacher((1 - sigma) * x0 + sigma * noise, t_teacher, y)
        projected = self.head(self.student_tokens)
        return 0.5 * (1 - F.cosine_similarity(projected, self.teacher_tokens, dim=-1).mean())

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.averages, self.trained, 1e-4)


def steps_of(
    kind: type[Library] | type[ByHand], batch: Batch, device: str
) -> Callable[[], tuple[float, float]]:
    """A training step that returns the seconds of the term and of the update."""
    torch.manual_seed(0)
    model = SiT(size=8, channels=4, classes=10, patch=2, width=32, depth=12, heads=2).to(device)
    side = kind(model)
    optimizer = torch.optim.SGD(side.parameters, lr=1e-3)
    x0, noise, t, y = batch

    def step() -> tuple[float, float]:
        prediction = model(LOSS.path.add_noise(x0, noise, t), t, y)
        denoising = F.mse_loss(prediction, LOSS.path.velocity(x0, noise, t))
        start = time.perf_counter()
        term = side.term(x0, noise, t, y)
        in_term = time.perf_counter() - start
        (denoising + term).backward()
        optimizer.step()
        optimizer.zero_grad()
        start = time.perf_counter()
        side.update()
        return in_term, time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x0 = torch.randn(2, 4, 8, 8, device=device)
    y = torch.randint(10, (2,), device=device)
    batch = (x0, torch.randn_like(x0), torch.rand(2, device=device), y)
    arms = {
        "by hand": steps_of(ByHand, batch, device),
        "selfalign": steps_of(Library, batch, device),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for round_ in range(options.rounds):
        for name, step in arms.items():
            measured = step()
            if round_ >= 20:  # the first ones warm up
                seconds[name].append(measured)
    table = Table("ms on the host", "align()", "update()", "together", title_justify="left")
    together = {}
    for name, measured in seconds.items():
        align, update = (1e3 * statistics.median(part) for part in zip(*measured, strict=True))
        together[name] = align + update
        table.add_row(name, f"{align:.2f}", f"{update:.2f}", f"{align + update:.2f}")
    Console().print(table)
    print(f"selfalign above by hand: {together['selfalign'] - together['by hand']:.2f} ms")


if __name__ == "__main__":
    main()
