"""Models of Flax NNX, Flax Linen, Equinox and optax as their users have them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_loop import make_loop
from jax_models import (
    WIDTH,
    EquinoxModel,
    LinenModel,
    LinenScannedModel,
    NnxModel,
    make_batch,
)

from selfalign.adapters import jax as sra

# What models capture


def by_hand(model, x, t, y):
    """Tokens after block 3, from the parts of the NNX model."""
    x = model.embed(x) + (model.labels(y) + t[:, None])[:, None]
    for block in list(model.blocks)[:3]:
        x = block(x)
    return x


def test_nnx_capture_and_sow_give_a_blocks_output():
    x, _, t, y = make_batch()
    model = nnx.view(NnxModel(nnx.Rngs(0)), deterministic=True)
    _, outputs = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(x, t, y)
    _, sown = nnx.capture(model, nnx.Intermediate)(x, t, y)
    expected = by_hand(model, x, t, y)
    np.testing.assert_array_equal(sra.tap(outputs, "blocks/2/__call__"), expected)
    np.testing.assert_array_equal(sra.tap(sown, "tokens_2"), expected)


def test_linen_capture_and_sow_give_a_blocks_output():
    x, _, t, y = make_batch()
    model = LinenModel()
    variables = model.init(jax.random.key(0), x, t, y)
    later = ("block_3", "block_4", "block_5")
    first = {name: value for name, value in variables["params"].items() if name not in later}
    shallow = LinenModel(depth=3)
    _, expected = shallow.apply({"params": first}, x, t, y, mutable=["intermediates"])

    def is_block(module, method):
        return (module.name or "").startswith("block_")

    for options, where in (
        ({"capture_intermediates": True}, "block_2/__call__"),
        ({"capture_intermediates": is_block}, "block_2"),
        ({}, "tokens_2"),
    ):
        _, captured = model.apply(variables, x, t, y, mutable=["intermediates"], **options)
        found = sra.tap(captured["intermediates"], where)
        np.testing.assert_array_equal(found, sra.tap(expected, "intermediates/tokens_2"))


def test_a_list_of_features_is_counted_from_one():
    features = [jnp.full((2, 3, 4), number) for number in (1, 2, 3)]
    assert sra.tap(features, 1) is features[0]
    assert sra.tap(tuple(features), 3) is features[-1]


# Training: (params, x, t, y) -> the prediction, and the tokens after blocks 2 and 4


def linen_training():
    model = LinenModel()
    x0, _, t, y = make_batch()
    params = model.init(jax.random.key(0), x0, t, y)["params"]

    def captured(params, *inputs):
        options = {"capture_intermediates": True, "mutable": ["intermediates"]}
        prediction, captures = model.apply({"params": params}, *inputs, **options)
        captures = captures["intermediates"]
        return prediction, [sra.tap(captures, f"block_{n}/__call__") for n in (1, 3)]

    return captured, params


def nnx_training():
    graph, params, rest = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)

    def captured(params, *inputs):
        model = nnx.view(nnx.merge(graph, params, rest), deterministic=True)
        capturing = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
        prediction, captures = capturing(*inputs)
        return prediction, [sra.tap(captures, f"blocks/{n}/__call__") for n in (1, 3)]

    return captured, params


def equinox_training():
    params, static = eqx.partition(EquinoxModel(jax.random.key(0)), eqx.is_inexact_array)

    def captured(params, *inputs):
        prediction, features = eqx.combine(params, static)(*inputs)
        return prediction, [sra.tap(features, n) for n in (2, 4)]

    return captured, params


TRAINING = {"linen": linen_training, "nnx": nnx_training, "equinox": equinox_training}


@pytest.mark.parametrize("library", TRAINING)
def test_a_jitted_donated_step_trains_model_and_projector(library, loss):
    captured, params = TRAINING[library]()
    optimizer = optax.adam(1e-2)
    trained = {"model": params, "projector": sra.init_projector(jax.random.key(0), WIDTH)}
    state = trained, optimizer.init(trained), sra.init_teacher(params)

    def apply(params, *inputs):
        return captured(params, *inputs)[1][1]

    def objective(trained, teacher, x0, noise, t, y, key):
        params, projector = trained["model"], trained["projector"]
        prediction, (student_tokens, _) = captured(params, loss.path.add_noise(x0, noise, t), t, y)
        denoising = jnp.mean((prediction - loss.path.velocity(x0, noise, t)) ** 2)
        sides = teacher, params, projector, student_tokens
        alignment = sra.align(loss, apply, *sides, x0, noise, t, y, key=key)
        return denoising + alignment, alignment

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        trained, moments, teacher = state
        gradients, alignment = jax.grad(objective, has_aux=True)(trained, teacher, *batch, key)
        updates, moments = optimizer.update(gradients, moments)
        trained = optax.apply_updates(trained, updates)
        return (trained, moments, sra.update_teacher(loss, teacher, trained["model"])), alignment

    terms = []
    for i in range(40):
        state, alignment = step(state, make_batch(16), jax.random.key(i))
        terms.append(float(alignment))
    assert terms[-1] < 0.5 * terms[0]
    assert state[2].step == 40
    assert step._cache_size() == 1


def test_whole_modules_go_through_the_librarys_own_jit(loss):
    x0, noise, t, y = make_batch()
    model = EquinoxModel(jax.random.key(0))
    projector = sra.init_projector(jax.random.key(1), WIDTH)

    def apply(model, *inputs):
        return model(*inputs)[1][3]

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def objective(trained, teacher, key):
        model, projector = trained
        features = model(loss.path.add_noise(x0, noise, t), t, y)[1]
        sides = teacher, model, projector, features[1]
        return sra.align(loss, apply, *sides, x0, noise, t, y, key=key)

    teacher = sra.init_teacher(model)
    value, (gradients, _) = objective((model, projector), teacher, jax.random.key(0))
    assert value > 0
    assert gradients.blocks[1].layers[0].weight.any()
    assert not gradients.blocks[2].layers[0].weight.any()
    assert teacher.average(x0, t, y)[0].shape == x0.shape  # the average is a model, to sample from


def test_optax_trains_the_projector_and_not_the_teacher(loss, params, batch):
    loop = make_loop(loss)
    trained, _, teacher = loop.start(params)
    everything = {**trained, "teacher": teacher.average}
    labels = {"model": "train", "projector": "train", "teacher": "freeze"}
    frozen = {name: label == "freeze" for name, label in labels.items()}
    zero = optax.set_to_zero()
    optimizers = (
        optax.multi_transform({"train": optax.adamw(1e-2), "freeze": zero}, labels),
        optax.chain(optax.adam(1e-2), optax.masked(zero, frozen)),
    )

    def objective(everything, key):
        teacher = sra.Teacher(everything["teacher"], jnp.zeros((), "int32"))
        return loop.objective(everything, teacher, *batch, key=key)

    @jax.jit
    def updates(everything, key):
        gradients = jax.grad(objective)(everything, key)
        starts = [optimizer.init(everything) for optimizer in optimizers]
        return [
            o.update(gradients, s, everything)[0] for o, s in zip(optimizers, starts, strict=True)
        ]

    for update in updates(everything, jax.random.key(0)):
        moved = jax.tree.map(lambda leaf: bool(np.any(leaf != 0)), update)
        assert not any(jax.tree.leaves(moved["teacher"]))
        assert all(jax.tree.leaves(moved["projector"]))
        assert moved["model"]["blocks.0.qkv.weight"]


def test_apply_may_be_any_callable(loss, batch):
    class Apply:
        def __call__(self, params, x, t, y):
            return x * params["w"]

    params = {"w": jnp.ones(4)}
    for apply in (Apply(), jax.jit(Apply()), functools.partial(Apply().__call__)):
        teacher = sra.init_teacher(params)
        target = sra.teacher_tokens(loss, apply, teacher, params, *batch, key=jax.random.key(0))
        assert target.shape == (4, 5, 4)


# Models that scan over their blocks


def test_blocks_split_into_first_and_rest():
    kernel = np.arange(12.0).reshape(6, 2)
    stacked = {"kernel": kernel, "activation": jax.nn.silu}
    for layer in range(1, 7):
        first, rest = sra.split_blocks(stacked, layer)
        np.testing.assert_array_equal(first["kernel"], kernel[:layer])
        np.testing.assert_array_equal(rest["kernel"], kernel[layer:])
        assert first["activation"] is rest["activation"] is jax.nn.silu


def test_a_scanned_teacher_runs_its_first_blocks_alone(loss):
    x0, noise, t, y = make_batch()
    model = LinenScannedModel()
    params = model.init(jax.random.key(0), x0, t, y)["params"]

    def short(params, *inputs):  # the same model, only shallower: nothing in it is edited
        first, _ = sra.split_blocks(params["blocks"], 4)
        shallow = model.clone(depth=4)
        return shallow.apply({"params": {**params, "blocks": first}}, *inputs)[1][-1]

    def whole(params, *inputs):
        return model.apply({"params": params}, *inputs)[1][3]

    teacher = sra.init_teacher(params)
    key = jax.random.key(0)
    tokens = [
        sra.teacher_tokens(loss, jax.jit(apply), teacher, params, x0, noise, t, y, key=key)
        for apply in (short, whole)
    ]
    np.testing.assert_allclose(*tokens, rtol=1e-6)


# The mode of whole modules


class NnxDropout(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, t):
        return self.dropout(self.layer(x)) + t[:, None, None]


class EquinoxDropout(eqx.Module):
    layer: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, x, t):
        tokens = jax.vmap(jax.vmap(self.layer))(x)
        return self.dropout(tokens, key=jax.random.key(0)) + t[:, None, None]


def nnx_dropout():
    return NnxDropout(nnx.Rngs(0)), lambda model: nnx.view(model, deterministic=True)


def equinox_dropout():
    layer = eqx.nn.Linear(4, WIDTH, key=jax.random.key(0))
    return EquinoxDropout(layer, eqx.nn.Dropout(0.5)), eqx.nn.inference_mode


@pytest.mark.parametrize("make", [nnx_dropout, equinox_dropout])
def test_a_whole_module_teaches_in_evaluation_mode(make, loss):
    """With an `apply` of the user's that says nothing of modes; the student keeps its own."""
    x0, noise, t, _ = make_batch()
    model, evaluated = make()

    def apply(model, x, t):
        return model(x, t)

    noisy = loss.path.add_noise(x0, noise, t)
    before = model(noisy, t)
    sides = sra.init_teacher(model), model
    tokens = sra.teacher_tokens(loss, apply, *sides, x0, noise, t, u=jnp.zeros(len(t)))
    np.testing.assert_allclose(tokens, evaluated(model)(noisy, t), rtol=1e-5, atol=1e-6)
    assert not np.allclose(tokens, before, atol=1e-3)
    assert not np.allclose(model(noisy, t), tokens, atol=1e-3)
