"""Presets: the published layers of named models, and what the recipes set."""

import dataclasses

import numpy as np
import oracle
import pytest

import selfalign
from selfalign import LayerSyncLoss, REPALoss, SRALoss, paths, presets, schedules

TABLE = {
    "SiT-B/2": (3, 8),
    "SiT-L/2": (6, 16),
    "SiT-XL/2": (8, 20),
    "DiT-B/2": (3, 7),
    "DiT-L/2": (6, 14),
    "DiT-XL/2": (8, 16),
}
MODELS = [f"{family}-{size}/2" for family in ("SiT", "DiT") for size in ("S", "B", "L", "XL")]
EACH_MODEL = pytest.mark.parametrize("name", MODELS)
DEPTHS = {"S": 12, "B": 12, "L": 24, "XL": 28}


# Names and layers


@pytest.mark.parametrize(("name", "layers"), TABLE.items())
def test_layers_of_the_papers_models(name, layers):
    assert selfalign.preset_layers(name) == layers


@pytest.mark.parametrize("family", ["SiT", "DiT"])
def test_s_has_the_layers_of_b(family):
    assert presets.preset_layers(f"{family}-S/2") == presets.preset_layers(f"{family}-B/2")


@pytest.mark.parametrize("patch", [1, 2, 4, 8, 16])
def test_the_patch_size_does_not_matter(patch):
    assert presets.preset_layers(f"SiT-L/{patch}") == (6, 16)


@EACH_MODEL
def test_names_are_parsed(name):
    model = presets.parse(name)
    assert name == f"{model.family}-{model.size}/2"
    assert model.depth == DEPTHS[model.size]


@EACH_MODEL
@pytest.mark.parametrize("kind", [SRALoss, LayerSyncLoss, REPALoss])
def test_layers_fit_the_model(kind, name):
    loss = kind.preset(name)
    depth = presets.parse(name).depth
    layers = loss.layers(depth)
    assert all(1 <= layer <= depth for layer in layers)
    assert list(layers) == sorted(layers)


# SRA's recipes


@EACH_MODEL
def test_default_recipe(name):
    loss = SRALoss.preset(name)
    student, teacher = selfalign.preset_layers(name)
    path = paths.Discrete() if name.startswith("DiT") else paths.Linear()
    assert loss == SRALoss(student_layer=student, teacher_layer=teacher, path=path)
    assert (loss.distance, loss.weight_at()) == ("cosine", 0.5)
    assert (loss.max_gap, loss.random_gap) == (0.2, True)
    assert loss.decay == schedules.Constant(0.9999)


@pytest.mark.parametrize("resolution", [256, 512])
@EACH_MODEL
def test_paper_recipe(name, resolution):
    loss = SRALoss.preset(name, recipe="paper", resolution=resolution, steps_per_epoch=10)
    base = {"SiT": 0.2, "DiT": 0.04}[name[:3]]
    assert (loss.distance, loss.beta, loss.max_gap) == ("smooth_l1", 0.05, 0.2)
    assert loss.path.name == {"SiT": "linear", "DiT": "discrete"}[name[:3]]
    for epoch in (0, 99, 100, 149, 150, 400, 800):
        wanted = oracle.paper_weight(base, epoch, resolution)
        np.testing.assert_allclose(loss.weight_at(10 * epoch), wanted, rtol=1e-12)


def test_numbers_of_the_paper():
    sit, dit = (SRALoss.preset(name, recipe="paper") for name in ("SiT-XL/2", "DiT-XL/2"))
    of_sit = {149: 0.2, 150: 0.19954, 200: 0.17784, 400: 0.11221, 800: 0.04467}
    of_dit = {0: 0.04, 400: 0.02244}
    assert {epoch: round(sit.weight_at(5004 * epoch), 5) for epoch in of_sit} == of_sit
    assert {epoch: round(dit.weight_at(5004 * epoch), 5) for epoch in of_dit} == of_dit


@EACH_MODEL
def test_official_recipe(name):
    loss = SRALoss.preset(name, recipe="official-2026-07")
    assert (loss.distance, loss.weight_at()) == ("token_axis_cosine", 0.5)


@EACH_MODEL
def test_short_recipe(name):
    """The default's layers, path and distance; a smaller weight, and an EMA that soon forgets."""
    loss, default = SRALoss.preset(name, recipe="short"), SRALoss.preset(name)
    assert (loss.weight_at(), default.weight_at()) == (0.1, 0.5)
    assert dataclasses.replace(loss, weight=default.weight, decay=default.decay) == default
    assert left_of_the_start(loss, 5000) < 0.01
    assert left_of_the_start(default, 5000) > 0.5


def left_of_the_start(loss, steps):
    """The weight of the first parameters in the average after so many steps."""
    return np.prod([loss.decay_at(step) for step in range(steps)])


def test_changes_override_the_recipe():
    changes = {"weight": 0.1, "path": paths.Linear(noise_at=0), "teacher_layer": 10}
    loss = SRALoss.preset("SiT-B/2", recipe="paper", **changes)
    assert (loss.weight_at(), loss.path.clean_at, loss.teacher_layer) == (0.1, 1, 10)
    assert loss.distance == "smooth_l1"


# The other objectives


@pytest.mark.parametrize(
    ("size", "layers"), [("S", (4, 8)), ("B", (4, 8)), ("L", (8, 16)), ("XL", (8, 16))]
)
@pytest.mark.parametrize("family", ["SiT", "DiT"])
def test_layersync(family, size, layers):
    student, teacher = layers
    wanted = LayerSyncLoss(student_layer=student, teacher_layer=teacher, weight=0.2)
    assert LayerSyncLoss.preset(f"{family}-{size}/2") == wanted


@pytest.mark.parametrize(("size", "layer"), [("S", 4), ("B", 4), ("L", 8), ("XL", 8)])
@pytest.mark.parametrize("family", ["SiT", "DiT"])
def test_repa(family, size, layer):
    wanted = REPALoss(student_layer=layer, width=768, hidden=2048, weight=0.5)
    assert REPALoss.preset(f"{family}-{size}/2") == wanted


@pytest.mark.parametrize("kind", presets.RECIPES)
@EACH_MODEL
def test_settings_of_every_recipe_make_an_objective(kind, name):
    objective = selfalign.objectives.KINDS[kind]
    for recipe in presets.RECIPES[kind]:
        loss = objective.preset(name, recipe, resolution=512, steps_per_epoch=7)
        settings = presets.settings_of(kind, name, recipe, 512, 7)
        assert objective(**settings) == loss


def test_every_kind_has_a_default_recipe():
    assert set(presets.RECIPES) == set(selfalign.objectives.KINDS)
    assert all("default" in recipes for recipes in presets.RECIPES.values())
