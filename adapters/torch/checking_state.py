"""Whether a state can be taken back, looked at whole before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from selfalign.adapting import Objective, head_shapes, init_head, invalid

from .sharding import local

# What may differ in a resumed run when the caller says so. The rest decides what the saved tensors
# mean: which layers, which head, which path.
CHANGEABLE = ("weight", "decay", "max_gap", "random_gap")
_ORIGIN = "Pass what SelfAlignment.state_dict() gave, as it was saved."


def mapping(what: str, value: Any) -> Mapping[str, Any]:
    """`value`, where it is a mapping.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise invalid(f"{what} must be a mapping", f"{kind} {value!r:.60}", _ORIGIN)
    return value


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number from 0 on, or too large for a counter."""
    if type(value) is not int or not 0 <= value < 2**63:
        received = f"{type(value).__name__} {value!r:.60}"
        rule = f"The state's {name} must be a whole number from 0 on, below 2**63"
        raise invalid(rule, received, _ORIGIN)


def check_named(
    what: str,
    given: Mapping[str, Any],
    wanted: Mapping[str, torch.Tensor | None],
    optional: Collection[str] = (),
) -> None:
    """Refuse tensors that are missing or unknown; the error names the first."""
    for name, tensor in wanted.items():
        if name not in given:
            raise _other_tensors(what, f"{name!r} missing instead of {_shape(tensor)}")
    for name, value in given.items():
        if name not in wanted and name not in optional:
            raise _other_tensors(what, f"{name!r} {_shape(value)} instead of missing")


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else "a tensor"


def check_tensors(
    what: str,
    given: Mapping[str, Any],
    present: Mapping[str, torch.Tensor | None],
    buffers: Collection[str] = (),
) -> None:
    """Refuse what cannot become the tensors that are present.

    Args:
        what: whose tensors they are.
        given: by name; all of them are among those present.
        present: by name; None where there is none yet.
        buffers: names of those that may have grown, and hold whatever they hold now.
    """
    for name, value in given.items():
        mine = present[name]
        where = f"{what} {name!r}"
        _check_values(where, value, mine)
        if mine is None:
            continue
        grows = name in buffers and value.ndim == mine.ndim
        if value.shape != mine.shape and not grows:
            received = f"{name!r} {tuple(value.shape)} instead of {tuple(mine.shape)}"
            raise _other_tensors(what, received)
        if hasattr(mine, "to_local") != hasattr(value, "to_local"):
            raise invalid(
                f"{where} must be sharded as it is here",
                f"a {type(value).__name__} instead of a {type(mine).__name__}",
                "Save and load a sharded teacher by torch.distributed.checkpoint.",
            )


def _check_values(where: str, value: Any, mine: torch.Tensor | None) -> None:
    """Refuse what is no tensor, of another kind of dtype, without values, or not finite."""
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise invalid(f"{where} must be a tensor", f"{kind} {value!r:.60}", _ORIGIN)
    if mine is None or mine.is_floating_point():
        fits = value.is_floating_point() or mine is None
        wanted = "floating-point"
    else:
        fits = value.dtype == mine.dtype
        wanted = str(mine.dtype)
    if not fits or value.layout != torch.strided:
        raise invalid(
            f"{where} must be {wanted} and dense", f"{value.dtype}, {value.layout}", _ORIGIN
        )
    if value.is_meta:
        fix = "Load the file with values: torch.load(file, map_location='cpu')."
        raise invalid(f"{where} must have values", "a tensor on meta", fix)
    if not _is_finite(value) and (mine is None or _is_finite(mine)):
        fix = "Take an earlier checkpoint, from before the run diverged."
        raise invalid(f"{where} must be finite", "NaN or infinity in it", fix)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(local(tensor.detach()).isfinite().all())


def check_shapes(objective: Objective, values: Mapping[str, torch.Tensor]) -> None:
    """Refuse a head's tensors that fit no width; for a head that does not know its own yet."""
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    widths = {size for shape in shapes.values() for size in shape}
    for width in widths:
        draws = {name: torch.zeros(shape) for name, shape in head_shapes(objective, width).items()}
        if all(shapes[name] == draw.shape for name, draw in draws.items()):
            first = init_head(objective, draws)
            if all(shapes[name] == tuple(value.shape) for name, value in first.items()):
                return
    raise _other_tensors("The state's projector", f"shapes {shapes}, which fit no width")


def _other_tensors(what: str, received: str) -> ValueError:
    return invalid(
        f"{what} must have the same tensors as this model",
        received,
        "Use the model, the objectives and the wrappers that the tensors were saved from.",
    )


def check_settings(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], changed: Iterable[str]
) -> None:
    """Refuse other settings than these, except those that the caller says have changed."""
    allowed = [changed] if isinstance(changed, str) else list(changed)
    wrong = [name for name in allowed if name not in CHANGEABLE]
    if wrong:
        raise invalid(
            f"changed= takes names of settings that may differ: {', '.join(CHANGEABLE)}",
            f"{wrong[0]!r}",
            "Build the loss with the other settings as they were saved.",
        )
    flat, mine = _flat(theirs), _flat(ours)
    names = sorted({*flat, *mine})
    missing = object()
    pairs = {name: (flat.get(name, missing), mine.get(name, missing)) for name in names}
    differing = {name: pair for name, pair in pairs.items() if _form(pair[0]) != _form(pair[1])}
    refused = [name for name in differing if name.rpartition("/")[2] not in allowed]
    if not refused:
        return
    fix = "Build the loss with the settings that were saved, or start afresh."
    last = [name.rpartition("/")[2] for name in differing]
    if all(name in CHANGEABLE for name in last):
        fix = (
            "Build the loss with the settings that were saved; if the change is meant, "
            f"load_state_dict(state, changed={tuple(dict.fromkeys(last))})."
        )
    described = [
        f"{name} {_text(then, missing)} instead of {_text(now, missing)}"
        for name, (then, now) in differing.items()
    ]
    raise invalid("The state must come from the same settings", ", ".join(described), fix)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name; those of a list of objectives as "name/setting"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and "kind" in value:
            flat |= {f"{name}/{key}": inner for key, inner in value.items()}
        else:
            flat[str(name)] = value
    return flat


def _form(value: Any) -> str:
    """A setting in a form that compares: a list as a tuple of the same, True as no 1."""
    if isinstance(value, Mapping):
        return str(sorted((str(key), _form(inner)) for key, inner in value.items()))
    if isinstance(value, (list, tuple)):
        return str([_form(inner) for inner in value])
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return repr(float(value)) if number else repr(value)


def _text(value: Any, missing: object) -> str:
    return "None" if value is missing else f"{value!r:.80}"
