"""Bad arguments for every public function, from what each of its parameters means.

`CALLS` holds calls that are right. `KINDS` says for each kind of argument what is wrong with it.
`bad_calls` puts one wrong argument among the right ones, each in turn.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import support  # noqa: F401  (chooses the backend)

import selfalign
from selfalign import (
    LayerSyncLoss,
    REPALoss,
    SRALoss,
    adapting,
    diagnostics,
    distances,
    ema,
    heads,
    layers,
    masks,
    normalise,
    objectives,
    paths,
    plateau,
    presets,
    schedules,
    sources,
    time_gap,
)

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = {
    "a word": "1",
    "a list": [1],
    "a dict": {"a": 1},
    "an object": object(),
    "a complex number": 1j,
    "an array": np.ones(2),
}
NO_FINITE = {"NaN": NAN, "infinity": INF, "minus infinity": -INF, "NumPy's NaN": np.float32(NAN)}
NUMBER = {
    **NO_NUMBERS,
    **NO_FINITE,
    "nothing": None,
    "True": True,
    "NumPy's True": np.True_,
    "huge": 10**400,
    "minus": -1,
}
COUNT = {**NUMBER, "half": 2.5}
FRACTION = {**NUMBER, "above": 1.5, "just above": 1.0001}
NO_ARRAY = {"nothing": None, "a word": "x", "a dict": {}, "an object": object(), "a number": 0.5}
WORD = {
    "another word": "nothing",
    "nothing": None,
    "a number": 3,
    "True": True,
    "NaN": NAN,
    "a list": ["cosine"],
    "a dict": {"a": 1},
    "an array": np.ones(2),
}


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


TOKENS = {
    **NO_ARRAY,
    "a list": [[[1.0]]],
    "[N, D]": ones(3, 4),
    "[B, H, W, D]": ones(2, 3, 1, 4),
    "a scalar": np.float32(1),
    "no samples": ones(0, 3, 4),
    "no tokens": ones(2, 0, 4),
    "no features": ones(2, 3, 0),
    "integers": ones(2, 3, 4, dtype="int32"),
    "booleans": ones(2, 3, 4, dtype="bool"),
    "complex": ones(2, 3, 4, dtype="complex64"),
    "text": np.full((2, 3, 4), "a"),
    "objects": np.full((2, 3, 4), None),
}
TIMES = {
    **NO_ARRAY,
    "a list": [0.5, 0.5],
    "a scalar": np.float32(0.5),
    "one more": ones(3) / 2,
    "[B, 1]": ones(2, 1) / 2,
    "none": ones(0),
    "below": -ones(2),
    "above": 2 * ones(2),
    "NaN": ones(2) * NAN,
    "infinity": ones(2) * INF,
    "integers": ones(2, dtype="int32"),
    "booleans": ones(2, dtype="bool"),
    "complex": ones(2, dtype="complex64"),
    "text": np.full(2, "a"),
}
MASK = {
    **{name: value for name, value in NO_ARRAY.items() if name != "nothing"},
    "a list": [True, False],
    "one more": ones(3),
    "one less": ones(1),
    "[B, N, D]": ones(2, 3, 4),
    "a scalar": np.float32(1),
    "negative": np.float32([1, -1]),
    "NaN": np.float32([1, NAN]),
    "infinity": np.float32([1, INF]),
    "complex": ones(2, dtype="complex64"),
    "text": np.full(2, "a"),
}
SAMPLE = {
    **NO_ARRAY,
    "a list": [[1.0]],
    "a scalar": np.float32(1),
    "one more": ones(3, 4),
    "another width": ones(2, 5),
    "integers": ones(2, 4, dtype="uint8"),
    "booleans": ones(2, 4, dtype="bool"),
    "complex": ones(2, 4, dtype="complex64"),
    "text": np.full((2, 4), "a"),
}
NO_MAPPING = {
    "nothing": None,
    "a word": "sra",
    "a number": 3,
    "a list": [],
    "pairs": [("kind", "sra")],
    "an object": object(),
    "empty": {},
    "unknown": {"nothing": 1},
    "a number as key": {1: 2},
}

# What can be wrong with an argument, by its kind
KINDS = {
    "switch": {**NO_NUMBERS, **NO_FINITE, "no": "False", "nothing": None, "0": 0, "1": 1, "2": 2},
    "steps": {**COUNT, "none": 0},
    "from 0": COUNT,
    "from 2": {**COUNT, "none": 0, "one": 1},
    "step": {name: value for name, value in COUNT.items() if name != "nothing"},
    "needed step": COUNT,
    "number": NUMBER,
    "positive": {**NUMBER, "zero": 0},
    "fraction": FRACTION,
    "draw or number": {**NO_FINITE, "a word": "1", "nothing": None},
    "schedule": NUMBER | {"of no name": {"name": "never"}, "no settings": {"name": "warmup"}},
    "decay": FRACTION
    | {"of no name": {"name": "never"}, "above by settings": schedules.Constant(2)},
    "layer": {**NUMBER, "zero": 0, "half": 1.5, "a whole float": 8.0, "all": 1.0},
    "word": WORD,
    "name": {k: v for k, v in WORD.items() if k not in ("nothing", "another word")}
    | {"two words": "a b", "empty": "", "a digit": "1a"},
    "needed word": WORD,
    "path": WORD
    | {
        "a class": paths.Linear,
        "of no name": {"name": "vp"},
        "no end": {"name": "linear", "noise_at": 3},
    },
    "path itself": WORD | {"a class": paths.Linear, "a name": "linear"},
    "distance": WORD,
    "tokens": TOKENS,
    "target": TOKENS
    | {
        "another width": ones(2, 3, 5),
        "another grid": ones(2, 5, 4),
        "another batch": ones(1, 3, 4),
    },
    "mask": MASK,
    "times": TIMES,
    "steps of a path": {k: v for k, v in TIMES.items() if k != "integers"} | {"floats": ones(2)},
    "draws": TIMES,
    "sample": SAMPLE,
    "objective": {**NO_MAPPING, "a class": SRALoss, "a function": len},
    "objectives": {k: v for k, v in NO_MAPPING.items() if k != "empty"},
    "settings": NO_MAPPING,
    "schedule settings": {
        **NUMBER,
        "of no name": {"name": "never"},
        "no settings": {"name": "warmup"},
        "too many": {"name": "warmup", "steps": 1, "step": 2},
        "of a wrong kind": {"name": "warmup", "steps": "many"},
        "no name": {},
    },
    "params": NO_MAPPING
    | {
        "lists": {k: [1.0] for k in heads.PROJECTOR.names},
        "of another width": {k: ones(3, 3) for k in heads.PROJECTOR.names},
    },
    "head": {**NO_MAPPING, "a class": heads.MLP},
    "matrix": {
        **NO_ARRAY,
        "a list": [[1.0]],
        "a vector": ones(4),
        "a cube": ones(4, 8, 1),
        "none": ones(0, 8),
        "another size": ones(7, 7),
        "integers": ones(4, 8, dtype="int32"),
        "text": np.full((4, 8), "a"),
    },
    "numbers that fall": {
        "a word": "ab",
        "nothing": None,
        "a number": 0.5,
        "words": ("a", "b"),
        "one": (0.5,),
        "none": (),
        "rising": (0.1, 0.9),
        "NaN": (0.9, NAN),
        "above": (1.5, 0.5),
        "below": (0.5, -0.5),
        "nested": ((0.9,), (0.1,)),
        "booleans": (True, False),
    },
    "end": {**NUMBER, "half": 0.5, "two": 2},
    "scalar": {
        **{k: v for k, v in NO_ARRAY.items() if k != "a number"},
        "a list": [0.5],
        "a vector": ones(2),
        "True": True,
        "complex": 1j,
    },
    "state": {**NO_ARRAY, "a tuple": (1, 2), "an empty tuple": ()},
    "any times": {
        **{k: v for k, v in NO_ARRAY.items() if k != "a number"},
        "below": -0.5,
        "above": 1.5,
        "NaN": NAN,
        "integers": ones(2, dtype="int32"),
        "True": True,
    },
    "ratio": {k: v for k, v in NO_ARRAY.items() if k != "a number"}
    | {"minus": -1.0, "NaN": NAN, "True": True},
    "tree": {
        "nothing": None,
        "a word": "x",
        "another": {"b": ones(2)},
        "another shape": {"a": ones(3)},
        "words": {"a": "x"},
        "less": {},
    },
    "factors": {
        "nothing": None,
        "a number": 3,
        "a word": "ab",
        "words": ("a",),
        "None inside": (None,),
        "a function": (len,),
        "minus": (-1,),
    },
    "kind": {**WORD, "a name": "sra", "an object": sources.Nothing()},
    "shape": {
        **NO_ARRAY,
        "a list": [[[1.0]]],
        "[N, D]": ones(3, 4),
        "another width": ones(2, 3, 5),
    },
    "features": {
        **NO_ARRAY,
        "a vector": ones(4),
        "none": ones(0, 4),
        "no width": ones(8, 0),
        "NaN": ones(8, 4) * NAN,
        "text": np.full((8, 4), "a"),
        "one": ones(1, 4),
    },
    "file": {"nothing": None, "a number": 3, "a list": [], "True": True},
    "labels": {k: v for k, v in NO_ARRAY.items() if k != "nothing"}
    | {
        "one more": np.arange(13) % 2,
        "one class": np.zeros(12, int),
        "[n, 1]": np.zeros((12, 1), int),
        "NaN": ones(12) * NAN,
    },
    "held out": {"a word": "x", "a number": 3, "one": (ones(4, 4),), "three": (1, 2, 3)},
    "lists": {
        "nothing": None,
        "a word": "x",
        "a number": 3,
        "empty": {},
        "a list": [],
        "words": {0.5: ["a"]},
        "no layers": {0.5: []},
        "words as times": {"a": [ones(12, 4)]},
    },
    "layers' features": {
        "nothing": None,
        "a word": "x",
        "a number": 3,
        "words": ["a"],
        "empty": [],
    },
    "function": {"nothing": None, "a word": "cka", "a number": 3, "True": True},
    "grid": {
        "nothing": None,
        "a word": "ab",
        "a number": 3,
        "minus": (-1, -4),
        "another": (2, 3),
        "halves": (1.5, 2.0),
        "empty": (),
    },
    "percentiles": {
        "nothing": None,
        "a word": "ab",
        "a number": 3,
        "one": (1.0,),
        "swapped": (99.0, 1.0),
        "above": (1.0, 101.0),
        "NaN": (NAN, 99.0),
    },
    "writer": {"nothing": None, "a word": "x", "a number": 3},
    "text": {"nothing": None, "a number": 3, "True": True, "a list": []},
    "metrics": {"nothing": None, "a word": "x", "a number": 3, "a list": []},
}


class Writer:
    """What TensorBoard's writer has."""

    def add_scalar(self, name, value, step):
        """Nothing is written."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that is right: the function, its arguments, and the kinds of those that are varied."""

    function: Callable
    good: dict[str, Any]
    kinds: dict[str, str]


def call(function, **arguments):
    """A call from arguments that are each (a good value, its kind)."""
    good = {name: value for name, (value, _) in arguments.items()}
    kinds = {name: kind for name, (_, kind) in arguments.items() if kind}
    return Call(function, good, kinds)


T = ones(2, 3, 4)
DRAW = (0.5 * ones(2), "draws")
TOKEN = (T, "tokens")
TARGET = (T, "target")
SHARED = {
    "student_layer": (2, "layer"),
    "weight": (0.5, "schedule"),
    "name": ("deep", "name"),
}
OF_TOKENS = {
    **SHARED,
    "distance": ("cosine", "distance"),
    "beta": (0.05, "positive"),
    "normalise": ("none", "word"),
}
TEACHER = {
    "path": ("linear", "path"),
    "max_gap": (0.2, "fraction"),
    "random_gap": (True, "switch"),
    "decay": (0.9, "decay"),
}
SRA = SRALoss(student_layer=1, teacher_layer=2)
REPA = REPALoss(student_layer=1, width=4, hidden=6)
LINEAR, DISCRETE = paths.Linear(), paths.Discrete()
SHAPES = heads.draw_shapes(4)
PARAMS = selfalign.init_projector(*(0.5 * ones(*shape) for shape in SHAPES))
SAMPLES = {
    "x0": (ones(2, 4), "sample"),
    "noise": (ones(2, 4), "sample"),
    "t": (0.5 * ones(2), "times"),
}
ROWS = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
LABELS = np.arange(12) % 2
COMPARED = {"student_tokens": TOKEN, "target_tokens": TARGET}


def evaluated(loss, **more):
    return {
        "head": (PARAMS, "params"),
        **COMPARED,
        "mask": (ones(2), "mask"),
        "logged": (True, None),
    }


CALLS = {
    # objectives
    "objectives.SRALoss": call(
        SRALoss,
        **OF_TOKENS,
        **TEACHER,
        teacher_layer=(4, "layer"),
        allow_same_layer=(False, "switch"),
    ),
    "objectives.LayerSyncLoss": call(
        LayerSyncLoss, **OF_TOKENS, teacher_layer=(4, "layer"), projector=(False, "switch")
    ),
    "objectives.REPALoss": call(REPALoss, **OF_TOKENS, width=(768, "steps"), hidden=(32, "steps")),
    "objective.Objective": call(selfalign.Objective, **SHARED),
    "objective.TokenObjective": call(selfalign.objective.TokenObjective, **OF_TOKENS),
    "objectives.from_settings": call(
        objectives.from_settings, settings=(SRA.settings(), "settings")
    ),
    "objective.Objective.__call__": call(SRA, **COMPARED, step=(1, None), mask=(ones(2), "mask")),
    "objective.Objective.__call__, scheduled": call(
        SRALoss(student_layer=1, teacher_layer=2, weight=schedules.Warmup(10)),
        student_tokens=(T, None),
        target_tokens=(T, None),
        step=(1, "needed step"),
    ),
    "objective.Objective.metrics": call(SRA.metrics, **COMPARED),
    "objective.Objective.evaluate": call(SRA.evaluate, **evaluated(SRA)),
    "objective.Objective.layers": call(SRA.layers, depth=(12, "from 2")),
    "objective.Objective.weigh": call(
        SRALoss(student_layer=1, teacher_layer=2, weight=schedules.Warmup(10)).weigh,
        distance=(np.float32(1), None),
        step=(1, "needed step"),
    ),
    "objective.Objective.weight_at": call(
        SRALoss(student_layer=1, teacher_layer=2, weight=schedules.Warmup(10)).weight_at,
        step=(1, "needed step"),
    ),
    "objectives.SRALoss.decay_at": call(
        SRALoss(student_layer=1, teacher_layer=2, decay=schedules.DecayWarmup()).decay_at,
        step=(1, "needed step"),
    ),
    "objectives.SRALoss.teacher_time": call(SRA.teacher_time, t=(0.5 * ones(2), "times"), u=DRAW),
    "configured.Configured.preset": call(
        SRALoss.preset,
        name=("SiT-B/2", "needed word"),
        recipe=("paper", "word"),
        resolution=(256, "steps"),
        steps_per_epoch=(5004, "steps"),
    ),
    "configured.Configured.from_settings": call(
        SRALoss.from_settings, settings=(SRA.settings(), "settings")
    ),
    # adapting
    "adapting.check_objective": call(adapting.check_objective, objective=(SRA, "objective")),
    "adapting.named_objectives": call(adapting.named_objectives, loss=(SRA, "objective")),
    "adapting.shared_teacher": call(
        adapting.shared_teacher, objectives=({"sra": SRA}, "objectives")
    ),
    "adapting.with_source": call(
        adapting.with_source,
        objectives=({"sra": SRA}, "objectives"),
        kind=(sources.EMATeacher, "kind"),
    ),
    "adapting.given_targets": call(
        adapting.given_targets,
        objectives=({"repa": REPA}, "objectives"),
        given=(T, "metrics"),
        several=(False, "switch"),
    ),
    "adapting.head_shapes": call(
        adapting.head_shapes, objective=(SRA, "objective"), width=(4, "steps")
    ),
    "adapting.init_head": call(
        adapting.init_head,
        objective=(SRA, "objective"),
        draws=(
            dict(
                zip(
                    ("hidden_kernel", "output_kernel"),
                    (0.5 * ones(*s) for s in SHAPES),
                    strict=True,
                )
            ),
            "settings",
        ),
    ),
    "adapting.apply_head": call(
        adapting.apply_head, objective=(SRA, "objective"), params=(PARAMS, "params"), tokens=TOKEN
    ),
    # distances, masks, normalisations
    **{
        f"distances.{name}": call(getattr(distances, name), student=TOKEN, target=TARGET)
        for name in ("cosine", "token_axis_cosine", "l1", "l2", "check_tokens")
    },
    "distances.check_same_shape": call(
        distances.check_same_shape, student=(T, "shape"), target=(T, "shape")
    ),
    "distances.smooth_l1": call(
        distances.smooth_l1, student=TOKEN, target=TARGET, beta=(0.05, "positive")
    ),
    "distances.checked": call(distances.checked, distance=("cosine", "distance")),
    "masks.masked_mean": call(
        masks.masked_mean, values=(ones(2, 3), "matrix"), mask=(ones(2), "mask")
    ),
    "masks.check_mask": call(masks.check_mask, mask=(ones(2), "mask"), shape=((2, 3), None)),
    "normalise.standardise": call(normalise.standardise, target=TOKEN, mask=(ones(2), "mask")),
    "normalise.centre": call(normalise.centre, target=TOKEN, mask=(ones(2), "mask")),
    "normalise.check_normalisation": call(normalise.check_normalisation, name=("none", "word")),
    # heads, average
    "heads.MLP": call(heads.MLP, layers=(2, "from 2"), hidden=(8, "step")),
    "heads.Head.draw_shapes": call(
        heads.PROJECTOR.draw_shapes, width=(8, "steps"), target_width=(8, "steps")
    ),
    "heads.project": call(heads.project, params=(PARAMS, "params"), tokens=TOKEN),
    "heads.check_params": call(
        heads.check_params,
        head=(heads.PROJECTOR, "head"),
        params=(PARAMS, "params"),
        tokens=(T, None),
    ),
    "heads.draw_shapes": call(heads.draw_shapes, width=(4, "steps"), hidden=(8, "step")),
    "heads.init_projector": call(
        heads.init_projector,
        hidden_draws=(0.5 * ones(4, 8), "matrix"),
        output_draws=(0.5 * ones(8, 4), "matrix"),
    ),
    "ema.ema_update": call(
        ema.ema_update,
        teacher=({"a": ones(2)}, "tree"),
        student=({"a": ones(2)}, "tree"),
        decay=(0.5, "fraction"),
    ),
    # layers, presets
    "layers.check_layer": call(
        layers.check_layer, name=("student_layer", None), layer=(2, "layer")
    ),
    "layers.check_order": call(
        layers.check_order,
        student=(2, "layer"),
        teacher=(4, "layer"),
        allow_same_layer=(False, "switch"),
    ),
    "layers.check_order_where_known": call(
        layers.check_order_where_known,
        student=(2, "layer"),
        teacher=(4, "layer"),
        allow_same_layer=(False, "switch"),
    ),
    "layers.resolve_layers": call(
        layers.resolve_layers,
        student_layer=(2, "layer"),
        teacher_layer=(4, "layer"),
        depth=(12, "from 2"),
        allow_same_layer=(False, "switch"),
    ),
    "layers.resolve_layer": call(
        layers.resolve_layer, name=("student_layer", None), layer=(2, "layer"), depth=(12, "steps")
    ),
    "presets.parse": call(presets.parse, name=("SiT-B/2", "needed word")),
    "presets.preset_layers": call(presets.preset_layers, name=("SiT-B/2", "needed word")),
    "presets.settings_of": call(
        presets.settings_of,
        kind=("sra", "word"),
        name=("SiT-B/2", "needed word"),
        recipe=("paper", "word"),
        resolution=(256, "steps"),
        steps_per_epoch=(5004, "steps"),
    ),
    # schedules, plateau
    "schedules.Constant": call(schedules.Constant, constant=(0.5, "number")),
    "schedules.Warmup": call(schedules.Warmup, steps=(10, "steps")),
    "schedules.Stop": call(schedules.Stop, step=(10, "from 0")),
    "schedules.PaperDecay": call(
        schedules.PaperDecay,
        steps_per_epoch=(10, "steps"),
        last_flat_epoch=(1, "from 0"),
        epochs_per_decade=(10, "steps"),
    ),
    "schedules.DecayWarmup": call(schedules.DecayWarmup, decay=(0.9, "fraction")),
    "schedules.Every": call(schedules.Every, steps=(2, "steps"), decay=(0.9, "decay")),
    "schedules.Product": call(schedules.Product, factors=((0.5, schedules.Warmup(10)), "factors")),
    "schedules.resolve": call(schedules.resolve, schedule=(0.5, "schedule settings")),
    **{
        f"schedules.Schedule.__call__, {schedule.name}": call(schedule, step=(3, "needed step"))
        for schedule in (
            schedules.Constant(0.5),
            schedules.Warmup(10),
            schedules.Stop(10),
            schedules.PaperDecay(10),
            schedules.DecayWarmup(),
            schedules.Every(2),
            0.5 * schedules.Warmup(10),
        )
    },
    "plateau.Plateau": call(
        plateau.Plateau,
        patience=(2, "steps"),
        min_gain=(0.1, "number"),
        smoothing=(0.9, "fraction"),
        warmup=(1, "from 0"),
        shrink=(0.5, "fraction"),
    ),
    "plateau.Plateau.__call__": call(
        plateau.Plateau(), state=(plateau.PlateauState(), "state"), cosine=(0.5, "scalar")
    ),
    # sources, time, paths
    "sources.EMATeacher": call(sources.EMATeacher, layer=(4, "layer"), **TEACHER),
    "sources.EMATeacher.decay_at": call(
        sources.EMATeacher(layer=2, decay=schedules.DecayWarmup()).decay_at, step=(1, "needed step")
    ),
    "sources.EMATeacher.teacher_time": call(
        sources.EMATeacher(layer=2).teacher_time, t=(0.5 * ones(2), "times"), u=DRAW
    ),
    "sources.LaterLayer": call(sources.LaterLayer, layer=(4, "layer")),
    "sources.Given": call(sources.Given, width=(4, "steps")),
    "time_gap.teacher_time": call(
        time_gap.teacher_time,
        path=(LINEAR, "path itself"),
        t=(0.5 * ones(2), "times"),
        u=DRAW,
        max_gap=(0.2, "fraction"),
        random_gap=(True, "switch"),
    ),
    "time_gap.teacher_time, discrete": call(
        time_gap.teacher_time,
        path=(DISCRETE, None),
        t=(ones(2, dtype="int32"), "steps of a path"),
        u=DRAW,
    ),
    "time_gap.gap_range": call(
        time_gap.gap_range, path=(LINEAR, "path itself"), max_gap=(0.2, "fraction")
    ),
    "paths.Linear": call(paths.Linear, noise_at=(1.0, "end")),
    "paths.Cosine": call(paths.Cosine, noise_at=(1.0, "end")),
    "paths.EDM": call(paths.EDM, sigma_min=(0.1, "positive"), sigma_max=(10.0, "positive")),
    "paths.Discrete": call(paths.Discrete, alphas_cumprod=((0.9, 0.1), "numbers that fall")),
    "paths.resolve": call(paths.resolve, path=("linear", "path")),
    "paths.Path.add_noise": call(LINEAR.add_noise, **SAMPLES),
    "paths.Path.velocity": call(LINEAR.velocity, **SAMPLES),
    "paths.Path.target": call(LINEAR.target, **SAMPLES, prediction=("velocity", "word")),
    "paths.Path.target, noise": call(LINEAR.target, **SAMPLES, prediction=("noise", None)),
    "paths.Path.add_less_noise": call(
        LINEAR.add_less_noise, **SAMPLES, u=DRAW, largest=(0.2, None), random_gap=(True, "switch")
    ),
    "paths.Path.draw_times": call(LINEAR.draw_times, u=(0.5 * ones(2), "draws of any shape")),
    "paths.Path.check_times": call(LINEAR.check_times, t=(0.5 * ones(2), "times"), batch=(2, None)),
    "paths.Path.snr": call(LINEAR.snr, t=(0.5, "any times")),
    "paths.Path.time_at_snr": call(LINEAR.time_at_snr, snr=(4.0, "ratio")),
    # diagnostics
    "diagnostics.feature_norm": call(diagnostics.feature_norm, tokens=(ROWS, "rows")),
    "diagnostics.effective_rank": call(
        diagnostics.effective_rank, tokens=(ROWS, "rows"), center=(True, "switch")
    ),
    "diagnostics.participation_ratio": call(
        diagnostics.participation_ratio, tokens=(ROWS, "rows"), center=(True, "switch")
    ),
    "diagnostics.drift": call(
        diagnostics.drift, teacher=({"a": ones(2)}, "tree"), student=({"a": ones(2)}, "tree")
    ),
    "diagnostics.snr_decibels": call(
        diagnostics.snr_decibels,
        path=(LINEAR, "path itself"),
        t=(0.5, "any times"),
        limit=(60.0, "positive"),
    ),
    "diagnostics.cka": call(diagnostics.cka, x=(ROWS, "rows"), y=(ROWS, "rows")),
    "diagnostics.cknna": call(
        diagnostics.cknna, x=(ROWS, "features"), y=(ROWS, "features"), k=(3, "steps")
    ),
    "diagnostics.compare": call(
        diagnostics.compare,
        left=([ROWS], "layers' features"),
        right=([ROWS], "layers' features"),
        measure=(diagnostics.cka, "function"),
    ),
    "diagnostics.linear_probe": call(
        diagnostics.linear_probe,
        features=(ROWS, "features"),
        labels=(LABELS, "labels"),
        folds=(3, "from 2"),
        held_out=(None, "held out"),
    ),
    "diagnostics.knn_probe": call(
        diagnostics.knn_probe,
        features=(ROWS, "features"),
        labels=(LABELS, "labels"),
        k=(3, "steps"),
        folds=(3, "from 2"),
        held_out=(None, "held out"),
    ),
    "diagnostics.per_layer": call(
        diagnostics.per_layer,
        features=({0.5: [ROWS]}, "filled lists"),
        measure=(diagnostics.feature_norm, "function"),
    ),
    "diagnostics.find_layers": call(
        diagnostics.find_layers,
        features=({0.1: [ROWS] * 3, 0.5: [ROWS] * 3}, "lists"),
        labels=(LABELS, "labels"),
        probe=(diagnostics.linear_probe, "function"),
        k=(3, "steps"),
        tolerance=(0.02, "number"),
    ),
    "diagnostics.pca_maps": call(
        diagnostics.pca_maps,
        tokens=(np.random.default_rng(0).normal(size=(2, 6, 4)), "tokens of any kind"),
        grid=((2, 3), "grid"),
        percentiles=((1.0, 99.0), "percentiles"),
    ),
    "diagnostics.CSVLogger": call(
        diagnostics.CSVLogger, path=("runs/a.csv", "file"), every=(10, "steps")
    ),
    "diagnostics.TensorBoardLogger": call(
        diagnostics.TensorBoardLogger,
        writer=(Writer(), "writer"),
        every=(10, "steps"),
        prefix=("sra/", "text"),
    ),
}
KINDS["draws of any shape"] = {
    name: value
    for name, value in TIMES.items()
    if name not in ("a scalar", "one more", "[B, 1]", "none", "a list", "a number")
}
KINDS["rows"] = {
    name: value for name, value in KINDS["features"].items() if name not in ("NaN", "one")
} | {"complex": ones(12, 4, dtype="complex64")}
KINDS["tokens of any kind"] = {
    **NO_ARRAY,
    "[N, D]": ones(6, 4),
    "none": ones(0, 6, 4),
    "NaN": ones(2, 6, 4) * NAN,
    "text": np.full((2, 6, 4), "a"),
}
KINDS["filled lists"] = {k: v for k, v in KINDS["lists"].items() if k not in ("empty", "no layers")}
KINDS["grid"]["another"] = (2, 2)


def bad_calls():
    """(description, function without arguments) for each wrong argument."""
    for name, right in CALLS.items():
        for parameter, kind in right.kinds.items():
            for what, value in KINDS[kind].items():
                arguments = {**right.good, parameter: value}
                yield (
                    f"{name}: {parameter} = {what}",
                    functools.partial(right.function, **arguments),
                )


def outcome(wrong):
    """What a wrong call ends in: "accepted", "unclear" or "clear", and the message."""
    try:
        found = wrong()
    except (ValueError, TypeError) as error:
        text = str(error)
        return ("clear" if is_clear(text) else "unclear"), f"{type(error).__name__}: {text}"
    except Exception as error:
        return "unclear", f"{type(error).__name__}: {error}"
    return "accepted", repr(found)


def is_clear(text):
    """A rule, what was received, and what to do."""
    rule, _, rest = text.partition(". Received: ")
    return bool(rule and rest) and text.endswith((".", "!"))
