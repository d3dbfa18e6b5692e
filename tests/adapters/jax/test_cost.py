"""What SRA costs a jitted step, counted in the compiled program."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax_loop import SGD, apply_at, make_loop
from jax_models import (
    WIDTH,
    LinenModel,
    LinenScannedModel,
    NnxModel,
    forward,
    make_batch,
    make_params,
)

import selfalign
from selfalign import schedules
from selfalign.adapters import jax as sra


@pytest.fixture
def params():
    """Of a model with a block after the teacher's layer."""
    return {name: jnp.asarray(value) for name, value in make_params(depth=3).items()}


def flops(function, *arguments, **named):
    return jax.jit(function).lower(*arguments, **named).compile().cost_analysis()["flops"]


def prefix(params, blocks):
    """The parameters of embedders and first blocks alone: by torch's names."""
    later = (*(f"blocks.{i}." for i in range(blocks, 12)), "final")
    return {name: value for name, value in params.items() if not name.startswith(later)}


def prefix_forward(params, x, t, y):
    head = {"final_layer.weight": jnp.zeros((1, WIDTH)), "final_layer.bias": jnp.zeros(1)}
    return forward(params | head, x, t, y)[1][-1]


def test_the_teacher_costs_its_prefix_and_no_more(loss, params):
    """XLA drops what comes after the returned block.

    The whole forward's count is compared with a model that has only these blocks.
    """
    x0, noise, t, y = make_batch(8, 16)

    def target(teacher, params, key):
        return sra.teacher_tokens(loss, apply_at(2), teacher, params, x0, noise, t, y, key=key)

    counted = flops(target, sra.init_teacher(params), params, jax.random.key(0))
    ideal = flops(prefix_forward, prefix(params, 2), x0, t, y)
    whole = flops(lambda params: forward(params, x0, t, y)[0], params)
    assert ideal < counted < 1.02 * ideal
    assert counted < 0.75 * whole


@pytest.mark.parametrize("decay", [0.9999, schedules.DecayWarmup(0.999)])
def test_a_step_costs_no_more_than_its_parts(decay, params):
    """Step with SRA <= plain step + teacher's prefix + projector + distance + EMA.

    Within 2 % of what is added. The plain step, too, updates the EMA and the projector.
    """
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, decay=decay)
    batch = make_batch(16, 64)
    x0, _, t, y = batch

    def of_step(loop):
        return flops(loop.step, loop.start(params), *batch, key=jax.random.key(0))

    added = of_step(make_loop(loss, SGD)) - of_step(make_loop(loss, SGD, aligned=False))
    teacher = flops(prefix_forward, prefix(params, 2), x0, t, y)
    term = jax.value_and_grad(functools.partial(sra.term, loss), argnums=(0, 1))
    tokens = jnp.ones((16, 64, WIDTH))
    projector = sra.init_projector(jax.random.key(0), WIDTH)
    parts = teacher + flops(term, projector, tokens, tokens + 1)
    assert added < 1.02 * parts
    assert added > 0.9 * parts  # and the parts are no overestimate


def test_a_list_costs_one_teacher(loss, params):
    """Two objectives with an EMA teacher share its forward."""
    batch = make_batch(8, 16)
    deep = selfalign.SRALoss(student_layer=2, teacher_layer=3, name="deep")

    def apply_both(*inputs):
        features = forward(*inputs)[1]
        return {"sra": features[1], "deep": features[2]}

    def target(loss, apply, teacher, params, key):
        return sra.teacher_tokens(loss, apply, teacher, params, *batch, key=key)

    arguments = sra.init_teacher(params), params, jax.random.key(0)
    two = flops(functools.partial(target, [loss, deep], apply_both), *arguments)
    one = flops(functools.partial(target, loss, apply_at(3)), *arguments)
    assert two < 1.02 * one


def test_the_ema_costs_three_operations_a_parameter(loss, params):
    count = sum(leaf.size for leaf in params.values())
    update = functools.partial(sra.update_teacher, loss)
    assert flops(update, sra.init_teacher(params), params) <= 3.01 * count


def nnx_tokens_and_params(x0, t, y):
    module = nnx.view(NnxModel(nnx.Rngs(0)), deterministic=True)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def tokens(params, block):
        model = nnx.merge(graph, params, rest)
        capturing = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
        return sra.tap(capturing(x0, t, y)[1], f"blocks/{block}/__call__")

    return tokens, params


def linen_tokens_and_params(x0, t, y):
    model = LinenModel()
    options = {"capture_intermediates": True, "mutable": ["intermediates"]}

    def tokens(variables, block):
        _, captured = model.apply(variables, x0, t, y, **options)
        return sra.tap(captured["intermediates"], f"block_{block}/__call__")

    return tokens, model.init(jax.random.key(0), x0, t, y)


@pytest.mark.parametrize("library", [nnx_tokens_and_params, linen_tokens_and_params])
def test_captures_that_are_not_read_cost_nothing(library):
    """NNX and Linen capture every module's output; only the tapped one is computed."""
    x0, _, t, y = make_batch()
    tokens, params = library(x0, t, y)
    counts = [flops(functools.partial(tokens, block=block), params) for block in range(6)]
    steps = [later - earlier for earlier, later in itertools.pairwise(counts)]
    assert max(steps) - min(steps) <= 0.01 * max(steps)
    assert steps[0] > 0


def matrix_products(function, *arguments):
    """Matrix products in the jaxpr, those under a scan times its length.

    XLA's own count takes a loop's body once.
    """

    def count(jaxpr, times=1):
        total = 0
        for equation in jaxpr.eqns:
            is_scan = equation.primitive.name == "scan"
            inner = times * equation.params["length"] if is_scan else times
            total += times * (equation.primitive.name == "dot_general")
            total += sum(count(sub, inner) for sub in jaxprs_in_params(equation.params))
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_a_scanned_teacher_costs_its_first_blocks_alone():
    x0, _, t, y = make_batch()
    model = LinenScannedModel()
    params = model.init(jax.random.key(0), x0, t, y)["params"]

    def tokens(params, depth):
        first, _ = sra.split_blocks(params["blocks"], depth)
        shallow = model.clone(depth=depth)
        return shallow.apply({"params": {**params, "blocks": first}}, x0, t, y)[1][-1]

    depths = (1, 2, 4, 6)
    products = [matrix_products(functools.partial(tokens, depth=n), params) for n in depths]
    assert [b - a for a, b in itertools.pairwise(products)] == [1, 2, 2]
