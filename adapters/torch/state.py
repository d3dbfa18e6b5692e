"""What a resumed run needs beside the model: saved, and taken back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from selfalign.adapting import invalid

from .checking_state import (
    check_count,
    check_named,
    check_settings,
    check_shapes,
    check_tensors,
    mapping,
)
from .pairing import name_inside
from .parts import Part, head_seed

if TYPE_CHECKING:
    from .term import Term

# settings that states of the first edition lack, at the values that they had
_ADDED = {"kind": "sra", "name": None, "normalise": "none"}
Saved = dict[str, torch.Tensor]


def saved(term: Term) -> dict[str, Any]:
    """The state of an alignment: see `SelfAlignment.state_dict`. Its tensors are copies."""
    state = _present(term)
    for name in ("projector", "teacher"):
        state[name] = {key: tensor.detach().clone() for key, tensor in state[name].items()}
    return state


def _present(term: Term) -> dict[str, Any]:
    """The state with the tensors themselves.

    A head without parameters yet is not in it: it gets them from the seed.
    """
    average = term.average
    projector: Saved = {}
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
        "teacher": {} if average is None else average.state(),
    }


def load(term: Term, state: Mapping[str, Any], changed: Iterable[str]) -> None:
    """Take back a state. Everything is checked first: an error changes nothing.

    Args:
        term: what takes it.
        state: the user's.
        changed: names of the settings that may differ.
    """
    mine = _present(term)
    given = mapping("The state", state)
    if given.keys() != mine.keys():
        raise invalid(
            "The state must be one of SelfAlignment.state_dict()",
            f"entries {sorted(map(str, given))}",
            f"Pass a dict with {sorted(mine)}.",
        )
    added = {} if term.several else _ADDED
    check_settings({**added, **mapping("Settings", given["settings"])}, mine["settings"], changed)
    for name in ("step", "seed", "terms"):
        check_count(name, given[name])
    heads = _checked_heads(term, mapping("The projector", given["projector"]), mine["projector"])
    teacher = _checked_teacher(term, mapping("The teacher", given["teacher"]), mine["teacher"])

    for index, part in enumerate(term.parts):
        part.head.seed = head_seed(given["seed"], index, part.name)
        if heads[part.name]:
            part.head.take_back(heads[part.name])
    if term.average is not None:
        term.average.load(teacher)
    term.seed = given["seed"]
    term.step = given["step"]
    term.terms = given["terms"]
    term.starting = True


def _prefix(term: Term, part: Part) -> str:
    """What stands before the names of a head's parameters."""
    return f"{part.name}." if term.several else ""


def _checked_heads(term: Term, theirs: Mapping[str, Any], mine: Saved) -> dict[str, Saved]:
    """The saved parameters by head; a head without parameters takes none, or any that fit it."""
    heads: dict[str, Saved] = {}
    expected: dict[str, Any] = dict(mine)
    for part in term.parts:
        prefix = _prefix(term, part)
        names = part.head.objective.head.names
        heads[part.name] = {n: theirs[prefix + n] for n in names if prefix + n in theirs}
        if heads[part.name] and not part.head.built:
            expected |= dict.fromkeys((prefix + name for name in names), None)
    check_named("The state's projector", theirs, expected)
    check_tensors("The state's projector", theirs, expected)
    for part in term.parts:
        if heads[part.name] and not part.head.built:
            check_shapes(part.head.objective, heads[part.name])
    return heads


def _checked_teacher(term: Term, theirs: Mapping[str, Any], mine: Saved) -> Saved:
    """The saved averages and buffers; these may have grown, come or gone."""
    plain = {name_inside(str(name)): value for name, value in theirs.items()}
    buffers = {} if term.average is None else term.average.buffers()
    parameters = {name: tensor for name, tensor in mine.items() if name not in buffers}
    check_named("The state's teacher", plain, parameters, buffers)
    check_tensors("The state's teacher", plain, {**parameters, **buffers}, buffers)
    return plain


def _settings(term: Term) -> dict[str, Any]:
    """The objectives' settings and the tapped modules; of a list, by name."""
    by_name = {part.name: {**part.objective.settings(), "taps": part.taps()} for part in term.parts}
    return by_name if term.several else next(iter(by_name.values()))
