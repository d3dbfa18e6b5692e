"""Objects that are their settings: from a preset, as plain values, and back."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

from . import paths, presets, schedules
from ._checks import check_mapping, invalid
from .typing import Settings


class Configured:
    """Base of what frozen settings describe: a dataclass with a kind.

    Attributes:
        kind: its name, such as "sra".

    Example:
        >>> import selfalign
        >>> selfalign.SRALoss.preset("SiT-B/2").settings()["kind"]
        'sra'
    """

    kind: ClassVar[str] = ""

    @classmethod
    def preset(
        cls,
        name: str,
        recipe: str = "default",
        *,
        resolution: int = 256,
        steps_per_epoch: int = 5004,
        **changes: Any,
    ) -> Self:
        """Settings for a named model: the published layers, with the values of a recipe.

        Args:
            name: "SiT-" or "DiT-", then S, B, L or XL, then "/" and any patch size.
            recipe: "default", our advice; `selfalign.presets` has the others.
            resolution: 256 or 512; the paper's decay of SRA's weight depends on it.
            steps_per_epoch: optimizer steps per epoch, for that decay; 5004 is ImageNet at batch
                256.
            **changes: settings that override the recipe's.

        Raises:
            ValueError: an unknown model, recipe or resolution, or a kind without presets.

        Example:
            >>> import selfalign
            >>> loss = selfalign.SRALoss.preset("DiT-B/2")
            >>> loss.student_layer, loss.teacher_layer, loss.path.name
            (3, 7, 'discrete')
        """
        found = presets.settings_of(cls.kind, name, recipe, resolution, steps_per_epoch)
        return cls(**(found | changes))

    def settings(self) -> Settings:
        """The settings as a plain dict (JSON-able), for checkpoints and logs.

        `from_settings` takes it back. A callable of your own appears by its name only.

        Example:
            >>> import selfalign
            >>> selfalign.SRALoss(student_layer=3, teacher_layer=8).settings()["path"]
            {'name': 'linear'}
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind} | {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_settings(cls, settings: Settings, **changes: Any) -> Self:
        """The objective with these settings.

        Args:
            settings: from `settings()`.
            **changes: override them, and put back callables of your own.

        Raises:
            ValueError: an unknown setting, settings of another kind, or a callable that only its
                name is left of.

        Example:
            >>> import selfalign
            >>> weight = 0.5 * selfalign.schedules.Warmup(100)
            >>> loss = selfalign.SRALoss(student_layer=3, teacher_layer=8, weight=weight)
            >>> selfalign.SRALoss.from_settings(loss.settings()) == loss
            True
        """
        return cls(**_arguments_of(cls, settings, changes))


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it; a callable by its name."""
    if isinstance(value, schedules.Constant):
        return value.constant
    if type(value) in (*paths.PATHS.values(), *schedules.SCHEDULES.values()):
        return value.settings()
    if callable(value) or isinstance(value, paths.Path):
        named = value if hasattr(value, "__qualname__") else type(value)
        return {"callable": f"{named.__module__}.{named.__qualname__}"}
    return value


def _arguments_of(kind: Any, settings: Settings, changes: Settings) -> Settings:
    """The arguments of an objective's class, from plain settings and what overrides them."""
    check_mapping("settings", settings)
    merged = dict(settings) | changes
    named = merged.pop("kind", kind.kind)
    unknown = sorted(set(merged) - {field.name for field in dataclasses.fields(kind)})
    if unknown or named != kind.kind:
        received = f"unknown {', '.join(unknown)}" if unknown else f"settings of {named!r}"
        rule = f"Settings must be those of {kind.__name__}"
        raise invalid(rule, received, "Check versions and spelling.")
    lost = {name: value["callable"] for name, value in merged.items() if _is_name(value)}
    needed = {field.name for field in dataclasses.fields(kind) if _is_needed(field)}
    missing = sorted(needed - set(merged))
    if missing:
        raise invalid(
            f"Settings of {kind.__name__} must have {', '.join(sorted(needed))}",
            f"settings without {', '.join(missing)}",
            "Take them from settings().",
        )
    if lost:
        raise invalid(
            "A callable cannot be rebuilt from its name",
            ", ".join(f"{name}={lost[name]}" for name in sorted(lost)),
            f"Pass it again: {kind.__name__}.from_settings(settings, distance=my_distance).",
        )
    return merged


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    """Whether a setting has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_name(value: Any) -> bool:
    """Whether this is what `plain` makes of a callable."""
    return isinstance(value, dict) and "callable" in value
