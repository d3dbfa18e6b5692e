"""A copy of a model that runs on its own weights: functions that hold the model are copied, too.

`copy.deepcopy` keeps functions as they are. A forward that was replaced by a closure (diffusers'
hooks for offloading and casting do that) would run the original's weights in the copy.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from selfalign.adapting import invalid

_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, weakref.ref)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def copied(model: nn.Module, kept: Mapping[int, Any]) -> nn.Module:
    """A deep copy, in evaluation mode and without gradient.

    Args:
        model: the original.
        kept: what stands in the copy for parts of the model, by their ids.

    Raises:
        ValueError: a model that cannot be copied.
    """
    memo = dict(kept)
    try:
        teacher = copy.deepcopy(model, memo)
    except Exception as error:
        raise invalid(
            "The model must be one that copy.deepcopy copies: its EMA is a copy",
            f"{type(error).__name__}: {error}",
            "Build SelfAlignment before what cannot be copied is added, or pass your own EMA as "
            "teacher=.",
        ) from error
    functions = _Functions(memo)
    for name, module in teacher.named_modules():
        if not hasattr(module, "_orig_mod"):  # torch.compile's module makes its own anew
            _check_compiled(name, vars(module).get("forward"))
            functions.renew_attributes(module)
        for hooks in (vars(module)[kind] for kind in _HOOKS):
            for key, hook in hooks.items():
                hooks[key] = functions.renewed(hook)
    teacher.requires_grad_(False)
    teacher.eval()  # its result is not used: a model's own train() may return nothing
    return teacher


class _Functions:
    """Makes functions anew that hold something of the model.

    Args:
        memo: the copy's memory: copies by the originals' ids.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.copies = {id(value) for value in memo.values()}
        self.done: dict[int, Any] = {}
        self.originals: list[Any] = []  # an id is no other object's as long as its own lives

    def renewed(self, value: Any) -> Any:
        """The same function with the copy in place of the original; other values as they are."""
        if id(value) in self.done:
            return self.done[id(value)]
        new = self._made_anew(value)
        self.done[id(new)] = new
        self.originals.append(value)
        return new

    def _made_anew(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            args = map(self._content, value.args)
            named = {name: self._content(held) for name, held in value.keywords.items()}
            return functools.partial(self.renewed(value.func), *args, **named)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._content(value.__self__))
        if isinstance(value, weakref.ref):
            new = self.memo.get(id(value()))
            return value if new is None else weakref.ref(new)
        return value

    def renew_attributes(self, owner: Any) -> None:
        """Make the functions anew that an object of the copy holds, in lists and dicts, too."""
        for name, held in list(vars(owner).items()):
            new = self._renewed_in(held)
            if new is not held:
                vars(owner)[name] = new

    def _renewed_in(self, held: Any) -> Any:
        """The same nest, or a new one where it holds functions of the model."""
        if type(held) in (list, tuple):
            parts = [self._renewed_in(part) for part in held]
            same = all(new is old for new, old in zip(parts, held, strict=True))
            return held if same else type(held)(parts)
        if type(held) is dict:
            named = {key: self._renewed_in(part) for key, part in held.items()}
            same = all(named[key] is part for key, part in held.items())
            return held if same else named
        return self.renewed(held) if isinstance(held, _FUNCTIONS) else held

    def _function(self, function: types.FunctionType) -> Any:
        """The function with copies in its closure and among its defaults."""
        closure = function.__closure__ or ()
        defaults = function.__defaults__ or ()
        named = function.__kwdefaults__ or {}
        if not (closure or defaults or named) or _is_compiled(function):
            return function
        cells = tuple(types.CellType() for _ in closure)
        parts = (function.__code__, function.__globals__, function.__name__)
        new = types.FunctionType(*parts, closure=cells)
        self.done[id(function)] = new  # it may hold itself
        for cell, old in zip(cells, closure, strict=True):
            cell.cell_contents = self._content(old.cell_contents)
        new.__defaults__ = tuple(map(self._content, defaults)) or None
        new.__kwdefaults__ = {name: self._content(value) for name, value in named.items()}
        new.__dict__.update(function.__dict__)
        return new

    def _content(self, value: Any) -> Any:
        """What a function holds, in the copy."""
        if isinstance(value, _FUNCTIONS):
            return self.renewed(value)
        if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            return value
        try:
            known = id(value) in self.copies
            new = value if known else copy.deepcopy(value, self.memo)
        except Exception:  # a stream, a lock: it cannot hold weights
            return value
        plain = hasattr(new, "__dict__") and not isinstance(new, (nn.Module, torch.Tensor))
        if plain and id(new) not in self.done:
            self.done[id(new)] = new
            self.renew_attributes(new)
        return new


def _check_compiled(name: str, forward: Any) -> None:
    """Refuse a function that torch.compile made: it cannot be made anew."""
    if _is_compiled(forward):
        raise invalid(
            "The model must not run functions that hold its weights: a copy would run them",
            f"{name or 'the model'}.forward, replaced by {forward.__qualname__}",
            "Replace forward after building SelfAlignment; compile a block by block.compile().",
        )


def _is_compiled(function: Any) -> bool:
    marks = ("_torchdynamo_inline", "_torchdynamo_orig_callable")
    return any(hasattr(function, mark) for mark in marks)
