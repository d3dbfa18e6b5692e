"""The term through keras.ops against plain torch, forward and backward, eager and compiled.

python benchmarks/bench_term.py
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rounds import Step, measure, show

import selfalign

LOSS = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7)
Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def unit(tokens: torch.Tensor) -> torch.Tensor:
    squares = tokens.square().sum(dim=-1, keepdim=True)
    return tokens * torch.rsqrt(squares.clamp(min=1e-12))


def formula(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """SRA's term by hand: half of the squared distance of unit vectors is 1 - cosine."""
    difference = unit(student.float()) - unit(teacher.detach().float())
    distances = 0.5 * difference.square().sum(dim=-1)
    return 0.5 * distances.mean()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = (32, 256, 1152)
    parser.add_argument("--shape", type=int, nargs=3, default=shape, metavar=("B", "N", "D"))
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    shape = tuple(options.shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = torch.randn(shape, requires_grad=True, device=device)
    teacher = torch.randn(shape, device=device)

    def forward_and_backward(term: Term) -> Step:
        def step() -> float:
            (gradient,) = torch.autograd.grad(term(student, teacher), student)
            return gradient.sum().item()  # waits for the device

        return step

    arms = {
        "plain torch, eager": forward_and_backward(formula),
        "keras.ops, eager": forward_and_backward(LOSS),
        "plain torch, compiled": forward_and_backward(torch.compile(formula)),
        "keras.ops, compiled": forward_and_backward(torch.compile(LOSS.__call__)),
    }
    against = {name: f"plain torch, {name.split(', ')[1]}" for name in arms}
    seconds = measure(arms, options.rounds, warm_up=10)
    show(Console(), f"The term on {shape}", seconds, against)


if __name__ == "__main__":
    main()
