"""What can be seen of the user's loop without touching it: whether the optimizer has stepped."""

from __future__ import annotations

import gc
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
    looked for in the values of a few small parameters, before it counts as skipped. And weights may
    be written and put back (for sampling from an EMA): that is no step.

    Args:
        model: the user's.
        heads: the modules beside it that are trained, too.

    Attributes:
        groups: the trained parameters of the model, and of the heads.
        counted: the writes to each group, at align() or after update().
        aligned: whether align() was called since the last update().
        collected: whether the parameters are known.
        first: the heads' first values, until they are seen to train.
        still: in how many steps the model moved and the heads did not, up to then.
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
        self.sharded = False
        self.values: list[torch.Tensor] = []
        self.first: list[torch.Tensor] = []
        self.still = 0

    def begin(self) -> None:
        """At align(): collect the parameters. Those of a sharded model are gathered now: later."""
        if not is_sharded(self.model):
            self.collect()

    def collect(self) -> None:
        """Collect the trained parameters, and note their state."""
        self.collected = True
        model = _trained([self.model])
        self.sharded = is_sharded(self.model)
        if self.sharded:  # what is gathered now may be without memory later
            model = [p for p in model if hasattr(p, "to_local")]
        heads = _trained(self.heads)
        self.groups = [model, heads]
        smallest = sorted(heads, key=torch.Tensor.numel)[:2]
        moderate = [p for p in model if p.numel() <= 2**16]
        spread = moderate[:: 1 + len(moderate) // 16]  # all over the model: parts of it may rest
        self.few = [*smallest, *spread, *moderate[-1:]]  # themselves: p.data may become another
        self.values = [p.detach().clone() for p in self.few]
        self.first = [p.detach().clone() for p in heads]
        self.counted = self.count()

    @torch.no_grad()
    def stepped(self) -> None:
        """After update()."""
        self.aligned = False
        if not self.sharded:
            torch._foreach_copy_(self.values, self.few)
            return
        for value, now in zip(self.values, self.few, strict=True):
            value.copy_(now)

    def count(self) -> list[int]:
        """The writes to each group up to now."""
        return [sum(map(VERSION, group)) for group in self.groups]

    def check_followed(self, terms: int) -> None:
        """At another align(): warn, once, where an optimizer step went by without update()."""
        written = self.count()[0] != self.counted[0] or terms % 100 == 0
        if self.warned or not written or not self._moved(rounding=8.0):
            return
        self.warned = True
        warnings.warn(
            "update() must follow each optimizer step. Received: an optimizer step, but no "
            "update(), since align(). Call align.update() after optimizer.step(), or the teacher "
            "never learns."
        )

    def sees_step(self, ran: bool) -> bool:
        """At update(): whether an optimizer step came before.

        A GradScaler skips it where a gradient is infinite. Warns where nothing came before.

        Args:
            ran: whether a forward without term came before.

        Raises:
            ValueError: heads that are not trained.
        """
        if not self.collected:
            self.collect()
            return True
        now = self.count()
        model = now[0] - self.counted[0]
        heads = now[1] - self.counted[1]
        self.counted = now
        if heads:
            self.first = []
        elif self.first and self.aligned and model:
            self._check_heads()
        if model or heads or self._moved() or self._is_unknown():
            return True
        if not self.aligned and not ran:
            warnings.warn(
                "update() must be called once per optimizer step. Received: a call with neither "
                "align() nor an optimizer step since the last one. Call it once, after "
                "optimizer.step()."
            )
            return True
        return False

    def _check_heads(self) -> None:
        """Look, until the heads are seen to train, why they did not while the model did.

        A learning rate of 0, or an optimizer that skips its step, is the user's choice. That no
        optimizer has them is a mistake, and that no gradient reaches them.
        """
        model, heads = self.groups
        if not _trained(self.heads):
            return
        pairs = zip(self.first, heads, strict=True)
        if any(not torch.equal(then.to(now.device), now) for then, now in pairs):
            self.first = []
            return
        self.still += 1
        unreached = _have_gradients(model) and not _have_gradients(heads)
        # a model that no optimizer has either is moved by hand, and its heads perhaps later
        looked = self.still in (1, 3)
        forgotten = looked and not _are_held(heads) and (self.still == 3 or _are_held(model))
        if unreached or forgotten:
            raise invalid(
                "The projector must be trained with the model",
                "an optimizer step that moved the model and left the projector as it was",
                "Hand its parameters to the optimizer, [*model.parameters(), "
                "*align.projector.parameters()], and add the term to the loss before backward().",
            )
        if self.still == 20:
            self.first = []
            warnings.warn(
                "The projector must be trained with the model. Received: 20 steps that moved the "
                "model and left the projector as it was. See that the term is added to the loss, "
                "and that the projector's optimizer steps. If that is meant, freeze it: "
                "align.projector.requires_grad_(False)."
            )

    def _is_unknown(self) -> bool:
        """Whether there is nothing to compare, or other parameters than at first."""
        known = {id(p) for group in self.groups for p in group}
        present = [*_trained([self.model]), *_trained(self.heads)]
        return not self.few or any(id(p) not in known for p in present)

    def _moved(self, rounding: float = 0.0) -> bool:
        """Whether a few parameters have other values, by more than some units of rounding."""
        pairs = zip(self.values, self.few, strict=True)
        return any(_differ(then.to(now.device), now.detach(), rounding) for then, now in pairs)


def _differ(then: torch.Tensor, now: torch.Tensor, rounding: float) -> bool:
    if torch.equal(then, now):
        return False
    tolerance = rounding * torch.finfo(now.dtype).eps * then.abs().max()
    return not bool(((then - now).abs() <= tolerance).all())


def _have_gradients(parameters: Iterable[torch.Tensor]) -> bool:
    return any(p.grad is not None for p in parameters)


def _are_held(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether an optimizer has one of these parameters."""
    wanted = set(map(id, parameters))
    for found in gc.get_objects():
        if issubclass(type(found), torch.optim.Optimizer):
            groups = getattr(found, "param_groups", [])
            if any(id(p) in wanted for group in groups for p in group["params"]):
                return True
    return False


def _trained(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """The parameters that train and have values."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [p for p in parameters if not isinstance(p, nn.UninitializedParameter)]
