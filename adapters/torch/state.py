"""What a resumed run needs beside the model: saved, checked, and taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from selfalign.adapting import invalid

from .average import check_same_tensors
from .parts import Part, head_seed

if TYPE_CHECKING:
    from .term import Term

# settings that states of the first edition lack, at the values that they had
_ADDED = {"kind": "sra", "name": None, "normalise": "none"}


def saved(term: Term) -> dict[str, Any]:
    """The state of an alignment: see `SelfAlignment.state_dict`.

    A head without parameters yet is not in it: it gets them from the seed.
    """
    average = term.average
    projector: dict[str, torch.Tensor] = {}
    for part in term.parts:
        if part.head.built:
            values = part.head.state_dict()
            projector |= {f"{_prefix(term, part)}{name}": values[name] for name in values}
    return {
        "settings": _settings(term),
        "step": term.step,
        "seed": term.seed,
        "terms": term.terms,
        "projector": projector,
        "teacher": {} if average is None else average.state_dict(),
    }


def load(term: Term, state: Mapping[str, Any]) -> None:
    """Take back a state. Everything is checked first: an error changes nothing."""
    mine = saved(term)
    if state.keys() != mine.keys():
        raise invalid(
            "The state must be one of SelfAlignment.state_dict()",
            f"entries {sorted(state)}",
            f"Pass a dict with {sorted(mine)}.",
        )
    added = {} if term.several else _ADDED
    _check_settings(_flat(added | state["settings"]), _flat(mine["settings"]))
    heads = _checked_heads(term, state["projector"], mine["projector"])
    check_same_tensors("The state's teacher", state["teacher"], mine["teacher"])
    seed = int(state["seed"])
    for index, part in enumerate(term.parts):
        part.head.seed = head_seed(seed, index, part.name)
        if heads[part.name]:
            part.head.take_back(heads[part.name])
    if term.average is not None:
        term.average.load_state_dict(state["teacher"])
    term.seed = seed
    term.step = int(state["step"])
    term.terms = int(state["terms"])
    term.starting = True


def _prefix(term: Term, part: Part) -> str:
    """What stands before the names of a head's parameters."""
    return f"{part.name}." if term.several else ""


def _checked_heads(
    term: Term, theirs: Mapping[str, torch.Tensor], mine: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """The saved parameters by head; those of a head without parameters are compared by name."""
    heads = {}
    expected: dict[str, Any] = dict(mine)
    for part in term.parts:
        prefix = _prefix(term, part)
        names = part.head.objective.head.names
        heads[part.name] = {n: theirs[prefix + n] for n in names if prefix + n in theirs}
        if heads[part.name] and not part.head.built:
            expected |= {prefix + name: theirs.get(prefix + name) for name in names}
    what = "The state's projector"
    missing = [name for name, value in expected.items() if value is None]
    if missing:
        rule = f"{what} must have the same tensors as this model"
        raise invalid(rule, f"no {missing[0]!r}", "Use the objectives that they were saved from.")
    check_same_tensors(what, theirs, expected)
    return heads


def _settings(term: Term) -> dict[str, Any]:
    """The objectives' settings and the tapped modules; of a list, by name."""
    by_name = {part.name: {**part.objective.settings(), "taps": part.taps()} for part in term.parts}
    return by_name if term.several else next(iter(by_name.values()))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name; those of a list of objectives as "name/setting"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and "kind" in value:
            flat |= {f"{name}/{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _check_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    differing = [
        f"{name} {theirs.get(name)!r:.80} instead of {ours.get(name)!r:.80}"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise invalid(
            "The state must come from the same settings",
            ", ".join(differing),
            "Build the loss with the settings that were saved, or start afresh.",
        )
