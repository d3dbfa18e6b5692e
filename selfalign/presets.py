"""Presets: published layers of named models, and recipes with the values of the other settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from . import schedules
from ._checks import check_choice, check_steps, invalid
from .typing import Settings

DEPTHS = {"S": 12, "B": 12, "L": 24, "XL": 28}
FAMILIES = ("SiT", "DiT")
SIZES = tuple(DEPTHS)

# (student, target) layers; the papers have no S, which gets those of B: it is as deep
_SRA = {
    "SiT": {"S": (3, 8), "B": (3, 8), "L": (6, 16), "XL": (8, 20)},
    "DiT": {"S": (3, 7), "B": (3, 7), "L": (6, 14), "XL": (8, 16)},
}
_LAYERSYNC = {"S": (4, 8), "B": (4, 8), "L": (8, 16), "XL": (8, 16)}  # XL published, 1/3 -> 2/3
_REPA = {"S": 4, "B": 4, "L": 8, "XL": 8}


class Model(NamedTuple):
    """A named model.

    Attributes:
        family: "SiT" or "DiT".
        size: "S", "B", "L" or "XL".

    Example:
        >>> import selfalign
        >>> selfalign.presets.parse("DiT-B/4").size
        'B'
    """

    family: str
    size: str

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return DEPTHS[self.size]


def parse(name: str) -> Model:
    """The model that a name such as "SiT-XL/2" stands for; the patch size does not matter.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import selfalign
        >>> selfalign.presets.parse("SiT-XL/2").depth
        28
    """
    pattern = r"(SiT|DiT)-(XL|S|B|L)/[1-9]\d*"
    match = re.fullmatch(pattern, name) if isinstance(name, str) else None
    if match is None:
        raise invalid(
            'A preset is named like "SiT-XL/2": SiT or DiT, then S, B, L or XL, then the patch '
            "size",
            repr(name),
            "For another model pass student_layer and teacher_layer, for instance 0.25 and 0.7.",
        )
    return Model(match[1], match[2])


def preset_layers(name: str) -> tuple[int, int]:
    """SRA's (student, teacher) layers of a model such as "SiT-XL/2" or "DiT-B/4".

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import selfalign
        >>> selfalign.preset_layers("SiT-XL/2")
        (8, 20)

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """
    model = parse(name)
    return _SRA[model.family][model.size]


class Training(NamedTuple):
    """What a recipe may depend on: the model, the resolution (256 or 512), and steps per epoch.

    Example:
        >>> import selfalign
        >>> model = selfalign.presets.parse("SiT-B/2")
        >>> selfalign.presets.Training(model, resolution=256, steps_per_epoch=5004).resolution
        256
    """

    model: Model
    resolution: int
    steps_per_epoch: int


def _sra_default(training: Training) -> Settings:
    return {}


def _sra_short(training: Training) -> Settings:
    """For runs below some 50,000 steps: an EMA that is faster and warms up, and a small weight."""
    return {"weight": 0.1, "decay": schedules.DecayWarmup(0.999)}


def _sra_paper(training: Training) -> Settings:
    """Smooth L1 with its decay by epochs; the weight of DiT is that of the authors' code."""
    last_flat_epoch, epochs_per_decade = {256: (149, 1000), 512: (99, 800)}[training.resolution]
    decay = schedules.PaperDecay(training.steps_per_epoch, last_flat_epoch, epochs_per_decade)
    weight = {"SiT": 0.2, "DiT": 0.04}[training.model.family]
    return {"distance": "smooth_l1", "weight": weight * decay}


def _sra_official(training: Training) -> Settings:
    """The authors' later cosine, which runs over the token axis."""
    return {"distance": "token_axis_cosine"}


Recipe = Callable[[Training], Settings]

RECIPES: dict[str, dict[str, Recipe]] = {
    "sra": {
        "default": _sra_default,
        "short": _sra_short,
        "paper": _sra_paper,
        "official-2026-07": _sra_official,
    },
    "layersync": {"default": lambda training: {}},
    "repa": {"default": lambda training: {"width": 768}},  # DINOv2-B's tokens
}


def _layers_of(kind: str, model: Model) -> Settings:
    if kind == "repa":
        return {"student_layer": _REPA[model.size]}
    pairs = _SRA[model.family] if kind == "sra" else _LAYERSYNC
    student, target = pairs[model.size]
    return {"student_layer": student, "teacher_layer": target}


def settings_of(
    kind: str,
    name: str,
    recipe: str = "default",
    resolution: int = 256,
    steps_per_epoch: int = 5004,
) -> Settings:
    """The settings of an objective for a named model; see `Objective.preset`.

    Args:
        kind: of the objective, such as "sra".
        name: of the model, such as "SiT-XL/2".
        recipe: "default", our advice. Of SRA also: "short", for runs below some 50,000 steps, with
            an EMA that is faster and warms up, and a weight of 0.1; "paper", smooth L1 with beta
            0.05, weight 0.2 (DiT: 0.04, as in the authors' code) with its decay by epochs;
            "official-2026-07", the authors' later cosine, which runs over the token axis.
        resolution: 256 or 512.
        steps_per_epoch: optimizer steps per epoch.

    Raises:
        ValueError: an unknown model, recipe or resolution, or a kind without presets.

    Example:
        >>> import selfalign
        >>> selfalign.presets.settings_of("layersync", "SiT-XL/2")
        {'student_layer': 8, 'teacher_layer': 16}
    """
    model = parse(name)
    check_choice("the kind of objective", kind, tuple(RECIPES))
    check_choice("recipe", recipe, tuple(RECIPES[kind]))
    check_choice("resolution", resolution, (256, 512))
    steps_per_epoch = check_steps("steps_per_epoch", steps_per_epoch, 1)
    settings = _layers_of(kind, model)
    if kind == "sra":
        settings["path"] = {"SiT": "linear", "DiT": "discrete"}[model.family]
    return settings | RECIPES[kind][recipe](Training(model, resolution, steps_per_epoch))
