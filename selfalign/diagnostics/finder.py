"""Finder: a proposal for the student's and the teacher's layers from a model's own features."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .. import layers
from .._checks import check_function, check_number, invalid
from ._arrays import Features, Labels, Time, check_lists, optional_import
from .probes import linear_probe, per_layer
from .similarity import cknna

_LABELLED = "accuracy of {0} on held-out samples"
_UNLABELLED = (
    "CKNNA of a layer's features at t = {1} with its own at more noise: how much of the "
    "neighbourhoods of samples survives noise"
)
_CAUTION = (
    "A heuristic, of one model at one point of its training, never compared over whole runs. The "
    "advice without it, 0.25 and 0.7 of the depth, is {0} -> {1} here: try both in a short run "
    "before a long one."
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
    scores: dict[Time, list[float]]
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
        figure = optional_import("matplotlib.figure").Figure((6, 3.5), layout="tight")
        axis = figure.subplots()
        numbers = range(1, len(self.quality) + 1)
        for time, scores in self.scores.items():
            axis.plot(numbers, scores, color="0.7", marker=".")
            axis.annotate(f" t = {time}", (numbers[-1], scores[-1]), va="center", color="0.4")
        axis.plot(numbers, self.quality, color="black", marker="o", label="mean")
        for name, layer, style in (("student", self.student, "--"), ("teacher", self.teacher, "-")):
            label = f"{name}: {layer}"
            axis.axvline(layer, color="#d1495b", linestyle=style, zorder=0, label=label)
        axis.set(xlabel="block", ylabel=self.measure)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
        figure.savefig(file, dpi=150)


def find_layers(
    features: Mapping[Time, Sequence[Features]],
    labels: Labels | None = None,
    *,
    probe: Callable[..., float] = linear_probe,
    k: int = 10,
    tolerance: float = 0.02,
) -> Layers:
    """Proposes the student's and the teacher's layer.

    A layer's quality is the mean over the times of its score: with labels the accuracy of a probe;
    without, the CKNNA of its features at the first time with those at each other time. Then

        teacher = the first layer whose quality is within `tolerance` of the best,
                  as a fraction of the best's lead over layer 1
        student = of the layers at least a quarter of the depth before the teacher, the one
                  whose quality is nearest to half-way between layer 1's and the teacher's

    The teacher is the cheapest of the good layers. The student knows something, and has something
    to learn. Where no layer is better than the first, the features decide nothing, and the advice
    is 0.25 and 0.7 of the depth.

    Args:
        features: {time: [features [n, D] after each block]} of the same samples and noise, such as
            `selfalign.adapters.torch.features` gives: of a model that has trained for a while,
            without SRA or with. Without labels at least two times, the first of them nearly clean.
            A few hundred samples at least.
        labels: classes [n]; None where there are none.
        probe: `linear_probe` or `knn_probe` (faster), or a function (features, labels) -> accuracy.
        k: neighbours for CKNNA.
        tolerance: a fraction of the lead, in [0, 1).

    Returns:
        The proposal as `Layers`, with its reasons.

    Raises:
        ValueError: no times, times of different depths, fewer than two layers, one time alone
            without labels, or what the measures refuse.
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
    check_lists(features)
    check_function("probe", probe)
    depth = _depth(features)
    check_number("k", k, 1, integer=True, fix="It counts neighbours.")
    check_number("tolerance", tolerance, 0, 0.999999)
    if labels is None:
        scores = _cknna_scores(features, k)
        measure, measured = "CKNNA", _UNLABELLED
    else:
        scores = per_layer(features, probe, labels)
        measure, measured = getattr(probe, "__name__", "probe"), _LABELLED
    quality = np.mean(list(scores.values()), axis=0)
    student, teacher, why = _choose(quality, depth, tolerance)
    what = measured.format(measure, next(iter(features)))
    times = ", ".join(map(str, scores))
    first_reason = f"Score: {what}; mean over t = {times}."
    reasons = (first_reason, *why, _CAUTION.format(*_advised(depth)))
    return Layers(student, teacher, scores, measure, quality.tolist(), reasons)


def _cknna_scores(features: Mapping[Time, Sequence[Features]], k: int) -> dict[Time, list[float]]:
    """The agreement of each layer at the first time with itself at each other time."""
    first, *others = features
    if not others:
        raise invalid(
            "Without labels the finder compares noise levels",
            f"features at {first} alone",
            "Pass features at two times or more, the one with the least noise first, or labels.",
        )
    scores = {}
    for time in others:
        pairs = zip(features[first], features[time], strict=True)
        scores[time] = [cknna(clean, noisy, k) for clean, noisy in pairs]
    return scores


def _depth(features: Mapping[Time, Sequence[Features]]) -> int:
    depths = {time: len(layers) for time, layers in features.items()}
    if len(set(depths.values())) != 1 or min(depths.values()) < 2:
        raise invalid(
            "features must be {time: [features of each layer]}, with the same two layers or more "
            "at each time",
            f"layers by time {depths}",
            "Take them after every block of the model.",
        )
    return next(iter(depths.values()))


def _advised(depth: int) -> tuple[int, int]:
    if depth <= 2:
        return 1, 2
    return layers.resolve_layers(0.25, 0.7, depth, allow_same_layer=False)


def _choose(quality: np.ndarray, depth: int, tolerance: float) -> tuple[int, int, list[str]]:
    """Student and teacher, from 1, and why."""
    low = float(quality[0])
    best = float(quality.max())
    if best <= low:
        student, teacher = _advised(depth)
        reason = (
            f"No block is better than block 1 ({low:.3f}): these features decide nothing, so the "
            "advice without them stands."
        )
        return student, teacher, [reason]
    near_the_best = quality[1:] >= best - tolerance * (best - low)
    teacher = int(np.argmax(near_the_best)) + 2
    top = float(quality[teacher - 1])
    half = (low + top) / 2
    shallow = quality[: max(1, teacher - max(1, depth // 4))]
    student = int(np.abs(shallow - half).argmin()) + 1
    of_teacher = (
        f"Teacher, block {teacher} of {depth}: {top:.3f}, the first of those near the best, "
        f"{best:.3f} at block {int(quality.argmax()) + 1}."
    )
    of_student = (
        f"Student, block {student}: {quality[student - 1]:.3f}, of blocks 1 to {len(shallow)} the "
        f"nearest to {half:.3f}, half-way from block 1 ({low:.3f}) to the teacher."
    )
    return student, teacher, [of_teacher, of_student]
