"""Options of SelfAlignment: unknown ones, those of the first edition, and values that cannot be."""

import inspect
import sys

import keras
import pytest
import torch
from dit_models import DiT, hooks_on, seen
from refusals.generated import KINDS, outcome

from selfalign import _backend
from selfalign.adapters.torch import SelfAlignment, features
from selfalign.adapters.torch.options import OPTIONS

OLD = {
    "student": ("blocks.1", r"taps=\(student, teacher\), paths of two modules"),
    "example": ((torch.zeros(1, 5, 4), torch.zeros(1)), r"`with align.recording\(\): model\(.*"),
    "truncate": (True, r"teacher=EMATeacher\(truncate=True\)"),
    "offload": (True, r"teacher=EMATeacher\(offload=True\)"),
    "teacher_dtype": (torch.bfloat16, r"teacher=EMATeacher\(dtype=torch.bfloat16\)"),
    "batch_share": (0.5, r"teacher=EMATeacher\(batch_fraction=0.5\)"),
    "check_condition": (False, r'checks="on" or "off"'),
    "check_finite": (True, r'checks="finite"'),
}


@pytest.mark.parametrize("name", OLD)
def test_an_option_of_the_first_edition_says_the_new_one(model, loss, name):
    value, new = OLD[name]
    message = (
        rf"(?s)option {name}= must be written as in the second edition. "
        rf"Received: {name}=.*\. Pass {new}\.$"
    )
    with pytest.raises(TypeError, match=message):
        SelfAlignment(model, loss, **{name: value})
    assert hooks_on(model) == 0


def test_an_option_that_never_was(model, loss):
    message = (
        r"must be given options that it has. Received: laeyrs=3. It has: blocks, taps, width, "
        r"select, call, seed, compile, log_metrics, teacher, checks\."
    )
    with pytest.raises(TypeError, match=message):
        SelfAlignment(model, loss, laeyrs=3)


def test_every_option_that_is_listed_is_one(model, loss):
    """And the list is whole."""
    parameters = inspect.signature(SelfAlignment.__init__).parameters.values()
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert named == list(OPTIONS)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"checks": "all"},
            ValueError,
            r"checks must be one of 'on', 'off', 'finite'. Received: 'all'",
        ),
        ({"checks": True}, ValueError, r"checks must be one of .* Received: True"),
        ({"checks": None}, ValueError, r"checks must be one of .* Received: None"),
        ({"log_metrics": 10}, TypeError, r"log_metrics must be True or False. Received: 10. Pass"),
        (
            {"compile": "max-autotune"},
            TypeError,
            r"compile must be True, False, or a dict .* Received: 'max-autotune'. Pass a",
        ),
        ({"compile": None}, TypeError, r"compile must be .* Received: None. Pass a boolean"),
        ({"compile": 1}, TypeError, r"compile must be .* Received: 1. Pass a boolean or a dict"),
    ],
)
def test_values_that_cannot_be(model, loss, options, kind, message):
    with pytest.raises(kind, match=message):
        SelfAlignment(model, loss, **options)
    assert hooks_on(model) == 0


def test_positional_options_are_none(model, loss):
    with pytest.raises(TypeError, match="positional"):
        SelfAlignment(model, loss, "blocks")


@pytest.mark.parametrize("checks", ["on", "off", "finite"])
def test_checks_change_no_number(batch, loss, checks):
    terms = []
    for word in ("on", checks):
        torch.manual_seed(0)
        model = DiT(label_dropout=0.5)
        align = SelfAlignment(model, loss, seed=1, checks=word)
        model(*seen(batch))
        terms.append(align(*batch))
    assert torch.equal(*terms)


def test_the_seed_is_torchs_own_unless_given(loss):
    torch.manual_seed(11)
    first = SelfAlignment(DiT(), loss)
    assert first.state_dict()["seed"] == 11
    given = SelfAlignment(DiT(), loss, seed=11)
    assert torch.equal(first.projector.hidden_kernel, given.projector.hidden_kernel)


# Another backend of Keras


@pytest.fixture
def no_keras_yet(monkeypatch):
    monkeypatch.setattr(_backend, "_backend", None)


@pytest.mark.parametrize("imported", [False, True])
def test_another_backend_is_named_when_attaching(model, loss, no_keras_yet, monkeypatch, imported):
    if imported:
        monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
        reason = r"\(Keras already runs on it in this process"
    else:
        monkeypatch.delitem(sys.modules, "keras")
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        reason = r"\(the environment variable KERAS_BACKEND asks for it\)"
    message = (
        rf"Received: a torch tensor, with the Keras backend 'jax' {reason}.* Set "
        r"KERAS_BACKEND=torch before the first import of Keras"
    )
    with pytest.raises(TypeError, match=message):
        SelfAlignment(model, loss)
    assert hooks_on(model) == 0


# Wrong values of every kind


def wrong(kind, *right):
    """What is wrong with an option of this kind, without what is right for it."""
    return {f"{kind}: {what}": value for what, value in KINDS[kind].items() if what not in right}


NUMBER = wrong("steps", "nothing")
WRONG = {
    "log_metrics": wrong("switch"),
    "checks": wrong("word"),
    "compile": wrong("switch", "a dict"),
    "width": NUMBER,
    "seed": wrong("from 0", "nothing"),
    "select": wrong("function", "nothing"),
    "call": wrong("function", "nothing"),
    "blocks": {"a number": 3, "True": True, "empty": "", "no list": "out"},
    "taps": {"a number": 3, "one": ("blocks.1",), "a word": "blocks.1", "nowhere": ("a", "b")},
    "teacher": {"a word": "blocks.1", "a number": 3, "True": True, "a dict": {}},
}


@pytest.mark.parametrize("option", WRONG)
def test_every_wrong_value_is_refused_in_three_parts(model, loss, option):
    ends = {
        what: outcome(lambda v=value: SelfAlignment(model, loss, **{option: v}))
        for what, value in WRONG[option].items()
    }
    assert {what: end for what, end in ends.items() if end[0] != "clear"} == {}
    if option != "taps":  # of those the paths are named
        assert all(option in message for _, message in ends.values())
    assert hooks_on(model) == 0


def test_there_are_wrong_values_for_every_option():
    assert set(WRONG) == set(OPTIONS)
    assert sum(map(len, WRONG.values())) > 80


@pytest.mark.parametrize(
    "option",
    [
        {"mean": "no"},
        {"times": "0.5"},
        {"times": [None]},
        {"select": 3},
        {"call": "x"},
        {"batch_size": 2.5},
    ],
)
def test_wrong_values_for_features(model, option):
    x0 = torch.zeros(2, 5, 4)
    options = {"times": [0.5], **option}
    kind, message = outcome(lambda: features(model, x0, x0, **options))
    assert kind == "clear"
    assert next(iter(option)) in message
