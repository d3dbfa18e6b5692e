"""check: what would go wrong in silence is found before the first step."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax_models import EquinoxListed, LinenModel, make_batch

import selfalign
from selfalign.adapters import jax as sra

LOSS = selfalign.SRALoss(student_layer=1, teacher_layer=3)
X0, NOISE, T, Y = make_batch(8)
X = LOSS.path.add_noise(X0, NOISE, T)
KEY = jax.random.key(0)
DEPTH, WIDTH = 4, 8


def make_params():
    """Of a transformer whose gates begin at zero."""
    keys = jax.random.split(KEY, 3)
    return {
        "embed": jax.random.normal(keys[0], (4, WIDTH)),
        "labels": jnp.zeros((11, WIDTH)),
        "time": jnp.zeros(WIDTH),
        "blocks": list(jax.random.normal(keys[1], (DEPTH, WIDTH, WIDTH))),
        "gates": list(jnp.zeros((DEPTH, WIDTH))),
    }


def features(params, x, t, y, dropped=None, after=None):
    """Tokens after each block; labels are dropped before or after a block."""
    x, found = x @ params["embed"], []
    for number, (kernel, gate) in enumerate(zip(params["blocks"], params["gates"], strict=True)):
        seen = y if dropped is None or number < after else jnp.where(dropped, 10, y)
        condition = (params["labels"][seen] + t[:, None] * params["time"])[:, None]
        x = x + gate * jnp.tanh(x @ kernel + condition)
        found.append(x)
    return found


def tap(loss, own=features, teachers=features, shift=0):
    student, teacher = loss.layers(DEPTH)

    def called(*inputs):
        return None, own(*inputs)[student - 1]

    return called, lambda *inputs: teachers(*inputs)[teacher - 1 + shift]


DROPPED = jnp.arange(8) % 2 == 0


def other_labels(params, x, t, y):
    return features(params, x, t, y + 1)


def scaled_time(params, x, t, y):
    return features(params, x, 1000 * t, y)


def of_its_own(fixed, params, x, t, y):
    return features(fixed, x, t, y)


def blind(params, x, t, y):
    return features(params, x, jnp.zeros_like(t), y)


def constant(params, x, t, y):
    return features(params, 0 * x, t, y)


def flat(params, x, t, y):
    return [each.mean(1) for each in features(params, x, t, y)]


def with_registers(params, x, t, y):
    return [jnp.pad(each, ((0, 0), (1, 0), (0, 0))) for each in features(params, x, t, y)]


def dropping(after):
    return functools.partial(features, dropped=DROPPED, after=after)


SAME = "With equal weights, no gap and one layer student and teacher must give the same tokens. "


def test_what_fits_passes():
    params = make_params()
    before = jax.tree.map(jnp.copy, params)
    assert sra.check(LOSS, tap, params, X0, NOISE, T, Y, x=X) is None
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, params))


def test_what_taps_a_library_passes_in_half_precision():
    dtype = "bfloat16"
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), EquinoxListed(KEY))
    call = lambda loss: sra.tap_equinox(loss, "blocks/{}", call=jax.vmap)  # noqa: E731
    batch = X0.astype(dtype), NOISE.astype(dtype), T.astype(dtype)
    sra.check(LOSS, call, model, *batch, Y)


def test_a_list_on_a_discrete_path_passes():
    path = selfalign.paths.Discrete()
    options = {"path": path, "teacher_layer": 4}
    losses = [
        selfalign.SRALoss(student_layer=1, **options),
        selfalign.SRALoss(student_layer=2, name="deep", **options),
        selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2),
    ]
    model = LinenModel()
    t = (T * 1000).astype("int32")
    params = model.init(KEY, X0, t, Y)["params"]
    x = path.add_noise(X0, NOISE, t)
    call = lambda loss: sra.tap_linen(loss, model, "block_{}")  # noqa: E731
    sra.check(losses, call, params, X0, NOISE, t, Y, x=x)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"own": dropping(after=0)},
            SAME + "Received: other tokens for 4 of 8 samples, after student_layer. The model "
            "drops labels or whole samples inside. Drop them before the student's call",
        ),
        (
            {"own": dropping(after=2)},
            SAME + "Received: other tokens for 4 of 8 samples, after teacher_layer. The model",
        ),
        (
            {"teachers": other_labels},
            SAME + "Received: other tokens of 'sra' for all samples, after student_layer. Look for",
        ),
        ({"teachers": scaled_time}, "Received: other tokens of 'sra' for all samples, after"),
        (
            {"shift": -1},
            "Received: tokens of 'sra' that the teacher has after layer 2, for student_layer. "
            "Count layers from 1 on both sides, and let tap use the layers of the loss.",
        ),
        (
            {"teachers": with_registers},
            SAME + "Received: shapes (8, 5, 8) and (8, 6, 8) of 'sra'. Tap both sides alike.",
        ),
        (
            {"own": flat, "teachers": flat},
            "Tokens must have the shape [B, N, D]. Received: (8, 8) of 'sra', for 8 samples.",
        ),
        (
            {"own": constant, "teachers": constant},
            "The student's tokens must depend on the sample. Received: tokens of 'sra' that stay "
            "the same. Tap a block that they run through",
        ),
        ({"own": blind, "teachers": blind}, "The student's tokens must depend on the time."),
    ],
)
def test_what_differs_is_said(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        sra.check(LOSS, functools.partial(tap, **options), make_params(), X0, NOISE, T, Y)


def test_a_teacher_that_runs_other_weights_is_refused():
    """A function that holds the model itself, and does not look at its parameters."""
    opened = jax.tree.map(lambda leaf: leaf + 0.1, make_params())
    fixed = functools.partial(of_its_own, opened)
    one_side = functools.partial(tap, teachers=fixed)
    with pytest.raises(ValueError, match=re.escape("must give the same tokens")):
        sra.check(LOSS, one_side, make_params(), X0, NOISE, T, Y)
    both = functools.partial(tap, own=fixed, teachers=fixed)
    text = "The student's tokens must depend on the parameters."
    with pytest.raises(ValueError, match=re.escape(text)):
        sra.check(LOSS, both, make_params(), X0, NOISE, T, Y)


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(4, WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])

    def __call__(self, x, t, y):
        x = self.drop(self.embed(x)) + t[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x


def test_dropout_is_seen_and_is_fine_once_it_is_off():
    model = Dropping(nnx.Rngs(0))
    call = lambda loss: sra.tap_nnx(loss, "blocks/{}")  # noqa: E731
    with pytest.raises(ValueError, match="Dropout of features and batch norm are right in the"):
        sra.check(LOSS, call, model, X0, NOISE, T, Y)
    sra.check(LOSS, call, nnx.view(model, deterministic=True), X0, NOISE, T, Y)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (
            LOSS.path.add_noise(X0, NOISE, 1 - T),
            "x must be the loss's path between x0 and noise, at t. Received: the path's sample at "
            "the opposite end's time, or sample and noise in each other's place. Give the loss",
        ),
        (LOSS.path.add_noise(X0, NOISE[::-1], T), "Received: something else. Pass the noise that"),
        (2 * X, "Received: something else. Pass the noise that x was made with, do not scale x"),
        (X[:4], "Received: shapes (4, 5, 4) and (8, 5, 4). Pass one batch."),
    ],
)
def test_what_is_not_on_the_path_is_refused(x, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        sra.check(LOSS, tap, make_params(), X0, NOISE, T, Y, x=x)


def test_sample_and_noise_are_told_apart_where_the_path_is_not_symmetric():
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=3, path=selfalign.paths.Discrete())
    t = (T * 1000).astype("int32")
    x = loss.path.add_noise(NOISE, X0, t)
    with pytest.raises(ValueError, match=r"in each other's place\. Pass x0 first"):
        sra.check(loss, tap, make_params(), X0, NOISE, t, Y, x=x)


def test_it_is_no_part_of_a_jitted_step():
    text = "check looks at values. Received: traced arrays. Call it once before training, outside"
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.jit(lambda t: sra.check(LOSS, tap, make_params(), X0, NOISE, t, Y))(T)


def test_an_objective_without_a_teacher_has_nothing_to_check():
    loss = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3)
    with pytest.raises(ValueError, match="There must be an objective with an EMA teacher"):
        sra.check(loss, tap, make_params(), X0, NOISE, T, Y)
