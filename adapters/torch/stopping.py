"""Forwards that end early, and forwards in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from selfalign.adapting import invalid

from .arguments import Arguments


class Stopped(Exception):
    """Ends a forward that need not go on."""


class Cut(nn.Module):
    """Stands where a block was that the teacher does not need."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to run."""
        raise invalid(
            "This teacher serves alignment only: it was cut after its layer",
            "a forward past it",
            "Build SelfAlignment without truncate=True to sample from the EMA.",
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # its result is not used: a model's own train() may return nothing
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_before(run: Callable[[], Any], module: nn.Module, where: str) -> Arguments:
    """Run a forward only up to the start of `module`; the arguments that it would get."""
    found: list[Arguments] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Arguments(args, kwargs))
        raise Stopped

    # first of all hooks: those of sharded models would gather weights for a forward that never ends
    handle = module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run()
    except Stopped:
        return found[0]
    finally:
        handle.remove()
    raise never_ran(where)


def never_ran(where: str) -> ValueError:
    """The error of a forward that ended without reaching a module."""
    return invalid(
        "The teacher's forward must reach its tapped block",
        f"{where} never ran",
        "Choose a layer that runs for every input, and let the model hold its blocks in "
        "attributes, lists and dicts: a copy of a weak dictionary, or of a cache of functions, "
        "holds the student's.",
    )
