"""The EMA teacher of a PyTorch model: a copy of what is trained, or an EMA that the user keeps; in float32 at least."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from selfalign._checks import invalid

from ._torch_distributed import check_whole, local, release

HALF = (torch.float16, torch.bfloat16)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module)\.")


class Cut(nn.Module):
    """Stands where a block was that the teacher does not need."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise invalid("This teacher serves alignment only: it was cut after its layer", "a forward past it",
                      "Build SelfAlignment without truncate=True to sample from the EMA.")  # fmt: skip


class Teacher:
    """The teacher module and its averages.

    What is frozen in the model is shared with it, not copied: under LoRA the teacher is the model's own base with the EMA of
    the adapter. A half-precision parameter has a float32 average beside it, since 1 - decay is lost in half precision; any
    other parameter of the teacher is its own average.

    Args:
        student: the model.
        given: an EMA of the user's, which is left alone, or None.
        cut: paths of blocks that the teacher does without.
        offload: keep all averages in CPU memory, beside the teacher.
        dtype: of the teacher's floating-point parameters, with float32 averages beside them; None: the model's.
    """

    def __init__(self, student: nn.Module, given: Any = None, cut: Iterable[str] = (), offload: bool = False,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        self.student, self.owned, self.started = student, given is None, False
        self.shadow: Any = None
        self.shared: set[str] = set()
        self.beside: dict[str, torch.Tensor] = {}
        self.dtype, self.dtypes = dtype, {name: p.dtype for name, p in student.named_parameters()}
        if dtype is not None and (given is not None or dtype not in HALF):
            raise invalid("teacher_dtype= must be torch.bfloat16 or torch.float16, for a teacher of ours",
                          f"{dtype}" if given is None else "teacher= of yours", "Leave it out.")  # fmt: skip
        if given is not None:
            self.module = self._follow(given)
            return
        frozen = {name: p for name, p in student.named_parameters() if not p.requires_grad}
        replaced: dict[int, Any] = {id(student.get_submodule(path)): Cut() for path in cut}
        replaced |= {id(p): p for p in frozen.values()}
        self.module = copy.deepcopy(student, replaced).requires_grad_(False).eval()
        _check_forwards(self.module)
        self.shared = set(frozen)
        for name, p in self._own():
            if offload or p.dtype in HALF or dtype is not None:
                wide = torch.promote_types(p.dtype, torch.float32)
                self.beside[name] = p.detach().to("cpu" if offload else p.device, wide, copy=True)
            if dtype is not None and p.is_floating_point():
                p.data = p.to(dtype)
        self.as_built = {id(p): p._version for _, p in self._own()}

    def _own(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, p) for name, p in self.module.named_parameters() if name not in self.shared]

    def _follow(self, given: Any) -> nn.Module:
        """The module inside an EMA of the user's: torch's AveragedModel, ema-pytorch, timm, diffusers, or a plain module."""
        if hasattr(given, "shadow_params"):  # diffusers keeps a list of tensors
            self.shadow, copied = given, copy.deepcopy(self.student).requires_grad_(False).eval()
            if [p.shape for p in given.shadow_params] != [p.shape for p in copied.parameters()]:
                raise invalid("teacher= must have the same tensors as this model", f"{len(given.shadow_params)} tensors",
                              "Build EMAModel from model.parameters().")  # fmt: skip
            return copied
        inner = [getattr(given, name, None) for name in ("ema_model", "module")]
        modules = [module for module in [*inner, given] if isinstance(module, nn.Module)]
        if not modules:
            raise invalid("teacher= must be a path, a module or an EMA around one", type(given).__name__,
                          "Pass a module, or an EMA of torch, ema-pytorch, timm or diffusers.")  # fmt: skip
        module = modules[0]
        if module is self.student:
            return module
        check_same_tensors("teacher=", plain_names(module.state_dict()), plain_names(self.student.state_dict()))
        half = next((name for name, p in module.named_parameters() if p.dtype in HALF), None)
        if half is not None:
            raise invalid("An EMA must be kept in float32 at least: in half precision it never moves",
                          f"{half!r} in half precision", "Keep it in float32, or let SelfAlignment keep the EMA.")  # fmt: skip
        return module

    def start(self, trains: bool) -> None:
        """Before a forward of the teacher. Up to the first that trains, the teacher becomes the model as it is then.

        Wrappers such as DDP write to the model after the teacher was made. A teacher that the user has written to stays.
        """
        if self.shadow is not None:
            for p, average in zip(self.module.parameters(), self.shadow.shadow_params, strict=True):
                p.data = average  # EMAModel replaces its tensors when it is loaded or moved
        if self.started or not self.owned:
            return
        check_whole(self.student)
        like = next(self.student.parameters())
        if any(p.device != like.device for _, p in self._own()):  # the model was moved after the teacher was made
            self.module.to(like.device)
        if not self._adopt():
            release(self.student)  # its forward has run: the root of a sharded model is gathered, and waits for its backward
            self._move(1.0)
            self.as_built = {id(p): p._version for _, p in self._own()}
            if callable(unshard := getattr(self.student, "unshard", None)):
                unshard()
        self.started = trains

    @torch.no_grad()
    def _adopt(self) -> bool:
        """Whether the user has written to the teacher before it began; averages beside it then follow."""
        written = not self.started and any(self.as_built.get(id(p), p._version) != p._version for _, p in self._own())
        for name, p in self._own() if written else ():
            if name in self.beside:
                self.beside[name].copy_(p)
        return written

    def update(self, decay: float) -> None:
        """One EMA step; buffers are copied. A teacher that the user keeps is left alone."""
        if self.owned:
            self._adopt()
            self.started = True
            if decay < 1.0:
                self._move(1.0 - decay)

    @torch.no_grad()
    def _move(self, share: float) -> None:
        """Move the averages by a share of the way to the model, whatever part of them this process holds."""
        students, own = dict(self.student.named_parameters()), self._own()
        missing = next((name for name in [*self.shared, *dict(own)] if name not in students), None)
        if missing is not None:
            raise invalid("The model must keep the parameters that SelfAlignment was built with", f"no {missing!r} any more",
                          "Build SelfAlignment after adding adapters or parametrizations.")  # fmt: skip
        thawed = next((name for name in self.shared if students[name].requires_grad), None)
        if thawed is not None:
            raise invalid("What was frozen when SelfAlignment was built must stay frozen: the teacher shares it",
                          f"{thawed!r}, which trains now", "Build SelfAlignment after unfreezing.")  # fmt: skip
        averages = [local(self.beside.get(name, p)) for name, p in own]
        sources = [local(students[name]) for name, _ in own]
        for (name, _), average, source in zip(own, averages, sources, strict=True):
            if average.shape != source.shape:
                raise invalid("The teacher must be sharded as the model is",
                              f"{name!r} {tuple(average.shape)} here, {tuple(source.shape)} in the model",
                              "Apply fully_shard to align.teacher in the same way.")  # fmt: skip
        other = next((name for name, _ in own if self.dtypes[name] != students[name].dtype), None)
        if other is not None:
            raise invalid("The model must keep the dtype that SelfAlignment was built with",
                          f"{other!r}, {self.dtypes[other]} then and {students[other].dtype} now",
                          "Convert the model first, or train under autocast.")  # fmt: skip
        alike = all(a.dtype == s.dtype and a.device == s.device for a, s in zip(averages, sources, strict=True))
        some = len(own) if alike else 16  # a few at a time where they must be converted: no second copy of the model at once
        for start in range(0, len(own), some or 1):
            part = averages[start : start + some]
            values = [s.to(a.device, a.dtype) for a, s in zip(part, sources[start : start + some], strict=True)]
            if share == 1.0:  # the average may never have had a value
                torch._foreach_copy_(part, values)
            else:  # the framework's own fused form of selfalign.ema_update; a test holds the two equal
                torch._foreach_lerp_(part, values, share)
        self._write_back(own)
        buffers = dict(self.student.named_buffers())
        for name, mine in self.module.named_buffers():
            mine.copy_(buffers[name])

    def _write_back(self, own: list[tuple[str, torch.Tensor]]) -> None:
        for name, p in own:
            if name in self.beside:
                local(p).copy_(local(self.beside[name]))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The teacher's own tensors, averages in place of half-precision parameters; empty where the user keeps the EMA."""
        if not self.owned:
            return {}
        self._adopt()
        tensors = _only_tensors(self.module.state_dict())
        return {name: self.beside.get(name, tensor) for name, tensor in tensors.items() if name not in self.shared}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self.started = True
        if self.owned:
            self._write_back(self._own())


def _only_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}  # no extra state


def plain_names(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors, without what DDP, torch.compile and AveragedModel put in front of names."""
    return {_WRAPPERS.sub("", name): tensor for name, tensor in _only_tensors(state).items()}


def _check_forwards(module: nn.Module) -> None:
    """Refuse a copy that runs functions of the original: they hold its weights."""
    for name, part in module.named_modules():
        forward = part.__dict__.get("forward")
        holds = isinstance(forward, types.FunctionType) and (forward.__closure__ or hasattr(forward, "_torchdynamo_inline"))
        if holds and not hasattr(part, "_orig_mod"):  # torch.compile's module makes its function anew
            raise invalid("The model must not run functions that hold its weights: a copy would run them, too",
                          f"{name or 'the model'}.forward, replaced by {forward.__qualname__}",
                          "Replace forward after building SelfAlignment; compile a block by block.compile().")  # fmt: skip


def check_same_tensors(what: str, given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Both hold tensors of the same names and shapes; the error names the first that differs."""
    for name in [*expected, *given]:
        shapes = [tuple(side[name].shape) if name in side else "missing" for side in (given, expected)]
        if shapes[0] != shapes[1]:
            raise invalid(f"{what} must have the same tensors as this model", f"{name!r} {shapes[0]} instead of {shapes[1]}",
                          "Use the model, and the wrappers around it, that the tensors were saved from.")  # fmt: skip
