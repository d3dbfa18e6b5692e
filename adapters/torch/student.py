"""The student's pass: what hooks record of the model's own forward."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from selfalign.adapting import invalid

from .arguments import Arguments, anew, first_samples, parts_of, tensors_by_place, with_parts
from .hooks import Hooks
from .tokens import Output

Indices = dict[str, list[torch.Tensor]]  # what each nn.Embedding received, call by call
Autocast = tuple[bool, torch.dtype]


class StudentPass:
    """The record of one forward of the model.

    Attributes:
        call: what the model was called with.
        outputs: what each tapped module returned, by its path.
        runs: how often each tapped module ran.
        autocast: whether autocast was on, and its dtype.
        indices: what the model's embeddings received: labels, where the model dropped some.
        random_states: of the random streams before the forward and after it.
        predicted: shapes of the tensors that the model returned.
        buffers: the model's before the forward.
        later: what the targets' modules returned in it. All four in the first steps only.
        forwards: how many forwards with gradient ran since the last align(), this one included.
    """

    def __init__(self, call: Arguments, forwards: int) -> None:
        self.call = call
        self.forwards = forwards
        self.outputs: dict[str, Output] = {}
        self.runs: dict[str, int] = {}
        self.autocast: Autocast = (False, torch.float32)
        self.indices: Indices = {}
        self.random_states: list[Any] = []
        self.predicted: list[torch.Size] = []
        self.buffers: dict[str, torch.Tensor] = {}
        self.later: dict[str, Output] = {}

    def called_with(self, call: Arguments) -> StudentPass:
        """The same, as if the model had been called with something else."""
        other = copy.copy(self)
        other.call = call
        return other

    def first(self, count: int, batch: int) -> StudentPass:
        """The same for the first `count` samples of a batch: of the call and the indices."""
        part = StudentPass(self.call.first(count, batch), self.forwards)
        part.indices = first_samples(self.indices, count, batch)
        part.random_states = self.random_states
        part.autocast = self.autocast
        return part


class Recorder(Hooks):
    """Hooks that record the model's last forward. Recomputation in backward leaves no trace.

    A forward without gradient (sampling, validation) is recorded beside one with gradient, which it
    does not replace.

    Args:
        model: the user's.
        taps: paths of the tapped modules.
        later: paths of modules that a teacher is tapped at.
        replayed: whether a teacher will need what the model's embeddings receive.
        watches_draws: record the random streams' states.

    Attributes:
        passes: the record of the last forward with gradient (True), and of the last without.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Iterable[str],
        later: Iterable[str],
        replayed: bool,
        watches_draws: bool,
    ) -> None:
        owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
        if any(isinstance(owner, Recorder) and owner.alive for owner in owners):
            raise invalid(
                "A model can be attached once",
                f"a second SelfAlignment on {type(model).__name__}",
                "Call detach() on the first one.",
            )
        super().__init__()
        self.watches_draws = watches_draws
        self.passes: dict[bool, StudentPass] = {}
        self.running: StudentPass | None = None
        self.paused = False
        self.looking: list[RemovableHandle] = []
        self.last: list[tuple[nn.Module, RemovableHandle]] = []
        add = self.handles.append
        # first of all: hooks of the user's, which the teacher has as well, may change the call
        add(model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True))
        for path in taps:
            hook = functools.partial(self._record, path)
            add(self._hooked(model.get_submodule(path), hook))
        for path in later:
            hook = functools.partial(self._record_later, path)
            self.looking.append(self._hooked(model.get_submodule(path), hook))
        add(model.register_forward_hook(self._end))
        for name, module in model.named_modules():
            if replayed and isinstance(module, nn.Embedding):
                hook = functools.partial(self._record_indices, name)
                add(module.register_forward_pre_hook(hook))

    def _hooked(self, module: nn.Module, hook: Any) -> RemovableHandle:
        handle = module.register_forward_hook(hook)
        self.last.append((module, handle))
        return handle

    # The hooks

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.alive or self.paused:
            return
        call = Arguments(args, dict(kwargs))
        if any(isinstance(value, (list, dict)) for value in (*args, *kwargs.values())):
            call = anew(call)  # a model may fill or empty what it is given
        trains = torch.is_grad_enabled()
        before = self.passes.get(True) if trains else None
        self.running = StudentPass(call, 1 if before is None else before.forwards + 1)
        self.passes[trains] = self.running
        if self.watches_draws and not torch.compiler.is_compiling():
            named = module.named_buffers(remove_duplicate=False)
            self.running.buffers = {name: buffer.detach().clone() for name, buffer in named}
            for tapped, handle in self.last:  # the user may have added hooks since
                hooks = tapped._forward_hooks
                hooks[handle.id] = hooks.pop(handle.id)
        self._mark()

    def _record(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Output) -> None:
        seen = self.running if self.alive else None
        if seen is not None:
            seen.outputs[path] = _kept(output)
            seen.runs[path] = seen.runs.get(path, 0) + 1
            seen.autocast = _autocast_of(module)

    def _record_later(self, path: str, module: nn.Module, args: Any, output: Output) -> None:
        if self.alive and self.running is not None and not torch.compiler.is_compiling():
            self.running.later[path] = _kept(output)

    def _record_indices(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.alive and self.running is not None and args:
            self.running.indices.setdefault(name, []).append(args[0])

    def _mark(self, output: Output = None) -> None:
        if torch.compiler.is_compiling() or not self.alive:
            return
        if self.watches_draws and self.running is not None:
            self.running.random_states.append(random_state())
            self.running.predicted = [tensor.shape for _, tensor in tensors_by_place(output)]

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Output) -> None:
        self._mark(output)
        self.running = None

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Meanwhile, record nothing."""
        before = self.paused
        self.paused = True
        try:
            yield
        finally:
            self.paused = before

    def forget(self) -> None:
        """Drop what was recorded."""
        self.passes.clear()
        self.running = None

    def look_no_longer(self) -> None:
        """The first steps are over."""
        for handle in self.looking:
            handle.remove()
        self.last = [(m, handle) for m, handle in self.last if handle not in self.looking]
        self.looking = []

    def remove(self) -> None:
        """Take every hook off the model."""
        self.forget()
        self.look_no_longer()
        super().remove()


def wrong_pass(seen: StudentPass | None, where: str) -> ValueError:
    """The error where not exactly one forward ran the tapped module exactly once."""
    if seen is None or where not in seen.outputs:
        return invalid(
            "The model's forward must run before align()",
            f"no output of {where} since the last align()",
            "Call the model itself (not model.forward) on the student's input first. If it was "
            "compiled and ran before attaching, attach before the first compiled call.",
        )
    return invalid(
        "The tapped block must run once per align()",
        f"{where} ran {seen.runs[where]} times in the model's last forward",
        "For a block used twice in one forward choose another layer.",
    )


def no_gradient(where: str) -> ValueError:
    """The error where the student's tokens carry no gradient."""
    return invalid(
        "The student's features must carry a gradient",
        f"features of {where} without one",
        "Reentrant checkpointing (use_reentrant=True), torch.no_grad() or frozen layers cut it: "
        "use use_reentrant=False, or tap a layer that trains.",
    )


def _autocast_of(module: nn.Module) -> Autocast:
    """Whether autocast is on where the module's weights are, and its dtype."""
    device = next((p.device.type for p in module.parameters()), "cpu")
    if device == "meta":
        return False, torch.float32
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _kept(output: Output) -> Any:
    """The output, safe from what the model does to it in place later.

    Inside a reentrant checkpoint it has no gradient yet: only the tensor itself will get one.
    """
    if isinstance(output, torch.Tensor):
        return output.clone() if output.requires_grad else output
    if type(output) in (tuple, list):
        return type(output)(map(_kept, output))
    if torch.compiler.is_compiling():
        return output
    parts = {key: _kept(part) for key, part in parts_of(output).items()}
    return with_parts(output, parts) if parts else output


def random_state() -> list[Any]:
    """The states of all random streams that a forward may draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda, random.getstate(), numpy.random.get_state()]


def same_state(a: Any, b: Any) -> bool:
    """Equality of random states, and of indices: through nests, by value."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return numpy.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b)


def set_random_state(states: list[Any]) -> None:
    """Put all random streams where `random_state` found them."""
    cpu, *cuda, python, arrays = states
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    numpy.random.set_state(arrays)


@contextmanager
def random_streams_kept(begin: list[Any] | None = None) -> Iterator[None]:
    """Put all random streams back afterwards; meanwhile they go on from `begin`."""
    before = random_state()
    try:
        if begin is not None:
            set_random_state(begin)
        yield
    finally:
        set_random_state(before)
