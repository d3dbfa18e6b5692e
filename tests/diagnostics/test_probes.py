"""Probes: what they read from features, and what they do not."""

import numpy as np
import pytest

from selfalign import diagnostics

pytestmark = pytest.mark.only("torch")  # NumPy and scikit-learn alone: once


def clouds(rng, distance, n=90):
    """Features of three classes, and the classes."""
    labels = np.arange(n) % 3
    return rng.normal(size=(n, 6)) + distance * np.eye(6)[labels], labels


@pytest.mark.parametrize("probe", [diagnostics.linear_probe, diagnostics.knn_probe])
def test_probes_tell_what_is_there_from_what_is_not(probe):
    import torch

    rng = np.random.default_rng(0)
    found = [probe(*clouds(rng, distance)) for distance in (0, 2, 20)]
    assert found[0] < 0.55
    assert found[0] < found[1] < found[2] == 1
    x, labels = clouds(rng, 3)
    half = torch.tensor(x, dtype=torch.bfloat16, requires_grad=True)
    wanted = probe(half.detach().double().numpy(), labels)
    assert probe(half, torch.tensor(labels)) == pytest.approx(wanted)
    assert probe(x, labels) == probe(x, labels)


@pytest.mark.parametrize("probe", [diagnostics.linear_probe, diagnostics.knn_probe])
def test_probes_of_other_samples(probe):
    """Labels that do not fit are not read; features are standardised as those fitted to."""
    rng = np.random.default_rng(0)
    train, test = clouds(rng, 3), clouds(rng, 3, 60)
    accuracy = probe(*train, held_out=test)
    assert accuracy * 60 == pytest.approx(round(accuracy * 60))
    assert accuracy > 0.9
    assert probe(*train, held_out=(test[0], (test[1] + 1) % 3)) < 0.1
    mean, deviation = train[0].mean(0), train[0].std(0)
    standard = [((x - mean) / deviation, labels) for x, labels in (train, test)]
    assert probe(*standard[0], held_out=standard[1]) == pytest.approx(accuracy)


def test_the_linear_probe_is_held_out():
    """As many features as samples fit any labels; what counts is what holds for others."""
    rng = np.random.default_rng(0)
    assert diagnostics.linear_probe(rng.normal(size=(60, 60)), np.arange(60) % 2) < 0.75


def test_per_layer_runs_over_layers_and_times():
    features = {0.1: [np.eye(3), 2 * np.eye(3)], 0.5: [np.eye(3), np.eye(3)]}
    assert diagnostics.per_layer(features, diagnostics.feature_norm) == {0.1: [1, 2], 0.5: [1, 1]}
    got = diagnostics.per_layer(features, diagnostics.effective_rank, center=True)
    assert got[0.5][0] == pytest.approx(2)
