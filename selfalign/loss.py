"""SRALoss: the settings of Self-Representation Alignment, and the term they define."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import distances, paths, schedules, targets, time_gap
from ._backend import on_backend, ops
from ._checks import check_choice, check_number, check_tokens, invalid, keep

_RECIPES = ("default", "short", "paper", "official-2026-07")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRALoss:
    """Self-Representation Alignment as a loss for whatever training loop you have.

        weight * mean_i distance( stop_gradient(teacher_i), project(student_i) )

    The teacher is an EMA of the student that sees the same sample, noise and condition with a little less noise. The object
    holds settings only (it is immutable and hashable); weights, draws and devices belong to your loop or to an adapter.

    Args:
        student_layer: after block n of the student, counted from 1, or a fraction of the depth such as 0.25.
        teacher_layer: the same for the teacher; later than the student's.
        path: "linear", "cosine", "discrete", "edm", or an object of `selfalign.paths`; carries the direction of time.
        max_gap: the teacher is ahead by a gap drawn from [0, max_gap), as a share of the path's time axis.
        random_gap: False makes every gap `max_gap` itself.
        distance: "cosine" (over features), "smooth_l1", "l1", "l2", or a callable (student, teacher) -> [B, N].
        beta: where smooth L1 turns from a parabola into a line; only for "smooth_l1".
        weight: weight of the term, a number or a schedule of the step.
        decay: the EMA teacher's weight of its old value, a number or a schedule of the step.
        allow_same_layer: permit student_layer = teacher_layer, for the paper's ablation.

    Raises:
        ValueError: a setting outside its range, or a name that does not exist.
        TypeError: a setting of the wrong type.

    Example:
        >>> import numpy as np, selfalign
        >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20, weight=0.5)
        >>> student, teacher = np.array([[[1.0, 0.0]]]), np.array([[[0.0, 1.0]]])  # [B, N, D], student's already projected
        >>> float(loss(student, teacher))
        0.5

    Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
    Guidance by Themselves", 2025, arXiv 2505.02831.
    """

    student_layer: int | float
    teacher_layer: int | float
    path: Any = "linear"
    max_gap: float = 0.2
    random_gap: bool = True
    distance: Any = "cosine"
    beta: float = 0.05
    weight: Any = 0.5
    decay: Any = 0.9999
    allow_same_layer: bool = False

    def __post_init__(self) -> None:
        student = targets.check_layer("student_layer", self.student_layer)
        teacher = targets.check_layer("teacher_layer", self.teacher_layer)
        if type(student) is type(teacher):  # a number and a fraction can be compared only once the depth is known
            targets.check_order(student, teacher, self.allow_same_layer)
        resolved = {"student_layer": student, "teacher_layer": teacher, "path": paths.resolve(self.path)}
        resolved |= {name: schedules.resolve(getattr(self, name)) for name in ("weight", "decay")}
        keep(self, **resolved)
        if isinstance(self.decay, schedules.Constant):
            check_number("decay", self.decay.constant, 0, 1, "It is the weight of the old value, 0.9999 in the paper.")
        if not callable(self.distance):
            check_choice("distance", self.distance, tuple(distances.NAMES))
        beta = check_number("beta", self.beta, 1e-12, fix="The paper takes 0.05.")
        time_gap.gap_range(self.path, self.max_gap)
        keep(self, beta=beta, max_gap=float(self.max_gap))

    @classmethod
    def preset(cls, name: str, recipe: str = "default", *, resolution: int = 256, steps_per_epoch: int = 5004,
               **changes: Any) -> SRALoss:  # fmt: skip
        """Settings for a named model: the paper's layers, with the values of a recipe.

        Args:
            name: "SiT-" or "DiT-", then S, B, L or XL, then "/" and any patch size.
            recipe: "default", our advice: cosine over features, weight 0.5. "short": for runs below some 50,000 steps, the same
                with an EMA that is faster and warms up, and a weight of 0.1. "paper": smooth L1 with beta 0.05, weight 0.2
                (DiT: 0.04, as in the authors' code) with its decay by epochs. "official-2026-07": the authors' later
                cosine, which runs over the token axis, weight 0.5.
            resolution: 256 or 512; the paper's decay depends on it.
            steps_per_epoch: optimizer steps per epoch, for the paper's decay; 5004 is ImageNet at batch 256.
            **changes: settings of `SRALoss` that override the recipe's.

        Raises:
            ValueError: an unknown preset, recipe or resolution.

        Example:
            >>> import selfalign
            >>> loss = selfalign.SRALoss.preset("DiT-B/2")
            >>> loss.student_layer, loss.teacher_layer, loss.path.name
            (3, 7, 'discrete')
        """
        family = targets.family_of(name)
        student, teacher = targets.preset_layers(name)
        check_choice("recipe", recipe, _RECIPES)
        check_choice("resolution", resolution, (256, 512))
        settings: dict[str, Any] = {"student_layer": student, "teacher_layer": teacher}
        settings["path"] = {"SiT": "linear", "DiT": "discrete"}[family]
        if recipe == "paper":
            epochs = {256: (149, 1000), 512: (99, 800)}[resolution]
            decay = schedules.PaperDecay(steps_per_epoch, *epochs)
            settings |= {"distance": "smooth_l1", "weight": {"SiT": 0.2, "DiT": 0.04}[family] * decay}
        elif recipe == "short":
            settings |= {"weight": 0.1, "decay": schedules.DecayWarmup(0.999)}
        elif recipe == "official-2026-07":
            settings["distance"] = "official-2026-07"
        return cls(**(settings | changes))

    def layers(self, depth: int) -> tuple[int, int]:
        """(student, teacher) layer numbers, from 1, in a model of `depth` blocks. Raises ValueError where they do not fit.

        Example:
            >>> import selfalign
            >>> selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7).layers(depth=12)
            (3, 8)
        """
        return targets.resolve_layers(self.student_layer, self.teacher_layer, depth, self.allow_same_layer)

    def teacher_time(self, t: Any, u: Any) -> Any:
        """The teacher's times [B] for the student's times `t` [B] and draws `u` [B], uniform in [0, 1).

        Toward the data and never past it; see `selfalign.time_gap.teacher_time` for errors and source.

        Example:
            >>> import numpy as np, selfalign
            >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20, max_gap=0.5)
            >>> float(loss.teacher_time(np.array([0.75]), np.array([0.5]))[0])
            0.5
        """
        return time_gap.teacher_time(self.path, t, u, self.max_gap, self.random_gap)

    def weight_at(self, step: Any = None) -> Any:
        """The term's weight at an optimizer step: a float for a Python int (or a constant weight), else a tensor.

        Raises:
            ValueError: no step, where the weight is a schedule.

        Example:
            >>> import selfalign
            >>> selfalign.SRALoss(student_layer=8, teacher_layer=20, weight=selfalign.schedules.Stop(10)).weight_at(3)
            1.0
        """
        if isinstance(self.weight, schedules.Constant):
            return float(self.weight.constant)
        if step is None:
            raise invalid("A weight that is a schedule needs the step", "step=None", "Pass step= the optimizer steps done.")
        return self.weight(step)

    def decay_at(self, step: Any) -> Any:
        """The EMA's decay at an optimizer step: a float for a Python int (or a constant decay), else a float32 tensor.

        As a tensor, 1 - 0.9999 is exact to 2e-4 only; a constant keeps all its digits, at traced steps, too.

        Example:
            >>> import selfalign
            >>> selfalign.SRALoss(student_layer=8, teacher_layer=20).decay_at(3)
            0.9999
        """
        return self.decay.constant if isinstance(self.decay, schedules.Constant) else self.decay(step)

    @on_backend
    def __call__(self, student_tokens: Any, teacher_tokens: Any, *, step: Any = None, mask: Any = None) -> Any:
        """The weighted term, a float32 scalar; 0 = aligned. No gradient reaches the teacher's tokens.

        Args:
            student_tokens: [B, N, D], already projected (`selfalign.project`); any floating dtype.
            teacher_tokens: [B, N, D], the teacher's features as they are.
            step: optimizer steps done; needed where `weight` is a schedule.
            mask: booleans or weights over samples [B] or tokens [B, N].

        Returns:
            A scalar; NaN or infinite where a feature is (`metrics` tells on which side).

        Raises:
            ValueError: tokens not of one shape [B, N, D], empty, a mask of another shape, a schedule without a step.
            TypeError: integer tokens, or tensors of another framework than Keras's backend.

        Example:
            >>> import numpy as np, selfalign
            >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20)
            >>> float(loss(np.ones((2, 4, 8)), np.ones((2, 4, 8))))
            0.0
        """
        return ops.cast(self.weight_at(step) * self._raw(student_tokens, teacher_tokens, mask), "float32")

    def _raw(self, student: Any, teacher: Any, mask: Any = None) -> Any:
        check_tokens(student, teacher)
        teacher = ops.stop_gradient(teacher)
        if self.distance == "official-2026-07" and len(getattr(mask, "shape", ())) == 2:
            raise invalid("mask must have the shape [B] (samples)", f"{tuple(mask.shape)}",
                          "With the token-axis cosine only a mask over samples has a meaning.")  # fmt: skip
        if not callable(self.distance):
            options = {"beta": self.beta} if self.distance == "smooth_l1" else {}
            return distances.masked_mean(distances.NAMES[self.distance](student, teacher, **options), mask)
        values = self.distance(ops.cast(student, "float32"), ops.cast(teacher, "float32"))
        if tuple(values.shape) != tuple(student.shape)[:2]:
            raise invalid("A distance must return one value per token, [B, N]", f"shape {tuple(values.shape)}",
                          f"Reduce over the last axis only: {tuple(student.shape)[:2]} is expected.")  # fmt: skip
        return distances.masked_mean(ops.cast(values, "float32"), mask)

    @on_backend
    def metrics(self, student_tokens: Any, teacher_tokens: Any) -> dict[str, Any]:
        """What to log: scalars without gradient that stay on the device (no host sync).

        Args:
            student_tokens: [B, N, D], already projected.
            teacher_tokens: [B, N, D].

        Returns:
            "distance" (unweighted), "cosine" (mean similarity over features, in [-1, 1]), "student_norm" and
            "teacher_norm" (mean token norm: growth under L1 or L2 is a warning), and "student_finite" and
            "teacher_finite" (booleans: which side is at fault).

        Raises:
            ValueError, TypeError: as for the loss itself.

        Example:
            >>> import numpy as np, selfalign
            >>> loss = selfalign.SRALoss(student_layer=8, teacher_layer=20)
            >>> info = loss.metrics(np.ones((1, 2, 4), "float32"), np.ones((1, 2, 4), "float32"))
            >>> float(info["cosine"]), float(info["teacher_norm"]), bool(info["student_finite"])
            (1.0, 2.0, True)
        """
        check_tokens(student_tokens, teacher_tokens)
        sides = {"student": ops.stop_gradient(student_tokens), "teacher": ops.stop_gradient(teacher_tokens)}
        info = {"distance": self._raw(*sides.values()), "cosine": 1.0 - ops.mean(distances.cosine(*sides.values()))}
        for side, tokens in sides.items():
            info[f"{side}_norm"] = ops.mean(ops.norm(ops.cast(tokens, "float32"), axis=-1))
            info[f"{side}_finite"] = ops.all(ops.isfinite(tokens))
        return info

    def settings(self) -> dict[str, Any]:
        """The settings as a plain dict (JSON-able), for checkpoints and logs; `from_settings` takes it back.

        A callable of your own appears by its name only.

        Example:
            >>> import selfalign
            >>> selfalign.SRALoss(student_layer=3, teacher_layer=8).settings()["path"]
            {'name': 'linear'}
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in fields.items()}

    @classmethod
    def from_settings(cls, settings: dict[str, Any], **changes: Any) -> SRALoss:
        """The loss with these settings; `changes` override, and put back callables of your own.

        Raises:
            ValueError: an unknown setting, or a callable that only its name is left of.

        Example:
            >>> import selfalign
            >>> loss = selfalign.SRALoss(student_layer=3, teacher_layer=8, weight=0.5 * selfalign.schedules.Warmup(100))
            >>> selfalign.SRALoss.from_settings(loss.settings()) == loss
            True
        """
        merged = dict(settings) | changes
        unknown = sorted(set(merged) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise invalid("Settings must be those of SRALoss", f"unknown {', '.join(unknown)}", "Check versions and spelling.")
        lost = sorted(name for name, value in merged.items() if isinstance(value, dict) and "callable" in value)
        if lost:
            raise invalid("A callable cannot be rebuilt from its name", ", ".join(f"{n}={merged[n]['callable']}" for n in lost),
                          "Pass it again: SRALoss.from_settings(settings, distance=my_distance).")  # fmt: skip
        return cls(**merged)


def _plain(value: Any) -> Any:
    if isinstance(value, schedules.Constant):
        return value.constant
    if type(value) in (*paths.KINDS.values(), *schedules.KINDS.values()):
        return value.settings()
    if callable(value) or isinstance(value, paths.Path):
        named = value if hasattr(value, "__qualname__") else type(value)
        return {"callable": f"{named.__module__}.{named.__qualname__}"}
    return value
