"""The study: every arm trains, differs from its neighbours where it should, and what is measured can be taken up again."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.only("torch")
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("studies", "examples")]

import common  # noqa: E402
import study  # noqa: E402
import torch_sit  # noqa: E402

ARMS = [(group, name) for group, arms in study.GROUPS.items() for name in arms]
TINY = ["--no-sra", "--patch", "2", "--width", "16", "--depth", "8", "--batch-size", "8", "--seed", "3"]


def settings() -> argparse.Namespace:
    return common.parse(torch_sit.PARSER, TINY)


@pytest.fixture(scope="module")
def data():
    return common.digits()


@pytest.mark.parametrize(("group", "name"), ARMS)
def test_every_arm_trains(data, group, name):
    run = study.Run(data, settings(), study.GROUPS[group][name])
    before = [p.clone() for p in run.model.parameters()]
    seen = [run.training_step() for _ in range(4)]
    assert all(torch.isfinite(denoising) for denoising, _ in seen)
    cosines = [float(cosine) for _, cosine in seen]
    every = study.GROUPS[group][name].every
    assert [cosine == cosine for cosine in cosines] == [every > 0 and step % every == 0 for step in range(4)]
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    if run.align:
        assert run.align.step == 4
        run.align.detach()


def test_arms_of_a_seed_start_alike_and_go_apart(data):
    """The first denoising loss is the same to the last bit; after some steps the weights of no two arms of a group are."""
    for arms in (study.GROUPS["core"], study.GROUPS["cheaper"]):  # in ablations, two warm-ups begin alike
        first, weights = [], []
        for arm in arms.values():
            run = study.Run(data, settings(), arm)
            first.append(float(run.training_step()[0]))
            for _ in range(11):  # an EMA of every 10th step has moved then
                run.training_step()
            weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
        assert len(set(first)) == 1
        same = [(a, b) for a in range(len(weights)) for b in range(a) if torch.equal(weights[a], weights[b])]
        assert not same, [(list(arms)[a], list(arms)[b]) for a, b in same]


def test_results_are_kept_run_by_run_and_shown(tmp_path):
    file = tmp_path / "digits-core.csv"
    assert study.finished(file) == set()
    comma = "same layer, 2 -> 2"
    for arm, seed, value in (("none", 1, 0.5), (comma, 1, 0.25), ("none", 2, 0.75)):
        rows = [("held-out loss", "12", value), ("probe of the EMA", "block 8 t 0.5", value)]
        study.keep(file, arm, seed, rows)
    assert study.finished(file) == {("none", 1), (comma, 1), ("none", 2)}
    table = study.table("core", file)
    assert "| none |  |  | 0.625 ± 0.177 |" in table
    assert f"| {comma} |  |  | 0.250 |" in table


def test_a_table_of_nothing_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "core", "--table", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        study.main()
    assert "A table needs results. Received: --table, and no file" in capsys.readouterr().err
