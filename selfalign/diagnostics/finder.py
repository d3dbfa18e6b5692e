"""Finder: a proposal for the student's and the teacher's layers from a model's own features."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import targets
from .._checks import check_number, invalid
from ._arrays import need
from .probes import linear_probe, per_layer
from .similarity import cknna

_LABELLED = "accuracy of {0} on held-out samples"
_UNLABELLED = "CKNNA of a layer's features at t = {1} with its own at more noise: how much of who is near whom survives noise"
_CAUTION = (
    "A heuristic, of one model at one point of its training, never compared over whole runs. The advice without it, 0.25 and "
    "0.7 of the depth, is {0} -> {1} here: try both in a short run before a long one."
)


@dataclasses.dataclass(frozen=True)
class Layers:
    """A proposal of `find_layers`; its text is the reasons.

    Attributes:
        student: layer number, from 1; as `SRALoss(student_layer=...)` takes it.
        teacher: the same for the teacher.
        scores: {time: [score of each layer]}.
        measure: what the scores are, in a word or two.
        quality: the mean of the scores over the times, by layer.
        reasons: sentences: what was measured, why these two, what it is worth.

    Example: see `find_layers`.
    """

    student: int
    teacher: int
    scores: dict[Any, list[float]]
    measure: str
    quality: list[float]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.reasons)

    def plot(self, file: str | os.PathLike[str]) -> None:
        """A picture of the scores by layer, a line for each time, with both layers marked.

        Raises:
            ImportError: matplotlib is missing.
        """
        axis = (figure := need("matplotlib.figure").Figure((6, 3.5), layout="tight")).subplots()
        layers = range(1, len(self.quality) + 1)
        for time, scores in self.scores.items():
            axis.plot(layers, scores, color="0.7", marker=".")
            axis.annotate(f" t = {time}", (layers[-1], scores[-1]), va="center", color="0.4")
        axis.plot(layers, self.quality, color="black", marker="o", label="mean")
        for name, layer, style in (("student", self.student, "--"), ("teacher", self.teacher, "-")):
            axis.axvline(layer, color="#d1495b", linestyle=style, zorder=0, label=f"{name}: {layer}")
        axis.set(xlabel="block", ylabel=self.measure)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        figure.savefig(file, dpi=150)


def find_layers(features: Mapping[Any, Sequence[Any]], labels: Any = None, *, probe: Callable[..., float] = linear_probe,
                k: int = 10, tolerance: float = 0.02) -> Layers:  # fmt: skip
    """Proposes the student's and the teacher's layer.

    A layer's quality is the mean over the times of its score: with labels the accuracy of a probe; without, the CKNNA of its
    features at the first time with those at each other time. Then

        teacher = the first layer whose quality is within `tolerance` of the best, as a share of the best's lead over layer 1:
                  it is the cheapest of the good ones
        student = the layer whose quality is nearest to half-way between layer 1's and the teacher's, among those that are
                  a quarter of the depth before the teacher at least: it knows something, and has something to learn

    Where no layer is better than the first, the features decide nothing, and the advice is 0.25 and 0.7 of the depth.

    Args:
        features: {time: [features [n, D] after each block]} of the same samples and noise, such as
            `selfalign.adapters.torch.features` gives: of a model that has trained for a while, without SRA or with. Without
            labels at least two times, the first of them nearly clean. A few hundred samples at least.
        labels: classes [n]; None where there are none.
        probe: `linear_probe` or `knn_probe` (faster), or a function (features, labels) -> accuracy.
        k: neighbours for CKNNA.
        tolerance: a share of the lead, in [0, 1).

    Returns:
        The proposal as `Layers`, with its reasons.

    Raises:
        ValueError: no times, times of different depths, fewer than two layers, one time alone without labels, or what the
            measures refuse.
        ImportError: scikit-learn is missing (with labels).

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> rng, labels = np.random.default_rng(0), np.arange(200) % 4
        >>> known = [0, 1, 3, 8, 8, 4]  # how much of the class each layer knows
        >>> layers = [rng.normal(size=(200, 8)) + c * np.eye(8)[labels] for c in known]
        >>> found = diagnostics.find_layers({0.25: layers}, labels, tolerance=0.05)
        >>> found.student, found.teacher
        (2, 4)

    Reference: the papers' pairs are in `selfalign.preset_layers`; this rule is our own.
    """
    depth = _depth(features)
    check_number("tolerance", tolerance, 0, 0.999999)
    if labels is None:
        first, *others = features
        if not others:
            raise invalid("Without labels the finder compares noise levels", f"features at {first} alone",
                          "Pass features at two times or more, the one with the least noise first, or labels.")  # fmt: skip
        pairs = {time: zip(features[first], features[time], strict=True) for time in others}
        scores = {time: [cknna(x, y, k) for x, y in layers] for time, layers in pairs.items()}
        measure, measured = "CKNNA", _UNLABELLED
    else:
        scores = per_layer(features, probe, labels)
        measure, measured = getattr(probe, "__name__", "probe"), _LABELLED
    quality = np.mean(list(scores.values()), axis=0)
    student, teacher, why = _choose(quality, depth, tolerance)
    what = f"Score: {measured.format(measure, next(iter(features)))}; mean over t = {', '.join(map(str, scores))}."
    reasons = (what, *why, _CAUTION.format(*_advised(depth)))
    return Layers(student, teacher, scores, measure, quality.tolist(), reasons)


def _depth(features: Mapping[Any, Sequence[Any]]) -> int:
    depths = {time: len(layers) for time, layers in features.items()}
    if len(set(depths.values())) != 1 or min(depths.values()) < 2:
        raise invalid("features must be {time: [features of each layer]}, with the same two layers or more at each time",
                      f"layers by time {depths}", "Take them after every block of the model.")  # fmt: skip
    return next(iter(depths.values()))


def _advised(depth: int) -> tuple[int, int]:
    return targets.resolve_layers(0.25, 0.7, depth, allow_same_layer=False) if depth > 2 else (1, 2)


def _choose(quality: np.ndarray, depth: int, tolerance: float) -> tuple[int, int, list[str]]:
    """Student, teacher (from 1), and why."""
    low, best = float(quality[0]), float(quality.max())
    if best <= low:
        return *_advised(depth), [f"No block is better than block 1 ({low:.3f}): these features decide nothing, so the advice "
                                  "without them stands."]  # fmt: skip
    teacher = int(np.argmax(quality[1:] >= best - tolerance * (best - low))) + 2
    top = float(quality[teacher - 1])
    half = (low + top) / 2
    shallow = quality[: max(1, teacher - max(1, depth // 4))]
    student = int(np.abs(shallow - half).argmin()) + 1
    return student, teacher, [
        f"Teacher, block {teacher} of {depth}: {top:.3f}, the first of those near the best, {best:.3f} at block "
        f"{int(quality.argmax()) + 1}.",
        f"Student, block {student}: {quality[student - 1]:.3f}, of blocks 1 to {len(shallow)} the nearest to {half:.3f}, "
        f"half-way from block 1 ({low:.3f}) to the teacher.",
    ]  # fmt: skip
