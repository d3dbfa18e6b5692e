"""The term of one call of SelfAlignment: tokens of both sides, and what the objectives say."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from selfalign.adapting import EMATeacher, Metrics, check_mask, given_targets

from . import first_steps
from .arguments import Arguments, Batch
from .average import Average
from .following import Followed
from .last_forward import check_last
from .law import Law
from .parts import Part, Tensors, Tokens
from .repeating import autocast_as
from .replaying import Outputs, TeacherCall
from .sharding import world
from .student import Autocast, Recorder, StudentPass, no_gradient, wrong_pass
from .tokens import features_in


class Term:
    """Computes the term of each call.

    Args:
        parts: one for each objective.
        recorder: the hooks on the model.
        average: the teacher, or None.
        fraction: of each batch that the teacher sees.
        several: whether the user passed a list of objectives.
        seed: of the gaps.

    Attributes:
        step: optimizer steps done.
        terms: calls with gradient since the last optimizer step.
        starting: whether this process has not seen an optimizer step yet.
        metrics: of the last call.
        logged, finite: whether metrics are kept, and looked at.
        just_built: whether the last call gave heads their parameters.
    """

    def __init__(
        self,
        parts: list[Part],
        recorder: Recorder,
        average: Average | Followed | None,
        fraction: float,
        several: bool,
        seed: int,
    ) -> None:
        self.parts = parts
        self.recorder = recorder
        self.average = average
        self.fraction = fraction
        self.several = several
        self.seed = seed
        self.step = 0
        self.terms = 0
        self.starting = True
        self.validated = 0  # calls without gradient
        self.rank = 0
        self.metrics: Metrics = {}
        self.logged = self.finite = self.just_built = False
        self.fraction_checked = fraction == 1.0
        self.objectives = {part.name: part.objective for part in parts}
        self.asks_caller = any(part.from_caller for part in parts)
        self.call: TeacherCall | None = None
        self.law: Any = None
        self.finder: Any = None

    def call_teacher(
        self,
        model: nn.Module,
        source: EMATeacher,
        function: Callable[..., Any] | None,
        checks: str,
        compiled: Mapping[str, Any] | None,
    ) -> None:
        """From now on, run the teacher of `source` in each call; see `TeacherCall`."""
        wanted = [part.target.where for part in self.parts if part.from_teacher and part.target]
        trusted = checks == "off"
        teacher: Any = self.average
        self.source = source
        self.call = TeacherCall(
            model, teacher.module, source, wanted, function, not trusted, compiled
        )
        taught = [part for part in self.parts if part.from_teacher]
        self.law = Law(self.call, taught, needed=not trusted)
        self.fraction_checked = self.fraction_checked or trusted

    def decay(self) -> float:
        """The EMA's decay at this step."""
        return float(self.source.decay_at(self.step))

    def __call__(
        self,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        condition: Arguments,
        u: torch.Tensor | None,
        mask: torch.Tensor | None,
        target_tokens: Tensors | None,
        trains: bool,
    ) -> torch.Tensor:
        """The weighted term, see `SelfAlignment.__call__`."""
        if self.starting:
            first_steps.check_tensors(x0, noise, t)
        seen = self._take_pass(x0, noise, t, trains)
        targets: Tokens = {}
        if self.asks_caller or target_tokens is not None:
            targets = given_targets(self.objectives, target_tokens, self.several)
        if self.starting:
            first_steps.check_times(self, x0, t)
            self.rank = world()[0]
        if u is None and self.call is not None:
            u = self._draw_gaps(t, trains)
        batch = Batch(x0, noise, t, u, condition)
        average = self.average
        if average is not None and not average.started:
            average.start(trains)
        students = self._student_tokens(batch, seen, trains)
        if self.starting:
            first_steps.check_weights_elsewhere(mask)
            first_steps.begin(self, students, x0, trains)
        if self.call is not None:
            self._run_teacher(batch, seen, students, targets)
        with precision(x0.device, seen.autocast):
            term = self._total(batch, seen, students, targets, mask)
        if self.finite:
            first_steps.check_finite(self.metrics)
        self.terms += trains
        return term

    def _take_pass(
        self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, trains: bool
    ) -> StudentPass:
        """The record of the student's forward, once."""
        passes = self.recorder.passes
        seen = passes.pop(trains, None) or passes.pop(not trains, None)
        if trains:  # validation leaves the record of a training forward alone
            passes.clear()
        for part in self.parts:
            where = part.student.where
            if seen is None or seen.runs.get(where) != 1:
                raise wrong_pass(seen, where)
            if part.from_later_layer and part.target and seen.runs.get(part.target.where, 1) > 1:
                raise wrong_pass(seen, part.target.where)
        if seen is not None and seen.forwards > 1:
            objectives = list(self.objectives.values())
            check_last(seen.call, seen.forwards, objectives, x0, noise, t)
        return seen  # type: ignore[return-value]  # there is at least one part

    def _draw_gaps(self, t: torch.Tensor, trains: bool) -> torch.Tensor:
        """Draws [B] that differ between processes and do not depend on how many there are.

        Validation has its own.
        """
        where: tuple[Any, ...] = ("gap", self.step, self.terms)
        if not trains:
            self.validated += 1
            where = ("validation", self.validated)
        generator = torch.Generator(t.device)
        stream = random.Random(repr((self.seed, *where, self.rank)))
        generator.manual_seed(stream.getrandbits(32))
        return torch.rand(t.shape, generator=generator, device=t.device)

    def _teachers_precision(self, seen: StudentPass) -> Autocast:
        """The autocast of the student's forward, or that of the teacher's dtype."""
        average = self.average
        if average is None:
            return seen.autocast
        if average.dtype is not None:
            return True, average.dtype
        if average.owned:
            return seen.autocast
        output = seen.outputs[self.parts[0].student.where]
        return first_steps.precision_for(output, seen.autocast)

    def _student_tokens(self, batch: Batch, seen: StudentPass, trains: bool) -> Tokens:
        """The student's tokens of each objective."""
        students = {}
        for part in self.parts:
            tokens = self.read(part.student, seen.outputs, batch, seen)
            if trains and not tokens.requires_grad:
                raise no_gradient(part.student.where)
            students[part.name] = tokens
        return students

    def _run_teacher(
        self, batch: Batch, seen: StudentPass, students: Tokens, targets: Tokens
    ) -> None:
        """Add the teacher's tokens to `targets`, for as many samples as are aligned."""
        call: Any = self.call
        average: Any = self.average
        trains = torch.is_grad_enabled()
        alike = average.owned and average.dtype is None
        autocast = seen.autocast if alike else self._teachers_precision(seen)
        if not self.law.over:
            again = first_steps.running_again(first_steps.REPEATED, first_steps.AS_ARGUMENTS)
            with precision(batch.t.device, autocast), again:
                self.law(batch, seen, students)
            self.recorder.watches_draws = call.draws_alike or not self.law.over
            if self.law.over:
                self.recorder.look_no_longer()
        with precision(batch.t.device, autocast):
            if self.fraction < 1.0:
                batch, seen = first_steps.first_part(self, batch, seen)
            # without gradient it is not compiled: a CUDA graph would overwrite the student's
            outputs = call(batch, seen, self.law.over and trains)
        for part in self.parts:
            if part.from_teacher:
                targets[part.name] = self.read(part.target, outputs, batch, seen)

    def _total(
        self,
        batch: Batch,
        seen: StudentPass,
        students: Tokens,
        targets: Tokens,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The sum of the objectives' terms."""
        total: Any = None
        self.metrics = {}
        for part in self.parts:
            student = students[part.name]
            target = targets.get(part.name)
            if part.from_later_layer:
                target = self.read(part.target, seen.outputs, batch, seen).detach()
            part_mask = mask
            if part.from_teacher and self.fraction < 1.0 and target is not None:
                if mask is not None:
                    check_mask(mask, tuple(student.shape)[:2])
                    part_mask = mask[: len(target)]
                student = student[: len(target)]
            head: Any = part.head._parameters
            if part.head._forward_hooks or part.head._forward_pre_hooks:
                head = part.head  # a module's call costs more than what it does
            distance, metrics = part.evaluate(head, student, target, part_mask, self.logged)
            term = part.objective.weigh(distance, self.step)
            total = term if total is None else total + term
            if self.several:
                metrics = {f"{part.name}/{name}": value for name, value in metrics.items()}
            self.metrics |= metrics
        return total

    def read(self, reader: Any, outputs: Outputs, batch: Batch, seen: StudentPass) -> Any:
        """The tokens [B, N, D] that `reader` takes out of its block's output."""
        output = outputs.get(reader.where)
        if output is None:
            raise first_steps.never_reached(reader.where)
        shape = output.shape if isinstance(output, torch.Tensor) else ()
        if (*batch.x0.shape[1:], *shape[1:]) in reader.plain:
            return output
        if not reader.knows(output, batch.x0, seen.call):
            self._find_tokens(reader.where, outputs, batch, seen)
        return reader(output, batch.x0, seen.call)

    def _find_tokens(self, where: str, outputs: Outputs, batch: Batch, seen: StudentPass) -> None:
        """Find out where the sample's tokens are."""
        features = [tensor for _, tensor in features_in(outputs[where])]
        trains = torch.is_grad_enabled() and outputs is seen.outputs
        if trains and features and not any(tensor.requires_grad for tensor in features):
            raise no_gradient(where)
        again = first_steps.running_again(first_steps.REPEATED, first_steps.AS_ARGUMENTS)
        with precision(batch.t.device, self._teachers_precision(seen)), again:
            self.finder(batch, seen)

    def remove(self) -> None:
        """Take the hooks off the teacher."""
        if self.call is not None:
            self.call.remove()


def precision(device: torch.device, autocast: Autocast) -> AbstractContextManager[Any]:
    """A context in the precision that was recorded; the present one, where it is the same."""
    enabled, dtype = autocast
    now = torch.is_autocast_enabled(device.type)
    if enabled == now and (not enabled or dtype == torch.get_autocast_dtype(device.type)):
        return nullcontext()
    return autocast_as(device, autocast)
