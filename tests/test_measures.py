"""What the demo and the study measure, against the definitions in NumPy."""

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

pytestmark = pytest.mark.only("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import common  # noqa: E402
import measures  # noqa: E402
import torch_sit  # noqa: E402


@pytest.fixture(scope="module")
def run():
    settings = common.parse(
        torch_sit.PARSER, ["--no-sra", "--patch", "2", "--width", "16", "--depth", "3", "--batch-size", "8"]
    )
    return torch_sit.Run(common.digits(), settings)


@pytest.fixture(scope="module")
def judge(run):
    return measures.Judge(run.tensors, epochs=1)


def test_the_judges_distances_are_the_literatures(judge, run):
    images = run.tensors.held_out_images[:100]
    real, fake = (x.double().numpy() for x in (judge.real, judge.features(images)))
    covariance, real_covariance = np.cov(fake, rowvar=False), np.cov(real, rowvar=False)
    root = scipy.linalg.sqrtm(covariance @ real_covariance).real
    frechet = np.sum((fake.mean(0) - real.mean(0)) ** 2) + np.trace(covariance + real_covariance - 2 * root)
    assert judge.frechet(images) == pytest.approx(frechet, rel=1e-3)

    few = real[:100]
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
    expected = off(kernel(few, few)) + off(kernel(fake, fake)) - 2 * kernel(few, fake).mean()
    assert judge.kernel(images) == pytest.approx(expected, rel=1e-3, abs=1e-5)

    between = np.linalg.norm(few[:, None] - few[None], axis=-1)
    radius = np.sort(between, axis=1)[:, 5]  # the nearest of all is the image itself
    covered = (np.linalg.norm(few[:, None] - fake[None], axis=-1).min(1) < radius).mean()
    assert judge.coverage(images) == pytest.approx(covered, abs=0.011)


def test_the_judge_knows_real_images_from_others(judge, run):
    data = run.tensors
    assert judge.nearest(data.images[:20]) < 1e-2
    assert judge.nearest(data.held_out_images[:20]) > 1
    assert judge.coverage(data.images[:50]) == 1
    assert judge.coverage(data.images[:1].expand(50, -1, -1, -1)) < 0.2
    blank = torch.zeros_like(data.images[:50])
    assert judge.frechet(blank) > judge.frechet(data.held_out_images[:50])
    assert judge.kernel(blank) > judge.kernel(data.held_out_images[:50])


def test_the_held_out_loss_is_the_mean_over_images_and_levels(run):
    data = run.tensors
    few = common.Data(data.images, data.labels, data.held_out_images[:70], data.held_out_labels[:70], data.classes)
    x0, noise = few.held_out_images, measures.noise_like(few.held_out_images, 2)
    with torch.no_grad():
        losses = []
        for level in torch.linspace(0.05, 0.95, 10):
            t = torch.full((70,), float(level))
            error = run.ema((1 - level) * x0 + level * noise, t, few.held_out_labels) - (noise - x0)
            losses.append(error.square().mean())
    assert measures.held_out_loss(run.ema, few) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_probes_by_time_and_block(run):
    found = measures.probe(run.ema, run.tensors, [0.1, 0.9])
    assert [len(accuracies) for accuracies in found.values()] == [3, 3]
    assert min(found[0.1]) > max(found[0.9])  # hardly anything is left to see at t = 0.9


def test_samples_are_the_same_for_the_same_model(run):
    images, y = measures.samples(run.ema, run.tensors, 70, steps=2)
    again, _ = measures.samples(run.ema, run.tensors, 70, steps=2)
    assert torch.equal(images, again)
    assert images.shape == (70, 1, 8, 8)
    assert images.abs().max() <= 1
    assert torch.equal(y, torch.arange(70) % 10)


def test_steps_are_timed_in_turns(run):
    class Fake:
        steps = 0

        def training_step(self):
            self.steps += 1
            return torch.zeros(()), torch.zeros(())

    runs = {"a": Fake(), "b": Fake()}
    seconds = measures.time_steps(runs, turns=3, steps=2)
    assert all(0 < value < 1 for value in seconds.values())
    assert [fake.steps for fake in runs.values()] == [8, 8]
