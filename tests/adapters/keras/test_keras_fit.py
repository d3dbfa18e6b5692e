"""SRA in compile and fit: what a step computes, what is trained, what is left alone. Runs on each backend that trains."""

import keras
import numpy as np
import oracle
import pytest
from keras import ops
from keras_fits import same, trained, weights
from keras_models import CHANNELS, DEPTH, TOKENS, WIDTH, Block, PairBlock, functional, subclassed
from support import array

import selfalign
from selfalign.adapters.keras import SelfAligned

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's own, with NumPy 2.4

LOGGED = ["alignment", "cosine", "denoising", "loss", "student_norm", "teacher_norm"]


def test_fit_logs_and_learns(backbone, loss, data):
    _, history = trained(backbone, loss, data, epochs=15)
    assert sorted(history) == LOGGED
    np.testing.assert_allclose(history["loss"], np.add(history["denoising"], history["alignment"]), rtol=1e-4)
    assert history["alignment"][-1] < 0.6 * history["alignment"][0]
    assert history["denoising"][-1] < history["denoising"][0]
    assert history["cosine"][-1] > history["cosine"][0]


class Recorder:
    """Stands in the path of both forwards and keeps what they were given and gave."""

    def __init__(self, model):
        self.student, self.teacher = [], []
        student, teacher = model._student_forward, model._teacher_forward

        def run_student(inputs, training):
            result = student(inputs, training)
            self.student.append((inputs, result))
            return result

        def run_teacher(inputs):
            tokens = teacher(inputs)
            self.teacher.append((inputs, tokens))
            return tokens

        model._student_forward, model._teacher_forward = run_student, run_teacher


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1"])
def test_a_step_is_the_papers_formula(backbone, data, distance):
    """Loss, noise, times and both sides' tokens of one eager step, held against the oracle."""
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, distance=distance, weight=0.3)
    model = SelfAligned(backbone, loss, seed=1)
    for variable in backbone.trainable_weights:  # teacher and student differ
        variable.assign(variable.value + 0.01)
    model.compile(optimizer="sgd")
    recorder = Recorder(model)
    total = model.compute_loss(*map(ops.convert_to_tensor, data), training=True)
    ((x_t, t, y), (prediction, tokens)), ((x_teacher, t_teacher, y_teacher), target) = recorder.student[0], recorder.teacher[0]
    x0 = data[0].astype("float64")
    x_t, t, prediction, tokens, x_teacher, t_teacher, target = map(
        array, (x_t, t, prediction, tokens, x_teacher, t_teacher, target)
    )
    noise = (x_t - (1 - t)[:, None, None] * x0) / t[:, None, None]
    np.testing.assert_allclose(x_teacher, oracle.add_noise(oracle.linear(1), x0, noise, t_teacher), atol=1e-3)  # the same noise
    assert (t_teacher <= t).all()
    assert (t - t_teacher < 0.2).all()
    assert t_teacher.std() > 0.05
    np.testing.assert_array_equal(array(y), array(y_teacher))
    params = {name: array(weight.value) for name, weight in model.projector_weights.items()}
    term = oracle.loss(distance, 0.3, oracle.project(params, tokens), target)
    denoising = np.mean((prediction - oracle.velocity(oracle.linear(1), x0, noise, np.clip(t, 1e-3, 1 - 1e-3))) ** 2)
    np.testing.assert_allclose(array(model.logged["alignment"].result()), term, rtol=1e-5)
    np.testing.assert_allclose(array(total), denoising + term, rtol=1e-3)


def test_tokens_are_those_of_the_named_layers(backbone, loss, data):
    model = SelfAligned(backbone, loss, seed=1)
    model.compile(optimizer="sgd")
    recorder = Recorder(model)
    model.compute_loss(*map(ops.convert_to_tensor, data), training=True)
    (inputs, (_, tokens)), (teacher_inputs, target) = recorder.student[0], recorder.teacher[0]
    for source, name, given, expected in (
        (backbone, "block_2", inputs, tokens),
        (model.average, "block_4", teacher_inputs, target),
    ):
        by_hand = keras.Model(source.inputs, source.get_layer(name).output)(given)
        np.testing.assert_array_equal(array(by_hand), array(expected))


def test_the_teacher_runs_to_its_layer_only(loss, data):
    model = SelfAligned(functional(Block, name="part"), loss)
    model.compile(optimizer="sgd")
    Block.ran.clear()
    model.compute_loss(*map(ops.convert_to_tensor, data), training=True)
    assert len(Block.ran) == DEPTH + 4


def test_the_ema_follows_the_optimizer_steps(backbone, data):
    """The average that is handed out after n steps is the oracle's, from the weights after each step."""
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=selfalign.schedules.DecayWarmup(0.9))
    model = SelfAligned(backbone, loss, seed=1)
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    expected = weights(backbone)
    for step in range(4):
        model.fit(data[0][:8], data[1][:8], batch_size=8, verbose=0)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = [oracle.ema(old, new, decay) for old, new in zip(expected, weights(backbone), strict=True)]
        for mine, theirs in zip(weights(model.ema_backbone()), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert int(model.steps) == 4


def test_gradient_accumulation_moves_the_ema_once_per_optimizer_step(data):
    results = []
    for options, batch in (({"gradient_accumulation_steps": 2}, 4), ({}, 8)):
        keras.utils.set_random_seed(0)
        loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=0.5)
        model = SelfAligned(functional(), loss, seed=1)
        model.compile(optimizer=keras.optimizers.SGD(0.1, **options))
        model.fit(*data, batch_size=batch, verbose=0, shuffle=False)
        results.append((int(model.steps), int(model.micro_batches)))
        before = weights(model.average)
        model.fit(data[0][:batch], data[1][:batch], batch_size=batch, verbose=0)  # takes the pending step
        middle = weights(model.average)
        assert any(not np.array_equal(a, b) for a, b in zip(before, middle, strict=True))
        if options:
            model.fit(data[0][:batch], data[1][:batch], batch_size=batch, verbose=0)  # the second half: nothing is pending
            assert all(np.array_equal(a, b) for a, b in zip(middle, weights(model.average), strict=True))
    assert results == [(4, 0), (4, 0)]


def test_no_gradient_reaches_the_teacher_or_later_blocks(data):
    """Alignment alone: only embedders, blocks up to the student's, and the projector move."""
    backbone = functional()
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=10.0)
    model = SelfAligned(backbone, loss, seed=1)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=lambda y, prediction: 0.0 * ops.sum(prediction, axis=(1, 2)))
    before = {id(v): array(v.value) for v in model.weights}
    model.fit(*data, batch_size=32, verbose=0)
    moved = {id(v) for v in model.weights if not np.array_equal(before[id(v)], array(v.value))}
    later = backbone.layers[[layer.name for layer in backbone.layers].index("block_2") + 1 :]
    assert not moved & set(map(id, model.average.weights))
    assert not moved & {id(v) for layer in later for v in layer.weights}
    assert set(map(id, model.projector_weights.values())) <= moved
    assert len(moved & set(map(id, backbone.weights))) > 5


def test_weight_zero_trains_as_the_backbone_alone(data):
    results = []
    for weight in (0.0, selfalign.schedules.Stop(0)):
        keras.utils.set_random_seed(0)
        model, history = trained(functional(), selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=weight), data)
        assert history["alignment"] == [0.0]
        results.append(model)
    assert same(*results)


@pytest.mark.parametrize(
    "make",
    [
        lambda loss: SelfAligned(functional(Block), loss),
        lambda loss: SelfAligned(functional(Block, name="part"), loss, blocks="part_{}"),
        lambda loss: SelfAligned(functional(PairBlock), loss, select=lambda output: output[1]),
        lambda loss: SelfAligned(functional(), loss, student="block_2", teacher="block_4"),
        lambda loss: SelfAligned(subclassed(), loss, width=WIDTH),
        lambda loss: SelfAligned(subclassed(), loss, width=WIDTH, teacher=subclassed()),
    ],
    ids=["class", "pattern", "select", "names", "subclassed", "teacher given"],
)
def test_backbones_of_every_kind_train(make, loss, data):
    model = make(loss)
    model.compile(optimizer=keras.optimizers.AdamW(1e-2))
    history = model.fit(*data, batch_size=8, epochs=8, verbose=0).history
    assert history["alignment"][-1] < history["alignment"][0]
    assert tuple(ops.shape(model.average.weights[0])) == tuple(ops.shape(model.backbone.weights[0]))


def test_grids_become_tokens(data):
    x, t = keras.Input((4, 4, 3)), keras.Input(())
    h = x + keras.layers.Reshape((1, 1, 1))(t)
    for n in range(1, 4):
        h = keras.layers.Conv2D(8, 3, padding="same", name=f"stage_{n}")(h)
    backbone = keras.Model([x, t], keras.layers.Conv2D(3, 1)(h))
    model = SelfAligned(backbone, selfalign.SRALoss(student_layer=1, teacher_layer=3), seed=0)
    model.compile(optimizer="adamw")
    assert np.isfinite(model.fit(np.ones((8, 4, 4, 3), "float32"), verbose=0).history["alignment"][0])
    assert model.width == 8


def test_times_are_the_paths_own(data):
    """Discrete paths draw integer steps; a reversed one is clean at 1; a drawer of the user's own decides."""
    for path, check in (
        ("discrete", lambda t: t.dtype.kind == "i" and t.max() > 100),
        (selfalign.paths.Linear(noise_at=0), lambda t: 0 <= t.min() <= t.max() <= 1),
    ):
        x, t = keras.Input((TOKENS, CHANNELS)), keras.Input((), dtype="int32" if path == "discrete" else "float32")
        h = x + ops.cast(keras.layers.Reshape((1, 1))(t), "float32")
        for n in range(1, 4):
            h = keras.layers.Dense(8, name=f"block_{n}")(h)
        backbone = keras.Model([x, t], keras.layers.Dense(CHANNELS)(h))
        loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, path=path)
        model = SelfAligned(backbone, loss, prediction="noise", seed=0)
        model.compile(optimizer="sgd")
        recorder = Recorder(model)
        model.compute_loss(ops.convert_to_tensor(data[0]), training=True)
        (_, student), (_, teacher) = recorder.student[0][0], recorder.teacher[0][0]
        assert check(array(student))
        assert (array(loss.path.snr(teacher)) >= array(loss.path.snr(student))).all()
    fixed = SelfAligned(functional(), selfalign.SRALoss(student_layer=1, teacher_layer=2, max_gap=0),
                        draw_time=lambda count, seed: ops.full((count,), 0.25))  # fmt: skip
    fixed.compile(optimizer="sgd")
    recorder = Recorder(fixed)
    fixed.compute_loss(*map(ops.convert_to_tensor, data), training=True)
    np.testing.assert_array_equal(array(recorder.teacher[0][0][1]), 0.25)


def test_labels_are_dropped_alike_on_both_sides_and_in_training_only(backbone, loss, data):
    model = SelfAligned(backbone, loss, label_dropout=0.5, null_label=10, seed=0)
    model.compile(optimizer="sgd")
    recorder = Recorder(model)
    for training in (True, False):
        model.compute_loss(*map(ops.convert_to_tensor, data), training=training)
    dropped, kept = ((array(s[0][2]), array(t[0][2])) for s, t in zip(recorder.student, recorder.teacher, strict=True))
    np.testing.assert_array_equal(*dropped)
    assert 4 < (dropped[0] == 10).sum() < 28
    np.testing.assert_array_equal(dropped[0][dropped[0] != 10], data[1][dropped[0] != 10])
    np.testing.assert_array_equal(kept[0], data[1])


def test_evaluate_moves_nothing_but_the_draws(backbone, loss, data):
    model, _ = trained(backbone, loss, data)
    before, steps = weights(model), int(model.steps)
    result = model.evaluate(*data, verbose=0, return_dict=True)
    assert sorted(result) == LOGGED
    assert int(model.steps) == steps
    assert all(np.array_equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_condition_may_come_with_x_or_as_y(loss, data):
    losses = []
    for arguments in (data, ((data[0], data[1]),)):
        keras.utils.set_random_seed(0)
        model = SelfAligned(functional(), loss, seed=1)
        model.compile(optimizer="sgd")
        losses.append(model.fit(*arguments, batch_size=8, verbose=0, shuffle=False).history["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy, loss, data):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model, history = trained(functional(), loss, data, epochs=4)
    finally:
        keras.config.set_dtype_policy(before)
    assert {v.dtype for v in model.average.weights} == {"float32"}
    assert np.isfinite(history["loss"]).all()
    assert history["alignment"][-1] < history["alignment"][0]


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*non-leaf Tensor", "ignore:.*Dynamo")  # torch.compile's own
@pytest.mark.parametrize("jit_compile", [True, False])
def test_compiled_and_eager_fits_agree(loss, data, jit_compile):
    keras.utils.set_random_seed(0)
    reference = SelfAligned(functional(depth=4), loss, seed=1)
    reference.compile(optimizer=keras.optimizers.SGD(0.05), run_eagerly=True)
    keras.utils.set_random_seed(0)
    model = SelfAligned(functional(depth=4), loss, seed=1)
    model.compile(optimizer=keras.optimizers.SGD(0.05), jit_compile=jit_compile)
    for m in (reference, model):
        m.fit(*data, batch_size=16, verbose=0, shuffle=False)
    for mine, theirs in zip(weights(model), weights(reference), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_backbone_loaded_before_the_first_fit_is_the_teachers_start(loss, data):
    model = SelfAligned(functional(), loss, seed=1)
    for variable in model.backbone.weights:
        variable.assign(variable.value + 1)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    model.fit(*data, batch_size=8, verbose=0)
    assert same(model.average, model.backbone)


def test_callbacks_see_the_ema_during_training(backbone, loss, data):
    seen = []

    class Sample(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            ema = self.model.ema_backbone()
            seen.append((array(ema([data[0][:2], np.ones(2, "float32"), data[1][:2]])), weights(ema)))

    model = SelfAligned(backbone, loss, seed=1)
    model.compile(optimizer=keras.optimizers.AdamW(1e-2))
    model.fit(*data, batch_size=8, epochs=3, verbose=0, callbacks=[Sample()])
    assert len(seen) == 3
    assert seen[0][0].shape == (2, TOKENS, CHANNELS)
    assert not np.array_equal(seen[0][1][0], seen[2][1][0])


def test_what_is_not_trained_is_copied(loss, data):
    """Moving statistics and frozen layers: both sides hold them, in buffers of their own."""
    x, t = keras.Input((TOKENS, CHANNELS)), keras.Input(())
    h = keras.layers.BatchNormalization(name="statistics")(x) + keras.layers.Reshape((1, 1))(t)
    for n in range(1, 5):
        h = keras.layers.Dense(8, "tanh", name=f"block_{n}")(h)
    backbone = keras.Model([x, t], keras.layers.Dense(CHANNELS)(h))
    backbone.get_layer("block_1").trainable = False
    model = SelfAligned(backbone, loss, seed=0)
    model.compile(optimizer="sgd")
    for _ in range(2):
        model.fit(data[0] + 3, batch_size=8, verbose=0)
        ema = model.ema_backbone()
    statistics = (array(m.get_layer("statistics").moving_mean.value) for m in (ema, backbone))
    np.testing.assert_array_equal(*statistics)
    model.fit(data[0], batch_size=8, verbose=0)
    assert array(ema.get_layer("statistics").moving_mean.value).mean() > 0.1
    assert np.array_equal(*(array(m.get_layer("block_1").kernel.value) for m in (ema, backbone)))


def test_train_on_batch_starts_from_the_backbone_as_it_is(loss, data):
    model = SelfAligned(functional(), loss, seed=1)
    for variable in model.backbone.weights:
        variable.assign(variable.value + 1)
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    model.train_on_batch(*data)
    assert same(model.average, model.backbone)
