"""What can be seen of the user's loop without touching it: whether the optimizer has stepped."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from selfalign.adapting import invalid

from .sharding import is_sharded

VERSION = operator.attrgetter("_version")  # what torch counts of a tensor's writes


class Watch:
    """Compares what torch counts of every parameter's writes between align() and update().

    An optimizer may write past these counters (through `.data`). So a step that they do not show is
    looked for in the values of a few small parameters, before it counts as skipped.

    Args:
        model: the user's.
        heads: the modules beside it that are trained, too.

    Attributes:
        groups: the trained parameters of the model, and of the heads.
        counted: the writes to each group, at align() or after update().
        aligned: whether align() was called since the last update().
        collected: whether the parameters are known.
    """

    def __init__(self, model: nn.Module, heads: Iterable[nn.Module]) -> None:
        self.model = model
        self.heads = list(heads)
        self.warned = False
        self.start_anew()

    def start_anew(self) -> None:
        """Know nothing: parameters are collected at the next align().

        Before, a model may still be sharded, and its old parameters must go then.
        """
        self.aligned = False
        self.collected = False
        self.groups: list[list[torch.Tensor]] = [[], []]
        self.counted = [0, 0]
        self.few: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def begin(self) -> None:
        """At align(): collect the parameters. Those of a sharded model are gathered now: later."""
        if not is_sharded(self.model):
            self.collect()

    def collect(self) -> None:
        """Collect the trained parameters, and note their state."""
        self.collected = True
        model = _trained([self.model])
        if is_sharded(self.model):  # what is gathered now may be without memory later
            model = [p for p in model if hasattr(p, "to_local")]
        heads = _trained(self.heads)
        self.groups = [model, heads]
        smallest = sorted(heads, key=torch.Tensor.numel)[:2]
        moderate = [p for p in model if p.numel() <= 2**16][-4:]
        self.few = [*smallest, *moderate]  # themselves: p.data may become another tensor
        self.values = [p.detach().clone() for p in self.few]
        self.counted = self.count()

    @torch.no_grad()
    def stepped(self) -> None:
        """After update()."""
        self.aligned = False
        for value, now in zip(self.values, self.few, strict=True):
            value.copy_(now)

    def count(self) -> list[int]:
        """The writes to each group up to now."""
        return [sum(map(VERSION, group)) for group in self.groups]

    def check_followed(self) -> None:
        """At a second align(): warn, once, where an optimizer step went by without update()."""
        if self.warned or self.count()[0] == self.counted[0]:
            return
        self.warned = True
        warnings.warn(
            "update() must follow each optimizer step. Received: an optimizer step, but no "
            "update(), since align(). Call align.update() after optimizer.step(), or the teacher "
            "never learns."
        )

    def sees_step(self) -> bool:
        """At update(): whether an optimizer step came before.

        A GradScaler skips it where a gradient is infinite. Warns where nothing came before.

        Raises:
            ValueError: a step that left the heads as they were.
        """
        if not self.collected:
            self.collect()
            return True
        now = self.count()
        model = now[0] - self.counted[0]
        heads = now[1] - self.counted[1]
        self.counted = now
        if model and heads:
            return True
        if not self.aligned and not model:
            warnings.warn(
                "update() must be called once per optimizer step. Received: a call with neither "
                "align() nor an optimizer step since the last one. Call it once, after "
                "optimizer.step()."
            )
            return True
        if self.aligned and model and _trained(self.heads):
            raise invalid(
                "The projector must be trained with the model",
                "an optimizer step that moved the model and left the projector as it was",
                "Hand its parameters to the optimizer, [*model.parameters(), "
                "*align.projector.parameters()], and add the term to the loss before backward().",
            )
        return bool(model or heads) or self._moved_unseen()

    def _moved_unseen(self) -> bool:
        """Whether a few parameters have other values; True where that cannot be told."""
        known = {id(p) for group in self.groups for p in group}
        present = [*_trained([self.model]), *_trained(self.heads)]
        if not self.few or any(id(p) not in known for p in present):
            return True
        pairs = zip(self.values, self.few, strict=True)
        return any(not torch.equal(then.to(now.device), now) for then, now in pairs)


def _trained(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """The parameters that train and have values."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [p for p in parameters if not isinstance(p, nn.UninitializedParameter)]
