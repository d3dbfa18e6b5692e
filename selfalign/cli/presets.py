"""`selfalign presets`: the named models, and what the recipes set."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from selfalign.objectives import KINDS
from selfalign.presets import DEPTHS, FAMILIES, RECIPES, parse, settings_of

from .output import Report, Row
from .usage import wrong_usage

_EPOCHS = {"weight": 0, "epoch_400": 400, "epoch_800": 800}


def recipe_names() -> tuple[str, ...]:
    """The names of the recipes of all objectives."""
    return tuple(dict.fromkeys(name for recipes in RECIPES.values() for name in recipes))


def show_presets(settings: Namespace, report: Report) -> None:
    """Fill `report`: the models' layers, then a row for each recipe."""
    kind = settings.objective
    recipes = [settings.recipe] if settings.recipe else list(RECIPES[kind])
    if not set(recipes) <= set(RECIPES[kind]):
        raise wrong_usage(
            f"--recipe must be one of the objective {kind}",
            settings.recipe,
            f"It has: {', '.join(RECIPES[kind])}.",
        )
    report["models"] = [_model(kind, f"{f}-{size}/2") for f in FAMILIES for size in DEPTHS]
    report["recipes"] = [
        _recipe(kind, recipe, family, settings.resolution)
        for recipe in recipes
        for family in FAMILIES
    ]


def _model(kind: str, name: str) -> Row:
    """A named model: its depth, and the settings that depend on it."""
    chosen: Row = {"model": name, "depth": parse(name).depth}
    for setting, value in settings_of(kind, name).items():
        if setting in ("student_layer", "teacher_layer", "path"):
            chosen[setting] = value
    return chosen


def _recipe(kind: str, recipe: str, family: str, resolution: int) -> Row:
    """What a recipe sets beside the layers; the weight at three epochs."""
    name = f"{family}-XL/2"
    loss: Any = KINDS[kind].preset(name, recipe, resolution=resolution, steps_per_epoch=1)
    row: Row = {"recipe": recipe, "models": family, "distance": loss.distance}
    for column, epoch in _EPOCHS.items():
        row[column] = round(loss.weight_at(epoch), 5)
    if hasattr(loss, "decay_at"):
        row["decay"] = loss.decay_at(10**9)
    if hasattr(loss, "width"):
        row["width"] = loss.width
    return row
