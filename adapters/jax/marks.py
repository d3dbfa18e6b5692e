"""A forward as JAX traces it: run once more, with the values at marked places.

What marks a value changes nothing in the forward. It stays where it is through vmap, jit, remat and
scan, whose bodies are traced with it. So the values can be read out of models that hand out none of
them. A scan is cut at the layer that is read: before it and after it the scan runs as it did.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import DropVar, Jaxpr, JaxprEqn, jaxprs_in_params
from jax.extend.core.primitives import closed_call_p, jit_p, name_p, remat_p, scan_p

from selfalign.adapting import Tree, invalid

_OURS = "selfalign:"
_ENTERED = (jit_p, closed_call_p, remat_p, scan_p)


def mark(value: jax.Array, name: str) -> None:
    """Note in what is traced that this value has this name."""
    checkpoint_name(value, _OURS + name)


class Traced:
    """A forward with its arguments, traced.

    Attributes:
        marks: the names of all marked values, in the order in which they are computed; those in a
            scan as often as it runs.
    """

    def __init__(self, function: Callable[..., Tree], *arguments: Tree) -> None:
        leaves = jax.tree.leaves(arguments)
        structure = jax.tree.structure(arguments)
        dynamic = [isinstance(leaf, jax.Array) or hasattr(leaf, "__array__") for leaf in leaves]
        self._values = [leaf for leaf, own in zip(leaves, dynamic, strict=True) if own]

        def flat(*values: jax.Array) -> Tree:
            given = iter(values)
            pairs = zip(leaves, dynamic, strict=True)
            whole = [next(given) if own else leaf for leaf, own in pairs]
            return function(*jax.tree.unflatten(structure, whole))

        self._jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*self._values)
        self._structure = jax.tree.structure(shapes)
        self.marks = _marks(self._jaxpr.jaxpr)

    def run(self, wanted: Collection[int]) -> tuple[Tree, dict[int, jax.Array]]:
        """What the function returns, and the marked values with these places in `marks`."""
        run = _Run(wanted, stops=False)
        found = run.through(self._jaxpr.jaxpr, self._jaxpr.consts, self._values)
        return jax.tree.unflatten(self._structure, found), run.found

    def run_until(self, wanted: Collection[int]) -> dict[int, jax.Array]:
        """The marked values alone: nothing runs that comes after the last of them."""
        run = _Run(wanted, stops=True)
        run.through(self._jaxpr.jaxpr, self._jaxpr.consts, self._values)
        return run.found


def _marks(jaxpr: Jaxpr) -> list[str]:
    return [name for equation in jaxpr.eqns for name in _marks_in(equation)]


def _marks_in(equation: JaxprEqn) -> list[str]:
    if equation.primitive is name_p:
        name = equation.params["name"]
        return [name.removeprefix(_OURS)] if name.startswith(_OURS) else []
    inner = [name for body in jaxprs_in_params(equation.params) for name in _marks(body)]
    if inner and equation.primitive not in _ENTERED:
        raise _hidden(inner[0], equation.primitive.name)
    if equation.primitive is scan_p:
        return inner * equation.params["length"]
    return inner


def _hidden(name: str, primitive: str) -> ValueError:
    return invalid(
        "A tapped block must run in the model's forward, or inside jit, vmap, remat or scan",
        f"{name!r} inside {primitive}",
        "Tap a module around it.",
    )


class _Run:
    """One run through a traced forward."""

    def __init__(self, wanted: Collection[int], stops: bool, seen: int = 0) -> None:
        self.wanted = wanted
        self.stops = stops
        self.seen = seen  # marks that are behind
        self.found: dict[int, jax.Array] = {}

    def through(self, jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """The outputs; an empty list where the run has stopped."""
        known = dict(zip(jaxpr.constvars, consts, strict=True))
        known |= zip(jaxpr.invars, values, strict=True)
        as_it_is: list[JaxprEqn] = []
        for equation in jaxpr.eqns:
            count = len(_marks_in(equation))
            if not self._wants(count):
                as_it_is.append(equation)
                self.seen += count
                continue
            known |= _evaluated(jaxpr, as_it_is, known)
            as_it_is = []
            outputs = self._entered(equation, [_read(known, each) for each in equation.invars])
            if self._is_done():
                return []
            known |= zip(equation.outvars, outputs, strict=True)
        known |= _evaluated(jaxpr, as_it_is, known)
        return [_read(known, each) for each in jaxpr.outvars]

    def _wants(self, count: int) -> bool:
        return any(self.seen <= place < self.seen + count for place in self.wanted)

    def _is_done(self) -> bool:
        return self.stops and self.found.keys() >= set(self.wanted)

    def _entered(self, equation: JaxprEqn, values: list[Any]) -> list[Any]:
        """The outputs of an equation that has wanted marks."""
        if equation.primitive is name_p:
            self.found[self.seen] = values[0]
            self.seen += 1
            return values
        if equation.primitive is scan_p:
            return self._scanned(equation.params, values)
        name = "call_jaxpr" if equation.primitive is closed_call_p else "jaxpr"
        body = equation.params[name]
        jaxpr, consts = getattr(body, "jaxpr", body), getattr(body, "consts", ())
        if equation.primitive is remat_p and not self.stops:
            return self._rematerialised(jaxpr, consts, equation.params, values)
        return self.through(jaxpr, consts, values)

    def _rematerialised(
        self, jaxpr: Jaxpr, consts: Sequence[Any], params: dict[str, Any], values: list[Any]
    ) -> list[Any]:
        inner = _Run(self.wanted, self.stops, self.seen)

        def body(*values: Any) -> tuple[list[Any], dict[int, jax.Array]]:
            return inner.through(jaxpr, consts, values), inner.found

        options = {name: params[name] for name in ("policy", "prevent_cse")}
        outputs, found = jax.checkpoint(body, **options)(*values)
        self.found |= found
        self.seen = inner.seen
        return outputs

    def _scanned(self, params: dict[str, Any], values: list[Any]) -> list[Any]:
        """A scan, with those of its steps apart that have wanted marks."""
        body, length = params["jaxpr"], params["length"]
        each = _marks(body.jaxpr)
        if params["reverse"]:
            raise _hidden(each[0], "a scan that runs in reverse")
        first = self.seen
        steps = {(place - first) // len(each) for place in self.wanted}
        scan = _Scan(params, values)
        for step in sorted(step for step in steps if 0 <= step < length):
            scan.run_to(step)
            self.seen = first + step * len(each)
            outputs = self.through(body.jaxpr, body.consts, scan.arguments())
            if self._is_done():
                return []
            scan.take(outputs)
        scan.run_to(length)
        self.seen = first + length * len(each)
        return scan.outputs()


class _Scan:
    """A scan that is run in pieces."""

    def __init__(self, params: dict[str, Any], values: list[Any]) -> None:
        self.body, self.unroll = params["jaxpr"], params["unroll"]
        carried = params["num_consts"] + params["num_carry"]
        self.consts = values[: params["num_consts"]]
        self.carry = values[params["num_consts"] : carried]
        self.xs = values[carried:]
        self.stacked: list[list[Any]] = []
        self.step = 0

    def run_to(self, end: int) -> None:
        """Run the steps before `end` as they are."""
        if end == self.step:
            return

        def run(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            values = (*self.consts, *carry, *xs)
            outputs = jax.core.eval_jaxpr(self.body.jaxpr, self.body.consts, *values)
            return outputs[: len(carry)], outputs[len(carry) :]

        xs = [each[self.step : end] for each in self.xs]
        count = end - self.step
        unroll = max(1, min(self.unroll, count))
        self.carry, stacked = jax.lax.scan(run, self.carry, xs, count, unroll=unroll)
        self.stacked.append(stacked)
        self.step = end

    def arguments(self) -> list[Any]:
        """Of the body, at this step."""
        return [*self.consts, *self.carry, *[each[self.step] for each in self.xs]]

    def take(self, outputs: list[Any]) -> None:
        """Go on with what the body gave at this step."""
        count = len(self.carry)
        self.carry = outputs[:count]
        self.stacked.append([jnp.expand_dims(each, 0) for each in outputs[count:]])
        self.step += 1

    def outputs(self) -> list[Any]:
        """Of the whole scan."""
        return [*self.carry, *[jnp.concatenate(each) for each in zip(*self.stacked, strict=True)]]


def _evaluated(jaxpr: Jaxpr, equations: list[JaxprEqn], known: dict[Any, Any]) -> dict[Any, Any]:
    """The values of these equations' variables."""
    if not equations:
        return {}
    outputs = [each for equation in equations for each in equation.outvars]
    made = [each for each in outputs if not isinstance(each, DropVar)]
    inputs = [each for equation in equations for each in equation.invars if _is_variable(each)]
    needed = [each for each in dict.fromkeys(inputs) if each in known]
    part = jaxpr.replace(constvars=[], invars=needed, outvars=made, eqns=equations)
    return dict(zip(made, jax.core.eval_jaxpr(part, [], *map(known.get, needed)), strict=True))


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")


def _read(known: dict[Any, Any], atom: Any) -> Any:
    return known[atom] if _is_variable(atom) else atom.val
