"""Running a model once more: in another mode, on other weights, and leaving it as it was."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .average import plain_names
from .buffers import buffers_kept, is_state
from .sharding import local
from .student import Autocast, random_state, random_streams_kept, set_random_state

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}
_ALPHA_DROPOUTS = {F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout}
# in training mode these are noisy features, and nothing else
_NOISY = (nn.modules.batchnorm._BatchNorm, nn.MultiheadAttention)
_DROPOUT = nn.modules.dropout._DropoutNd
_CONSTANT = 0.02  # weights so small keep a forward finite


class WithoutDropout(TorchFunctionMode):
    """Meanwhile, dropout of features does nothing.

    Where whole samples are dropped, and others are kept whole, it is none of features: it drops a
    condition.

    Attributes:
        found: whether there was any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ALPHA_DROPOUTS:
            self.found = True
            return args[0] if args else kwargs["input"]
        if func in _DROPOUTS:
            given = args[0] if args else kwargs.pop("input")
            return self._without(given, functools.partial(func, given.clone(), *args[1:], **kwargs))
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            self.found = True
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)

    def _without(self, given: torch.Tensor, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What was given, if features are dropped; what dropout makes of it, if samples are."""
        state = random_state()
        output = run()
        present = (given != 0).flatten(1)
        lost = present & (output == 0).flatten(1)
        in_part = lost.any(1) & (lost != present).any(1)
        if in_part.any() or torch.equal(output, given):
            self.found |= bool(in_part.any())
            set_random_state(state)  # as if nothing had been drawn
            return given
        return output if lost.any() else given


@contextmanager
def as_in_training(model: nn.Module, idle: set[nn.Module]) -> Iterator[WithoutDropout]:
    """Training mode, but without what makes features noisy: dropout, batch norm, `idle` leaves."""
    modes = {module: module.training for module in model.modules()}
    dropout = WithoutDropout()
    for module in modes:
        noisy = isinstance(module, _NOISY) or (module in idle and not isinstance(module, _DROPOUT))
        dropout.found |= noisy and _has_effect(module)
        module.training = not noisy
    try:
        with dropout:
            yield dropout
    finally:
        for module, mode in modes.items():
            module.training = mode


def _has_effect(module: nn.Module) -> bool:
    """Whether training mode changes anything in a noisy module."""
    chance = getattr(module, "p", getattr(module, "dropout", 1.0))
    return not isinstance(module, nn.Identity) and chance != 0.0


def idle_leaves(
    model: nn.Module, run: Callable[[], Any], run_another: Callable[[], Any]
) -> set[nn.Module]:
    """The leaves without weights that give back, in evaluation mode, what depends on the sample.

    Stochastic depth is such a module. What it does to a condition is no matter of features.

    Args:
        model: that runs.
        run: a forward.
        run_another: the same forward of another sample.
    """
    seen: dict[nn.Module, list[float]] = {}

    def compare(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and output is args[0] and isinstance(output, torch.Tensor):
            seen.setdefault(module, []).append(float(output.double().abs().sum()))

    handles = []
    for module in model.modules():
        if not module._modules and not module._parameters:
            handles.append(module.register_forward_hook(compare))
    try:
        run()
        first = {module: list(sums) for module, sums in seen.items()}
        seen.clear()
        run_another()
    finally:
        for handle in handles:
            handle.remove()
    return {module for module, sums in first.items() if seen.get(module) != sums}


# What a run changes


def autocast_as(device: torch.device, autocast: Autocast) -> AbstractContextManager[Any]:
    """Meanwhile, autocast is as it was recorded."""
    enabled, dtype = autocast
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def eagerly() -> AbstractContextManager[Any]:
    """Meanwhile, what is compiled runs as it was written, where torch can do so."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


@contextmanager
def kept_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put random streams, buffers and the model's own generators back afterwards."""
    generators = [(generator, _state_of(generator)) for generator in own_generators(model)]
    try:
        with random_streams_kept(), buffers_kept(model):
            yield
    finally:
        for generator, state in generators:
            _set_state(generator, state)


def own_generators(model: nn.Module) -> list[Any]:
    """The generators of random numbers that the model's modules hold."""
    kinds = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)
    held = (value for module in model.modules() for value in vars(module).values())
    return [value for value in held if isinstance(value, kinds)]


def _state_of(generator: Any) -> Any:
    if isinstance(generator, numpy.random.Generator):
        return generator.bit_generator.state
    get = getattr(generator, "getstate", None) or generator.get_state
    return get()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
        return
    put = getattr(generator, "setstate", None) or generator.set_state
    put(state)


# Other weights


def with_weights_of(student: nn.Module, teacher: nn.Module) -> AbstractContextManager[None]:
    """Meanwhile, the teacher has the student's weights and buffers."""
    theirs = plain_names(_tensors(student))
    mine = plain_names(_tensors(teacher))
    pairs: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for name, to in mine.items():
        of = theirs.get(name)
        if of is not None and to is not of and to.shape == of.shape:
            # a forward may write into the state of a model: into a copy of it
            pairs.append((to, of.detach().clone() if is_state(of) else of))
    return _replaced(pairs)


def with_buffers(model: nn.Module, values: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
    """Meanwhile, the model's buffers have these values, by name."""
    mine = plain_names(dict(model.named_buffers(remove_duplicate=False)))
    pairs: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for name, value in values.items():
        if name in mine and mine[name].shape == value.shape:
            pairs.append((mine[name], value.clone()))
    return _replaced(pairs)


def with_constants(weights: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
    """Meanwhile, all these weights are one constant."""
    return _replaced([(p, None) for p in weights if p.is_floating_point() and _is_plain(p)])


def with_open_gates(model: nn.Module) -> AbstractContextManager[None]:
    """Meanwhile, weights that are all zero are a constant: such gates hide the condition."""
    return with_constants(p for p in model.parameters() if _is_plain(p) and not local(p).any())


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


@contextmanager
def _replaced(pairs: list[tuple[torch.Tensor, torch.Tensor | None]]) -> Iterator[None]:
    """Meanwhile, tensors have other values, or a constant.

    A tensor is pointed at the other's memory: nothing is copied, and what torch counts of its
    writes stays. Shards are written to, and put back.
    """
    pointed: list[tuple[torch.Tensor, torch.Tensor]] = []
    written: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for tensor, other in pairs:
            part = local(tensor)
            value = _value(part, None if other is None else local(other))
            if part is tensor:
                pointed.append((tensor, tensor.data))
                tensor.data = value
            else:
                written.append((part.detach(), part.detach().clone()))
                part.detach().copy_(value)
        yield
    finally:
        # in reverse: a tensor that is tied stands there twice
        for tensor, data in reversed(pointed):
            tensor.data = data
        for part, before in reversed(written):
            part.copy_(before)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has plain numbers in memory; quantised ones have not."""
    plain = type(tensor.data) is torch.Tensor or hasattr(tensor, "to_local")
    return plain and not tensor.is_meta


def _value(tensor: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    if other is not None:
        return other.detach().to(tensor.device)
    constant = torch.tensor(_CONSTANT, device=tensor.device).to(tensor.dtype)
    return constant.expand(tensor.shape)
