"""What SRA costs a jitted step, counted in the compiled program."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax_loop import apply_at, make_loop
from jax_models import WIDTH, LinenModel, LinenScannedModel, NnxModel, forward, make_batch, make_params

import selfalign
from selfalign.adapters import jax as sra


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
    """XLA drops what comes after the returned block: the whole forward's count against a model that has only these blocks."""
    x0, noise, t, y = make_batch(8, 16)
    teacher, key = sra.init_teacher(params), jax.random.key(0)

    def target(teacher, params, key):
        return sra.teacher_tokens(loss, apply_at(4), teacher, params, x0, noise, t, y, key=key)

    counted = flops(target, teacher, params, key)
    ideal = flops(prefix_forward, prefix(params, 4), x0, t, y)
    whole = flops(lambda params: forward(params, x0, t, y)[0], params)
    assert ideal < counted < 1.02 * ideal
    assert counted < 0.75 * whole


def step_flops(loss, sra_on):
    params = {name: jnp.asarray(value) for name, value in make_params(depth=6).items()}
    loop = make_loop(loss, sra_on=sra_on)
    batch = make_batch(16, 64)
    return flops(loop.step, loop.start(params), *batch, key=jax.random.key(0)), params, batch


@pytest.mark.parametrize("decay", [0.9999, selfalign.schedules.DecayWarmup(0.999)])
def test_a_step_costs_no_more_than_its_parts(decay):
    """Step with SRA <= plain step + teacher's prefix + projector + distance + EMA, within 2 % of what is added."""
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=decay)
    # the plain step also updates the EMA and the projector's parameters: both are asked for in both steps
    plain, params, (x0, _, t, y) = step_flops(loss, sra_on=False)
    total, *_ = step_flops(loss, sra_on=True)
    tokens = jnp.ones((16, 64, WIDTH))
    projector = sra.init_projector(jax.random.key(0), WIDTH)
    teacher = flops(prefix_forward, prefix(params, 4), x0, t, y)
    term = flops(jax.value_and_grad(functools.partial(sra.term, loss), argnums=(0, 1)), projector, tokens, tokens + 1)
    assert total - plain < 1.02 * (teacher + term)
    assert total - plain > 0.9 * (teacher + term)  # and the parts are no overestimate


def test_the_ema_costs_three_operations_a_parameter(loss, params):
    count = sum(leaf.size for leaf in params.values())
    assert flops(functools.partial(sra.update_teacher, loss), sra.init_teacher(params), params) <= 3.01 * count


def test_captures_that_nobody_reads_cost_nothing():
    """NNX and Linen capture every module's output; only the tapped one is computed."""
    x0, _, t, y = make_batch()
    graph, params, rest = nnx.split(nnx.view(NnxModel(nnx.Rngs(0)), deterministic=True), nnx.Param, ...)
    variables = LinenModel().init(jax.random.key(0), x0, t, y)

    def nnx_tokens(params, block):
        model = nnx.merge(graph, params, rest)
        return sra.tap(
            nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(x0, t, y)[1], f"blocks/{block}/__call__"
        )

    def linen_tokens(variables, block):
        _, captured = LinenModel().apply(variables, x0, t, y, capture_intermediates=True, mutable=["intermediates"])
        return sra.tap(captured["intermediates"], f"block_{block}/__call__")

    for tokens, weights in ((nnx_tokens, params), (linen_tokens, variables)):
        counts = [flops(functools.partial(tokens, block=block), weights) for block in range(6)]
        steps = [later - earlier for earlier, later in itertools.pairwise(counts)]
        assert max(steps) - min(steps) <= 0.01 * max(steps)
        assert steps[0] > 0


def matrix_products(function, *arguments):
    """Matrix products in the jaxpr, those under a scan times its length: XLA's own count takes a loop's body once."""

    def count(jaxpr, times=1):
        total = 0
        for equation in jaxpr.eqns:
            inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
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
        return model.clone(depth=depth).apply({"params": {**params, "blocks": first}}, x0, t, y)[1][-1]

    products = [matrix_products(functools.partial(tokens, depth=depth), params) for depth in (1, 2, 4, 6)]
    assert [b - a for a, b in itertools.pairwise(products)] == [1, 2, 2]
