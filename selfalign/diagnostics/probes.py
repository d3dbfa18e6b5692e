"""Probes: how well a simple classifier reads the class from frozen features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._checks import check_number, invalid
from ._arrays import need, rows


def linear_probe(features: Any, labels: Any, folds: int = 3, *, held_out: tuple[Any, Any] | None = None) -> float:
    """Accuracy of a linear classifier of the features: logistic regression on standardised features, cross-validated.

    Args:
        features: [n, D]: of each sample, such as its mean token.
        labels: the samples' classes [n].
        folds: parts of the samples; each is predicted by a classifier of the others. The same folds at every call.
        held_out: (features, labels) of other samples to be predicted, instead of the parts.

    Returns:
        The (mean) held-out accuracy, in [0, 1].

    Raises:
        ValueError: features that are not [n, D] or not finite, labels of another number, a class with fewer samples
            than folds, or held-out features of another width.
        ImportError: scikit-learn is missing.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> labels = np.arange(60) % 3
        >>> diagnostics.linear_probe(np.eye(3)[labels], labels)
        1.0

    Reference: Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016, arXiv 1610.01644.
    """
    return _score(need("sklearn.linear_model").LogisticRegression(max_iter=5000), features, labels, folds, held_out)


def knn_probe(features: Any, labels: Any, k: int = 20, folds: int = 3, *,
              held_out: tuple[Any, Any] | None = None) -> float:  # fmt: skip
    """Accuracy of the k nearest neighbours' vote, by cosine, cross-validated: fast where `linear_probe` is not.

    Args, result and errors as in `linear_probe`; `k` is the number of neighbours, at most the samples that are left to vote.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> labels = np.arange(60) % 3
        >>> diagnostics.knn_probe(np.eye(3)[labels], labels, k=5)
        1.0

    Reference: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, arXiv 1805.01978.
    """
    check_number("k", k, 1, integer=True, fix="It counts neighbours.")
    check_number("folds", folds, 2, integer=True)
    kept = len(features) - (0 if held_out else -(-len(features) // folds))  # without the largest fold
    if k > kept:
        raise invalid("k must not exceed the samples that are left to vote", f"k={k}, {kept} samples", "Take more samples.")
    classifier = need("sklearn.neighbors").KNeighborsClassifier(k, metric="cosine")
    return _score(classifier, features, labels, folds, held_out)


def _score(classifier: Any, features: Any, labels: Any, folds: int, held_out: tuple[Any, Any] | None) -> float:
    x, y = _labelled(features, labels)
    check_number("folds", folds, 2, integer=True)
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2 or (not held_out and counts.min() < folds):
        raise invalid("A probe needs two classes or more, each with as many samples as there are folds",
                      f"{len(classes)} classes, the smallest of {counts.min()} samples, {folds} folds",
                      "Take more samples, or fewer folds.")  # fmt: skip
    pipeline = need("sklearn.pipeline").make_pipeline(need("sklearn.preprocessing").StandardScaler(), classifier)
    if held_out:
        x_held_out, y_held_out = _labelled(*held_out)
        if x_held_out.shape[1] != x.shape[1]:
            raise invalid("Held-out features must have the width of the others", f"{x_held_out.shape[1]} and {x.shape[1]}",
                          "Take both from one layer.")  # fmt: skip
        return float(pipeline.fit(x, y).score(x_held_out, y_held_out))
    selection = need("sklearn.model_selection")
    parts = selection.StratifiedKFold(folds, shuffle=True, random_state=0)
    return float(selection.cross_val_score(pipeline, x, y, cv=parts).mean())


def _labelled(features: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = rows("features", features), np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if y.shape != x.shape[:1]:
        raise invalid("labels must hold one class per sample, [n]", f"shape {y.shape}, for {len(x)} samples",
                      "Pass the classes of the samples whose features these are.")  # fmt: skip
    return x, y


def per_layer(features: Mapping[Any, Sequence[Any]], measure: Callable[..., Any], *args: Any,
              **options: Any) -> dict[Any, list[float]]:  # fmt: skip
    """A measure of the features of each layer at each noise level: {time: [measure(layer) for each layer]}.

    Args:
        features: {time: [features [n, D] after each block]}, as `selfalign.adapters.torch.features` gives them.
        measure: `linear_probe`, `knn_probe`, `effective_rank`, `feature_norm`, or a function of your own.
        *args, **options: what the measure needs besides, such as labels.

    Returns:
        Floats by time and layer.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> labels = np.arange(60) % 3
        >>> features = {0.1: [np.zeros((60, 3)), np.eye(3)[labels]]}
        >>> diagnostics.per_layer(features, diagnostics.linear_probe, labels)[0.1][1]
        1.0
    """
    return {time: [float(measure(layer, *args, **options)) for layer in layers] for time, layers in features.items()}
