"""One objective on a model: where it is tapped, its head, and how its tokens are read."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from selfalign.adapting import EMATeacher, Given, LaterLayer, Objective, invalid

from .blocks import Tapped, Taps, read_width
from .heads import Projector
from .tokens import Select, TokenReader

Tensors = torch.Tensor | Mapping[str, torch.Tensor]
Tokens = dict[str, torch.Tensor]  # by the objectives' names


class Part(NamedTuple):
    """One objective on a model.

    Attributes:
        name: the objective's.
        objective: its settings and arithmetic.
        head: the parameters of its head.
        evaluate: `objective.evaluate`, compiled where that was asked for.
        student: reads the student's tokens.
        target: reads the target's, where it is a layer's output; None otherwise.
        from_teacher: whether the target is a layer of an EMA teacher.
        from_later_layer: whether it is a layer of the student's own forward.
        from_caller: whether the caller of align() gives it.
    """

    name: str
    objective: Objective
    head: Projector
    evaluate: Callable[..., Any]
    student: TokenReader
    target: TokenReader | None
    from_teacher: bool
    from_later_layer: bool
    from_caller: bool

    def taps(self) -> list[str]:
        """Paths of the tapped modules: the student's, then the target's."""
        return [reader.where for reader in self.readers()]

    def readers(self) -> list[TokenReader]:
        """The student's, then the target's."""
        return [self.student] if self.target is None else [self.student, self.target]

    def own_taps(self) -> list[str]:
        """Those that are tapped in the student's forward."""
        return self.taps() if self.from_later_layer else [self.student.where]


def make_parts(
    model: nn.Module,
    objectives: Mapping[str, Objective],
    taps: Taps,
    width: int | None,
    select: Select | None,
    seed: int,
    compiled: Mapping[str, Any] | None,
) -> list[Part]:
    """The parts of a model's alignment, one for each objective."""
    parts = []
    for index, (name, objective) in enumerate(objectives.items()):
        tapped = taps.by_name[name]
        block = model.get_submodule(tapped.student)
        _check_two_modules(model, tapped, objective)
        known = read_width(model, block) if width is None else width
        head = Projector(objective, head_seed(seed, index, name), _like(model, block), known)
        evaluate: Callable[..., Any] = objective.evaluate
        if compiled is not None:
            evaluate = _compiled(evaluate, compiled)
        student = TokenReader(model, tapped.student, select, known)
        target = None if tapped.target is None else TokenReader(model, tapped.target, select, known)
        source = objective.source
        kinds = [isinstance(source, kind) for kind in (EMATeacher, LaterLayer, Given)]
        parts.append(Part(name, objective, head, evaluate, student, target, *kinds))
    return parts


def _check_two_modules(model: nn.Module, tapped: Tapped, objective: Objective) -> None:
    """The target is another module than the student's, as for layers."""
    same = tapped.target is not None and model.get_submodule(tapped.target) is (
        model.get_submodule(tapped.student)
    )
    if same and not getattr(objective, "allow_same_layer", False):
        raise invalid(
            "taps= must name two modules, the student's and one that runs after it",
            f"{tapped.student!r} and {tapped.target!r}, which are one",
            "Pass a later module as the second; for the paper's same-layer ablation "
            "SRALoss(allow_same_layer=True).",
        )


def _compiled(evaluate: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The function compiled, as it must be where that makes CUDA graphs.

    A graph overwrites what an earlier one returned, unless that waits for its backward. So without
    gradient nothing is compiled, and metrics, which are kept from step to step, are copies.
    """
    quick = torch.compile(evaluate, **options)

    def run(*arguments: Any) -> tuple[Any, Any]:
        if not torch.is_grad_enabled():
            return evaluate(*arguments)
        distance, metrics = quick(*arguments)
        return distance, {name: value.clone() for name, value in metrics.items()}

    return run


def head_seed(seed: int, index: int, name: str) -> int:
    """The seed of the initial values of one of the heads."""
    return drawn(seed, "projector" if index == 0 else f"projector {name}")


def drawn(seed: int, *what: Any) -> int:
    """A seed for one purpose: streams of their own, also beside generators seeded alike."""
    return random.Random(repr((seed, *what))).getrandbits(32)


def _like(model: nn.Module, block: nn.Module) -> torch.Tensor:
    """A tensor in whose dtype and on whose device a head belongs."""
    parameters = (*block.parameters(), *model.parameters())
    return next((p for p in parameters if p.is_floating_point()), torch.empty(0))
