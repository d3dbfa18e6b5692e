"""What can be seen of the user's loop without touching it: which parameters the optimizer has written to, and when."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from selfalign._checks import invalid


class Watch:
    """Compares what torch counts of every parameter's writes between align() and update().

    An optimizer may write past these counters (through `.data`); so a step that they do not show is looked for in the values
    of a few small parameters, before it counts as skipped.
    """

    def __init__(self, model: nn.Module, projector: nn.Module) -> None:
        self.modules = (model, projector)
        self.warned = False
        self.stepped()

    def _count(self) -> tuple[int, ...]:
        return tuple(sum(p._version for p in module.parameters() if p.requires_grad) for module in self.modules)

    def _some(self) -> list[torch.Tensor]:
        """The projector's smallest trained parameters, and the model's last ones of moderate size."""
        model, projector = ([p.detach() for p in m.parameters() if p.requires_grad] for m in self.modules)
        return sorted(projector, key=torch.Tensor.numel)[:2] + [p for p in model if p.numel() <= 2**16][-4:]

    def stepped(self) -> None:
        """After update()."""
        self.aligned, self.counted = False, self._count()
        self.values = [p.clone() for p in self._some()]

    def note_align(self) -> None:
        """At align(): warn, once, where an optimizer step went by without update()."""
        counted = self._count()
        if self.aligned and counted[0] != self.counted[0] and not self.warned:
            self.warned = True
            warnings.warn(
                "update() must follow each optimizer step. Received: an optimizer step, but no update(), since align(). "
                "Call align.update() after optimizer.step(), or the teacher never learns."
            )
        self.aligned, self.counted = True, counted

    def sees_step(self) -> bool:
        """At update(): whether an optimizer step came before. A GradScaler skips it where a gradient is infinite.

        Warns where nothing came before, refuses where a step left the projector as it was.
        """
        model, projector = (now - before for now, before in zip(self._count(), self.counted, strict=True))
        if not self.aligned and not model:
            warnings.warn(
                "update() must be called once per optimizer step. Received: a call with neither align() nor an optimizer step "
                "since the last one. Call it once, after optimizer.step()."
            )
            return True
        if self.aligned and model and not projector and any(p.requires_grad for p in self.modules[1].parameters()):
            raise invalid(
                "The projector must be trained with the model",
                "an optimizer step that moved the model and left the projector as it was",
                "Hand its parameters to the optimizer, [*model.parameters(), *align.projector.parameters()], and add the term "
                "to the loss before backward().",
            )
        if model or projector:
            return True
        pairs = list(zip(self.values, self._some(), strict=False))
        return not pairs or any(not torch.equal(before.to(now.device), now) for before, now in pairs)
