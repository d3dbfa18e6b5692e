"""Trying out, once, whether replaying indices repeats what a model drops of its condition."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn

from selfalign.adapting import invalid

from .replaying import Batch, Outputs, TeacherCall
from .stopping import run_before
from .student import Indices, StudentPass, random_state, random_streams_kept

_TRIALS = 64  # a condition dropped with probability 0.1 escapes them all with probability 0.001
_MODE_IRRELEVANT = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class Trial:
    """Finds out, at the first steps, whether student and teacher see the same condition.

    Only a model that draws random numbers in its forward is tried out. Embeddings whose indices do
    not change with the time embed the condition. Where replaying does not cover what the model does
    before its first block, it is refused.

    Args:
        call: the teacher's calls.
        first: path of the first block.
        needed: False: the model is trusted.
    """

    def __init__(self, call: TeacherCall, first: str, needed: bool) -> None:
        self.call = call
        self.first = call.teacher.get_submodule(first)
        self.over = not needed

    @torch.no_grad()
    def __call__(self, batch: Batch, seen: StudentPass, outputs: Outputs) -> Outputs:
        """Look at the student's pass; the teacher's outputs, anew where more is known now.

        Raises:
            ValueError: a model that drops its condition in a way that replaying does not repeat.
        """
        if not self.call.student.training:
            return outputs
        before_blocks, anywhere = _where_drawn(seen.random_states)
        clean = torch.full_like(batch.t, self.call.path.clean_at)
        doubtful = anywhere and bool(self.call.unknown_embeddings)
        if doubtful:
            # dropped labels may be among indices that were not replayed: they might be times
            self._find_condition_embeddings(batch, seen, clean)
            outputs = self.call(batch, seen, explored=False)
        if before_blocks:
            self._check_replaying(self._run_at(batch, seen, batch.t))
        # where all times are the clean end, no embedding can be told to depend on time
        self.over = not (doubtful and torch.equal(batch.t, clean))
        return outputs

    def _run_at(self, batch: Batch, seen: StudentPass, t: torch.Tensor) -> Callable[[], Any]:
        x = self.call.path.noised(batch.x0, batch.noise, batch.t)
        return functools.partial(self.call.call, batch, seen, x, t)

    def _find_condition_embeddings(
        self, batch: Batch, seen: StudentPass, clean: torch.Tensor
    ) -> None:
        """Embeddings whose indices stay the same at other times embed a condition."""
        found = []
        for time in (batch.t, clean):
            run = self._run_at(batch, seen, time)
            _, indices = self._with_indices(functools.partial(self.call.reach, run, {}))
            found.append(indices)
        at_t, at_clean = found
        for name in self.call.unknown_embeddings:
            if same(at_t.get(name), at_clean.get(name)):
                self.call.condition_embeddings.add(name)

    def _check_replaying(self, run: Callable[[], Any]) -> None:
        """Drop conditions as the student does, and compare the first block's inputs."""
        embed = functools.partial(run_before, run, self.first, "the first block")
        with random_streams_kept():
            for _ in range(_TRIALS):
                before = random_state()
                try:
                    with _training_before(self.first, self.call.teacher):
                        inputs, indices = self._with_indices(embed)
                    if same(before, random_state()):
                        return  # nothing is drawn, nothing is dropped
                    self.call.replaying = indices
                    replayed = embed()
                finally:
                    self.call.replaying = None
                    self.call.release()
                if not same(inputs, replayed):
                    raise self._refusal()

    def _refusal(self) -> ValueError:
        return invalid(
            "Student and teacher must see the same condition",
            f"{type(self.call.teacher).__name__} draws random numbers before its first block in "
            "training mode, and replaying the student's label indices in the teacher does not "
            "repeat their effect",
            "Drop labels before calling the model and switch the model's own dropping off. If the "
            'draws are not the condition\'s, pass checks="off".',
        )

    def _with_indices(self, run: Callable[[], Any]) -> tuple[Any, Indices]:
        """What `run` returns, and the indices that the teacher's embeddings receive in it."""
        seen: Indices = {}

        def record(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, []).append(args[0])

        handles = []
        for name, module in self.call.teacher.named_modules():
            if isinstance(module, nn.Embedding):
                hook = functools.partial(record, name)
                handles.append(module.register_forward_pre_hook(hook))
        try:
            return run(), seen
        finally:
            for handle in handles:
                handle.remove()


def _where_drawn(states: list[Any]) -> tuple[bool, bool]:
    """Whether the student's forward drew random numbers: before its first block, and anywhere.

    Without records (a compiled model leaves none) both are possible.
    """
    if len(states) != 3:
        return True, True
    before, at_first_block, after = states
    return not same(before, at_first_block), not same(before, after)


@contextmanager
def _training_before(first_block: nn.Module, model: nn.Module) -> Iterator[None]:
    """Training mode for what embeds inputs and condition; the rest stays in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    parents = [m for m in modes if any(child is first_block for child in m.children())]
    siblings = [child for parent in parents for child in parent.children()]
    blocks = {inner for sibling in siblings for inner in sibling.modules()}
    try:
        for module in modes:
            module.training = module not in blocks and not isinstance(module, _MODE_IRRELEVANT)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def same(a: Any, b: Any) -> bool:
    """Equality through nests; tensors and arrays by value."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return numpy.array_equal(a, b)
    if isinstance(a, dict):
        matching = isinstance(b, dict) and a.keys() == b.keys()
        return matching and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
