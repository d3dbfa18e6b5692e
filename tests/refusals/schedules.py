"""Schedules of weights and decays."""

from selfalign import schedules

from .common import BOUNDS, NUMBER, SETTINGS, SPELLING, sra

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
        lambda: schedules.Every(0.5),
        TypeError,
        "steps must be an integer",
        "0.5",
        NUMBER,
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
    "a factor that has no settings": (
        lambda: schedules.Warmup(10) * len,
        ValueError,
        "Factors must be numbers or objects of selfalign.schedules",
        "<built-in function len>",
        "Multiply inside a function of the step instead.",
    ),
}
