"""The EMA: decays and structures."""

import numpy as np
from support import tensor

from .common import OLD_VALUE, ema, ones

STRUCTURE = "Teacher and student must have the same structure and shapes"
COPY = "Build the teacher as a copy of the student's parameters."

CASES = {
    "decay above 1": (
        lambda: ema([ones(2)], [ones(2)], 1.5),
        ValueError,
        "decay must be in [0, 1]",
        "1.5",
        OLD_VALUE,
    ),
    "decay NaN": (
        lambda: ema([ones(2)], [ones(2)], float("nan")),
        ValueError,
        "decay must be in [0, 1]",
        "nan",
        OLD_VALUE,
    ),
    "no decay": (
        lambda: ema([ones(2)], [ones(2)], None),
        TypeError,
        "decay must be a number",
        "None",
        OLD_VALUE,
    ),
    "decay in words": (
        lambda: ema([ones(2)], [ones(2)], "0.9"),
        TypeError,
        "decay must be a number",
        "'0.9'",
        OLD_VALUE,
    ),
    "decay as a vector": (
        lambda: ema([ones(2)], [ones(2)], ones(2)),
        TypeError,
        "decay must be a number",
        "1.",
        OLD_VALUE,
    ),
    "a leaf that is no array": (
        lambda: ema({"a": ["weights"]}, {"a": ["weights"]}),
        TypeError,
        "The leaf at 'a/0' must be a tensor",
        "str 'weights'",
        "Convert it first.",
    ),
    "decay True": (
        lambda: ema([ones(2)], [ones(2)], True),
        TypeError,
        "decay must be a number",
        "True",
        OLD_VALUE,
    ),
    "decay tensor below 0": (
        lambda: ema([ones(2)], [ones(2)], tensor(np.float32(-0.5))),
        ValueError,
        "decay must be in [0, 1]",
        "-0.5",
        OLD_VALUE,
    ),
    "parameter missing": (
        lambda: ema({"a": {"w": ones(2)}}, {"a": {"v": ones(2)}}),
        ValueError,
        STRUCTURE,
        "at 'a/w': teacher (2,), student missing",
        COPY,
    ),
    "parameter too many": (
        lambda: ema({"a": ones(2)}, {"a": ones(2), "b": ones(3)}),
        ValueError,
        STRUCTURE,
        "at 'b': teacher missing, student (3,)",
        COPY,
    ),
    "parameter of another shape": (
        lambda: ema({"a": [ones(2), ones(2, 3)]}, {"a": [ones(2), ones(3, 2)]}),
        ValueError,
        STRUCTURE,
        "at 'a/1': teacher (2, 3), student (3, 2)",
        COPY,
    ),
}
