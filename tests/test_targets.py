"""Target selection: layers by name, by number and by fraction."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import selfalign
from selfalign import targets

TABLE = {
    "SiT-B/2": (3, 8),
    "SiT-L/2": (6, 16),
    "SiT-XL/2": (8, 20),
    "DiT-B/2": (3, 7),
    "DiT-L/2": (6, 14),
    "DiT-XL/2": (8, 16),
}
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


@pytest.mark.parametrize(("name", "layers"), TABLE.items())
def test_layers_of_the_papers_models(name, layers):
    assert selfalign.preset_layers(name) == layers


@pytest.mark.parametrize("family", ["SiT", "DiT"])
def test_s_has_the_layers_of_b(family):
    assert targets.preset_layers(f"{family}-S/2") == targets.preset_layers(f"{family}-B/2")


@pytest.mark.parametrize("patch", [1, 2, 4, 8, 16])
def test_the_patch_size_does_not_matter(patch):
    assert targets.preset_layers(f"SiT-L/{patch}") == (6, 16)


@pytest.mark.parametrize("name", TABLE)
def test_names_are_parsed(name):
    family, size = targets.parse_preset(name)
    assert name == f"{family}-{size}/2"
    assert targets.family_of(name) == family


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ((8, 20), 28, (8, 20)),
        ((0.25, 0.7), 12, (3, 8)),
        ((0.25, 0.7), 24, (6, 17)),
        ((0.25, 0.7), 28, (7, 20)),
        ((0.25, 0.75), 12, (3, 9)),
        ((0.25, 0.75), 10, (3, 8)),  # 2.5 and 7.5: halves go up
        ((0.01, 0.99), 12, (1, 12)),
        ((3, 0.7), 12, (3, 8)),
        ((0.25, 12), 12, (3, 12)),
    ],
)
def test_layers_in_a_model_of_given_depth(layers, depth, expected):
    assert targets.resolve_layers(*layers, depth=depth) == expected
    assert selfalign.SRALoss(student_layer=layers[0], teacher_layer=layers[1]).layers(depth) == expected


@given(st.integers(1, 200), fractions, fractions)
def test_a_fraction_is_a_layer_of_the_model_and_keeps_the_order(depth, a, b):
    student, teacher = targets.resolve_layers(min(a, b), max(a, b), depth, allow_same_layer=True)
    assert 1 <= student <= teacher <= depth
    assert abs(student - min(a, b) * depth) <= 1
    assert abs(teacher - max(a, b) * depth) <= 1


@given(st.integers(2, 200).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth - 1))))
def test_numbers_are_taken_as_they_are(drawn):
    depth, layer = drawn
    assert targets.resolve_layers(layer, depth, depth) == (layer, depth)


def test_the_same_layer_must_be_asked_for():
    assert targets.resolve_layers(3, 3, 12, allow_same_layer=True) == (3, 3)
    assert selfalign.SRALoss(student_layer=3, teacher_layer=3, allow_same_layer=True).layers(12) == (3, 3)
