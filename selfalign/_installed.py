"""What is installed: versions, devices, and which adapters work. For `selfalign info`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import warnings
from typing import Any

from ._backend import load_keras
from ._checks import invalid

_TRAINS = ("torch", "jax")  # the frameworks that have an adapter, and that Keras trains on
_OPTIONAL = ("numpy", "diffusers", "accelerate", "lightning", "flax", "equinox", "keras-hub")


def describe(report: dict[str, Any]) -> None:
    """Fill `report`. A broken package is described as such, and breaks nothing here.

    Raises:
        ValueError: at the end, where an installed package cannot be imported, or no adapter works.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a look must not take the memory of a GPU in use
    states = {name: _state(name) for name in (*_TRAINS, "keras", *_OPTIONAL)}
    working = [name for name in _TRAINS if states[name] == "works"]
    asked = os.environ.get("KERAS_BACKEND")
    report |= {"selfalign": _version("selfalign"), "python": platform.python_version(), "platform": platform.platform()}
    report["keras_backend"] = f"{asked}, by KERAS_BACKEND" if asked else f"the first tensor's: {' or '.join(working) or 'none'}"
    for name in working:
        report[f"{name}_devices"] = _devices(name)
    report["packages"] = [{"package": name, "version": _version(name), "state": _with_fix(name, state)}
                          for name, state in states.items()]  # fmt: skip
    report["adapters"] = [{"adapter": f"selfalign.adapters.{name}", "state": _adapter(name, states, working, asked)}
                          for name in (*_TRAINS, "keras")]  # fmt: skip
    broken = [f"{name} {state}" for name, state in states.items() if state.startswith("broken")]
    if broken:
        raise invalid("What is installed must import", "; ".join(broken), "Reinstall it, or what its error names.")
    if all(row["state"] != "works" for row in report["adapters"]):
        raise invalid("One adapter at least must work", "none that does", "The table of adapters says what each of them needs.")


def _state(package: str) -> str:
    """ "works", "missing", or how its import breaks."""
    module = package.replace("-", "_")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other packages' imports
            load_keras() if package == "keras" else importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return "missing"
        return f"broken ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    return "works"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _with_fix(package: str, state: str) -> str:
    wanted = f'"selfalign[{package}]"' if package in (*_TRAINS, "keras") else package
    return f"missing: pip install {wanted}" if state == "missing" else state


def _adapter(name: str, states: dict[str, str], working: list[str], asked: str | None) -> str:
    """Whether an adapter works, or what it needs."""
    frameworks = [name] if name in _TRAINS else working
    lacking = [needed for needed in (*frameworks, "keras") if states[needed] != "works"]
    if lacking or not frameworks:
        return f"needs {' and '.join(lacking) or ' or '.join(_TRAINS)}"
    if asked and asked not in frameworks:
        return f"needs KERAS_BACKEND={' or '.join(frameworks)}, or none; it is {asked}"
    return _state(f"selfalign.adapters.{name}")


def _devices(framework: str) -> list[str]:
    module = sys.modules[framework]
    try:
        if framework == "jax":
            return [f"{device.platform}:{device.id} ({device.device_kind})" for device in module.devices()]
        gpus = [f"cuda:{n} ({module.cuda.get_device_name(n)})" for n in range(module.cuda.device_count())]
        return ["cpu", *gpus, *["mps"] * module.backends.mps.is_available()]
    except RuntimeError as error:  # a driver that does not answer
        return [f"broken ({error})"]
