"""The finder: which layers it proposes, and why."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import selfalign
from selfalign import diagnostics

pytestmark = pytest.mark.only("torch")  # NumPy and scikit-learn alone: once


def model_features(known, rng, n=240, times=(0.1, 0.5)):
    """Layers that know so much of a sample's class, less of it at more noise; the rest is noise."""
    labels = np.arange(n) % 4
    hidden = 4 * np.eye(8)[labels] + rng.normal(size=(n, 8))
    layers = {}
    for time in times:
        signals = [fraction * (1 - time) * hidden for fraction in known]
        layers[time] = [signal + rng.normal(size=(n, 8)) for signal in signals]
    return layers, labels


@pytest.mark.parametrize("labelled", [True, False])
def test_the_finder_proposes_the_first_of_the_best_and_one_half_way(labelled):
    known = [0.1, 0.25, 0.5, 0.9, 2.0, 2.0, 1.0, 0.5]
    features, labels = model_features(known, np.random.default_rng(0))
    given_labels = labels if labelled else None
    options = {"probe": diagnostics.knn_probe, "tolerance": 0.05}
    found = diagnostics.find_layers(features, given_labels, **options)
    assert found.teacher in (5, 6)
    assert found.student in (2, 3)
    assert found.student <= found.teacher - 2
    half = (found.quality[0] + found.quality[found.teacher - 1]) / 2
    distances = [abs(q - half) for q in found.quality[: found.teacher - 2]]
    assert distances[found.student - 1] == min(distances)
    np.testing.assert_allclose(found.quality, np.mean(list(found.scores.values()), 0))


def test_the_finder_says_why():
    features, labels = model_features([0.1, 0.5, 2.0, 2.0], np.random.default_rng(0))
    found = diagnostics.find_layers(features, labels)
    text = str(found)
    assert list(found.scores) == [0.1, 0.5]
    assert f"Teacher, block {found.teacher} of 4: {found.quality[found.teacher - 1]:.3f}" in text
    assert f"Student, block {found.student}: {found.quality[found.student - 1]:.3f}" in text
    assert "Score: accuracy of linear_probe on held-out samples; mean over t = 0.1, 0.5." in text
    assert found.measure == "linear_probe"
    assert "A heuristic, of one model" in text
    assert "0.25 and 0.7 of the depth, is 1 -> 2 here" in text or "is 1 -> 3 here" in text
    selfalign.SRALoss(student_layer=found.student, teacher_layer=found.teacher).layers(4)


def test_the_finder_says_why_without_labels():
    features, _ = model_features([0.1, 0.5, 2.0, 2.0], np.random.default_rng(0))
    unlabelled = diagnostics.find_layers(features)
    text = str(unlabelled)
    assert "Score: CKNNA of a layer's features at t = 0.1 with its own at more noise" in text
    assert list(unlabelled.scores) == [0.5]
    assert unlabelled.scores[0.5][2] == diagnostics.cknna(features[0.1][2], features[0.5][2])


def test_where_the_first_layer_is_best_the_advice_stands():
    accuracies = iter([0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    features = {0.5: [np.eye(3)] * 8}
    found = diagnostics.find_layers(features, [0, 1, 2], probe=lambda x, y: next(accuracies))
    advised = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7).layers(8)
    assert (found.student, found.teacher) == advised
    assert "No block is better than block 1 (0.900): these features decide nothing" in str(found)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_every_proposal_is_a_pair_that_the_loss_takes(quality):
    scores = iter(quality)
    features = {0.5: [np.eye(2)] * len(quality)}
    found = diagnostics.find_layers(features, [0, 1], probe=lambda x, y: next(scores))
    assert 1 <= found.student < found.teacher <= len(quality)
    loss = selfalign.SRALoss(student_layer=found.student, teacher_layer=found.teacher)
    assert loss.layers(len(quality)) == (found.student, found.teacher)


def test_the_finders_plot(tmp_path):
    features, _ = model_features([0.1, 0.5, 2.0, 2.0], np.random.default_rng(0), n=40)
    diagnostics.find_layers(features).plot(tmp_path / "layers.svg")
    assert "</svg>" in (tmp_path / "layers.svg").read_text()
