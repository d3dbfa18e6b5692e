"""Weights of samples: a weight of 0 leaves a sample out, a weight of 2 counts it twice."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from keras_fits import compiled
from keras_models import functional

import selfalign

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4

COUNT = 4
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(COUNT, 5, 4)).astype("float32")
LABELS = np.arange(COUNT, dtype="int32")
MASK = (RNG.uniform(size=(COUNT, 5)) + 0.1).astype("float32")


class OfTheSample:
    """Draws that are functions of the sample: the same in every batch."""

    def dropped(self, condition):
        return condition

    def noise(self, x0):
        self.means = ops.mean(ops.sin(7 * x0), axis=(1, 2))
        return ops.sin(100 * x0)

    def times(self, count):
        return 0.5 + 0.4 * self.means

    def gaps(self, t):
        return 0.5 + 0.5 * self.means


def of_samples(target, prediction):
    return ops.mean(ops.square(target - prediction), axis=(1, 2))


def of_numbers(target, prediction):
    return ops.abs(target - prediction)


LOSSES = {
    "none": None,
    "a name": "mse",
    "an object": keras.losses.Huber(),
    "a sum": keras.losses.MeanSquaredError(reduction="sum"),
    "a weighted mean": keras.losses.MeanAbsoluteError(reduction="mean_with_sample_weight"),
    "values [B]": of_samples,
    "values [B, N, D]": of_numbers,
    "a list": ["mae"],
}
OBJECTIVES = [
    selfalign.SRALoss(student_layer=2, teacher_layer=4, name="sra"),
    selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3, distance="l2", name="later"),
]


@pytest.fixture(scope="module")
def models():
    """A model for each form of the loss; its draws depend on the sample alone."""
    made = {}
    for name, loss in LOSSES.items():
        keras.utils.set_random_seed(0)
        model = compiled(functional(depth=4), OBJECTIVES)
        model.compile(keras.optimizers.SGD(0.0), loss, loss_weights=[0.5], run_eagerly=True)
        model._step.drawing = model._step.held_out = OfTheSample()
        made[name] = model
    return made


def by_name(model, x, y):
    names = [each.name for each in model.backbone.inputs]
    return {names[0]: x, names[2]: y}


# how samples, labels, a mask and weights may come: (model, x, y, mask, weights) -> arguments
FORMS = {
    "x and y": lambda _, x, y, m, w: ((x, (y, {"loss_mask": m}), w), {}),
    "x with all": lambda _, x, y, m, w: (((x, y, {"loss_mask": m}), None, w), {}),
    "by name": lambda model, x, y, m, w: (
        ({**by_name(model, x, y), "loss_mask": m},),
        {"sample_weight": w[:, None]},
    ),
}


def sums(model, form, counts, weights):
    """Denoising loss and term, times the number of samples; each sample `counts` times."""
    data = (np.repeat(array, counts, axis=0) for array in (IMAGES, LABELS, MASK, weights))
    arguments, options = FORMS[form](model, *data)
    found = model.test_on_batch(*arguments, return_dict=True, **options)
    return sum(counts) * np.array([found["denoising"], found["alignment"]])


@pytest.mark.parametrize("kind", LOSSES)
@settings(max_examples=5, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2]), min_size=COUNT, max_size=COUNT).filter(any),
    form=st.sampled_from(list(FORMS)),
)
def test_a_weight_counts_a_sample(models, kind, counts, form):
    ones = np.ones(COUNT, "float32")
    weighed = sums(models[kind], form, [1] * COUNT, np.array(counts, "float32"))
    counted = sums(models[kind], form, counts, ones)
    # these two do not divide by the number of samples
    whole = kind in ("a sum", "a weighted mean")
    scale = COUNT / sum(counts) if whole else 1.0
    np.testing.assert_allclose(weighed, counted * (scale, masked_scale(counts)), rtol=2e-4)


def masked_scale(counts):
    """The term divides by the sum of its mask, where the loss divides by the number of samples."""
    mean_of_counted = np.repeat(MASK, counts, axis=0).mean()
    return mean_of_counted / MASK.mean()


@pytest.mark.parametrize("entry", ["fit", "train_on_batch"])
@pytest.mark.parametrize("labels_beside_x", [True, False])
def test_class_weights_are_weights_of_the_samples(entry, labels_beside_x, loss):
    weights = {"class_weight": {1: 3.0, 2: 0.0}}, {"sample_weight": np.array([1, 3, 0, 1.0])}
    data = ((IMAGES, LABELS),) if labels_beside_x else (IMAGES, LABELS)
    ends = []
    for options in weights:
        keras.utils.set_random_seed(0)
        model = compiled(functional(depth=4), loss)
        getattr(model, entry)(*data, **options)
        ends.append(ops.convert_to_numpy(model.backbone.weights[0]))
    np.testing.assert_array_equal(*ends)


def test_weights_of_places_weigh_the_denoising_loss(models):
    model = models["a name"]
    places = np.zeros((COUNT, 5), "float32")
    found = model.test_on_batch(IMAGES, LABELS, places, return_dict=True)
    whole = model.test_on_batch(IMAGES, LABELS, return_dict=True)
    assert found["denoising"] == 0
    assert found["alignment"] == whole["alignment"]


def test_datasets_bring_their_weights(models):
    model = models["none"]
    weights = np.array([1, 0, 2, 0], "float32")
    arrays = model.evaluate(IMAGES, LABELS, sample_weight=weights, verbose=0)
    batch = IMAGES, (LABELS,), weights
    from_dataset = model.evaluate((each for each in [batch]), steps=1, verbose=0)
    np.testing.assert_allclose(from_dataset, arrays, rtol=1e-6)
