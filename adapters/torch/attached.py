"""An object whose hooks are on a model: which forwards they see, and when they go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import nn

from selfalign.adapting import invalid, paths

from .first_steps import recording
from .student import Recorder
from .term import Term
from .watch import Watch


class Attached:
    """Base of `SelfAlignment`: it can be paused and detached, and not copied."""

    model: nn.Module
    _recorder: Recorder
    _term: Term
    _watch: Watch
    _average: Any
    _detached = False
    loss: Any

    def _check_attached(self) -> None:
        if self._detached:
            fix = "Build a new SelfAlignment."
            raise invalid("The object must be attached to its model", "a call after detach()", fix)

    @property
    def path(self) -> paths.Path:
        """The noise path of the objectives.

        Raises:
            ValueError: none of them has one.
        """
        found = [getattr(part.objective, "path", None) for part in self._term.parts]
        for path in found:
            if isinstance(path, paths.Path):
                return path
        raise invalid(
            "Only objectives that add noise have a path",
            f"the path of {self.loss!r:.80}",
            "Take the path that you train with, such as selfalign.paths.Linear().",
        )

    @property
    def teacher(self) -> nn.Module | None:
        """The EMA model, for sampling, in evaluation mode and without gradient.

        What is frozen in the model is the model's own. None where no objective has a teacher.
        """
        return None if self._average is None else self._average.module

    def forget(self) -> None:
        """Drop what was recorded of a forward whose batch is skipped.

        Example: `except torch.OutOfMemoryError: align.forget(); optimizer.zero_grad()`.
        """
        self._recorder.forget()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside are not the student's: nothing is recorded.

        Example: `with align.paused(): preview = sample(model, noise)`.
        """
        with self._recorder.silent():
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """One forward inside, on real or meta tensors, tells the width where the model does not.

        The heads have their parameters afterwards. The forward runs in evaluation mode, without
        gradient, and leaves the random streams as they were.

        Example: `with align.recording(): model(x, t, y)`, before the optimizer is made.
        """
        with recording(self._term, self.model):
            yield
        self._watch.start_anew()

    def __reduce__(self) -> Any:
        raise TypeError(
            "A SelfAlignment cannot be copied or pickled: its hooks are on one model. Received: "
            "copy, deepcopy or pickle. Build a new one on the copied model, and hand it "
            "state_dict()."
        )

    def detach(self) -> None:
        """Remove every hook: the model is as it was. The teacher stays, for sampling.

        A `with` block ends in it.
        """
        self._detached = True
        self._recorder.remove()
        self._term.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
