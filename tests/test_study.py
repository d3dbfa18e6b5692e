"""The study: every arm trains and differs from the others, and what is measured can be resumed."""

import functools
import math
import sys
from pathlib import Path
from typing import NamedTuple

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
TINY = ("--patch", "2", "--width", "16", "--depth", "8", "--batch-size", "8")


class Trained(NamedTuple):
    """What some steps of an arm left behind."""

    losses: list[float]
    cosines: list[float]
    first_weights: torch.Tensor
    weights: torch.Tensor
    updates: int  # of the EMA


def all_weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@functools.cache
def trained(group, name):
    """In ablations 4 steps; elsewhere 12: an EMA of every 10th step has moved then."""
    settings = common.parse(torch_sit.PARSER, ["--no-sra", *TINY, "--seed", "3"])
    run = study.Run(study.load(("--data", "digits")), settings, study.GROUPS[group][name])
    first_weights = all_weights(run.model)
    losses = [run.training_step() for _ in range(4 if group == "ablations" else 12)]
    denoising, cosines = torch.tensor(losses).T.tolist()
    updates = run.align.step if run.align else 0
    if run.align:
        run.align.detach()
    return Trained(denoising, cosines, first_weights, all_weights(run.model), updates)


@pytest.mark.parametrize(("group", "name"), ARMS)
def test_every_arm_trains(group, name):
    arm = study.GROUPS[group][name]
    found = trained(group, name)
    assert all(map(math.isfinite, found.losses))
    assert not torch.equal(found.first_weights, found.weights)
    with_term = [not math.isnan(cosine) for cosine in found.cosines]
    steps = range(len(found.losses))
    assert with_term == [arm.loss is not None and step % arm.every == 0 for step in steps]
    assert found.updates == (0 if arm.loss is None else len(steps))


@pytest.mark.parametrize("group", ["core", "cheaper"])  # in ablations, two warm-ups begin alike
def test_arms_of_a_seed_start_alike_and_go_apart(group):
    """The first loss is the same to the last bit; later the weights of no two arms are."""
    arms = {name: trained(group, name) for name in study.GROUPS[group]}
    assert len({found.losses[0] for found in arms.values()}) == 1
    same = [
        (a, b)
        for a in arms
        for b in arms
        if a < b and torch.equal(arms[a].weights, arms[b].weights)
    ]
    assert same == []


def test_the_teacher_computes_half_of_the_tokens():
    half = study.HalfOfTheTokens(16, seed=0)
    tokens = torch.arange(16.0).reshape(1, 16, 1)
    seen = set()
    for _ in range(5):
        half.draw()
        (computed, condition) = half.before_first_block(torch.nn.Identity(), (tokens, "condition"))
        assert computed.shape == (1, 8, 1)
        assert condition == "condition"
        assert torch.equal(half.select(tokens), computed)  # the same places on both sides
        assert torch.equal(half.select(computed), computed)
        seen.add(tuple(half.places.tolist()))
    assert len(seen) == 5


def test_a_run_leaves_all_that_the_report_reads():
    size = study.SIZES["digits"]._replace(
        measured_every=2,
        lengths={"core": study.Length(4, losses_every=2)},
        samples=20,
        sampling_steps=2,
        judge_images=100,
        judge_epochs=1,
        probed=200,
    )
    said = []
    arguments = ("--data", "digits", *TINY, "--steps", "4")
    rows = study.train(lambda *what: said.append(what), "core", "default", 3, size, arguments)
    assert said == [(2, ""), (2, "measuring"), (4, ""), (4, "measuring")]
    assert not any(math.isnan(value) for *_, value in rows)

    steps = {}
    for step, metric, where, _ in rows:
        if not where:
            steps.setdefault(metric, set()).add(step)
    for metric in ("held-out loss", "Frechet distance", "KID", "coverage", "judge's accuracy"):
        assert steps[metric] == {2, 4}, metric
    for metric in ("time of a step", "nearest image", "real: KID", "real: nearest image"):
        assert steps[metric] == {4}, metric

    probes = [(step, metric, where.split()) for step, metric, where, _ in rows if where]
    ema = {(4, "probe of the EMA", str(time)) for time in study.TIMES}
    others = {(2, "probe of the EMA", "0.5"), (4, "probe of the model", "0.5")}
    assert {(step, metric, where[3]) for step, metric, where in probes} == ema | others
    assert {where[1] for _, _, where in probes} == {str(block) for block in range(1, 9)}


def test_what_has_been_run_is_not_run_again(tmp_path, monkeypatch):
    file = tmp_path / "digits-core.csv"
    ran = []
    records.keep(file, "none", 1, [(4, "KID", "", 0.5)])

    def train_all(work, jobs, steps, workers, done):
        ran.append((list(jobs), steps, workers))
        done("default, seed 1", [(4, "KID", "", 0.25)])

    arms = {name: study.GROUPS["core"][name] for name in ("none", "default")}
    monkeypatch.setattr(side_by_side, "train_all", train_all)
    monkeypatch.setattr(study, "GROUPS", {"core": arms})
    for _ in range(2):
        study.run_missing("core", file, [1], study.SIZES["digits"], ("--steps", "4"), 2)
    assert ran == [(["default, seed 1"], 4, 2)]
    assert records.read(file) == [
        ("none", 1, 4, "KID", "", 0.5),
        ("default", 1, 4, "KID", "", 0.25),
    ]


def test_runs_of_other_lengths_are_no_part_of_a_study(tmp_path):
    file = tmp_path / "digits-core.csv"
    size = study.SIZES["digits"]
    study.describe("core", file, size, ("--steps", "4"))
    records.keep(file, "none", 1, [(4, "KID", "", 0.5)])
    study.describe("core", file, size, ("--steps", "4"))
    message = r"settings it began with\. Received: --steps 8, for .* are of --steps 4\. Repeat"
    with pytest.raises(ValueError, match=message):
        study.describe("core", file, size, ("--steps", "8"))


def test_a_study_of_no_images_is_refused_in_a_sentence(tmp_path, monkeypatch):
    arguments = ["study.py", "core", "--data", "mnits", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    message = "error: --data must be digits, fashion-mnist, or a folder of images"
    with pytest.raises(SystemExit, match=message):
        study.main()
    assert not list(tmp_path.iterdir())


def test_a_training_that_fails_leaves_the_others_their_results():
    kept = {}
    # isinstance(report, 3) raises, isinstance(report, int) is False
    jobs = {"fails": (3,), "works": (int,)}
    with pytest.raises(TypeError, match="isinstance"):
        side_by_side.train_all(isinstance, jobs, 1, 1, kept.__setitem__)
    assert kept == {"works": False}
