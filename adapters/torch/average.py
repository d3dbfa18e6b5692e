"""The EMA of a PyTorch model that SelfAlignment keeps: a copy of what is trained, in float32."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from selfalign.adapting import check_number, invalid

from .arguments import tensors_in
from .buffers import put, saved_buffers
from .copying import copied
from .pairing import Pairing, buffer_owners, named_inside
from .sharding import check_whole, local, resharded
from .stopping import Cut

HALF = (torch.float16, torch.bfloat16)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module)\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMATeacher:
    """How SelfAlignment keeps its teacher: in which precision, where, and how much of it.

    Args:
        dtype: torch.bfloat16 or torch.float16: of the teacher's copy of a float32 model, beside
            float32 averages; the teacher runs under autocast in that dtype. None: the model's.
        offload: keep the float32 averages in CPU memory, and on the model's device only the
            teacher's copy in the model's dtype.
        truncate: do without the blocks after the teacher's last layer. Saves their memory; one
            cannot sample from `align.teacher` then.
        batch_fraction: align only the first samples of each batch, this fraction of it, in (0, 1].
            It needs samples that do not depend on each other.
        model: an EMA of yours, which you keep up to date: see `SelfAlignment`. Only
            `batch_fraction` goes with it.

    Raises:
        ValueError: another dtype, a fraction outside (0, 1], or options that an EMA of yours
            cannot have.
        TypeError: a setting of the wrong type.

    Example:
        >>> import torch
        >>> from selfalign.adapters.torch import EMATeacher
        >>> EMATeacher(dtype=torch.bfloat16, truncate=True).batch_fraction
        1.0
    """

    dtype: torch.dtype | None = None
    offload: bool = False
    truncate: bool = False
    batch_fraction: float = 1.0
    model: Any = None

    def __post_init__(self) -> None:
        for name in ("offload", "truncate"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(
                    f"{name} must be True or False. Received: {value!r}. Pass a boolean."
                )
        check_number("batch_fraction", self.batch_fraction, 1e-12, 1)
        if self.dtype is not None and self.dtype not in HALF:
            raise invalid(
                "The teacher's dtype must be torch.bfloat16 or torch.float16",
                self.dtype,
                "Leave it out: the teacher has the model's dtype then.",
            )
        if self.model is not None and (self.dtype is not None or self.offload or self.truncate):
            raise invalid(
                "dtype, offload and truncate are for a teacher that SelfAlignment keeps",
                f"{self!r:.200}",
                "Leave them out, or leave model= out.",
            )


class Average:
    """The teacher module and its averages.

    What is frozen in the model is the model's own in the teacher, not a copy: under LoRA the
    teacher is the model's base with the EMA of the adapter. A half-precision parameter has a
    float32 average beside it, since 1 - decay is lost in half precision. Any other parameter of the
    teacher is its own average.

    Args:
        student: the model.
        options: precision, place in memory and blocks.
        later: paths of blocks that a truncated teacher does without.
    """

    owned = True

    def __init__(self, student: nn.Module, options: EMATeacher, later: Iterable[str] = ()) -> None:
        self.student = student
        self.dtype = options.dtype
        self.started = False
        named = named_inside(student.named_parameters())
        self.frozen = {name for name, p in named.items() if not p.requires_grad}
        self.dtypes = {name: p.dtype for name, p in named.items()}
        self.module = _copied(student, later if options.truncate else ())
        self.beside: dict[str, torch.Tensor] = {}
        for name, p in self._own().items():
            if options.offload or p.dtype in HALF or options.dtype is not None:
                wide = torch.promote_types(p.dtype, torch.float32)
                device = "cpu" if options.offload else p.device
                self.beside[name] = p.detach().to(device, wide, copy=True)
            if options.dtype is not None and p.is_floating_point():
                p.data = p.to(options.dtype)
        self.pairing: Pairing | None = None
        self._note_versions()

    def _own(self) -> dict[str, torch.Tensor]:
        """The teacher's own parameters, by name."""
        named = named_inside(self.module.named_parameters())
        return {name: p for name, p in named.items() if name not in self.frozen}

    def _note_versions(self) -> None:
        self.versions = {id(p): p._version for p in self._own().values()}

    def start(self, trains: bool) -> None:
        """Before a forward of the teacher, up to the first that trains: it becomes the model.

        Wrappers such as DDP write to the model after the teacher was made. A teacher that the user
        has written to stays.
        """
        check_whole(self.student)
        device = next(self.student.parameters()).device
        if any(p.device != device for p in self._own().values()):
            self.module.to(device)  # the model was moved after the teacher was made
        if not self._adopt():
            with resharded(self.student):
                self._move(1.0)
                self._note_versions()
        self.started = trains

    @torch.no_grad()
    def _adopt(self) -> bool:
        """Whether the user has written to the teacher before it began; averages then follow."""
        own = self._own()
        written = any(self.versions.get(id(p), p._version) != p._version for p in own.values())
        if written and not self.started:
            for name, average in self.beside.items():
                average.copy_(own[name])
        return written and not self.started

    def update(self, decay: float) -> None:
        """One EMA step; buffers are copied."""
        if not self.started:
            self._adopt()
            self.started = True
        if decay < 1.0:
            self._move(1.0 - decay)

    @torch.no_grad()
    def _move(self, fraction: float) -> None:
        """Move the averages by a fraction of the way to the model, as far as they are here."""
        pairing = self._paired()
        sources = pairing.sources()
        alike = pairing.alike()
        # a few at a time where they are converted: no second copy of the model at once
        count = len(sources) if alike else 16
        for start in range(0, len(sources), count or 1):
            averages = pairing.averages[start : start + count]
            values = sources[start : start + count]
            if not alike:
                pairs = zip(averages, values, strict=True)
                values = [value.to(average.device, average.dtype) for average, value in pairs]
            if fraction == 1.0:  # the average may never have had a value
                torch._foreach_copy_(averages, values)
            else:  # the framework's own fused form of ema_update; a test holds the two equal
                torch._foreach_lerp_(averages, values, fraction)
        _write_back(pairing.copies)
        pairing.copy_buffers()

    def _paired(self) -> Pairing:
        """The averages and the model's parameters, looked up anew where some were replaced."""
        pairing = self.pairing
        if pairing is None or not pairing.is_fresh():
            parts = (self.student, self.module, self.frozen, self.beside, self.dtypes)
            pairing = self.pairing = Pairing(*parts)
        else:
            pairing.check()
        return pairing

    def state(self) -> dict[str, torch.Tensor]:
        """The teacher's own tensors themselves, averages in place of half-precision parameters."""
        if not self.started:
            self._adopt()
        tensors = named_inside(only_tensors(self.module.state_dict()).items())
        own = {name: tensor for name, tensor in tensors.items() if name not in self.frozen}
        return {name: self.beside.get(name, tensor) for name, tensor in own.items()}

    def buffers(self) -> dict[str, torch.Tensor | None]:
        """The buffers that a state may hold: of the teacher, and those that it will get."""
        owners = buffer_owners(self.student, self.module)
        return {path: mine.get(name) for path, mine, name in saved_buffers(owners)}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave, checked before. Buffers become what they were there."""
        own = self.state()
        device = next(self.module.parameters()).device
        places = list(saved_buffers(buffer_owners(self.student, self.module)))
        for path, kept, name in places:
            if path in state:
                old = kept.get(name)
                like = state[path].to(device) if old is None else state[path].to(old)
                put(kept, name, like)
        for name in own.keys() - {path for path, _, _ in places}:
            own[name].copy_(state[name])
        self.started = True
        own = self._own()
        _write_back([(own[name], average) for name, average in self.beside.items()])


def _write_back(copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Make parameters of the teacher those of the averages beside them."""
    for p, average in copies:
        local(p).copy_(local(average))


def _copied(student: nn.Module, cut: Iterable[str]) -> nn.Module:
    """A copy of the model, which holds what is frozen in common with it."""
    kept: dict[int, Any] = {id(student.get_submodule(path)): Cut() for path in cut}
    kept |= {id(p): p for p in student.parameters() if not p.requires_grad}
    for module in student.modules():
        # what a forward has left there cannot be copied with its graph
        for _, tensor in tensors_in(vars(module)):
            if not tensor.is_leaf:
                kept[id(tensor)] = tensor.detach().clone()
    return copied(student, kept)


def only_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A state dict without what is no tensor (extra state)."""
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def plain_names(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors, without what DDP, torch.compile and AveragedModel put in front of names."""
    return {_WRAPPERS.sub("", name): tensor for name, tensor in only_tensors(state).items()}


def check_same_tensors(
    what: str, given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Both hold tensors of the same names and shapes; the error names the first that differs."""
    for name in [*expected, *given]:
        theirs = tuple(given[name].shape) if name in given else "missing"
        mine = tuple(expected[name].shape) if name in expected else "missing"
        if theirs != mine:
            raise invalid(
                f"{what} must have the same tensors as this model",
                f"{name!r} {theirs} instead of {mine}",
                "Use the model, and the wrappers around it, that the tensors were saved from.",
            )
