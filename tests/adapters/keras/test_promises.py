"""What users of Keras take for granted: added losses, metrics, validation, data by name."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras_fits import compiled, fitted, weights
from keras_models import CHANNELS, TOKENS, functional, unconditional

import selfalign

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4


@keras.saving.register_keras_serializable(package="tests")
class Adds(layers.Layer):
    """Adds one half to the loss."""

    def call(self, x):
        self.add_loss(0.5 + 0 * ops.sum(x))
        return x


def adding():
    """Adds 0.5 in the step, and 0.01 times the squares of two kernels."""
    x, t = keras.Input((TOKENS, CHANNELS)), keras.Input(())
    h = Adds()(x + layers.Reshape((1, 1))(t))
    for n in range(1, 4):
        regularizer = keras.regularizers.L2(0.01) if n < 3 else None
        h = layers.Dense(8, "tanh", name=f"block_{n}", kernel_regularizer=regularizer)(h)
    return keras.Model([x, t], layers.Dense(CHANNELS)(h))


@pytest.mark.parametrize("options", [{}, {"loss": "mse"}, {"run_eagerly": True}], ids=str)
def test_what_layers_add_is_in_the_loss_once(options, data):
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=3)
    model = compiled(adding(), loss)
    model.compile(keras.optimizers.SGD(0.0), **options)
    kernels = [ops.convert_to_numpy(model.backbone.get_layer(f"block_{n}").kernel) for n in (1, 2)]
    added = 0.5 + 0.01 * sum(np.sum(np.square(kernel)) for kernel in kernels)
    trained = model.train_on_batch(data[0], return_dict=True)
    model.reset_metrics()
    held_out = model.evaluate(data[0], verbose=0, return_dict=True)
    for logs in (trained, held_out):
        expected = logs["denoising"] + logs["alignment"] + added
        np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


def test_validation_repeats_itself_and_changes_nothing(loss, data):
    ends = []
    for held_out in (None, data):
        keras.utils.set_random_seed(0)
        model = compiled(functional(depth=4), loss)
        options = {"epochs": 2, "batch_size": 8, "shuffle": False, "verbose": 0}
        model.fit(*data, validation_data=held_out, **options)
        if held_out:
            numbers = [model.evaluate(*held_out, batch_size=8, verbose=0) for _ in range(2)]
            assert numbers[0] == numbers[1]
            alone = [model.test_on_batch(*held_out) for _ in range(2)]
            assert alone[0] == alone[1]
        fitted(model, data)
        ends.append([*weights(model), ops.convert_to_numpy(model.draws.state)])
    for without, with_it in zip(*ends, strict=True):
        np.testing.assert_array_equal(without, with_it)


def test_batches_of_one_evaluation_see_noise_of_their_own(loss, data):
    model = compiled(functional(depth=4), loss)
    twice = tuple(np.concatenate([part[:8], part[:8]]) for part in data)
    once = model.evaluate(data[0][:8], data[1][:8], batch_size=8, verbose=0)
    assert model.evaluate(*twice, batch_size=8, verbose=0) != once


def test_metrics_compare_what_the_backbone_predicts(loss, data):
    model = compiled(functional(depth=4), loss)
    metrics = {"metrics": ["mse"], "weighted_metrics": [keras.metrics.MeanSquaredError("weighed")]}
    model.compile(keras.optimizers.SGD(0.0), "mse", **metrics)
    sample_weight = np.arange(32).astype("float32")
    trained = fitted(model, data)
    np.testing.assert_allclose(trained["mse"], trained["denoising"], rtol=1e-5)
    found = model.evaluate(*data, sample_weight=sample_weight, verbose=0, return_dict=True)
    mean = sample_weight.mean()
    np.testing.assert_allclose(found["weighed"] * mean, found["denoising"], rtol=1e-5)
    assert found["mse"] != pytest.approx(found["weighed"], rel=1e-4)


def test_logs_of_batches_of_unequal_size_add_up(loss, data):
    model = compiled(functional(depth=4), loss)
    logs = model.evaluate(*data, batch_size=20, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["loss"], logs["denoising"] + logs["alignment"], rtol=1e-5)


def test_samples_may_be_given_by_the_names_of_inputs(loss, data):
    backbone = functional(depth=4)
    names = [each.name for each in backbone.inputs]
    model = compiled(backbone, loss)
    by_place = model.test_on_batch(*data)
    assert model.test_on_batch({names[2]: data[1], names[0]: data[0]}) == by_place
    assert model.test_on_batch({names[0]: data[0]}, data[1]) == by_place


def test_before_the_first_step_the_teacher_is_the_backbone(data):
    """Weights may be loaded after an evaluation, too."""
    model = compiled(unconditional(), selfalign.SRALoss(student_layer=1, teacher_layer=2))
    for _ in range(2):
        for variable in model.backbone.weights:
            variable.assign(variable.value + 1)
        model.evaluate(data[0], verbose=0)
        average = model.ema_backbone()
        for mine, theirs in zip(weights(average), weights(model.backbone), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_callback_may_scale_the_terms(loss, data):
    model = compiled(functional(depth=4), loss)
    whole = model.test_on_batch(*data, return_dict=True)
    model.factor.assign(0.25)
    part = model.test_on_batch(*data, return_dict=True)
    np.testing.assert_allclose(part["alignment"], 0.25 * whole["alignment"], rtol=1e-6)
    assert part["denoising"] == whole["denoising"]


def test_metrics_say_which_side_is_not_finite(loss, data):
    model = compiled(functional(depth=4), loss)
    for side in ("student", "teacher"):
        name = f"{side}_finite"
        model.logged[name] = keras.metrics.Mean(name)
    model.train_on_batch(*data)
    kernel = model.average.weights[-4]  # of its last block
    kernel.assign(np.full(kernel.shape, np.nan))
    found = model.test_on_batch(*data, return_dict=True)
    assert (found["student_finite"], found["teacher_finite"]) == (1.0, 0.0)
