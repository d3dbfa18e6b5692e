"""Which Keras backend serves the caller, and on which device their tensors live.

Keras runs on one backend per process and decides at its first import. selfalign imports it as late as it can, when
the first tensor is in its hands, and then asks for the framework of that tensor. Nothing here imports a framework.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_TENSORS = {
    "torch": "Tensor",
    "jax": "Array",
    "tensorflow": "Tensor",
    "mlx.core": "array",
    "cupy": "ndarray",
    "paddle": "Tensor",
}
_KERAS_BACKENDS = ("torch", "jax", "tensorflow", "numpy", "openvino")
_backend: str | None = None  # the backend Keras runs on, once we have seen Keras imported


class _Ops:
    """`keras.ops`, imported when the first of its functions is wanted; from then on a plain attribute look-up."""

    def __getattr__(self, name: str) -> Any:
        load_keras()
        return getattr(sys.modules["keras"].ops, name)


ops: Any = _Ops()


def framework_of(value: object) -> str | None:
    """The framework whose tensor `value` is; None for NumPy arrays, numbers and everything else."""
    for name, kind in _TENSORS.items():  # a tensor can only exist once its framework has been imported
        if name in sys.modules and isinstance(value, getattr(sys.modules[name], kind, ())):
            return name
    return None


def load_keras(framework: str | None = None) -> None:
    """Import Keras for tensors of `framework` (None: NumPy arrays and numbers, which every backend takes).

    Raises:
        TypeError: Keras runs, or is told by KERAS_BACKEND to run, on another backend.
    """
    if _backend is None:
        if compiling():
            raise TypeError(
                "Keras must be imported before torch.compile traces selfalign. Received: a first call under torch.compile. "
                "Build the SelfAlignment first, or run the first step eagerly."
            )
        _import_keras(framework)
    if framework is not None and framework != _backend:
        raise _mismatch(framework, str(_backend), "Keras already runs on it in this process, and it cannot change")


def _import_keras(framework: str | None) -> None:
    global _backend
    backend = _choose(framework)
    vars(ops).update({k: v for k, v in vars(_keras_on(backend).ops).items() if not k.startswith("_")})
    _backend = backend  # last: an import that fails must not count


def _choose(framework: str | None) -> str:
    if "keras" in sys.modules:
        return sys.modules["keras"].backend.backend()
    asked = os.environ.get("KERAS_BACKEND")
    if asked:
        if framework not in (None, asked):
            raise _mismatch(framework, asked, "the environment variable KERAS_BACKEND asks for it")
        return asked
    if framework is None:
        imported = [name for name in ("torch", "jax", "tensorflow") if name in sys.modules]
        return imported[0] if len(imported) == 1 else "numpy"
    if framework not in _KERAS_BACKENDS:
        raise _mismatch(framework, "/".join(_KERAS_BACKENDS), "these are the backends Keras has")
    return framework


@contextlib.contextmanager
def host_randomness_kept() -> Iterator[None]:
    """Leaves the random streams of Python and NumPy as they were."""
    import random

    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


def _keras_on(backend: str) -> Any:
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = backend  # the one switch Keras has; put back at once
    try:
        with host_randomness_kept():  # Keras draws numbers at import: a run must not depend on when that happens
            return importlib.import_module("keras")
    finally:
        if before is None:
            del os.environ["KERAS_BACKEND"]
        else:
            os.environ["KERAS_BACKEND"] = before


def _mismatch(framework: str | None, backend: str, reason: str) -> TypeError:
    known = framework in _KERAS_BACKENDS
    fix = f"Set KERAS_BACKEND={framework} before the first import of Keras, or pass {backend} tensors." if known else \
        "Convert it to a framework that Keras runs on."  # fmt: skip
    return TypeError(
        f"Tensors must belong to the framework of Keras's backend. Received: a {framework} tensor, with the Keras backend "
        f"{backend!r} ({reason}). {fix}"
    )


def _tensors(value: object) -> Iterator[tuple[str, Any]]:
    """(framework, tensor) for each framework tensor in a nest of dicts, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    else:
        framework = framework_of(value)
        if framework:
            yield framework, value


def scope(*values: object) -> Any:
    """Check that all tensors in `values` are of one framework and device, and return the context that keeps them there.

    On torch, Keras moves whatever it touches to its default device; the context makes that the tensors' own device.

    Raises:
        TypeError: tensors of two frameworks, or of another framework than Keras's backend.
        ValueError: torch tensors on two devices.
    """
    found = list(_tensors(values))
    names = sorted({name for name, _ in found})
    if len(names) > 1:
        raise TypeError(
            f"All tensors of one call must belong to one framework. Received: tensors of {' and '.join(names)}. "
            "Convert them to one framework yourself: selfalign never converts silently."
        )
    load_keras(names[0] if names else None)
    if names != ["torch"]:
        return contextlib.nullcontext()
    # torch lets a scalar stay on the CPU (a step, a decay), and so do we
    devices = sorted({str(x.device) for _, x in found if x.ndim}) or [str(found[0][1].device)]
    if len(devices) > 1:
        raise ValueError(
            f"All tensors of one call must be on one device. Received: tensors on {' and '.join(devices)}. "
            "Move them with .to(device) first."
        )
    return sys.modules["keras"].device(devices[0])


def on_backend(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` a public entrance: Keras is set up, tensors are checked and NumPy arrays converted here, once."""

    @functools.wraps(function)
    def entrance(*args: P.args, **kwargs: P.kwargs) -> R:
        with scope(args, kwargs):
            return function(*map(converted, args), **{name: converted(value) for name, value in kwargs.items()})

    return entrance


def converted(value: Any) -> Any:
    """A NumPy array as the backend's own tensor; anything else as it is."""
    return ops.convert_to_tensor(value) if type(value).__qualname__ == "ndarray" and _backend != "numpy" else value


def compiling() -> bool:
    """Whether torch.compile is tracing us."""
    return "torch" in sys.modules and sys.modules["torch"].compiler.is_compiling()


def constant(values: tuple[float, ...]) -> Any:
    """A table of Python numbers as a float32 tensor."""
    if compiling():  # Keras's way with NumPy arrays does not trace; its way with tuples does, and is slow only now
        return ops.convert_to_tensor(values, "float32")
    import numpy

    return ops.convert_to_tensor(numpy.asarray(values, "float32"))


def readable(value: Any) -> bool:
    """Whether the numbers in `value` can be looked at for free: not traced or compiled, and in the host's memory."""
    framework = framework_of(value)
    if framework == "torch":
        return value.device.type == "cpu" and not compiling()
    if framework == "jax":
        traced = isinstance(value, sys.modules["jax"].core.Tracer)
        return not traced and all(device.platform == "cpu" for device in value.devices())
    return framework is None


def dtype_of(value: Any) -> str:
    """The dtype's name, the same in every framework; a Python number has the default of its kind."""
    if isinstance(value, (bool, int, float)) and not hasattr(value, "dtype"):
        return {bool: "bool", int: "int32", float: "float32"}[type(value)]
    return str(sys.modules["keras"].backend.standardize_dtype(value.dtype))


def is_floating(value: Any) -> bool:
    return "float" in dtype_of(value)


def widened(value: Any) -> Any:
    """`value` in float32, or in float64 where it came so: half precision is for storage, not for arithmetic."""
    return ops.cast(value, "float64" if dtype_of(value) == "float64" else "float32")
