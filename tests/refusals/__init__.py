"""Everything that the core refuses, by subject.

A case is (the call, the exception, the rule, what was received, what to do).
"""

from . import (
    adapting,
    distances,
    ema,
    frameworks,
    heads,
    layers,
    objective,
    paths,
    plateau,
    schedules,
    time,
    tokens,
)

SUBJECTS = (
    frameworks,
    tokens,
    time,
    paths,
    layers,
    distances,
    heads,
    ema,
    schedules,
    plateau,
    objective,
    adapting,
)
CASES = {
    f"{subject.__name__.rpartition('.')[2]}: {what}": case
    for subject in SUBJECTS
    for what, case in subject.CASES.items()
}
