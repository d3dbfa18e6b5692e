"""What the student draws in training mode: the teacher repeats it, or the model is refused."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .buffers import buffers_kept
from .comparing import distances
from .looking import ROUNDING, Look
from .parts import Tokens
from .repeating import as_in_training, idle_leaves, own_generators
from .sharding import any_process
from .student import Indices, random_state, same_state
from .tokens import features_in

_TRIALS = 64  # a condition dropped with probability 0.1 escapes them all in 1 of 850 runs
_ENOUGH = 3  # trials in which something was dropped

_OTHER_DRAWS = (
    "Drop labels, or draw tokens, before calling the model, pass what was drawn as an argument, "
    "and switch the model's own drawing off; where tokens are routed, tap a student's block before "
    'the route. If what is drawn is noise on features only, pass checks="off".'
)
_DROPPED_LATER = (
    "Drop a condition before calling the model, and pass what was kept as an argument. If tokens "
    "are masked, or whole blocks left out, at random after the student's block, the teacher sees "
    'all of them: pass checks="off".'
)


class Draws:
    """Tries out what training mode draws, on the teacher with the student's weights.

    Dropout of features is off on both sides. Up to the student's block nothing else may differ.
    Behind it tokens may be left out: then every sample changes, or the first thing that changes is
    some of the tokens that a block is given. Else, where some samples change and others do not, a
    condition was dropped.

    Attributes:
        noisy: whether dropout makes the student's own features noisy.
    """

    def __init__(self, look: Look) -> None:
        self.look = look
        self.noisy = False
        self.later = [path for path in look.readers if path not in look.students]
        self.changed = False
        self.unchanged = False
        self.idle: set[nn.Module] = set()
        self.state: list[Any] = []  # of the random streams before the first change behind

    def check(self) -> None:
        """Look at a number of forwards.

        Raises:
            ValueError: something is drawn that cannot be repeated.
        """
        look = self.look
        teacher = look.call.teacher
        undropped = look.tokens(look.at_t, {})
        runs = [functools.partial(look.tokens, run, {}) for run in (look.at_t, look.at_another)]
        self.idle = idle_leaves(teacher, *runs)
        dropped = 0
        for _ in range(_TRIALS):
            state = random_state()
            with buffers_kept(teacher):
                with as_in_training(teacher, self.idle) as dropout:
                    trained, indices = look.with_indices(look.at_t, trains=True, writes=True)
                # with what training mode has left in the buffers, or without
                repeated = look.tokens(look.at_t, indices)
            self.noisy |= dropout.found
            if look.differ(trained, repeated):
                repeated = look.tokens(look.at_t, indices)
            if same_state(state, random_state()) and not own_generators(teacher):
                break  # nothing is drawn, nothing is dropped
            if look.differ(trained, repeated):
                self._check_same(trained, indices, state)
            else:
                self._look_behind(trained, repeated, state)
            dropped += look.differ(trained, undropped)
            if dropped == _ENOUGH:
                break
        self._check_behind()

    def _check_same(self, trained: Tokens, indices: Indices, state: list[Any]) -> None:
        """What is drawn in evaluation mode as well can be drawn alike: from the student's state."""
        look = self.look
        recorded = len(look.seen.random_states) == 2
        same = functools.partial(look.tokens, look.at_t, indices, state)
        if self.noisy or not recorded or look.differ(trained, same()):
            raise look.broken("other tokens where the model draws random numbers", _OTHER_DRAWS)
        look.call.draws_alike = True

    def _look_behind(self, trained: Tokens, repeated: Tokens, state: list[Any]) -> None:
        """Which samples change behind the student's block."""
        for path in self.later:
            changed = distances(trained[path], repeated[path]) > ROUNDING
            self.changed |= bool(changed.any())
            self.unchanged |= bool((~changed).any())
        if self.changed and not self.state:
            self.state = state

    def _check_behind(self) -> None:
        changed, unchanged = self.changed, self.unchanged
        if self.look.sharded:
            changed = any_process(changed, self.look.device)
            unchanged = any_process(unchanged, self.look.device)
        if changed and unchanged and not self._masks_tokens():
            received = f"other tokens at {self.later[0]} for some of the samples only"
            raise self.look.broken(received, _DROPPED_LATER)

    def _masks_tokens(self) -> bool:
        """Whether the first that changes behind is some, and not all, of a block's tokens."""
        if self.look.sharded:
            return False
        with as_in_training(self.look.call.teacher, self.idle):
            trained, indices = self._given(None)
        repeated, _ = self._given(indices)
        for path, tokens in trained.items():
            there = repeated.get(path, tokens)
            if tokens.shape != there.shape:
                return True
            differ = (tokens - there).norm(dim=-1) > ROUNDING * there.norm(dim=-1).mean()
            if differ.any():
                return bool((differ.any(1) & ~differ.all(1)).any())
        return False

    def _given(self, indices: Indices | None) -> tuple[dict[str, torch.Tensor], Indices]:
        """The tokens that each block beside the target's is given, in the order in which they run.

        Args:
            indices: of embeddings, to be replayed; None: a forward in training mode.
        """
        look = self.look
        given: dict[str, torch.Tensor] = {}

        def keep(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [tensor for _, tensor in features_in([args, kwargs]) if tensor.ndim == 3]
            if tensors:
                given[path] = max(tensors, key=torch.numel).clone()

        blocks = beside(look.call.teacher, self.later[0])
        handles = [
            block.register_forward_pre_hook(functools.partial(keep, path), with_kwargs=True)
            for path, block in blocks.items()
        ]
        try:
            if indices is None:
                _, found = look.with_indices(look.at_t, trains=True, begin=self.state)
                return given, found
            look.tokens(look.at_t, indices)
            return given, indices
        finally:
            for handle in handles:
                handle.remove()


def beside(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The modules of the list in which this one is, by their paths."""
    parent, _, _ = path.rpartition(".")
    blocks = model.get_submodule(parent)._modules.items()
    return {f"{parent}.{name}".lstrip("."): block for name, block in blocks if block is not None}
