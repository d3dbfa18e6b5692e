"""Every public function refuses what its parameters cannot be, and says what it received.

The calls and the wrong arguments are in refusals/generated.py.
"""

import importlib
import inspect
import sys
from pathlib import Path

import pytest
from refusals import generated
from refusals.generated import CALLS, bad_calls, outcome

import selfalign

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.only("numpy")

# What is for tensors that are checked already, in adapters; and what has no arguments of its own.
UNCHECKED = {
    "distances.cosine_distances",
    "masks.mean_over_mask",
    "masks.weights_of",
    "masks.check_weights",
    "metrics.measured",
    "metrics.Comparing",
    "objective.Objective.compare",
    "objective.TokenObjective.compare",
    "heads.Head",
    "heads.Head.init",
    "heads.Head.apply",
    "paths.Path.noised",
    "paths.Path.moved",
    "paths.Path.coefficients",
    "paths.Path.rates",
    "paths.Path.toward_data",
    "paths.Path.gap",
    "paths.Path.times_from",
    "paths.Path.time_conventions",
    "paths.Path.settings",
    "paths.Path",
    "paths.UnitTime",
    "schedules.Schedule",
    "schedules.Schedule.value",
    "schedules.Schedule.settings",
    "sources.Source",
    "sources.Source.target_width",
    "sources.Nothing",
    "configured.Configured",
    "configured.Configured.settings",
    "plateau.PlateauState",
    "plateau.Plateau.init",
    "presets.Model",
    "presets.Training",
    "diagnostics.Layers",
    "diagnostics.Layers.plot",
    "diagnostics.draw_maps",
}
# counted, so that nobody empties the tables
COUNT = 3390


def names():
    """The public functions and classes of the core, without `selfalign.`."""
    sys.path.insert(0, str(ROOT / "docs" / "tools"))
    try:
        tool = importlib.import_module("names")
    finally:
        del sys.path[0]
    found = [name.removeprefix("selfalign.") for name, _ in tool.public(ROOT)]
    return [name for name in found if not name.startswith("adapters.")]


def methods(name):
    """The public methods that a class itself defines, and its call."""
    module, _, attribute = name.rpartition(".")
    kind = getattr(importlib.import_module(f"selfalign.{module}"), attribute)
    if not inspect.isclass(kind):
        return []
    members = {
        member
        for member, value in vars(kind).items()
        if isinstance(value, classmethod) or inspect.isfunction(inspect.unwrap(value))
    }
    return [f"{name}.{m}" for m in members if m == "__call__" or not m.startswith("_")]


def test_no_public_function_is_missing():
    known = {name.partition(",")[0] for name in CALLS} | UNCHECKED
    assert [name for name in names() if name not in known] == []


def test_no_method_with_arguments_is_missing():
    """Methods count once, in the class that first has them."""
    known = {name.partition(",")[0].rpartition(".")[2] for name in {*CALLS, *UNCHECKED}}
    found = {method.rpartition(".")[2] for name in names() for method in methods(name)}
    loggers = {"log", "flush", "write", "close"}
    without_arguments = {"depth", "settings", "reversed"}
    assert found - known - loggers - without_arguments == set()


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right(name):
    right = CALLS[name]
    assert set(right.kinds.values()) <= set(generated.KINDS)
    right.function(**right.good)


def test_every_wrong_argument_is_refused_in_three_parts():
    wrong = {"accepted": [], "unclear": [], "clear": []}
    for what, call in bad_calls():
        kind, message = outcome(call)
        wrong[kind].append(f"{what}: {message:.200}")
    assert wrong["accepted"] == []
    assert wrong["unclear"] == []
    assert len(wrong["clear"]) >= COUNT


def test_an_accepted_argument_and_an_unclear_error_would_be_found():
    assert outcome(lambda: 1)[0] == "accepted"
    assert outcome(lambda: int("x"))[0] == "unclear"
    assert outcome(lambda: {}["x"])[0] == "unclear"
    assert outcome(lambda: selfalign.schedules.Warmup(-1))[0] == "clear"
