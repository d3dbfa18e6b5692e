"""One call taps a model that nobody edited: NNX, Linen and Equinox."""

import functools
import itertools
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax_models import (
    CHANNELS,
    WIDTH,
    EquinoxBlock,
    EquinoxListed,
    EquinoxModel,
    LinenBlock,
    LinenModel,
    LinenScannedModel,
    NnxModel,
    make_batch,
)

import selfalign
from selfalign.adapters import jax as sra

LOSS = selfalign.SRALoss(student_layer=2, teacher_layer=4)
X, NOISE, T, Y = make_batch()
KEY = jax.random.key(0)

# Models: (what is tapped, the parameters, the forward by hand -> prediction, all blocks' tokens)


class NnxScanned(nnx.Module):
    """Stacked blocks, and a scan over them."""

    def __init__(self, rngs, checkpointed=False):
        @nnx.split_rngs(splits=6)
        @nnx.vmap
        def stacked(rngs):
            return NnxPlain(rngs)

        self.embed = nnx.Linear(CHANNELS, WIDTH, rngs=rngs)
        self.blocks = stacked(rngs)

    def __call__(self, x, t, y):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return run(self.embed(x) + t[:, None, None], self.blocks)


class NnxPlain(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


class NnxCheckpointed(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(CHANNELS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxPlain(rngs) for _ in range(6)])

    def __call__(self, x, t, y):
        x = self.embed(x) + t[:, None, None]
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x


class LinenCheckpointed(nn.Module):
    @nn.compact
    def __call__(self, x, t, y):
        x = nn.Dense(WIDTH)(x) + t[:, None, None]
        for i in range(6):
            x = nn.remat(LinenBlock)(name=f"block_{i}")(x)
        return x


class EquinoxScanned(eqx.Module):
    """Of one sample [N, C], with stacked blocks."""

    embed: eqx.nn.Linear
    blocks: EquinoxBlock

    def __init__(self, key):
        self.embed = eqx.nn.Linear(CHANNELS, WIDTH, key=key)
        self.blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(key, 6))

    def __call__(self, x, t, y):
        x = jax.vmap(self.embed)(x) + t
        return jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)[0]


def one_after_the_other(x, blocks):
    return list(itertools.accumulate(blocks, lambda x, block: block(x), initial=x))[1:]


def nnx_listed():
    return functools.partial(sra.tap_nnx, blocks="blocks/{}"), NnxCheckpointed(nnx.Rngs(0))


def nnx_scanned():
    return functools.partial(sra.tap_nnx, blocks="blocks"), NnxScanned(nnx.Rngs(0))


def nnx_features(model):
    blocks = model.blocks
    if not isinstance(blocks, nnx.List):
        graph, state = nnx.split(blocks)
        parts = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(6)]
        blocks = [nnx.merge(graph, part) for part in parts]
    return one_after_the_other(model.embed(X) + T[:, None, None], blocks)


def linen_tapped(model, blocks):
    params = model.init(KEY, X, T, Y)["params"]
    return functools.partial(sra.tap_linen, model=model, blocks=blocks), params


def linen_listed():
    return linen_tapped(LinenCheckpointed(), "block_{}")


def linen_scanned():
    return linen_tapped(LinenScannedModel(), "blocks/block")


def linen_features(params):
    if "blocks" in params:
        return LinenScannedModel().apply({"params": params}, X, T, Y)[1]
    x = nn.Dense(WIDTH).apply({"params": params["Dense_0"]}, X) + T[:, None, None]
    blocks = [
        functools.partial(LinenBlock().apply, {"params": params[f"block_{i}"]}) for i in range(6)
    ]
    return one_after_the_other(x, blocks)


def equinox_listed():
    tapped = functools.partial(sra.tap_equinox, blocks="blocks/{}", call=jax.vmap)
    return tapped, EquinoxListed(KEY)


def equinox_scanned():
    tapped = functools.partial(sra.tap_equinox, blocks="blocks", call=jax.vmap)
    return tapped, EquinoxScanned(KEY)


def equinox_features(model):
    blocks = model.blocks
    if not isinstance(blocks, list):
        blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(6)]
    return one_after_the_other(
        jax.vmap(jax.vmap(model.embed))(X) + T[:, None, None], map(jax.vmap, blocks)
    )


MODELS = {
    "nnx": (nnx_listed, nnx_features),
    "nnx, scanned": (nnx_scanned, nnx_features),
    "linen": (linen_listed, linen_features),
    "linen, scanned": (linen_scanned, linen_features),
    "equinox": (equinox_listed, equinox_features),
    "equinox, scanned": (equinox_scanned, equinox_features),
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_gradients_are_those_of_the_forward_by_hand(name):
    """Blocks in lists under remat, and stacked blocks under scan."""
    make, by_hand = MODELS[name]
    tapped, params = make()
    student, apply = tapped(LOSS)

    def found(params):
        prediction, tokens = student(params, X, T, Y)
        return jnp.sum(tokens**2), (prediction, tokens, apply(params, X, T, Y))

    def expected(params):
        features = by_hand(params)
        return jnp.sum(features[1] ** 2), (features[5], features[1], features[3])

    gradients, outputs = jax.jit(jax.grad(found, has_aux=True))(params)
    wanted, features = jax.jit(jax.grad(expected, has_aux=True))(params)
    if name == "linen, scanned":
        outputs, features = outputs[1:], features[1:]  # this model has a head
    compared = [*zip(outputs, features, strict=True)]
    compared += zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True)
    for mine, theirs in compared:
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_teacher_runs_its_first_blocks_alone(name):
    """Matrix products in what is traced, those of a scan as often as it runs."""
    tapped, params = MODELS[name][0]()
    counts = []
    for layer in (2, 3, 6):
        loss = selfalign.SRALoss(student_layer=1, teacher_layer=layer)
        apply = tapped(loss).apply
        counts.append(products(jax.make_jaxpr(lambda p, a=apply: a(p, X, T, Y))(params).jaxpr))
    assert counts[1] - counts[0] == 1
    assert counts[2] - counts[1] == 3


def products(jaxpr, times=1):
    total = 0
    for equation in jaxpr.eqns:
        is_scan = equation.primitive.name == "scan"
        inner = times * equation.params["length"] if is_scan else times
        total += times * (equation.primitive.name == "dot_general")
        total += sum(products(body, inner) for body in jaxprs_in_params(equation.params))
    return total


def test_the_students_forward_costs_what_the_models_does():
    """Operations of the compiled gradient, remat's second forward among them."""
    tapped, params = nnx_listed()
    student, _ = tapped(LOSS)

    def flops(forward):
        gradient = jax.grad(lambda params: jnp.sum(forward(params) ** 2))
        return jax.jit(gradient).lower(params).compile().cost_analysis()["flops"]

    own = flops(lambda model: model(X, T, Y))
    assert flops(lambda model: student(model, X, T, Y)[0]) <= 1.01 * own


# Modes


class NnxTraining(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(CHANNELS, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlockOfSeveral(rngs) for _ in range(4)])

    def __call__(self, x, t, y, train=True):
        x = self.norm(self.embed(x)) + t[:, None, None]
        for block in self.blocks:
            x = block(x)["tokens"]
        return x * (2 if train else 1)


class NnxBlockOfSeveral(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return {"tokens": x + self.drop(self.linear(x)), "norm": jnp.mean(x)}


def test_nnx_trains_as_it_is_and_teaches_in_evaluation_mode():
    student, apply = sra.tap_nnx(LOSS, "blocks/{}", select="tokens")
    model, same = NnxTraining(nnx.Rngs(0)), NnxTraining(nnx.Rngs(0))
    prediction, _ = nnx.jit(student)(model, X, T, Y)
    np.testing.assert_allclose(prediction, same(X, T, Y), rtol=1e-4, atol=1e-5)
    states = [jax.tree.leaves(nnx.state(each, nnx.Not(nnx.RngKey))) for each in (model, same)]
    for mine, theirs in zip(*states, strict=True):  # random streams and running averages moved
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    tokens = nnx.jit(apply)(model, X, T, Y)
    still = nnx.state(model, nnx.Not(nnx.RngKey))
    for mine, theirs in zip(jax.tree.leaves(still), states[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    same.eval()
    x = same.norm(same.embed(X)) + T[:, None, None]
    for block in same.blocks:
        x = block(x)["tokens"]
    np.testing.assert_allclose(tokens, x, rtol=1e-4, atol=1e-5)


class NnxScannedTraining(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=4)
        @nnx.vmap
        def stacked(rngs):
            return NnxNoisy(rngs)

        self.embed = nnx.Linear(CHANNELS, WIDTH, rngs=rngs)
        self.blocks = stacked(rngs)

    def __call__(self, x, t, y):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return run(self.embed(x) + t[:, None, None], self.blocks)


class NnxNoisy(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.norm(self.drop(x))


def test_a_scan_that_is_cut_draws_and_averages_as_the_whole():
    student, _ = sra.tap_nnx(LOSS, "blocks")
    model, same = NnxScannedTraining(nnx.Rngs(0)), NnxScannedTraining(nnx.Rngs(0))
    prediction, _ = nnx.jit(student)(model, X, T, Y)
    np.testing.assert_allclose(prediction, nnx.jit(lambda same: same(X, T, Y))(same))
    states = [jax.tree.leaves(nnx.state(each, nnx.Not(nnx.RngKey))) for each in (model, same)]
    for mine, theirs in zip(*states, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


class LinenTraining(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x, t, y, deterministic=False):
        x = nn.BatchNorm(use_running_average=not self.train)(nn.Dense(WIDTH)(x))
        for i in range(4):
            hidden = nn.Dense(WIDTH, name=f"layer_{i}")(x)
            x = nn.Dropout(0.5, deterministic=deterministic, name=f"block_{i}")(x + hidden)
        return x


def test_linen_trains_as_it_is_and_teaches_in_evaluation_mode():
    model = LinenTraining()
    variables = LinenTraining(train=False).init(KEY, X, T, Y, deterministic=True)
    student, apply = sra.tap_linen(LOSS, model, "block_{}")
    options = {"rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats"]}
    (prediction, changed), tokens = jax.jit(functools.partial(student, **options))(
        variables, X, T, Y
    )
    expected, updated = model.apply(variables, X, T, Y, **options)
    np.testing.assert_allclose(prediction, expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(changed) == jax.tree.structure(updated)
    assert (tokens == 0).any()
    plain = LinenTraining(train=False)
    shown = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, captured = plain.apply(variables, X, T, Y, deterministic=True, **shown)
    expected = sra.tap(captured["intermediates"], "block_3/__call__")
    np.testing.assert_allclose(apply(variables, X, T, Y), expected, rtol=1e-5)


class EquinoxTraining(eqx.Module):
    blocks: list
    drop: eqx.nn.Dropout = eqx.field(default_factory=lambda: eqx.nn.Dropout(0.5))

    def __call__(self, x, t, y, key=None, train=True):
        if train:
            x = self.drop(x, key=key)
        for block in self.blocks:
            x = block(x)
        return x


def test_equinox_trains_as_it_is_and_teaches_in_inference_mode():
    model = EquinoxTraining([EquinoxBlock(key) for key in jax.random.split(KEY, 4)])
    student, apply = sra.tap_equinox(LOSS, "blocks/{}", call=jax.vmap)
    x, keys = jnp.ones((4, 5, WIDTH)), jax.random.split(KEY, 4)
    prediction, tokens = student(model, x, T, Y, keys)
    np.testing.assert_allclose(prediction, jax.vmap(model)(x, T, Y, keys), rtol=1e-5)
    expected = one_after_the_other(x, map(jax.vmap, model.blocks))
    np.testing.assert_allclose(apply(model, x, T, Y), expected[3], rtol=1e-5)
    assert abs(tokens - expected[1]).max() > 0.1


# Objectives, paths, outputs


def test_a_list_gives_tokens_and_later_layers_by_name():
    deep = selfalign.SRALoss(student_layer=1, teacher_layer=6, name="deep")
    layersync = selfalign.LayerSyncLoss(student_layer=3, teacher_layer=5)
    student, apply = sra.tap_linen([LOSS, deep, layersync], LinenCheckpointed(), "block_{}")
    params = linen_listed()[1]
    features = linen_features(params)
    _, tokens, targets = student(params, X, T, Y)
    taught = apply(params, X, T, Y)
    for found, layers in (
        (tokens, {"sra": 2, "deep": 1, "layersync": 3}),
        (targets, {"layersync": 5}),
        (taught, {"sra": 4, "deep": 6}),
    ):
        assert found.keys() == layers.keys()
        for name, layer in layers.items():
            np.testing.assert_allclose(found[name], features[layer - 1], rtol=1e-5)
    heads = {**{n: sra.init_projector(KEY, WIDTH) for n in ("sra", "deep")}, "layersync": {}}
    sides = sra.init_teacher(params), params, heads, tokens
    losses = [LOSS, deep, layersync]
    assert sra.align(losses, apply, *sides, X, NOISE, T, Y, key=KEY, target_tokens=targets) > 0


def test_layersync_alone_needs_no_teacher():
    loss = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4)
    student, apply = sra.tap_equinox(loss, "blocks/{}", call=jax.vmap)
    _, tokens, target = student(EquinoxListed(KEY), X, T, Y)
    features = equinox_features(EquinoxListed(KEY))
    np.testing.assert_allclose(tokens, features[1], rtol=1e-5)
    np.testing.assert_allclose(target, features[3], rtol=1e-5)
    with pytest.raises(ValueError, match="There must be an objective with an EMA teacher"):
        apply(EquinoxListed(KEY), X, T, Y)


def test_two_paths_name_the_modules():
    student, apply = sra.tap_nnx(LOSS, ("blocks/0", "blocks/5"))
    model = NnxCheckpointed(nnx.Rngs(0))
    features = nnx_features(model)
    np.testing.assert_allclose(student(model, X, T, Y)[1], features[0], rtol=1e-5)
    np.testing.assert_allclose(apply(model, X, T, Y), features[5], rtol=1e-5)


def test_parts_of_a_module_may_be_the_parameters():
    graph, params, rest = nnx.split(NnxCheckpointed(nnx.Rngs(0)), nnx.Param, ...)
    model = nnx.merge(graph, params, rest)
    tapped = sra.tap_nnx(LOSS, "blocks/{}", module=lambda params: nnx.merge(graph, params, rest))
    np.testing.assert_array_equal(
        tapped.apply(params, X, T, Y), sra.tap_nnx(LOSS, "blocks/{}").apply(model, X, T, Y)
    )
    arrays, static = eqx.partition(EquinoxListed(KEY), eqx.is_array)
    options = {"module": lambda params: eqx.combine(params, static), "call": jax.vmap}
    tapped = sra.tap_equinox(LOSS, "blocks/{}", **options)
    features = equinox_features(EquinoxListed(KEY))
    np.testing.assert_allclose(tapped.apply(arrays, X, T, Y), features[3], rtol=1e-5)


def test_another_method_may_be_called():
    class Model(NnxCheckpointed):
        def forward(self, x, t, y):
            return NnxCheckpointed.__call__(self, x, t, y)

        __call__ = None

    student, _ = sra.tap_nnx(LOSS, "blocks/{}", call=lambda model: model.forward)
    model = Model(nnx.Rngs(0))
    np.testing.assert_allclose(student(model, X, T, Y)[1], nnx_features(model)[1], rtol=1e-5)


def test_an_ensemble_is_tapped_under_vmap():
    tapped, _ = equinox_listed()
    student, apply = tapped(LOSS)
    models = eqx.filter_vmap(EquinoxListed)(jax.random.split(KEY, 2))
    both = eqx.filter_vmap(lambda model: (student(model, X, T, Y)[1], apply(model, X, T, Y)))
    features = equinox_features(jax.tree.map(lambda leaf: leaf[1], models))
    for found, layer in zip(both(models), (2, 4), strict=True):
        np.testing.assert_allclose(found[1], features[layer - 1], rtol=1e-5)


def test_a_tapped_scan_runs_on_devices_of_a_shard_map():
    tapped, params = linen_scanned()
    student, apply = tapped(LOSS)

    def both(params, *inputs):
        return student(params, *inputs)[1], apply(params, *inputs)

    split = jax.P("data")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (jax.P(), split, split, split), "out_specs": split}
    mapped = jax.shard_map(both, mesh=mesh, **specs)
    features = linen_features(params)
    for found, layer in zip(jax.jit(mapped)(params, X, T, Y), (2, 4), strict=True):
        np.testing.assert_allclose(found, features[layer - 1], rtol=1e-4, atol=1e-5)


# What does not fit


def run(tapped, *model):
    return tapped.student(*model, X, T, Y)


class Branching(eqx.Module):
    blocks: list

    def __call__(self, x, t, y):
        for block in self.blocks:
            x = jax.lax.cond(t.sum() > 0, lambda x, block=block: block(x), lambda x: x, x)
        return x


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: run(sra.tap_nnx(LOSS, "layers/{}"), NnxCheckpointed(nnx.Rngs(0))),
            ValueError,
            "blocks must name modules that run in the model's forward. Received: 'layers/{}', of "
            "which none ran. Its modules: blocks, blocks/0, blocks/0/linear, ",
        ),
        (
            lambda: run(sra.tap_equinox(LOSS, "layers/{}"), EquinoxModel(KEY)),
            ValueError,
            "'layers/{}', of which none ran. Its modules: blocks/0, blocks/0/layers/0, ",
        ),
        (
            lambda: run(sra.tap_linen(LOSS, LinenModel(), "layers/{}"), LINEN),
            ValueError,
            "'layers/{}', of which none ran. Its modules: Dense_0, Dense_1, Embed_0, block_0, ",
        ),
        (
            lambda: run(sra.tap_nnx(LOSS, "blocks/{}"), NnxTraining(nnx.Rngs(0))),
            ValueError,
            "A tapped block must return one array, or select= must say which of them it is. "
            "Received: 'blocks/0' returns 2: (), (4, 5, 16). Pass for instance select=0",
        ),
        (
            lambda: run(sra.tap_nnx(LOSS, "blocks/{}", select=3), NnxTraining(nnx.Rngs(0))),
            ValueError,
            "select= must fit what the block returns. Received: select=3, a dict at 'blocks/0'.",
        ),
        (
            lambda: run(sra.tap_nnx(LOSS, "blocks/{}", select=dict), NnxTraining(nnx.Rngs(0))),
            TypeError,
            "select= must give one array. Received: dict at 'blocks/0'. Select the tokens",
        ),
        (
            lambda: run(
                sra.tap_equinox(LOSS, ("embed", "blocks"), call=jax.vmap), EquinoxScanned(KEY)
            ),
            ValueError,
            "A tapped module must run once in a forward. Received: 'blocks', which runs 6 times.",
        ),
        (
            lambda: run(sra.tap_equinox(LOSS, "blocks/{}"), Branching([eqx.nn.Identity()] * 4)),
            ValueError,
            "A tapped block must run in the model's forward, or inside jit, vmap, remat or scan. "
            "Received: 'blocks/0' inside cond. Tap a module around it.",
        ),
        (
            lambda: run(sra.tap_nnx(LOSS, "blocks/{}"), nnx.state(NnxModel(nnx.Rngs(0)))),
            TypeError,
            "The model must be an nnx.Module. Received: State. For a state pass module=lambda",
        ),
        (
            lambda: run(sra.tap_equinox(LOSS, "blocks/{}"), {"blocks": []}),
            TypeError,
            "The model must be an equinox.Module. Received: dict. For its arrays pass module=",
        ),
        (
            lambda: sra.tap_linen(LOSS, LINEN, "block_{}"),
            TypeError,
            "model must be a flax.linen.Module. Received: dict. Pass the module itself",
        ),
        (
            lambda: sra.tap_nnx(LOSS, ["blocks/0", "blocks/1"]),
            TypeError,
            "blocks must be a path such as 'blocks/{}', or two paths, the student's module and the "
            "target's. Received: ['blocks/0', 'blocks/1']. Write {} for the blocks' numbers.",
        ),
    ],
)
def test_what_cannot_be_tapped_is_refused(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()


LINEN = LinenModel().init(KEY, X, T, Y)["params"]
