"""Which Keras backend serves the caller, and on which device their tensors live.

Keras runs on one backend per process and decides at its first import. selfalign imports it as late
as it can, when the first tensor is in its hands, and then asks for the framework of that tensor.
Nothing here imports a framework.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

from .typing import Scalar, Tensor

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
_backend: str | None = None  # the backend Keras runs on, once Keras was seen imported


class _Ops:
    """`keras.ops`, imported when the first of its functions is wanted."""

    def __getattr__(self, name: str) -> Any:
        load_keras()  # makes the functions plain attributes
        return getattr(sys.modules["keras"].ops, name)


ops: Any = _Ops()


def load_keras(framework: str | None = None) -> None:
    """Import Keras for tensors of `framework`; None stands for NumPy, which every backend takes.

    Raises:
        TypeError: Keras runs, or is told by KERAS_BACKEND to run, on another backend.
    """
    if _backend is None:
        if compiling():
            raise TypeError(
                "Keras must be imported before torch.compile traces selfalign. Received: a first "
                "call under torch.compile. Build the SelfAlignment first, or run the first step "
                "eagerly."
            )
        _import_keras(framework)
    if framework is not None and framework != _backend:
        reason = "Keras already runs on it in this process, and it cannot change"
        raise _mismatch(framework, str(_backend), reason)


def _import_keras(framework: str | None) -> None:
    global _backend
    backend = _choose(framework)
    functions = vars(_keras_on(backend).ops)
    vars(ops).update({k: v for k, v in functions.items() if not k.startswith("_")})
    _backend = backend  # last: an import that fails must not count


def _choose(framework: str | None) -> str:
    if "keras" in sys.modules:
        return str(sys.modules["keras"].backend.backend())
    asked = os.environ.get("KERAS_BACKEND")
    if asked:
        if framework not in (None, asked):
            reason = "the environment variable KERAS_BACKEND asks for it"
            raise _mismatch(framework, asked, reason)
        return asked
    if framework is None:
        imported = [name for name in ("torch", "jax", "tensorflow") if name in sys.modules]
        return imported[0] if len(imported) == 1 else "numpy"
    if framework not in _KERAS_BACKENDS:
        raise _mismatch(framework, "/".join(_KERAS_BACKENDS), "these are the backends Keras has")
    return framework


@contextlib.contextmanager
def host_randomness_kept() -> Iterator[None]:
    """Leave the random streams of Python and NumPy as they were."""
    import random

    import numpy

    python = random.getstate()
    arrays = numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


def _keras_on(backend: str) -> Any:
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = backend  # the one switch Keras has; put back at once
    try:
        # Keras draws numbers at import: a run must not depend on when that happens
        with host_randomness_kept():
            return importlib.import_module("keras")
    finally:
        if before is None:
            del os.environ["KERAS_BACKEND"]
        else:
            os.environ["KERAS_BACKEND"] = before


def _mismatch(framework: str | None, backend: str, reason: str) -> TypeError:
    fix = "Convert it to a framework that Keras runs on."
    if framework in _KERAS_BACKENDS:
        fix = (
            f"Set KERAS_BACKEND={framework} before the first import of Keras, "
            f"or pass {backend} tensors."
        )
    return TypeError(
        "Tensors must belong to the framework of Keras's backend. Received: a "
        f"{framework} tensor, with the Keras backend {backend!r} ({reason}). {fix}"
    )


def tensors_in(value: object) -> list[tuple[str, Tensor]]:
    """(framework, tensor) for each framework tensor in a nest of dicts, lists and tuples."""
    kinds: list[tuple[str, Any]] = []
    for name, class_name in _TENSORS.items():
        if name in sys.modules:  # a tensor can only exist once its framework has been imported
            kinds.append((name, getattr(sys.modules[name], class_name, ())))
    found: list[tuple[str, Tensor]] = []
    waiting: list[Any] = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        else:
            for name, kind in kinds:
                if isinstance(item, kind):
                    found.append((name, item))
    return found


def framework_of(value: object) -> str | None:
    """The framework whose tensor `value` is; None for NumPy arrays, numbers and the rest."""
    found = tensors_in([value])
    return found[0][0] if found else None


def scope(*values: object) -> AbstractContextManager[Any]:
    """Check that all tensors are of one framework and device, and keep results there.

    On torch, Keras moves whatever it touches to its default device. The context that is returned
    makes that the tensors' own device.

    Raises:
        TypeError: tensors of two frameworks, or of another framework than Keras's backend.
        ValueError: torch tensors on two devices.
    """
    names: set[str] = set()
    devices: set[str] = set()
    scalar_devices: set[str] = set()
    for name, tensor in tensors_in(values):
        names.add(name)
        if name == "torch":
            # torch lets a scalar stay on the CPU (a step, a decay), and so do we
            (devices if tensor.ndim else scalar_devices).add(str(tensor.device))
    if len(names) > 1:
        raise TypeError(
            "All tensors of one call must belong to one framework. Received: tensors of "
            f"{' and '.join(sorted(names))}. Convert them to one framework yourself: selfalign "
            "never converts silently."
        )
    framework = names.pop() if names else None
    if _backend is None or framework not in (None, _backend):
        load_keras(framework)
    if framework != "torch":
        return contextlib.nullcontext()
    if len(devices) > 1:
        raise ValueError(
            "All tensors of one call must be on one device. Received: tensors on "
            f"{' and '.join(sorted(devices))}. Move them with .to(device) first."
        )
    device = next(iter(devices or scalar_devices))
    context: AbstractContextManager[Any] = sys.modules["keras"].device(device)
    return context


def on_backend(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` a public entrance.

    Here, once, Keras is set up, tensors are checked and NumPy arrays become tensors.
    """

    @functools.wraps(function)
    def entrance(*args: P.args, **kwargs: P.kwargs) -> R:
        with scope(args, kwargs):
            given: Any = list(args)
            named: Any = dict(kwargs)
            for place, value in [*enumerate(args), *kwargs.items()]:
                if type(value).__qualname__ == "ndarray":
                    (given if isinstance(place, int) else named)[place] = converted(value)
            return function(*given, **named)

    return entrance


def converted(value: Any) -> Any:
    """A NumPy array as the backend's own tensor; anything else as it is."""
    if type(value).__qualname__ == "ndarray" and _backend != "numpy":
        return ops.convert_to_tensor(value)
    return value


def compiling() -> bool:
    """Whether torch.compile is tracing this code."""
    return "torch" in sys.modules and bool(sys.modules["torch"].compiler.is_compiling())


def constant(values: tuple[float, ...]) -> Tensor:
    """A table of Python numbers as a float32 tensor."""
    # Keras's way with NumPy arrays does not trace; its way with tuples does, and is slow otherwise
    if compiling():
        return ops.convert_to_tensor(values, "float32")
    import numpy

    return ops.convert_to_tensor(numpy.asarray(values, "float32"))


def extremes(values: Tensor) -> tuple[float, float] | None:
    """The smallest and the largest of the values, NaN if there is one.

    None where looking is not free: while traced or compiled, and outside the host's memory.
    """
    import numpy

    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        if values.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(values):
            return None
        smallest, largest = values.detach().aminmax()
        return float(smallest), float(largest)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(values, jax.Array):
        if isinstance(values, jax.core.Tracer):
            return None
        if any(device.platform != "cpu" for device in values.devices()):
            return None
    elif framework_of(values) is not None:
        return None
    # not through keras.ops: inside jit that would trace a constant
    found = numpy.asarray(values)
    return float(found.min()), float(found.max())


_DTYPE_NAMES: dict[Any, str] = {}  # of the frameworks' dtype objects, once they were asked for


def dtype_of(value: Tensor) -> str:
    """The dtype's name, the same in every framework; a Python number has its kind's default."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return {bool: "bool", int: "int32", float: "float32"}[type(value)]
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        try:
            name = str(sys.modules["keras"].backend.standardize_dtype(dtype))
        except ValueError:  # text and objects, which no framework computes with
            name = str(dtype)
        _DTYPE_NAMES[dtype] = name
    return name


def is_floating(value: Tensor) -> bool:
    """Whether the values are floating-point numbers."""
    return "float" in dtype_of(value)


def widened(value: Tensor | Scalar) -> Tensor:
    """`value` in float32, or float64 where it came so: half precision is only for storage."""
    dtype = dtype_of(value)
    if dtype in ("float32", "float64") and hasattr(value, "dtype"):
        return value
    return ops.cast(value, "float32")
