"""Times, draws and gaps."""

import numpy as np
from support import tensor

from selfalign import paths, sources

from .common import GAP, SKIP, less, mix, move, ones, sra

TIME_SCALE = "Check which path the model is trained with, and the scale of its time."
LINEAR_TIME = "The linear path counts time in [0, 1]: check the model's time scale."
STEPS = "The discrete path counts time in [0, 999]: check the model's time scale."
DRAW = "Draw u uniform in [0, 1)"

CASES = {
    "one time for all": (
        lambda: move(0.5),
        ValueError,
        "t must hold one time per sample, shape [B]",
        "shape ()",
        "Pass a vector of times.",
    ),
    "time as a column": (
        lambda: move([[0.5], [0.5]]),
        ValueError,
        "t must hold one time per sample, shape [B]",
        "shape (2, 1)",
        "Pass a vector of times.",
    ),
    "another number of times": (
        lambda: mix(t=[0.5, 0.5, 0.5]),
        ValueError,
        "t must hold one time per sample, shape [B] = (2,)",
        "shape (3,)",
        "Pass a vector of times.",
    ),
    "no times": (
        lambda: move(np.zeros(0), np.zeros(0)),
        ValueError,
        "t must not be empty",
        "shape (0,)",
        SKIP,
    ),
    "steps on a continuous path": (
        lambda: move([1, 2]),
        TypeError,
        "The linear path takes floating-point times",
        "t of dtype int32",
        TIME_SCALE,
    ),
    "boolean steps": (
        lambda: move([True, False], path=paths.Discrete()),
        TypeError,
        "The discrete path takes integer steps",
        "t of dtype bool",
        TIME_SCALE,
    ),
    "continuous time on a discrete path": (
        lambda: mix(t=[0.5, 1.0], path=paths.Discrete()),
        TypeError,
        "The discrete path takes integer steps",
        "t of dtype float32",
        TIME_SCALE,
    ),
    "time of another scale": (
        lambda: move([0.5, 999.0]),
        ValueError,
        "t must lie in [0, 1]",
        "values from 0.5 to 999",
        LINEAR_TIME,
    ),
    "time that is not a number": (
        lambda: mix(t=[0.5, np.nan]),
        ValueError,
        "t must lie in [0, 1]",
        "values from nan to nan",
        "check the model's time scale.",
    ),
    "a step too many": (
        lambda: move([0, 1000], path=paths.Discrete()),
        ValueError,
        "t must lie in [0, 999]",
        "values from 0 to 1000",
        STEPS,
    ),
    "sigma below 0": (
        lambda: paths.EDM().snr(tensor([-1.0])),
        ValueError,
        "t must lie in [0, 3e+38]",
        "values from -1 to -1",
        "check the model's time scale.",
    ),
    "another number of draws": (
        lambda: move([0.5, 0.5], [0.5]),
        ValueError,
        "u must hold one draw per sample, of t's shape",
        "u (1,), t (2,)",
        "Draw u like t: uniform in [0, 1).",
    ),
    "no draws": (
        lambda: sra().teacher_time(ones(2), None),
        ValueError,
        "u must hold one draw per sample, of t's shape",
        "u None, t (2,)",
        "Draw u like t: uniform in [0, 1).",
    ),
    "integer draws": (
        lambda: move([0.5, 0.5], [1, 0]),
        TypeError,
        "u must be floating point",
        "dtype int32",
        DRAW,
    ),
    "normal draws": (
        lambda: move([0.5, 0.5], [-1.5, 2.5]),
        ValueError,
        "u must lie in [0, 1]",
        "values from -1.5 to 2.5",
        DRAW + ": the loss scales it to the gap.",
    ),
    "gap above 1": (
        lambda: move([0.5, 0.5], max_gap=200),
        ValueError,
        "max_gap must be in [0, 1]",
        "200",
        GAP,
    ),
    "negative gap": (
        lambda: sra(max_gap=-0.1),
        ValueError,
        "max_gap must be in [0, 1]",
        "-0.1",
        GAP,
    ),
    "gap that is not a number": (
        lambda: sra(max_gap="0.2"),
        TypeError,
        "max_gap must be a number",
        "'0.2'",
        GAP,
    ),
    "gap below one step": (
        lambda: sra(path="discrete", max_gap=0.0004),
        ValueError,
        "max_gap must cover at least one step of a discrete path",
        "0.0004 of 1000 steps",
        "Enlarge it, or pass 0 for no gap.",
    ),
    "another number of times, at less noise": (
        lambda: less(t=[0.5, 0.5, 0.5]),
        ValueError,
        "t must hold one time per sample, shape [B] = (2,)",
        "shape (3,)",
        "Pass a vector of times.",
    ),
    "no draws, at less noise": (
        lambda: less(u=None),
        ValueError,
        "u must hold one draw per sample, of t's shape",
        "u None, t (2,)",
        "Draw u like t: uniform in [0, 1).",
    ),
    "steps on a continuous path, at less noise": (
        lambda: less(t=[1, 2]),
        TypeError,
        "The linear path takes floating-point times",
        "t of dtype int32",
        TIME_SCALE,
    ),
    "negative gap of a source": (
        lambda: sources.EMATeacher(layer=2, max_gap=-0.1),
        ValueError,
        "max_gap must be in [0, 1]",
        "-0.1",
        GAP,
    ),
}
