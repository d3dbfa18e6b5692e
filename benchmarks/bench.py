"""What SRA costs, side by side in one run and as ratios: `python benchmarks/bench.py` (or `make bench`).

Steps: the plain step, the step with selfalign, and the same method written by hand in plain torch the way the public code does
it (the teacher runs whole, the EMA is a loop over tensors). Term: `SRALoss` through keras.ops against the same formula in plain
torch, eager and compiled, forward and backward. Arms take turns, so that a machine that slows down slows all of them down.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rounds import Step, measure, show
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import selfalign
from selfalign.adapters.torch import SelfAlignment

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from torch_sit import SiT

LOSS = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7)


class Setting:
    """One model, its optimizer and the user's loop; each arm has its own, from the same weights."""

    def __init__(self, model: nn.Module, batch: tuple[torch.Tensor, ...], extra: nn.Module | None = None) -> None:
        self.model, (self.x0, self.noise, self.t, self.y) = model, batch
        self.optimizer = torch.optim.AdamW([*model.parameters(), *(extra.parameters() if extra else [])], lr=1e-4)

    def denoising(self) -> torch.Tensor:
        t = self.t[:, None, None, None]
        prediction = self.model((1 - t) * self.x0 + t * self.noise, self.t, self.y)
        return F.mse_loss(prediction, self.noise - self.x0)

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> Step:
    setting = Setting(model, batch)
    return lambda: setting.step(setting.denoising())


def with_selfalign(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> Step:
    align = SelfAlignment(model, LOSS)
    setting = Setting(model, batch, align.projector)

    def step() -> None:
        setting.step(setting.denoising() + align(*batch))
        align.update()

    return step


def by_hand(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> Step:
    """The same layers, gap, projector, distance and decay, as one would write them into a training script."""
    teacher, features = copy.deepcopy(model).requires_grad_(False).eval(), {}
    student_layer, teacher_layer = LOSS.layers(len(model.blocks))
    model.blocks[student_layer - 1].register_forward_hook(lambda m, a, out: features.__setitem__("student", out))
    teacher.blocks[teacher_layer - 1].register_forward_hook(lambda m, a, out: features.__setitem__("teacher", out))
    width = model.blocks[0].out.in_features
    projector = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
    setting = Setting(model, batch, projector)
    x0, noise, t, y = batch

    def step() -> None:
        loss = setting.denoising()
        t_teacher = (t - 0.2 * torch.rand_like(t)).clamp(min=0)
        a = t_teacher[:, None, None, None]
        with torch.no_grad():
            teacher((1 - a) * x0 + a * noise, t_teacher, y)
        term = 1 - F.cosine_similarity(projector(features["student"]), features["teacher"], dim=-1).mean()
        setting.step(loss + 0.5 * term)
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
                mine.mul_(0.9999).add_(theirs, alpha=1e-4)

    return step


def term_arms(shape: tuple[int, ...]) -> dict[str, Step]:
    """Forward and backward of the term alone."""
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def unit(tokens: torch.Tensor) -> torch.Tensor:
        return tokens * torch.rsqrt(tokens.square().sum(dim=-1, keepdim=True).clamp(min=1e-12))

    def formula(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return 0.5 * (0.5 * (unit(student.float()) - unit(teacher.detach().float())).square().sum(dim=-1)).mean()

    def run(term: Callable[..., torch.Tensor]) -> Step:
        return lambda: torch.autograd.grad(term(student, teacher), student)

    arms = {"plain torch, eager": run(formula), "keras.ops, eager": run(LOSS)}
    compiled = {"plain torch, compiled": torch.compile(formula), "keras.ops, compiled": torch.compile(LOSS.__call__)}
    return arms | {name: run(term) for name, term in compiled.items()}


def count(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--size", type=int, default=16, help="side of the image or latent; patches of 2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--term", type=int, nargs=3, default=(32, 256, 1152), metavar=("B", "N", "D"))
    options = parser.parse_args()
    console = Console()

    torch.manual_seed(0)
    model = SiT(options.size, 4, 10, patch=2, width=options.width, depth=options.depth, heads=options.width // 64)
    shape = (options.batch, 4, options.size, options.size)
    batch = torch.randn(shape), torch.randn(shape), torch.rand(options.batch), torch.randint(0, 10, (options.batch,))
    makers = {"plain step": plain, "with selfalign": with_selfalign, "by hand, whole teacher": by_hand}
    arms = {name: make(copy.deepcopy(model), batch) for name, make in makers.items()}
    flops = {name: count(step) for name, step in arms.items()}
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, SiT {options.width} x {options.depth}, "
                  f"{(options.size // 2) ** 2} tokens, batch {options.batch}, float32")  # fmt: skip
    for name, value in flops.items():
        console.print(f"counted FLOPs, {name}: {value / 1e9:.2f} G, {value / flops['plain step']:.3f} x plain")
    seconds = measure(arms, options.rounds)
    show(console, "A training step", seconds, dict.fromkeys(arms, "plain step"))
    show(console, "The same", {n: seconds[n] for n in list(arms)[1:]}, dict.fromkeys(arms, "by hand, whole teacher"))

    seconds = measure(term_arms(tuple(options.term)), 3 * options.rounds, warm_up=10)
    against = {name: "plain torch, " + name.rpartition(" ")[2] for name in seconds}
    show(console, f"The term on {tuple(options.term)}, forward and backward", seconds, against)


if __name__ == "__main__":
    main()
