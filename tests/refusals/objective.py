"""Objectives: their settings, steps, names and kinds."""

import numpy as np

from selfalign import LayerSyncLoss, Objective, SRALoss, objectives, schedules, sources

from .common import OLD_VALUE, SPELLING, both, layersync, repa, sra, tokens

NAME = "An objective's name must be one word of letters, digits and underscores"

CASES = {
    "decay above 1 in the loss": (
        lambda: sra(decay=2),
        ValueError,
        "decay must be in [0, 1]",
        "2",
        OLD_VALUE,
    ),
    "unknown recipe": (
        lambda: SRALoss.preset("SiT-B/2", recipe="official"),
        ValueError,
        "recipe must be one of 'default', 'short', 'paper', 'official-2026-07'",
        "'official'",
        SPELLING,
    ),
    "unknown resolution": (
        lambda: SRALoss.preset("SiT-B/2", resolution=128),
        ValueError,
        "resolution must be one of 256, 512",
        "128",
        SPELLING,
    ),
    "schedule without a step": (
        lambda: sra(weight=schedules.Warmup(10))(tokens(1, 1, 1), tokens(1, 1, 1)),
        ValueError,
        "A weight that is a schedule needs the step",
        "step=None",
        "Pass step= the optimizer steps done.",
    ),
    "unknown setting": (
        lambda: SRALoss.from_settings(sra().settings(), gap=0.2),
        ValueError,
        "Settings must be those of SRALoss",
        "unknown gap",
        "Check versions and spelling.",
    ),
    "callable from its name": (
        lambda: SRALoss.from_settings(sra(distance=np.hypot, weight=len).settings()),
        ValueError,
        "A callable cannot be rebuilt from its name",
        "weight=builtins.len",
        "Pass it again: SRALoss.from_settings(settings, distance=my_distance).",
    ),
    "decay above 1 in a source": (
        lambda: sources.EMATeacher(layer=2, decay=1.5),
        ValueError,
        "decay must be in [0, 1]",
        "1.5",
        OLD_VALUE,
    ),
    "a name of two words": (
        lambda: layersync(name="deep layer"),
        ValueError,
        NAME,
        "'deep layer'",
        'Pass for instance name="deep".',
    ),
    "an empty name": (
        lambda: repa(name=""),
        ValueError,
        NAME,
        "''",
        'Pass for instance name="deep".',
    ),
    "a number as name": (
        lambda: sra(name=3),
        ValueError,
        NAME,
        "3",
        'Pass for instance name="deep".',
    ),
    "schedule without a step, in weigh": (
        lambda: layersync(weight=schedules.Warmup(10)).weigh(1.0),
        ValueError,
        "A weight that is a schedule needs the step",
        "step=None",
        "Pass step= the optimizer steps done.",
    ),
    "settings of another kind": (
        lambda: LayerSyncLoss.from_settings(repa().settings()),
        ValueError,
        "Settings must be those of LayerSyncLoss",
        "unknown hidden, width",
        "Check versions and spelling.",
    ),
    "settings of another kind with the same names": (
        lambda: SRALoss.from_settings({**sra().settings(), "kind": "layersync"}),
        ValueError,
        "Settings must be those of SRALoss",
        "settings of 'layersync'",
        "Check versions and spelling.",
    ),
    "settings of an unknown kind": (
        lambda: objectives.from_settings({"kind": "dino"}),
        ValueError,
        "kind must be one of 'sra', 'layersync', 'repa'",
        "'dino'",
        SPELLING,
    ),
    "settings without a kind": (
        lambda: objectives.from_settings({"student_layer": 2}),
        ValueError,
        "kind must be one of 'sra', 'layersync', 'repa'",
        "None",
        SPELLING,
    ),
    "an objective without a source": (
        lambda: Objective(student_layer=2).source,
        TypeError,
        "An objective must have `source`, one of selfalign.sources",
        "Objective without it",
        "Define it in your class; docs/extending.md shows a whole one.",
    ),
    "an objective that compares nothing": (
        lambda: Objective(student_layer=2).compare(*both(1, 1, 1)),
        TypeError,
        "An objective must have `compare`, a method (student, target, mask) -> scalar",
        "Objective without it",
        "Define it in your class; docs/extending.md shows a whole one.",
    ),
}
