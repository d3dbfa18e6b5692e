"""`selfalign presets`: the papers' layers, and what the recipes set."""

from pathlib import Path

import pytest

import selfalign
from selfalign import cli
from selfalign.presets import RECIPES

pytestmark = pytest.mark.only("torch")


def test_presets_are_the_papers(report):
    models = {row["model"]: row for row in report("presets")["models"]}
    for name, row in models.items():
        assert (row["student_layer"], row["teacher_layer"]) == selfalign.preset_layers(name)
    assert (models["SiT-XL/2"]["depth"], models["SiT-XL/2"]["path"]) == (28, "linear")
    assert (models["DiT-L/2"]["depth"], models["DiT-L/2"]["path"]) == (24, "discrete")
    assert len(models) == 8


def test_presets_show_the_recipes_weights(report):
    rows = {(row["recipe"], row["models"]): row for row in report("presets")["recipes"]}
    assert len(rows) == 8
    assert rows["paper", "SiT"] == {
        "recipe": "paper",
        "models": "SiT",
        "distance": "smooth_l1",
        "weight": 0.2,
        "epoch_400": 0.11221,
        "epoch_800": 0.04467,
        "decay": 0.9999,
    }
    assert [rows["paper", "DiT"][name] for name in ("weight", "epoch_400")] == [0.04, 0.02244]
    assert rows["official-2026-07", "DiT"]["distance"] == "token_axis_cosine"
    short = rows["short", "SiT"]
    assert (short["weight"], short["decay"]) == (0.1, 0.999)  # once it has warmed up


def test_presets_of_one_recipe_at_another_resolution(report, shown, lines):
    (sit, _) = report("presets", "--recipe", "paper", "--resolution", "512")["recipes"]
    assert sit["epoch_400"] == round(0.2 * 10 ** (-(400 - 99) / 800), 5)
    code, out, errors = shown("presets", "--recipe", "paper")
    assert (code, errors) == (0, "")
    wanted = {"SiT-XL/2 28 8 20 linear", "paper SiT smooth_l1 0.2 0.1122 0.04467 0.9999"}
    assert wanted <= set(lines(out))
    assert len(lines(out)) == 9 + 1 + 3


@pytest.mark.parametrize("kind", RECIPES)
def test_presets_of_every_objective_are_its_own(report, kind):
    found = report("presets", "--objective", kind)
    assert [row["recipe"] for row in found["recipes"]][::2] == list(RECIPES[kind])
    for row in found["models"]:
        loss = selfalign.objectives.KINDS[kind].preset(row["model"])
        assert row["student_layer"] == loss.student_layer
        assert row.get("teacher_layer") == getattr(loss, "teacher_layer", None)
    for row in found["recipes"]:
        loss = selfalign.objectives.KINDS[kind].preset("SiT-XL/2", row["recipe"])
        assert row["distance"] == loss.distance
        assert ("decay" in row) == (kind == "sra")
        assert row.get("width") == getattr(loss, "width", None)


def test_a_recipe_of_another_objective_is_wrong_usage(shown):
    code, out, errors = shown("presets", "--objective", "layersync", "--recipe", "paper")
    assert (code, out) == (2, "")
    message = "--recipe must be one of the objective layersync. Received: paper. It has: default."
    assert errors == f"selfalign: {message}\n"


def test_the_docs_show_what_the_command_shows(capsys):
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert cli.main(["presets", "--recipe", "paper"]) == 0
    assert f"$ selfalign presets --recipe paper\n{capsys.readouterr().out}```" in page
