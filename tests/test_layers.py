"""Layers by number and by fraction of the depth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import selfalign
from selfalign import layers

fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
RESOLVED = [
    ((8, 20), 28, (8, 20)),
    ((0.25, 0.7), 12, (3, 8)),
    ((0.25, 0.7), 24, (6, 17)),
    ((0.25, 0.7), 28, (7, 20)),
    ((0.25, 0.75), 12, (3, 9)),
    ((0.25, 0.75), 10, (3, 8)),  # 2.5 and 7.5: halves go up
    ((0.01, 0.99), 12, (1, 12)),
    ((3, 0.7), 12, (3, 8)),
    ((0.25, 12), 12, (3, 12)),
]


@pytest.mark.parametrize(("given_layers", "depth", "expected"), RESOLVED)
def test_layers_in_a_model_of_given_depth(given_layers, depth, expected):
    student, teacher = given_layers
    assert layers.resolve_layers(student, teacher, depth=depth) == expected
    for kind in (selfalign.SRALoss, selfalign.LayerSyncLoss):
        assert kind(student_layer=student, teacher_layer=teacher).layers(depth) == expected


@pytest.mark.parametrize(("given_layers", "depth", "expected"), RESOLVED)
def test_one_layer_where_the_target_has_none(given_layers, depth, expected):
    student = given_layers[0]
    assert layers.resolve_layer("student_layer", student, depth) == expected[0]
    loss = selfalign.REPALoss(student_layer=student, width=6)
    assert loss.layers(depth) == expected[:1]


@given(st.integers(1, 200), fractions, fractions)
def test_a_fraction_is_a_layer_of_the_model_and_keeps_the_order(depth, a, b):
    student, teacher = layers.resolve_layers(min(a, b), max(a, b), depth, allow_same_layer=True)
    assert 1 <= student <= teacher <= depth
    assert abs(student - min(a, b) * depth) <= 1
    assert abs(teacher - max(a, b) * depth) <= 1


@st.composite
def depths_and_layers(draw):
    depth = draw(st.integers(2, 200))
    return depth, draw(st.integers(1, depth - 1))


@given(depths_and_layers())
def test_numbers_are_taken_as_they_are(drawn):
    depth, layer = drawn
    assert layers.resolve_layers(layer, depth, depth) == (layer, depth)


def test_the_same_layer_must_be_asked_for():
    assert layers.resolve_layers(3, 3, 12, allow_same_layer=True) == (3, 3)
    loss = selfalign.SRALoss(student_layer=3, teacher_layer=3, allow_same_layer=True)
    assert loss.layers(12) == (3, 3)


def test_the_order_of_a_number_and_a_fraction_waits_for_the_depth():
    loss = selfalign.LayerSyncLoss(student_layer=8, teacher_layer=0.5)
    assert loss.layers(28) == (8, 14)
    with pytest.raises(ValueError, match=r"must come before.*Received: student 8, teacher 6"):
        loss.layers(12)
