"""Schedules of weights and decays."""

import numpy as np
from support import tensor

from selfalign import schedules

from .common import BOUNDS, NUMBER, SETTINGS, SPELLING, sra, tokens

SCHEDULE = "A schedule must be a number or a function of the step"
ANY_SCHEDULE = "Pass a number, an object of selfalign.schedules, or a callable."

CASES = {
    "negative weight": (
        lambda: sra(weight=-0.5),
        ValueError,
        "weight must be finite and at least 0",
        "-0.5",
        "Weights and decays are never negative.",
    ),
    "infinite weight": (
        lambda: schedules.Constant(float("inf")),
        ValueError,
        "weight must be finite and at least 0",
        "inf",
        "Weights and decays are never negative.",
    ),
    "weight in words": (lambda: sra(weight="0.5"), ValueError, SCHEDULE, "'0.5'", ANY_SCHEDULE),
    "the class of a schedule": (
        lambda: sra(weight=schedules.Warmup),
        ValueError,
        SCHEDULE,
        "<class 'selfalign.schedules.Warmup'>",
        ANY_SCHEDULE,
    ),
    "weight True": (lambda: sra(weight=True), ValueError, SCHEDULE, "True", ANY_SCHEDULE),
    "no weight": (lambda: sra(weight=None), ValueError, SCHEDULE, "None", ANY_SCHEDULE),
    "product with a word": (
        lambda: schedules.Warmup(10) * "2",
        ValueError,
        SCHEDULE,
        "'2'",
        ANY_SCHEDULE,
    ),
    "warm-up of no steps": (
        lambda: schedules.Warmup(0),
        ValueError,
        "steps must be finite and at least 1",
        "0",
        BOUNDS,
    ),
    "every half step": (
        lambda: schedules.Every(2.5),
        TypeError,
        "steps must be an integer",
        "2.5",
        "Pass a whole number of steps.",
    ),
    "every no step": (
        lambda: schedules.Every(0),
        ValueError,
        "steps must be finite and at least 1",
        "0",
        BOUNDS,
    ),
    "every with a decay above 1": (
        lambda: schedules.Every(2, 1.5),
        ValueError,
        "decay must be in [0, 1]",
        "1.5",
        BOUNDS,
    ),
    "every with a function": (
        lambda: schedules.Every(2, len),
        ValueError,
        "decay must be a number or an object of selfalign.schedules",
        repr(len),
        "power of steps inside a function",
    ),
    "warm-up of words": (
        lambda: schedules.Warmup("10"),
        TypeError,
        "steps must be a number",
        "'10'",
        NUMBER,
    ),
    "stop before the start": (
        lambda: schedules.Stop(-1),
        ValueError,
        "step must be finite and at least 0",
        "-1",
        BOUNDS,
    ),
    "no steps per epoch": (
        lambda: schedules.PaperDecay(0),
        ValueError,
        "steps_per_epoch must be finite and at least 1",
        "0",
        BOUNDS,
    ),
    "negative epoch": (
        lambda: schedules.PaperDecay(1, -1),
        ValueError,
        "last_flat_epoch must be finite and at least 0",
        "-1",
        BOUNDS,
    ),
    "no epochs per decade": (
        lambda: schedules.PaperDecay(1, 1, 0),
        ValueError,
        "epochs_per_decade must be finite and at least 1",
        "0",
        BOUNDS,
    ),
    "decay schedule above 1": (
        lambda: schedules.DecayWarmup(1.1),
        ValueError,
        "decay must be in [0, 1]",
        "1.1",
        BOUNDS,
    ),
    "unknown schedule": (
        lambda: schedules.resolve({"name": "linear"}),
        ValueError,
        "schedule must be one of 'constant', 'warmup', 'stop', 'paper_decay', 'decay_warmup', "
        "'every', 'product'",
        "'linear'",
        SPELLING,
    ),
    "setting of a schedule missing": (
        lambda: schedules.resolve({"name": "warmup"}),
        ValueError,
        "The settings of the schedule 'warmup' must be steps",
        "none",
        SETTINGS,
    ),
    "product without factors": (
        lambda: schedules.resolve({"name": "product"}),
        ValueError,
        "The settings of the schedule 'product' must be factors",
        "none",
        SETTINGS,
    ),
    "factors that are none": (
        lambda: schedules.Product(3),
        ValueError,
        "factors must be a list or tuple",
        "3",
        "Multiply schedules instead: 0.5 * Warmup(1000).",
    ),
    "a step before the first": (
        lambda: schedules.Warmup(10)(-1),
        ValueError,
        "step must be finite and at least 0",
        "-1",
        BOUNDS,
    ),
    "half a step": (
        lambda: schedules.Warmup(10)(2.5),
        TypeError,
        "step must be an integer",
        "2.5",
        "Pass a whole number of steps.",
    ),
    "a step before the first, as a tensor": (
        lambda: schedules.Warmup(10)(tensor(np.array(-1))),
        ValueError,
        "step must be an integer of at least 0, or a scalar tensor that holds one",
        "-1",
        "Pass the number of optimizer steps done.",
    ),
    "two steps": (
        lambda: schedules.Warmup(10)(tokens(2, dtype="int32")),
        ValueError,
        "step must be an integer of at least 0, or a scalar tensor that holds one",
        "shape (2,) of dtype int32",
        "Pass the number of optimizer steps done.",
    ),
    "a warm-up of half a step": (
        lambda: schedules.Warmup(2.5),
        TypeError,
        "steps must be an integer",
        "2.5",
        "Pass a whole number of steps.",
    ),
    "a negative decay": (
        lambda: sra(decay=-1),
        ValueError,
        "decay must be in [0, 1]",
        "-1",
        "It is the weight of the old value, 0.9999 in the paper.",
    ),
    "an int of hundreds of digits": (
        lambda: schedules.Warmup(10**400),
        ValueError,
        "steps must be finite and at least 1",
        "1000",
        BOUNDS,
    ),
    "settings that are no dict": (
        lambda: sra().from_settings([]),
        TypeError,
        "settings must be a dict by names",
        "list []",
        "Pass a dict whose keys are strings.",
    ),
    "settings without layers": (
        lambda: sra().from_settings({}),
        ValueError,
        "Settings of SRALoss must have student_layer, teacher_layer",
        "settings without student_layer, teacher_layer",
        "Take them from settings().",
    ),
    "a switch in words": (
        lambda: sra(random_gap="False"),
        TypeError,
        "random_gap must be True or False",
        "'False'",
        "Pass a boolean.",
    ),
    "a factor that has no settings": (
        lambda: schedules.Warmup(10) * len,
        ValueError,
        "Factors must be numbers or objects of selfalign.schedules",
        "<built-in function len>",
        "Multiply inside a function of the step instead.",
    ),
}
