"""The study: every arm trains, differs from its neighbours where it should, and what is measured can be taken up again."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.only("torch")
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("studies", "examples")]

import common  # noqa: E402
import records  # noqa: E402
import side_by_side  # noqa: E402
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


def test_a_run_leaves_all_that_the_report_reads():
    size = study.SIZES["digits"]._replace(
        every=2, steps={"core": (4, 2)}, samples=20, sampling_steps=2, judge=(100, 1), probed=200
    )
    arguments = ("--data", "digits", *TINY[1:-2], "--steps", "4")
    said = []
    rows = study.train(lambda step, state: said.append((step, state)), "core", "default", 3, size, arguments)
    found = {(step, metric): value for step, metric, where, value in rows if not where}
    for metric in ("held-out loss", "Frechet distance", "KID", "coverage", "judge's accuracy"):
        assert {step for step, name in found if name == metric} == {2, 4}, metric
    assert {"time of a step", "nearest image", "real: KID", "real: nearest image"} < {name for _, name in found}
    probed = {(step, metric, where.split()[3]) for step, metric, where, _ in rows if where}
    ema = {(4, "probe of the EMA", str(time)) for time in study.TIMES}
    assert probed == {(2, "probe of the EMA", "0.5"), *ema, (4, "probe of the model", "0.5")}
    assert {where.split()[1] for _, _, where, _ in rows if where} == {str(n) for n in range(1, 9)}
    assert all(value == value for *_, value in rows)
    assert said == [(2, ""), (2, "measuring"), (4, ""), (4, "measuring")]


def test_what_has_been_run_is_not_run_again(tmp_path, monkeypatch):
    file, ran = tmp_path / "digits-core.csv", []
    records.keep(file, "none", 1, [(4, "KID", "", 0.5)])

    def train_all(work, jobs, steps, workers, done):
        ran.append((list(jobs), steps, workers))
        done("default, seed 1", [(4, "KID", "", 0.25)])

    monkeypatch.setattr(side_by_side, "train_all", train_all)
    monkeypatch.setattr(study, "GROUPS", {"core": {name: study.GROUPS["core"][name] for name in ("none", "default")}})
    for _ in range(2):
        study.run_missing("core", file, [1], study.SIZES["digits"], ("--steps", "4"), 2)
    assert ran == [(["default, seed 1"], 4, 2)]
    assert records.read(file) == [("none", 1, 4, "KID", "", 0.5), ("default", 1, 4, "KID", "", 0.25)]


def test_runs_of_other_lengths_are_no_part_of_a_study(tmp_path):
    file = tmp_path / "digits-core.csv"
    study.describe("core", file, study.SIZES["digits"], ("--steps", "4"))
    records.keep(file, "none", 1, [(4, "KID", "", 0.5)])
    study.describe("core", file, study.SIZES["digits"], ("--steps", "4"))
    with pytest.raises(
        ValueError, match=r"settings it began with\. Received: --steps 8, for .* are of --steps 4\. Repeat those"
    ):
        study.describe("core", file, study.SIZES["digits"], ("--steps", "8"))


def test_a_study_of_no_images_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "core", "--data", "mnits", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: --data must be digits, fashion-mnist, or a folder of images"):
        study.main()
    assert not list(tmp_path.iterdir())


def test_a_training_that_fails_leaves_the_others_their_results():
    kept = {}
    jobs = {"fails": (3,), "works": (int,)}  # isinstance(report, 3) raises, isinstance(report, int) is False
    with pytest.raises(TypeError, match="isinstance"):
        side_by_side.train_all(isinstance, jobs, 1, 1, kept.__setitem__)
    assert kept == {"works": False}
