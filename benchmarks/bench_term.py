"""The term through keras.ops against plain torch, forward and backward: `python benchmarks/bench_term.py`."""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rounds import Step, measure, show

import selfalign

LOSS = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7)


def unit(tokens: torch.Tensor) -> torch.Tensor:
    return tokens * torch.rsqrt(tokens.square().sum(dim=-1, keepdim=True).clamp(min=1e-12))


def formula(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return 0.5 * (0.5 * (unit(student.float()) - unit(teacher.detach().float())).square().sum(dim=-1)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 256, 1152), metavar=("B", "N", "D"))
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    shape, device = tuple(options.shape), "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = torch.randn(shape, requires_grad=True, device=device), torch.randn(shape, device=device)

    def run(term: Callable[..., torch.Tensor]) -> Step:
        return lambda: torch.autograd.grad(term(student, teacher), student)[0].sum().item()

    arms = {
        "plain torch, eager": run(formula),
        "keras.ops, eager": run(LOSS),
        "plain torch, compiled": run(torch.compile(formula)),
        "keras.ops, compiled": run(torch.compile(LOSS.__call__)),
    }
    against = {name: "plain torch, " + name.rpartition(" ")[2] for name in arms}
    show(Console(), f"The term on {shape}", measure(arms, options.rounds, warm_up=10), against)


if __name__ == "__main__":
    main()
