"""Probes: how well a simple classifier reads the class from frozen features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from .._checks import check_function, check_number, invalid
from ._arrays import Features, Labels, Time, check_lists, optional_import, rows

HeldOut: TypeAlias = tuple[Features, Labels] | None
"""Features and labels of other samples, which are predicted; None: parts of the same samples."""


def linear_probe(
    features: Features, labels: Labels, folds: int = 3, *, held_out: HeldOut = None
) -> float:
    """Accuracy of a linear classifier of the features, cross-validated.

    It is logistic regression on standardised features.

    Args:
        features: [n, D]: of each sample, such as its mean token.
        labels: the samples' classes [n].
        folds: parts of the samples; each is predicted by a classifier of the others. The same folds
            at every call.
        held_out: (features, labels) of other samples to be predicted, instead of the parts.

    Returns:
        The (mean) held-out accuracy, in [0, 1].

    Raises:
        ValueError: features that are not [n, D] or not finite, labels of another number, a class
            with fewer samples than folds, or held-out features of another width.
        ImportError: scikit-learn is missing.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> labels = np.arange(60) % 3
        >>> diagnostics.linear_probe(np.eye(3)[labels], labels)
        1.0

    Reference: Alain and Bengio, "Understanding intermediate layers using linear classifier probes",
    2016, arXiv 1610.01644.
    """
    classifier = optional_import("sklearn.linear_model").LogisticRegression(max_iter=5000)
    return _score(classifier, features, labels, folds, held_out)


def knn_probe(
    features: Features,
    labels: Labels,
    k: int = 20,
    folds: int = 3,
    *,
    held_out: HeldOut = None,
) -> float:
    """Accuracy of the vote of the k nearest neighbours, by cosine, cross-validated.

    Fast where `linear_probe` is not. Args, result and errors as in `linear_probe`; `k` is the
    number of neighbours, at most the samples that are left to vote.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> labels = np.arange(60) % 3
        >>> diagnostics.knn_probe(np.eye(3)[labels], labels, k=5)
        1.0

    Reference: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", 2018, arXiv 1805.01978.
    """
    check_number("k", k, 1, integer=True, fix="It counts neighbours.")
    check_number("folds", folds, 2, integer=True)
    count = len(rows("features", features))
    voters = count
    if not held_out:
        largest_fold = -(-count // folds)
        voters -= largest_fold
    if k > voters:
        raise invalid(
            "k must not exceed the samples that are left to vote",
            f"k={k}, {voters} samples",
            "Take more samples.",
        )
    classifier = optional_import("sklearn.neighbors").KNeighborsClassifier(k, metric="cosine")
    return _score(classifier, features, labels, folds, held_out)


def _score(
    classifier: Any, features: Features, labels: Labels, folds: int, held_out: HeldOut
) -> float:
    """The accuracy of a classifier of standardised features on samples that it was not shown."""
    x, y = _labelled(features, labels)
    check_number("folds", folds, 2, integer=True)
    if held_out is not None and not (isinstance(held_out, (tuple, list)) and len(held_out) == 2):
        raise TypeError(
            f"held_out must be (features, labels). Received: {type(held_out).__name__} "
            f"{held_out!r:.60}. Pass both of other samples, or leave it out."
        )
    _check_classes(y, 1 if held_out else folds)
    scaler = optional_import("sklearn.preprocessing").StandardScaler()
    pipeline = optional_import("sklearn.pipeline").make_pipeline(scaler, classifier)
    if held_out:
        return _held_out_score(pipeline.fit(x, y), x.shape[1], held_out)
    selection = optional_import("sklearn.model_selection")
    parts = selection.StratifiedKFold(folds, shuffle=True, random_state=0)
    return float(selection.cross_val_score(pipeline, x, y, cv=parts).mean())


def _check_classes(labels: np.ndarray, folds: int) -> None:
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < folds:
        raise invalid(
            "A probe needs two classes or more, each with as many samples as there are folds",
            f"{len(classes)} classes, the smallest of {counts.min()} samples, {folds} folds",
            "Take more samples, or fewer folds.",
        )


def _held_out_score(fitted: Any, width: int, held_out: tuple[Features, Labels]) -> float:
    x, y = _labelled(*held_out)
    if x.shape[1] != width:
        raise invalid(
            "Held-out features must have the width of the others",
            f"{x.shape[1]} and {width}",
            "Take both from one layer.",
        )
    return float(fitted.score(x, y))


def _labelled(features: Features, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, D] and classes [n], as arrays."""
    x = rows("features", features)
    y = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if y.shape != x.shape[:1]:
        raise invalid(
            "labels must hold one class per sample, [n]",
            f"shape {y.shape}, for {len(x)} samples",
            "Pass the classes of the samples whose features these are.",
        )
    return x, y


def per_layer(
    features: Mapping[Time, Sequence[Features]],
    measure: Callable[..., Any],
    *args: Any,
    **options: Any,
) -> dict[Time, list[float]]:
    """A measure of the features of each layer at each noise level.

    Args:
        features: {time: [features [n, D] after each block]}, as `selfalign.adapters.torch.features`
            gives them.
        measure: `linear_probe`, `knn_probe`, `effective_rank`, `feature_norm`, or a function of
            your own.
        *args, **options: what the measure needs besides, such as labels.

    Returns:
        Floats by time and layer, {time: [measure(layer) for each layer]}.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> labels = np.arange(60) % 3
        >>> features = {0.1: [np.zeros((60, 3)), np.eye(3)[labels]]}
        >>> diagnostics.per_layer(features, diagnostics.linear_probe, labels)[0.1][1]
        1.0
    """
    check_lists(features)
    check_function("measure", measure)
    measured = {}
    for time, layers in features.items():
        measured[time] = [float(measure(layer, *args, **options)) for layer in layers]
    return measured
