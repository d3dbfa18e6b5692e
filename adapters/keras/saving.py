"""Settings of a SelfAligned model in files: written, compared, and made into objects again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import keras
import numpy

from selfalign.adapting import Objective, Settings, from_settings, invalid, paths

from .options import Options

FUNCTIONS = ("select", "arrange", "draw_time")
PLAIN = ("blocks", "taps", "width", "prediction", "label_dropout", "null_label", "seed", "checks")
_FUNCTION = "function"
_NOT_COMPARED = ("seed", "checks")  # another seed goes on with the saved draws


def settings_of(objectives: Mapping[str, Objective], options: Options) -> Settings:
    """All plain settings by one name each, such as "sra.weight": what two models must agree on."""
    found = {
        f"{name}.{key}": value
        for name, each in objectives.items()
        for key, value in each.settings().items()
    }
    found |= {name: getattr(options, name) for name in PLAIN if name not in _NOT_COMPARED}
    found["path"] = _path_settings(options.path)
    return _plain(found)


def check_settings(saved: Settings, mine: Settings) -> None:
    """Settings that agree: raises ValueError otherwise."""
    names = [*mine, *(name for name in saved if name not in mine)]
    changed = [
        f"{name} {saved.get(name)!r} instead of {mine.get(name)!r}"
        for name in names
        if saved.get(name) != mine.get(name)
    ]
    if changed:
        raise invalid(
            "Weights must come from a model of the same settings",
            ", ".join(changed),
            "Build it with those settings, or load the whole .keras file.",
        )


def as_array(settings: Settings) -> numpy.ndarray:
    """Settings as the array that Keras's files can hold."""
    return numpy.frombuffer(json.dumps(settings).encode(), "uint8")


def from_array(array: Any) -> Settings:
    """The settings that `as_array` wrote."""
    settings: Settings = json.loads(numpy.asarray(array).tobytes())
    return settings


def config_of(objectives: Mapping[str, Objective], listed: bool, options: Options) -> Settings:
    """The arguments of a model but for its backbone, in Keras's form."""
    settings = [_objective_config(each) for each in objectives.values()]
    config: Settings = {"loss": settings if listed else settings[0]}
    for name in FUNCTIONS:
        config[name] = _function_config(name, getattr(options, name))
    config |= _plain({name: getattr(options, name) for name in PLAIN})
    config["path"] = _path_settings(options.path)
    return config


def _function_config(name: str, function: Any) -> Any:
    """A function of the user's in Keras's form: raises ValueError where it has none."""
    try:
        return keras.saving.serialize_keras_object(function)
    except TypeError as error:
        raise invalid(
            f"{name} must be a function that Keras can save",
            f"{function!r:.60}, which has no name and no get_config()",
            "Write it as a function with def, and register it with "
            "keras.saving.register_keras_serializable().",
        ) from error


def _objective_config(objective: Objective) -> Settings:
    """The settings of an objective, with the functions among them in Keras's form.

    What has none stays a name, and the objective must be passed again when the file is loaded.
    """
    config = _plain(objective.settings())
    for name, value in config.items():
        if isinstance(value, dict) and "callable" in value:
            with contextlib.suppress(TypeError):
                function = keras.saving.serialize_keras_object(getattr(objective, name))
                config[name] = {_FUNCTION: function}
    return config


def arguments_of(config: Settings, custom_objects: Settings | None) -> Settings:
    """The arguments that `config_of` and the backbone's configuration describe.

    Raises:
        ValueError: an objective that does not come back from its settings.
    """
    arguments = dict(config)
    for name in ("backbone", *FUNCTIONS):
        value = arguments.get(name)
        arguments[name] = keras.saving.deserialize_keras_object(value, custom_objects)
    loss = arguments["loss"]
    if isinstance(loss, list):
        arguments["loss"] = [_objective(settings, custom_objects) for settings in loss]
    else:
        arguments["loss"] = _objective(loss, custom_objects)
    return arguments


def _objective(settings: Settings, custom_objects: Settings | None) -> Objective:
    """The objective that the user passes again under its name, else the one of these settings."""
    name = str(settings.get("name") or settings.get("kind"))
    passed = keras.saving.get_registered_object(name, custom_objects)
    if isinstance(passed, Objective):
        return passed
    try:
        return from_settings({key: _setting(value) for key, value in settings.items()})
    except (TypeError, ValueError) as error:
        raise invalid(
            "An objective of yours, or one with a function of yours, must be passed again when a "
            "file is loaded",
            f"a file with the objective {name!r}, without it",
            f'Pass keras.saving.load_model(file, custom_objects={{"{name}": loss}}).',
        ) from error


def _setting(value: Any) -> Any:
    """A setting from its form in a file, a function of the user's by its own name."""
    if isinstance(value, dict) and _FUNCTION in value:
        return keras.saving.deserialize_keras_object(value[_FUNCTION])
    return value


def _path_settings(path: paths.Path | str | None) -> Settings | None:
    return None if path is None else paths.resolve(path).settings()


def _plain(settings: Settings) -> Settings:
    """Settings as they come back from a file; what JSON cannot hold by its repr."""
    plain: Settings = json.loads(json.dumps(settings, default=repr))
    return plain
