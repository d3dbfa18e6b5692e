"""Where the sample's tokens are in what the tapped blocks of this model return."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import nn

from selfalign.adapting import invalid

from .arguments import Batch, tensors_by_place, with_tensor
from .flow import Flow, check_order, readers_at, same_order
from .parts import Part
from .probing import Probe, Unlike, find_streams, not_found, passed_over
from .ragged import Following, arrangement, lengths_like, starts_of
from .reading import Runs
from .repeating import kept_as_it_was, with_open_gates
from .replaying import Outputs, TeacherCall, run_until
from .sharding import is_sharded
from .stopping import evaluating
from .student import Recorder, StudentPass, same_state
from .tokens import Stream, TokenReader

Run = Callable[[list[str], torch.Tensor], Outputs]  # paths of blocks, a sample -> their outputs


class Finder:
    """Runs the probe at the first step, and again where a block returns other shapes.

    The teacher runs, or, where no objective has one, the model itself in evaluation mode. A sharded
    model cannot run once more between its forward and its backward: shapes decide there.

    Args:
        model: the student.
        blocks: paths of the modules in which tokens may mix.
        parts: whose readers learn.
        recorder: of the student's forwards.
        call: the teacher's calls, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[str],
        parts: list[Part],
        recorder: Recorder,
        call: TeacherCall | None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.parts = parts
        self.readers = [reader for part in parts for reader in part.readers()]
        self.recorder = recorder
        self.call = call
        self.ran = False

    @torch.no_grad()
    def __call__(self, batch: Batch, seen: StudentPass) -> None:
        """Tell all readers where the sample's tokens are.

        Raises:
            ValueError: that cannot be told, or student and target have them in different orders.
        """
        if self.ran and is_sharded(self.model):
            raise self._other_shapes(batch)
        first, self.ran = not self.ran, True
        found = self._runner(batch, seen)
        if found is None:
            self._learn_by_shape(batch, seen)
            return
        x, run = found
        probe = self._probe(x, run, self.readers)
        flow = Flow(self._module(), self.blocks, functools.partial(self._probe, x, run), run, x)
        try:
            streams = find_streams(probe, batch.x0, flow.reads)
        except Unlike as error:
            raise Unlike(
                error.where, flow.instead(error.where), flow.reads_at(error.where)
            ) from None
        for reader, stream in zip(probe.readers, streams, strict=True):
            reader.learn(self._followed(batch, seen, probe, reader, stream))
            reader.any_size = is_sharded(self.model)
        for part in self.parts:
            if first and part.target is not None and part.target in probe.readers:
                flow.check_in_a_row(part.student.where, part.target.where)
            if part.target in probe.readers:
                others = functools.partial(self._alike, x, run, part.student, part.target)
                check_order(probe, part.student, part.target, others)

    def _learn_by_shape(self, batch: Batch, seen: StudentPass) -> None:
        """Shapes alone tell where the tokens are in the student's own outputs."""
        for reader in self.readers:
            if reader.where in seen.outputs:
                reader.learn(reader.by_shape(seen.outputs[reader.where], batch.x0))
                reader.any_size = is_sharded(self.model)

    def _other_shapes(self, batch: Batch) -> ValueError:
        """A sharded model runs on all processes at once, and only one of them may need it."""
        return invalid(
            "A sharded model must keep the shapes of its first step where other tokens stand "
            "beside the sample's",
            f"samples {tuple(batch.x0.shape[1:])}, or text of another length",
            "Pad text to one length, or pass select=, a function from the block's output to the "
            "sample's tokens [B, N, D].",
        )

    def _followed(
        self, batch: Batch, seen: StudentPass, probe: Probe, reader: TokenReader, stream: Stream
    ) -> Stream:
        """The stream, and which text it follows: a mask or lengths in the call say so.

        What may say so is tried out: with a shorter text, the tokens are where it says. Not so for
        a sharded model, whose processes have texts of their own.

        Raises:
            ValueError: something moves the tokens, and how cannot be told.
        """
        starts = starts_of(stream.reading, len(batch.x0))
        if starts is None:
            return stream
        stream = stream._replace(arrangement=arrangement(seen.call, len(batch.x0)))
        uneven = isinstance(stream.reading.places, Runs)
        moved = False
        for lengths in lengths_like(seen.call, starts):
            if is_sharded(self.model):
                follows = uneven and lengths.offset == 0
            else:
                shorter = seen.called_with(lengths.shortened(seen.call))
                found = self._starts(batch, shorter, reader)
                moved = moved or (found is not None and not same_state(found, starts.cpu()))
                follows = moved and same_state(found, lengths.starts(shorter.call).cpu())
            if follows:
                tensor = reader.features(probe.outputs[reader.where])[stream.place]
                size = stream.reading(tensor).shape[1]
                return stream._replace(following=Following(stream.reading, lengths, size))
        if uneven or moved:
            reason = "the sample's tokens are at other places from sample to sample"
            raise not_found(probe, reader, reason)
        return stream

    def _starts(self, batch: Batch, seen: StudentPass, reader: TokenReader) -> torch.Tensor | None:
        """Where the sample's tokens begin in such a call, [B]; None where that cannot be told."""
        try:
            x, run = self._runner(batch, seen)  # type: ignore[misc]
            reading = self._probe(x, run, [reader]).stream(reader).reading
        except Exception:  # such a call may be refused: then nothing there is a length
            return None
        starts = starts_of(reading, len(batch.x0))
        return None if starts is None else starts.cpu()

    def _runner(self, batch: Batch, seen: StudentPass) -> tuple[torch.Tensor, Run] | None:
        """The sample as the model sees it, and a forward; None where it cannot run once more."""
        if self.call is not None:
            return self.call.on_samples(batch, seen)
        given = [(p, v) for p, v in tensors_by_place(seen.call) if len(p) == 2]
        alike = [(place, value) for place, value in given if value.shape == batch.x0.shape]
        if len(alike) != 1 or is_sharded(self.model):
            return None
        ((place, x),) = alike

        def run(paths: list[str], sample: torch.Tensor) -> Outputs:
            taps = {path: self.model.get_submodule(path) for path in paths}
            args, kwargs = with_tensor(seen.call, place, sample)
            with evaluating(self.model), self.recorder.silent():
                return run_until(taps, functools.partial(self.model, *args, **kwargs))

        return x, run

    def _probe(self, x: torch.Tensor, run: Run, readers: Iterable[TokenReader]) -> Probe:
        readers = list(readers)
        module = self._module()
        paths = list(dict.fromkeys(reader.where for reader in readers))
        blocks = [module.get_submodule(path) for path in self.blocks]

        def passing(sample: torch.Tensor) -> Outputs:
            with passed_over(blocks), kept_as_it_was(module):
                return run(paths, sample)

        probe = Probe(passing, x, readers)
        if all(map(probe.changes, probe.readers)):
            return probe
        with with_open_gates(module):  # embedders may begin at zero
            return Probe(passing, x, readers)

    def _module(self) -> nn.Module:
        return self.model if self.call is None else self.call.teacher

    def _alike(
        self, x: torch.Tensor, run: Run, student: TokenReader, target: TokenReader
    ) -> list[str]:
        """Paths of blocks whose tokens lie as the student's do, the nearest to the target first."""
        others = [path for path in self.blocks if path != student.where]
        probe = self._probe(x, run, [student, *readers_at(self._module(), others)])
        found = same_order(probe, student)
        at = self.blocks.index(target.where)
        return sorted(found, key=lambda path: abs(self.blocks.index(path) - at))
