"""One model as its users have it: how it is built, called and read, told by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from noise import LINEAR, Noise
from torch import nn

Condition = dict[str, Any]


class Repository(NamedTuple):
    """A public repository.

    Attributes:
        name: owner/name on GitHub.
        commit: that is looked at.
        folders: those that its scripts have on their path.
    """

    name: str
    commit: str
    folders: tuple[str, ...] = (".",)


def first(output: Any, condition: Condition) -> Any:
    """The block's output is the sample's tokens."""
    return output


def call_by_name(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, t, **condition)


class Entry(NamedTuple):
    """One model.

    Attributes:
        name: of the class.
        build: makes a tiny one.
        batch: size -> clean samples, and the rest of the condition.
        tokens: how many tokens there are of a sample.
        taps: paths of the student's and of the teacher's block.
        layers: the same, counted from 1 through the trunk.
        pick: (a block's output, condition) -> the sample's tokens [B, N, D].
        run: (model, noised sample, the path's time, condition) -> anything: the model's own call.
        noise: the noise path that it is trained with.
        repository: where it is from; None: diffusers.
        dropped: paths of the embeddings that get labels after the model has dropped some.
        answers: what a user answers to an error that names an option.
        given: options that are passed from the start: another row tells how they are found.
        size: of the batch.
        refused: why it is refused; empty: it is not.
        note: what the tokens are, or what is special.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[torch.Tensor, Condition]]
    tokens: int
    taps: tuple[str, str]
    layers: tuple[int, int] = (1, 3)
    pick: Callable[[Any, Condition], torch.Tensor] = first
    run: Callable[[nn.Module, torch.Tensor, torch.Tensor, Condition], Any] = call_by_name
    noise: Noise = LINEAR
    repository: Repository | None = None
    dropped: tuple[str, ...] = ()
    answers: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    given: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    size: int = 3
    refused: str = ""
    note: str = ""
