"""A model that nobody edited, tapped at its objectives' layers: what all libraries have in common.

A library's own file marks what its blocks return (`Blocks.marked`) and calls the model in training
or evaluation mode. Here the layers are found among the marks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax

from selfalign.adapting import (
    EMATeacher,
    LaterLayer,
    Objective,
    check_function,
    invalid,
    named_objectives,
    with_source,
)

from .by_name import ByName, Loss, is_list, teacher_of
from .marks import Traced, mark

Paths: TypeAlias = str | tuple[str, str]
"""A path with {} in the place of the blocks' numbers; or the student's module and the target's."""

Select: TypeAlias = int | str | Callable[[Any], jax.Array] | None
"""Which of a block's outputs are the tokens: its place or name, or a function of them."""

# What training changes, by the names that arguments and attributes of modules have for it.
EVALUATION = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "inference": True,
    "use_running_average": True,
}


class Tapped(NamedTuple):
    """A tapped model: `student, apply = tap_nnx(loss, "blocks/{}")`.

    Attributes:
        student: your call of the model, in the mode that it has: (model, x, t, *condition) -> the
            prediction, and the tokens after the student's layer. For a list of objectives a dict of
            tokens by name. Where an objective takes a later layer of the same forward
            (LayerSync), a third result has these targets.
        apply: what `align` and `teacher_tokens` take: (params, x, t, *condition) -> the tokens
            after the teacher's layer, in evaluation mode.

    Example: see `tap_nnx`, `tap_linen` and `tap_equinox`.
    """

    student: Callable[..., tuple[Any, ...]]
    apply: Callable[..., ByName]


class Blocks:
    """Which modules of a model are tapped, and what of their outputs."""

    def __init__(self, loss: Loss, blocks: Paths, select: Select) -> None:
        self.objectives = named_objectives(loss)
        self.several = is_list(loss)
        self.blocks = blocks
        self.select = select
        self._check()
        self._patterns = [_pattern(path) for path in self._paths()]

    def _check(self) -> None:
        is_pair = isinstance(self.blocks, tuple) and len(self.blocks) == 2
        if not isinstance(self.blocks, str) and not is_pair:
            raise TypeError(
                "blocks must be a path such as 'blocks/{}', or two paths, the student's module and "
                f"the target's. Received: {self.blocks!r:.60}. Write {{}} for the blocks' numbers."
            )
        if not isinstance(self.select, (int, str, type(None))):
            check_function("select", self.select)

    def _paths(self) -> tuple[str, ...]:
        return (self.blocks,) if isinstance(self.blocks, str) else self.blocks

    def have(self, path: str) -> bool:
        """Whether the module at this path is one of them."""
        return any(pattern.fullmatch(path) for pattern in self._patterns)

    def marked(self, output: Any, path: str) -> None:
        """Mark the tokens in what a block returned."""
        mark(self._tokens(output, path), path)

    def _tokens(self, output: Any, path: str) -> jax.Array:
        select = self.select
        if select is None:
            arrays = jax.tree.leaves(output)
            if len(arrays) == 1:
                return arrays[0]
            shapes = ", ".join(str(getattr(each, "shape", each)) for each in arrays)
            raise invalid(
                "A tapped block must return one array, or select= must say which of them it is",
                f"{path!r} returns {len(arrays)}: {shapes}",
                "Pass for instance select=0, or a function of the output.",
            )
        try:
            tokens = select(output) if callable(select) else output[select]
        except (LookupError, TypeError) as error:
            received = f"select={select!r:.40}, a {type(output).__name__} at {path!r}"
            fix = "Pass a place or a name in what the block returns, or a function of it."
            raise invalid("select= must fit what the block returns", received, fix) from error
        if not hasattr(tokens, "shape"):
            raise TypeError(
                "select= must give one array. Received: "
                f"{type(tokens).__name__} at {path!r}. Select the tokens [B, N, D] alone."
            )
        return tokens

    def student(self, traced: Traced, existing: Collection[str]) -> tuple[Any, ...]:
        """The forward's result, the student's tokens, and the targets of the same forward."""
        places = self._places(traced.marks, existing)
        later = with_source(self.objectives, LaterLayer)
        targets = {name: places[name][1] for name in later}
        students = {name: found[0] for name, found in places.items()}
        result, tokens = traced.run({*students.values(), *targets.values()})
        by_name = [{n: tokens[i] for n, i in each.items()} for each in (students, targets)]
        return (result, *[self._form(each) for each in by_name if each])

    def teacher(self, traced: Traced, existing: Collection[str]) -> ByName:
        """The teacher's tokens. What comes after them does not run."""
        places = self._places(traced.marks, existing)
        taught = {n: places[n][1] for n in with_source(self.objectives, EMATeacher)}
        tokens = traced.run_until(set(taught.values()))
        return self._form({name: tokens[place] for name, place in taught.items()})

    def check_teacher(self) -> None:
        """There is an objective with an EMA teacher."""
        teacher_of(self.objectives)

    def _form(self, found: dict[str, jax.Array]) -> ByName:
        return found if self.several else next(iter(found.values()))

    def _places(self, marks: list[str], existing: Collection[str]) -> dict[str, tuple[int, ...]]:
        """The student's and the target's place among the marks, by the objectives' names."""
        places = [
            [place for place, name in enumerate(marks) if pattern.fullmatch(name)]
            for pattern in self._patterns
        ]
        for path, found in zip(self._paths(), places, strict=True):
            if not found:
                listed = ", ".join(sorted(each for each in existing if each)) or "none"
                raise invalid(
                    "blocks must name modules that run in the model's forward",
                    f"{path!r}, of which none ran",
                    f"Its modules: {listed:.2000}.",
                )
        if isinstance(self.blocks, str):
            (runs,) = places
            return {name: _numbered(each, runs) for name, each in self.objectives.items()}
        for path, found in zip(self._paths(), places, strict=True):
            if len(found) > 1:
                raise invalid(
                    "A tapped module must run once in a forward",
                    f"{path!r}, which runs {len(found)} times",
                    "Pass its path alone, blocks='...': the layers' numbers are then its runs.",
                )
        ((student,), (target,)) = places
        return dict.fromkeys(self.objectives, (student, target))


def _numbered(objective: Objective, runs: list[int]) -> tuple[int, ...]:
    """The objective's layers are the first, second, ... of the blocks that run."""
    return tuple(runs[layer - 1] for layer in objective.layers(len(runs)))


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path.strip("/")).replace(r"\{\}", r"\d+"))


def itself(model: Any) -> Any:
    """The model, where nothing else is asked for."""
    return model


def evaluation_arguments(function: Callable[..., Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by which a call is in evaluation mode; `own` are the user's."""
    try:
        names = set(inspect.signature(function).parameters)
    except (ValueError, TypeError):
        names = set()
    return {name: value for name, value in EVALUATION.items() if name in names} | dict(own)
