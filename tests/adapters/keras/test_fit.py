"""SelfAligned in compile and fit: it logs, learns, and serves backbones of every kind."""

import keras
import numpy as np
import pytest
from keras_fits import compiled, fitted, same, weights
from keras_models import (
    TOKENS,
    WIDTH,
    Block,
    PairBlock,
    functional,
    subclassed,
    unconditional,
)
from support import array

import selfalign

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4

LOGGED = ["alignment", "cosine", "denoising", "loss", "student_norm", "teacher_norm"]


def test_fit_logs_and_learns(backbone, loss, data):
    model = compiled(backbone, loss, keras.optimizers.AdamW(1e-2))
    history = fitted(model, data, epochs=15)
    assert sorted(history) == LOGGED
    total = np.add(history["denoising"], history["alignment"])
    np.testing.assert_allclose(history["loss"], total, rtol=1e-4)
    assert history["alignment"][-1] < 0.6 * history["alignment"][0]
    assert history["denoising"][-1] < history["denoising"][0]
    assert history["cosine"][-1] > history["cosine"][0]


KINDS = {
    "class": (lambda: functional(Block, depth=4), {}),
    "pattern": (lambda: functional(Block, depth=4, name="part"), {"blocks": "part_{}"}),
    "select": (lambda: functional(PairBlock, depth=4), {"select": lambda output: output[1]}),
    "taps": (lambda: functional(depth=4), {"taps": ("block_2", "block_4")}),
    "subclassed": (lambda: subclassed(depth=4), {"width": WIDTH}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_backbones_of_every_kind_train(kind, loss, data):
    make, options = KINDS[kind]
    model = compiled(make(), loss, **options)
    history = fitted(model, data, epochs=4)
    assert history["alignment"][-1] < history["alignment"][0]
    assert history["denoising"][-1] < history["denoising"][0]


def test_grids_become_tokens():
    x = keras.Input((4, 4, 3))
    t = keras.Input(())
    h = x + keras.layers.Reshape((1, 1, 1))(t)
    for n in range(1, 4):
        h = keras.layers.Conv2D(8, 3, padding="same", name=f"stage_{n}")(h)
    backbone = keras.Model([x, t], keras.layers.Conv2D(3, 1)(h))
    model = compiled(backbone, selfalign.SRALoss(student_layer=1, teacher_layer=3))
    term = model.train_on_batch(np.ones((8, 4, 4, 3), "float32"), return_dict=True)["alignment"]
    assert np.isfinite(term)
    assert model.width == 8


def test_evaluate_moves_nothing_but_the_draws(backbone, loss, data):
    model = compiled(backbone, loss)
    fitted(model, data)
    before = weights(model)
    steps = int(model.steps)
    result = model.evaluate(*data, verbose=0, return_dict=True)
    assert sorted(result) == LOGGED
    assert int(model.steps) == steps
    assert all(np.array_equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_condition_may_come_with_x_or_as_y(loss, data):
    losses = []
    for arguments in (data, (data,)):
        keras.utils.set_random_seed(0)
        losses.append(fitted(compiled(functional(depth=4), loss), arguments)["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy, loss, data):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(functional(depth=4), loss, keras.optimizers.AdamW(1e-2))
        history = fitted(model, data, epochs=4)
    finally:
        keras.config.set_dtype_policy(before)
    assert {variable.dtype for variable in model.average.weights} == {"float32"}
    assert np.isfinite(history["loss"]).all()
    assert history["alignment"][-1] < history["alignment"][0]


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*non-leaf Tensor", "ignore:.*Dynamo")
@pytest.mark.parametrize("jit_compile", [pytest.param(True, marks=pytest.mark.heavy), False])
def test_compiled_and_eager_fits_agree(data, jit_compile):
    """With the smallest of backbones: torch's compiler takes longer with each layer."""
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
    models = []
    for options in ({"run_eagerly": True}, {"jit_compile": jit_compile}):
        keras.utils.set_random_seed(0)
        model = compiled(unconditional(depth=2, width=4, use_bias=False), loss)
        model.compile(optimizer=keras.optimizers.SGD(0.05), **options)
        fitted(model, data[:1], batch_size=16)
        models.append(model)
    for eager, other in zip(*map(weights, models), strict=True):
        np.testing.assert_allclose(other, eager, rtol=1e-4, atol=1e-5)


def test_callbacks_see_the_ema_during_training(backbone, loss, data):
    predictions = []
    averages = []

    class Sample(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            ema = self.model.ema_backbone()
            predictions.append(array(ema([data[0][:2], np.ones(2, "float32"), data[1][:2]])))
            averages.append(ema)

    model = compiled(backbone, loss)
    model.fit(*data, batch_size=8, epochs=3, verbose=0, callbacks=[Sample()])
    assert [prediction.shape for prediction in predictions] == [(2, TOKENS, 4)] * 3
    assert not same(averages[0], averages[2])
