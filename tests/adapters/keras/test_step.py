"""One step of SelfAligned with its own draws: what both sides see, and what moves."""

import itertools

import keras
import numpy as np
import oracle
import pytest
from keras import ops
from keras_fits import compiled, same, weights
from keras_models import CHANNELS, TOKENS, Block, functional, unconditional
from support import array

import selfalign
from selfalign.adapters.keras import SelfAligned

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4

DEPTH = 5


class Recorder:
    """Stands in the path of both forwards and keeps what they were given and gave."""

    def __init__(self, model):
        self.forwards = model._step.forwards
        self.inputs = []
        self.outputs = []
        self.teacher_inputs = []
        self.teacher_outputs = []
        model._step.forwards = self

    def student(self, inputs, training):
        output = self.forwards.student(inputs, training)
        self.inputs.append(inputs)
        self.outputs.append(output)
        return output

    def teacher(self, inputs):
        tokens = self.forwards.teacher(inputs)
        self.teacher_inputs.append(inputs)
        self.teacher_outputs.append(tokens)
        return tokens


def step(model, data, training=True):
    """The total of one eager step, and the recorder of its forwards."""
    recorder = Recorder(model)
    total = model.compute_loss(*map(ops.convert_to_tensor, data), training=training)
    return array(total), recorder


def test_a_step_is_the_papers_formula(backbone, data):
    """One sample, one noise and one condition on both sides; the teacher at less noise."""
    model = compiled(backbone, selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=0.3))
    for variable in backbone.trainable_weights:  # teacher and student differ
        variable.assign(variable.value + 0.01)
    total, recorder = step(model, data)
    x_t, t, labels = map(array, recorder.inputs[0])
    x_teacher, t_teacher, teacher_labels = map(array, recorder.teacher_inputs[0])
    x0 = data[0].astype("float64")
    noise = (x_t - (1 - t)[:, None, None] * x0) / t[:, None, None]
    path = oracle.linear(1)
    np.testing.assert_allclose(x_teacher, oracle.add_noise(path, x0, noise, t_teacher), atol=1e-3)
    assert (t_teacher <= t).all()
    assert (t - t_teacher < 0.2).all()
    assert t_teacher.std() > 0.05
    np.testing.assert_array_equal(labels, teacher_labels)
    projector = {name: array(weight.value) for name, weight in model.projector.items()}
    tokens = array(recorder.outputs[0].tokens["sra"])
    target = array(recorder.teacher_outputs[0]["sra"])
    term = oracle.loss("cosine", 0.3, oracle.project(projector, tokens), target)
    velocity = oracle.velocity(path, x0, noise, np.clip(t, 1e-3, 1 - 1e-3))
    denoising = np.mean((array(recorder.outputs[0].prediction) - velocity) ** 2)
    np.testing.assert_allclose(array(model.logged["alignment"].result()), term, rtol=1e-5)
    np.testing.assert_allclose(total, denoising + term, rtol=1e-3)


def test_tokens_are_those_of_the_named_layers(backbone, loss, data):
    model = compiled(backbone, loss)
    _, recorder = step(model, data)
    student = keras.Model(backbone.inputs, backbone.get_layer("block_2").output)
    teacher = keras.Model(model.average.inputs, model.average.get_layer("block_4").output)
    by_hand = array(student(recorder.inputs[0])), array(teacher(recorder.teacher_inputs[0]))
    np.testing.assert_array_equal(by_hand[0], array(recorder.outputs[0].tokens["sra"]))
    np.testing.assert_array_equal(by_hand[1], array(recorder.teacher_outputs[0]["sra"]))


def test_the_teacher_runs_to_its_layer_only(loss, data):
    model = compiled(functional(Block, DEPTH, "part"), loss)
    Block.ran.clear()
    step(model, data)
    assert len(Block.ran) == DEPTH + 4


def test_a_later_layer_is_tapped_in_the_same_forward(data):
    layersync = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4)
    model = compiled(functional(Block, DEPTH, "part"), layersync)
    Block.ran.clear()
    _, recorder = step(model, data)
    assert Block.ran == [f"part_{n}" for n in range(1, DEPTH + 1)]
    assert recorder.teacher_inputs == []
    assert model.average is None
    later = keras.Model(model.backbone.inputs, model.backbone.get_layer("part_4").output)
    target = array(recorder.outputs[0].targets["layersync"])
    np.testing.assert_array_equal(array(later(recorder.inputs[0])), target)


def test_objectives_of_one_teacher_share_its_forward(data):
    layers = {"near": 3, "far": 4}
    losses = [
        selfalign.SRALoss(student_layer=2, teacher_layer=layer, name=name)
        for name, layer in layers.items()
    ]
    model = compiled(functional(Block, DEPTH, "part"), losses)
    Block.ran.clear()
    _, recorder = step(model, data)
    assert len(Block.ran) == DEPTH + 4
    for name, layer in layers.items():
        teacher = keras.Model(model.average.inputs, model.average.get_layer(f"part_{layer}").output)
        by_hand = array(teacher(recorder.teacher_inputs[0]))
        np.testing.assert_array_equal(by_hand, array(recorder.teacher_outputs[0][name]))


def discrete_backbone():
    x = keras.Input((TOKENS, CHANNELS))
    t = keras.Input((), dtype="int32")
    tokens = x + ops.cast(keras.layers.Reshape((1, 1))(t), "float32")
    for n in range(1, 4):
        tokens = keras.layers.Dense(8, name=f"block_{n}")(tokens)
    return keras.Model([x, t], keras.layers.Dense(CHANNELS)(tokens))


PATHS = {
    "discrete": (selfalign.paths.Discrete(), discrete_backbone, (0, 999)),
    "noise at 0": (selfalign.paths.Linear(noise_at=0), unconditional, (0, 1)),
    "edm": (selfalign.paths.EDM(), unconditional, (0.002, 80)),
}


@pytest.mark.parametrize("name", PATHS)
def test_times_are_the_paths_own(name, data):
    path, make, (low, high) = PATHS[name]
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, path=path)
    _, recorder = step(compiled(make(), loss, prediction="noise"), data[:1])
    student = recorder.inputs[0][1]
    teacher = recorder.teacher_inputs[0][1]
    times = array(student)
    assert times.dtype.kind == ("i" if path.discrete else "f")
    assert low <= times.min() < times.max() <= high
    assert (array(path.snr(teacher)) >= array(path.snr(student))).all()


def test_a_path_is_needed_by_no_teacher(data):
    """Without an EMA teacher the model's own path= draws and noises."""
    layersync = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2)
    assert compiled(unconditional(), layersync).noise_path == selfalign.paths.Linear()
    model = compiled(unconditional(), layersync, path="edm")
    _, recorder = step(model, data[:1])
    assert array(recorder.inputs[0][1]).max() > 1


def test_times_may_be_drawn_by_the_user(data):
    def quarter(count, seed):
        return ops.full((count,), 0.25)

    still = selfalign.SRALoss(student_layer=2, teacher_layer=4, max_gap=0)
    _, recorder = step(compiled(functional(), still, draw_time=quarter), data)
    np.testing.assert_array_equal(array(recorder.inputs[0][1]), 0.25)
    np.testing.assert_array_equal(array(recorder.teacher_inputs[0][1]), 0.25)


def test_labels_are_dropped_alike_on_both_sides(backbone, loss, data):
    model = compiled(backbone, loss, label_dropout=0.5, null_label=10)
    _, recorder = step(model, data)
    student = array(recorder.inputs[0][2])
    np.testing.assert_array_equal(student, array(recorder.teacher_inputs[0][2]))
    assert 4 < (student == 10).sum() < 28
    np.testing.assert_array_equal(student[student != 10], data[1][student != 10])


def test_labels_are_dropped_in_training_only(backbone, loss, data):
    model = compiled(backbone, loss, label_dropout=0.5, null_label=10)
    _, recorder = step(model, data, training=False)
    np.testing.assert_array_equal(array(recorder.inputs[0][2]), data[1])


# The average, one step behind


def test_what_is_not_trained_is_copied(loss, data):
    """Moving statistics and frozen layers: both sides hold them, in buffers of their own."""
    x = keras.Input((TOKENS, CHANNELS))
    t = keras.Input(())
    h = keras.layers.BatchNormalization(name="statistics")(x) + keras.layers.Reshape((1, 1))(t)
    for n in range(1, 5):
        h = keras.layers.Dense(8, "tanh", name=f"block_{n}")(h)
    backbone = keras.Model([x, t], keras.layers.Dense(CHANNELS)(h))
    backbone.get_layer("block_1").trainable = False
    model = compiled(backbone, loss)
    for _ in range(2):
        model.train_on_batch(data[0] + 3)
        ema = model.ema_backbone()
    mean = array(ema.get_layer("statistics").moving_mean.value)
    np.testing.assert_array_equal(mean, array(backbone.get_layer("statistics").moving_mean.value))
    assert mean.mean() > 0.01
    frozen = [array(side.get_layer("block_1").kernel.value) for side in (ema, backbone)]
    np.testing.assert_array_equal(*frozen)
    model.train_on_batch(data[0])
    np.testing.assert_array_equal(mean, array(ema.get_layer("statistics").moving_mean.value))


def test_gradient_accumulation_moves_the_ema_once_per_optimizer_step(data):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=0.5)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model = compiled(functional(depth=4), loss, optimizer)
    averages = []
    for _ in range(5):
        model.train_on_batch(*data)
        averages.append(weights(model.average))
    assert int(model.steps) == 2
    moved = []
    for before, after in itertools.pairwise(averages):
        moved.append(not all(map(np.array_equal, before, after)))
    assert moved == [False, True, False, True]  # taken when the next step begins


def test_a_step_that_fails_leaves_the_ema_as_it_would_be(data):
    """The pending step is taken once, however often the next one is tried."""
    tokens = np.ones((32, TOKENS, 6), "float32")
    losses = [
        selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=0.5),
        selfalign.REPALoss(student_layer=2, width=6, hidden=8),
    ]
    good = {"target_tokens": {"repa": tokens}}
    bad = {"target_tokens": {"repa": tokens[..., :5]}}
    model = compiled(functional(depth=4), losses)
    model.train_on_batch(data[0], (data[1], good))
    expected = weights(model.ema_backbone())
    for _ in range(2):
        with pytest.raises(ValueError, match="must have the same shape"):
            model.train_on_batch(data[0], (data[1], bad))
    found = weights(model.ema_backbone())
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_training_starts_from_the_backbone_as_it_is(loss, data):
    """Its weights may have been loaded since the model was built."""
    for train in ("fit", "train_on_batch"):
        model = compiled(functional(depth=4), loss, keras.optimizers.SGD(0.0))
        for variable in model.backbone.weights:
            variable.assign(variable.value + 1)
        getattr(model, train)(*data)
        assert same(model.average, model.backbone)


def test_the_teacher_may_be_another_instance(data):
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
    first = unconditional()
    second = keras.models.clone_model(first)
    model = SelfAligned(first, loss, teacher=second)
    assert model.average is second
    assert same(first, second)


def low_rank(backbone):
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Dense):
            layer.enable_lora(2)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("quantized", [True, False])
def test_adapters_of_low_rank_are_averaged_and_frozen_kernels_are_not(quantized, data):
    backbone = unconditional()
    if quantized:
        backbone.quantize("int8")
    low_rank(backbone)
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, decay=0.5)
    model = compiled(backbone, loss)
    for _ in range(2):
        model.train_on_batch(data[0])
    trained = {id(variable) for variable in backbone.trainable_weights}
    assert len(trained) == 12  # two factors and a bias of each layer
    average = model.ema_backbone()
    for mine, theirs in zip(average.weights, backbone.weights, strict=True):
        assert np.array_equal(array(mine.value), array(theirs.value)) == (id(theirs) not in trained)


def test_a_backbone_that_is_changed_later_is_refused(data):
    model = compiled(unconditional(), selfalign.SRALoss(student_layer=1, teacher_layer=2))
    low_rank(model.backbone)
    model.compile("sgd")
    rule = "must keep the weights that it had when SelfAligned was made. Received: 16 weights inste"
    with pytest.raises(ValueError, match=rule):
        model.train_on_batch(data[0])


def overflowing(step):
    """A weight that is infinite in the third step that is tried."""
    return ops.where(step == 2, np.inf, 0.5)


def test_a_step_that_loss_scaling_skips_moves_nothing(data):
    """Gradients are infinite as long as the step is not counted: from then on all are skipped."""
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, decay=0.5, weight=overflowing)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0)
    model = compiled(unconditional(), loss, optimizer)
    averages = []
    for _ in range(5):
        model.train_on_batch(data[0])
        averages.append(weights(model.ema_backbone()))
    assert int(model.steps) == 2
    moved = []
    for before, after in itertools.pairwise(averages):
        moved.append(not all(map(np.array_equal, before, after)))
    assert moved == [True, False, False, False]


def test_steps_go_on_with_another_optimizer(data):
    model = compiled(unconditional(), selfalign.SRALoss(student_layer=1, teacher_layer=2))
    for done in range(1, 3):
        model.train_on_batch(data[0])
        before = weights(model.ema_backbone())
        model.compile(keras.optimizers.SGD(0.1))
        assert int(model.steps) == done
        assert all(map(np.array_equal, before, weights(model.ema_backbone())))
