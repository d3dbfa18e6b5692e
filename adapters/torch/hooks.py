"""What all hooks on a user's model have in common."""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle


class Hooks:
    """Owner of hooks on the user's model.

    A deep copy or a pickle of the model takes along only dead hooks, which do nothing.
    """

    alive = False

    def __init__(self) -> None:
        self.alive = True
        self.handles: list[RemovableHandle] = []

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: Any) -> Hooks:
        return object.__new__(type(self))

    def __reduce__(self) -> Any:
        return object.__new__, (type(self),)
