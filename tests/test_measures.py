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

TINY = ["--no-sra", "--patch", "2", "--width", "16", "--depth", "3", "--batch-size", "8"]


@pytest.fixture(scope="module")
def run():
    return torch_sit.Run(common.digits(), common.parse(torch_sit.PARSER, TINY))


@pytest.fixture(scope="module")
def judge(run):
    return measures.Judge(run.data, epochs=1)


@pytest.fixture(scope="module")
def features(judge, run):
    """Of all real images, and of a hundred others."""
    others = judge.features(run.data.held_out_images[:100])
    return judge.real.double().numpy(), others.double().numpy()


def test_the_frechet_distance_is_the_literatures(judge, run, features):
    real, fake = features
    real_covariance = np.cov(real, rowvar=False)
    covariance = np.cov(fake, rowvar=False)
    root = scipy.linalg.sqrtm(covariance @ real_covariance).real
    means = np.sum((fake.mean(0) - real.mean(0)) ** 2)
    expected = means + np.trace(covariance + real_covariance - 2 * root)
    found = judge.frechet(run.data.held_out_images[:100])
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_kernel_distance_is_the_literatures(judge, run, features):
    real, fake = features
    few = real[:100]

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_off_diagonal(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    within = mean_off_diagonal(kernel(few, few)) + mean_off_diagonal(kernel(fake, fake))
    expected = within - 2 * kernel(few, fake).mean()
    found = judge.kernel(run.data.held_out_images[:100])
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_coverage_is_the_literatures(judge, run, features):
    real, fake = features
    few = real[:100]
    between_real = np.linalg.norm(few[:, None] - few[None], axis=-1)
    radius = np.sort(between_real, axis=1)[:, 5]  # the nearest of all is the image itself
    to_fake = np.linalg.norm(few[:, None] - fake[None], axis=-1)
    expected = (to_fake.min(1) < radius).mean()
    assert judge.coverage(run.data.held_out_images[:100]) == pytest.approx(expected, abs=0.011)


def test_the_judge_knows_real_images_from_others(judge, run):
    data = run.data
    assert judge.nearest(data.images[:20]) < 1e-2
    assert judge.nearest(data.held_out_images[:20]) > 1
    assert judge.coverage(data.images[:50]) == 1
    assert judge.coverage(data.images[:1].expand(50, -1, -1, -1)) < 0.2
    blank = torch.zeros_like(data.images[:50])
    assert judge.frechet(blank) > judge.frechet(data.held_out_images[:50])
    assert judge.kernel(blank) > judge.kernel(data.held_out_images[:50])


def test_the_held_out_loss_is_the_mean_over_images_and_levels(run):
    x0 = run.data.held_out_images[:70]
    labels = run.data.held_out_labels[:70]
    noise = measures.noise_like(x0, 2)
    losses = []
    for level in torch.linspace(0.05, 0.95, 10):
        t = torch.full((70,), float(level))
        with torch.no_grad():
            prediction = run.ema((1 - level) * x0 + level * noise, t, labels)
        losses.append((prediction - (noise - x0)).square().mean())
    expected = torch.stack(losses).mean().item()
    few = run.data._replace(held_out_images=x0, held_out_labels=labels)
    assert measures.held_out_loss(run.ema, few) == pytest.approx(expected, rel=1e-5)


def test_probes_by_time_and_block(run):
    found = measures.probe(run.ema, run.data, [0.1, 0.9])
    assert [len(accuracies) for accuracies in found.values()] == [3, 3]
    assert min(found[0.1]) > max(found[0.9])  # hardly anything is left to see at t = 0.9


def test_samples_are_the_same_for_the_same_model(run):
    images, y = measures.samples(run.ema, run.data, 70, steps=2)
    again, _ = measures.samples(run.ema, run.data, 70, steps=2)
    assert torch.equal(images, again)
    assert images.shape == (70, 1, 8, 8)
    assert images.abs().max() <= 1
    assert torch.equal(y, torch.arange(70) % 10)


def test_steps_are_timed_in_turns():
    order = []

    def step_of(name):
        def make_step():
            order.append(name)
            return torch.zeros(()), torch.zeros(())

        return make_step

    seconds = measures.time_steps({"a": step_of("a"), "b": step_of("b")}, turns=3, steps=2)
    assert all(0 < value < 1 for value in seconds.values())
    assert "".join(order) == "aabb" * 4  # the first turn warms up
