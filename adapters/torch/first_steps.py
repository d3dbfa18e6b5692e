"""What happens in the first steps only, and what only some runs need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from selfalign.adapting import Metrics, check_weights, invalid, paths

from .arguments import Batch
from .average import HALF
from .buffers import buffers_kept
from .comparing import close
from .parts import Tokens
from .sharding import broadcast
from .stopping import evaluating
from .student import Autocast, StudentPass, random_streams_kept, wrong_pass
from .tokens import Output, features_in

if TYPE_CHECKING:
    from .term import Term

_INDEPENDENT = "batch_fraction= needs samples that do not depend on each other"
_WHOLE_BATCH = (
    "A tensor of the model's call may have the batch's length by chance, or not be sample by "
    "sample: leave batch_fraction= out."
)
REPEATED = "The teacher must be able to repeat the student's forward"
AS_ARGUMENTS = (
    "Give the model what changes from call to call as arguments: attributes that are set after "
    "attaching are the student's alone, and hooks on the model see the teacher's call anew. Or "
    "pass call=."
)


def check_tensors(x0: Any, noise: Any, t: Any) -> None:
    """What align() is given first are tensors.

    Raises:
        TypeError: something else.
    """
    for name, value in (("x0", x0), ("noise", noise), ("t", t)):
        is_number = name == "t" and isinstance(value, (int, float))  # told of its shape
        if not isinstance(value, torch.Tensor) and not is_number:
            raise TypeError(
                f"{name} must be a tensor. Received: a {type(value).__name__}, {value!r:.40}. Pass "
                "the x0, noise and t with which the model was called."
            )


@contextmanager
def running_again(rule: str, fix: str) -> Iterator[None]:
    """The student's forward has just run: what breaks its repetition is told as that.

    Raises:
        ValueError: the model's own error is its cause.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError) as error:
        raise invalid(rule, f"{type(error).__name__}: {error!s:.200}", fix) from error


def check_times(term: Term, x0: torch.Tensor, t: torch.Tensor) -> None:
    """The times are the paths': on a GPU in the first step only, since it waits for the device."""
    for part in term.parts:
        path = getattr(part.objective, "path", None)
        if isinstance(path, paths.Path):
            path.check_times(t.cpu() if isinstance(t, torch.Tensor) else t, len(x0))


def begin(term: Term, students: Tokens, x0: torch.Tensor, trains: bool) -> None:
    """At each call before the first update(): heads, and what processes agree on."""
    term.just_built = False
    for part in term.parts:
        if not part.head.built:
            part.head.build(students[part.name].shape[-1])
            term.just_built = True
    if term.terms == 0 and trains:  # a validation may run on one process alone
        for part in term.parts:
            block = part.student.block
            part.head.to(next(block.parameters(), x0).device)  # the model may have been moved
            broadcast(part.head)


def check_weights_elsewhere(mask: torch.Tensor | None) -> None:
    """The weights of a mask that is not on the CPU: reading them waits for the device."""
    if mask is not None and getattr(mask, "is_cuda", False):
        check_weights((float(mask.min()), float(mask.max())))


@contextmanager
def recording(term: Term, model: nn.Module) -> Iterator[None]:
    """One forward inside gives the heads their parameters; see `SelfAlignment.recording`."""
    recorder = term.recorder
    kept = dict(recorder.passes)
    recorder.passes.clear()
    try:
        with torch.no_grad(), evaluating(model), random_streams_kept(), buffers_kept(model):
            yield
        seen = recorder.passes.get(False)
        for part in term.parts:
            where = part.student.where
            if seen is None or where not in seen.outputs:
                raise wrong_pass(None, where)
        if seen is not None:
            for part in term.parts:
                if not part.head.built:
                    part.head.build(part.student.width_of(seen.outputs[part.student.where]))
    finally:
        recorder.passes.clear()
        recorder.passes.update(kept)


def precision_for(output: Output, autocast: Autocast) -> Autocast:
    """The precision of an EMA of the user's: it is float32, the student's outputs may not be."""
    dtypes = {tensor.dtype for _, tensor in features_in(output)} & set(HALF)
    return (True, dtypes.pop()) if dtypes else autocast


def first_part(term: Term, batch: Batch, seen: StudentPass) -> tuple[Batch, StudentPass]:
    """The first samples of a batch, as many as are aligned; once compared with the whole."""
    size = len(batch.t)
    count = max(1, round(term.fraction * size))
    if count == size:
        return batch, seen
    part = batch.first(count)
    seen_part = seen.first(count, size)
    if not term.fraction_checked:
        whole = _teacher_tokens(term, batch, seen)
        with running_again(_INDEPENDENT, _WHOLE_BATCH):
            first = _teacher_tokens(term, part, seen_part)
        for tokens, expected in zip(first, whole, strict=True):
            _check_independent(tokens, expected[:count])
        term.fraction_checked = True
    return part, seen_part


def _teacher_tokens(term: Term, batch: Batch, seen: StudentPass) -> list[torch.Tensor]:
    call: Any = term.call
    outputs = call(batch, seen, term.law.over)
    taught = [part for part in term.parts if part.from_teacher]
    return [term.read(part.target, outputs, batch, seen) for part in taught]


def _check_independent(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a model whose first samples have other tokens amid the whole batch."""
    if tokens.shape != expected.shape or not close(tokens, expected):
        raise invalid(
            _INDEPENDENT,
            f"tokens {tuple(tokens.shape)} that differ from those of the whole batch, "
            f"{tuple(expected.shape)}",
            _WHOLE_BATCH,
        )


def check_finite(metrics: Metrics) -> None:
    """Raise where features are not finite: a host sync."""
    wrong = [name for name, value in metrics.items() if name.endswith("_finite") and not value]
    if wrong:
        sides = " and the ".join(name.removesuffix("_finite") for name in wrong)
        raise invalid(
            "Features must be finite",
            f"NaN or infinity in the tokens of the {sides}",
            "Lower the learning rate or clip gradients; in float16 look for overflow.",
        )


def never_reached(where: str) -> ValueError:
    """The error of a target's layer that did not run."""
    return invalid(
        "The teacher's layer must run in the student's forward",
        f"no output of {where}",
        "Choose a layer that runs for every input.",
    )
