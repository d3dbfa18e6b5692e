"""`selfalign info`: versions, devices, and which adapters work."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping

from selfalign.adapting import invalid, load_keras

from .output import Report, Row

TRAINS = ("torch", "jax")  # the frameworks that have an adapter, and that Keras trains on
OPTIONAL = ("numpy", "diffusers", "accelerate", "lightning", "flax", "equinox", "keras-hub")


def show_installed(settings: Namespace, report: Report) -> None:
    """Fill `report`. A broken package is described as such, and breaks nothing here.

    Raises:
        ValueError: at the end, where an installed package cannot be imported, or no adapter works.
    """
    # a look must not take the memory of a GPU in use
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    states = {name: _state(name) for name in (*TRAINS, "keras", *OPTIONAL)}
    working = [name for name in TRAINS if states[name] == "works"]
    asked = os.environ.get("KERAS_BACKEND")
    report["selfalign"] = _version("selfalign")
    report["python"] = platform.python_version()
    report["platform"] = platform.platform()
    report["keras_backend"] = _backend(asked, working)
    for name in working:
        report[f"{name}_devices"] = _devices(name)
    report["packages"] = [_package(name, state) for name, state in states.items()]
    report["adapters"] = [
        {"adapter": f"selfalign.adapters.{name}", "state": _adapter(name, states, working, asked)}
        for name in (*TRAINS, "keras")
    ]
    _check_states(states, report["adapters"])


def _check_states(states: Mapping[str, str], adapters: list[Row]) -> None:
    broken = [f"{name} {state}" for name, state in states.items() if state.startswith("broken")]
    if broken:
        fix = "Reinstall it, or what its error names."
        raise invalid("What is installed must import", "; ".join(broken), fix)
    if all(row["state"] != "works" for row in adapters):
        fix = "The table of adapters says what each of them needs."
        raise invalid("One adapter at least must work", "none that does", fix)


def _backend(asked: str | None, working: list[str]) -> str:
    if asked:
        return f"{asked}, by KERAS_BACKEND"
    return f"the first tensor's: {' or '.join(working) or 'none'}"


def _package(name: str, state: str) -> Row:
    """A row of the table of packages; where one is missing, how to install it."""
    if state == "missing":
        wanted = f'"selfalign[{name}]"' if name in (*TRAINS, "keras") else name
        state = f"missing: pip install {wanted}"
    return {"package": name, "version": _version(name), "state": state}


def _state(package: str) -> str:
    """Whether a package "works", is "missing", or how its import breaks."""
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


def _adapter(name: str, states: Mapping[str, str], working: list[str], asked: str | None) -> str:
    """Whether an adapter works, or what it needs."""
    frameworks = [name] if name in TRAINS else working
    lacking = [needed for needed in (*frameworks, "keras") if states[needed] != "works"]
    if lacking or not frameworks:
        return f"needs {' and '.join(lacking) or ' or '.join(TRAINS)}"
    if asked and asked not in frameworks:
        return f"needs KERAS_BACKEND={' or '.join(frameworks)}, or none; it is {asked}"
    return _state(f"selfalign.adapters.{name}")


def _devices(framework: str) -> list[str]:
    """The devices that a framework sees, or how its driver breaks."""
    module = sys.modules[framework]
    try:
        if framework == "jax":
            found = module.devices()
            return [f"{device.platform}:{device.id} ({device.device_kind})" for device in found]
        count = module.cuda.device_count()
        gpus = [f"cuda:{n} ({module.cuda.get_device_name(n)})" for n in range(count)]
        return ["cpu", *gpus, *["mps"] * module.backends.mps.is_available()]
    except RuntimeError as error:  # a driver that does not answer
        return [f"broken ({error})"]
