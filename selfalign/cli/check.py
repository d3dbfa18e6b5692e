"""`selfalign check`: SRA attached to a model, and a few training steps."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from selfalign import SRALoss, paths
from selfalign.adapting import tensors_in

from .loading import built_model, named_function
from .output import Report
from .usage import WrongUsage, running, wrong_usage

_LAYERS = {"student_layer": 0.25, "teacher_layer": 0.7}


def check_model(settings: argparse.Namespace, report: Report) -> None:
    """Fill `report` with what is found in the model that the command line names."""
    _check_inputs(settings)
    loss = _loss(settings)
    model = built_model(settings)
    report["model"] = f"{type(model).__name__} of {settings.model}"
    if _is_a(model, "keras", "Model"):  # before PyTorch: on its torch backend it is both
        _check_keras(settings, model, loss, report)
    elif _is_a(model, "torch.nn", "Module"):
        _check_torch(settings, model, loss, report)
    elif _of_jax(model):
        raise wrong_usage(
            "This command is for PyTorch and Keras models",
            f"{type(model).__name__}, a model of JAX",
            "docs/jax.md tells how features come out of it, and how the term is taken.",
        )
    else:
        raise wrong_usage(
            "MODEL must give a torch.nn.Module or a keras.Model",
            f"{type(model).__name__} {model!r:.60}",
            "Name a function or class that returns the model.",
        )


def _check_inputs(settings: argparse.Namespace) -> None:
    both = settings.example and settings.input
    if both or (settings.classes and not settings.input):
        raise wrong_usage(
            "Inputs come from --input, with --classes where the model takes labels, or from "
            "--example",
            "--example beside --input" if settings.input else "--classes without --input",
            "Give one of the two, or neither.",
        )


def _loss(settings: argparse.Namespace) -> SRALoss:
    asked = {
        "student_layer": settings.student,
        "teacher_layer": settings.teacher,
        "path": settings.path,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        if settings.preset:
            return SRALoss.preset(settings.preset, **given)
        return SRALoss(**(_LAYERS | given))
    except ValueError as error:
        raise WrongUsage(str(error)) from error


def _check_torch(settings: argparse.Namespace, model: Any, loss: SRALoss, report: Report) -> None:
    from . import check_torch, torch_inputs

    if settings.device:
        with running("--device must be one that torch has", "`selfalign info` lists them."):
            model.to(settings.device)
    example = None
    if settings.input:
        shape = (settings.batch, *settings.input)
        path = paths.resolve(loss.path)
        example = torch_inputs.drawn(model, path, shape, settings.classes, settings.time_scale)
    elif settings.example:
        function = named_function(settings.example)
        rule = "--example must name a function without arguments"
        with running(rule, "Let it return (x, t, *condition), or a dict."):
            example = function()
    tried = check_torch.Tried(model, loss, settings.blocks, settings.width)
    check_torch.check(tried, example, settings.time_scale, settings.repeat, report)


def _check_keras(settings: argparse.Namespace, model: Any, loss: SRALoss, report: Report) -> None:
    from . import check_keras

    pattern = settings.blocks[0] if settings.blocks else None
    check_keras.check(model, loss, pattern, settings.width, report)


def _is_a(value: Any, module: str, kind: str) -> bool:
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], kind))


def _of_jax(model: Any) -> bool:
    """A module of a JAX library, or a nest with arrays of JAX."""
    origins = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    if origins & {"flax", "equinox", "haiku", "jax"}:
        return True
    return any(name == "jax" for name, _ in tensors_in(model))
