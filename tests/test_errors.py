"""Every error of the core says the rule, what was received, and what to do.

The calls are in refusals/, by subject.
"""

import ast
import pathlib
import re
import sys
import types

import numpy as np
import pytest
from refusals import CASES
from refusals.common import (
    Foreign,
    Other,
    both,
    ema,
    mix,
    move,
    ones,
    project,
    projector,
    sra,
    tokens,
)
from support import array, tensor

import selfalign
from selfalign import paths, schedules, time_gap


@pytest.fixture(autouse=True)
def frameworks(monkeypatch):
    """Two foreign frameworks, as far as selfalign looks at them."""
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=Foreign))
    monkeypatch.setitem(sys.modules, "paddle", types.SimpleNamespace(Tensor=Other))


@pytest.mark.parametrize(("call", "kind", "rule", "received", "fix"), CASES.values(), ids=CASES)
def test_rule_received_and_fix(call, kind, rule, received, fix):
    parts = [f"^{re.escape(rule)}", f"Received: .*{re.escape(received)}", re.escape(fix)]
    with pytest.raises(kind, match=".*".join(parts)) as caught:
        call()
    assert type(caught.value) is kind


def test_nothing_is_refused_without_reason():
    """The calls of the tables are wrong in one thing only: set right, their helpers work."""
    assert array(sra()(*both(2, 3, 4), mask=ones(2))) == 0
    assert tuple(project(4, 4).shape) == (2, 3, 4)
    assert array(move([0.5, 0.5], max_gap=0.5)).tolist() == [0.25, 0.25]
    assert array(mix()).tolist() == np.ones((2, 3)).tolist()
    assert array(ema([ones(2)], [ones(2)])[0]).tolist() == [1, 1]
    names = ["hidden_bias", "hidden_kernel", "output_bias", "output_kernel"]
    assert sorted(projector(4)) == names


# Modules that were renamed


@pytest.mark.parametrize(
    ("old", "new"),
    [("targets", "layers"), ("projector", "heads"), ("teacher", "ema"), ("loss", "objectives")],
)
def test_a_module_of_the_first_edition_says_its_present_name(old, new):
    message = rf"present name\. Received: selfalign\.{old}\. Write selfalign\.{new}\."
    with pytest.raises(AttributeError, match=message):
        getattr(selfalign, old)


def test_an_attribute_that_never_was():
    with pytest.raises(AttributeError, match="module 'selfalign' has no attribute 'nothing'"):
        _ = selfalign.nothing


# Devices and gradients, in PyTorch


@pytest.mark.only("torch")
def test_two_devices():
    import torch

    rule = r"All tensors of one call must be on one device\."
    fix = r"Move them with \.to\(device\) first\."
    with pytest.raises(ValueError, match=rf"^{rule} Received: tensors on cpu and meta\. {fix}"):
        sra()(tokens(2, 3, 4), torch.zeros(2, 3, 4, device="meta"))


@pytest.mark.only("torch")
def test_a_module_is_no_structure_of_arrays():
    import torch

    message = r"must be a tensor\. Received: Linear Linear\(.*\. Convert it first\."
    with pytest.raises(TypeError, match=message):
        ema(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))


@pytest.mark.only("torch")
def test_a_scalar_may_stay_on_another_device():
    import torch

    far = torch.zeros(2, 3, 4, device="meta")
    term = sra(weight=0.5 * schedules.Warmup(10))(far, far, step=torch.tensor(3))
    assert term.device.type == "meta"


@pytest.mark.only("torch")
def test_times_that_carry_a_gradient_are_looked_at_without_a_warning():
    import torch

    t = torch.tensor([0.5, 0.75], requires_grad=True)
    moved = time_gap.teacher_time(paths.Linear(), t, torch.full((2,), 0.5))
    assert moved.tolist() == pytest.approx([0.4, 0.65])


def test_numbers_of_a_broken_kind_are_refused_before_anything_is_computed():
    """A NaN in t is an error where it can be seen; NumPy's scalars are numbers."""
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        sra().teacher_time(tensor([np.nan]), tensor([0.5]))
    assert sra(weight=np.float32(0.25), max_gap=np.float64(0.5)).weight_at() == 0.25


# The tables are whole

ELSEWHERE = (
    # test_two_devices
    "All tensors of one call must be on one device. Received: tensors on ",
    # test_imports.py
    "Keras must be imported before torch.compile traces selfalign. Received: a first call under "
    "torch.compile. Build the SelfAlignment first, or run the first step eagerly.",
)


def test_every_error_of_the_core_is_in_the_tables():
    """The longest literal of each rule in the sources occurs in a message that a case gave."""
    messages = [message for call, *_ in CASES.values() if (message := message_of(call))]
    core = pathlib.Path(selfalign.__file__).parent
    files = [
        file for folder in (".", "paths", "objectives") for file in (core / folder).glob("*.py")
    ]
    trees = [ast.parse(file.read_text("utf-8")) for file in files]
    rules = {rule for tree in trees for rule in literal_rules(tree)}
    assert len(rules) > 40
    known = [*messages, *ELSEWHERE]
    assert sorted(rule for rule in rules if not any(rule in message for message in known)) == []


def message_of(call):
    try:
        call()
    except Exception as error:  # of the wrong kind: the test of that case says so
        return str(error)
    return None


def literal_rules(tree):
    """The longest string in the first argument of each invalid(), ValueError() and TypeError()."""
    for node in ast.walk(tree):
        called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if called in ("invalid", "ValueError", "TypeError"):
            parts = [
                part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)
            ]
            texts = [part for part in parts if isinstance(part, str)]
            if texts:
                yield max(texts, key=len)
