"""Every objective in fit: LayerSync, REPA, lists, one without a target, a third party's."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops
from keras_fits import compiled, fitted, weights
from keras_models import TOKENS, WIDTH, functional, subclassed
from support import array
from third_party import LogCoshLoss

import selfalign
from selfalign.adapters.keras import SelfAligned

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4


@pytest.fixture
def backbone():
    return functional(depth=4)


@pytest.fixture
def layersync():
    return selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3)


@pytest.fixture
def repa():
    return selfalign.REPALoss(student_layer=2, width=6, hidden=12)


@pytest.fixture
def targets():
    """An encoder's tokens [32, 5, 6]."""
    return np.random.default_rng(1).normal(size=(32, TOKENS, 6)).astype("float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormLoss(selfalign.Objective):
    """Has no target."""

    kind = "norm"
    source = selfalign.sources.Nothing()

    def compare(self, student, target, mask=None):
        return ops.mean(ops.square(ops.cast(student, "float32")))


def test_layersync_trains_without_a_second_backbone(backbone, layersync, data):
    model = compiled(backbone, dataclasses.replace(layersync, weight=5.0))
    history = fitted(model, data, epochs=6)
    assert history["alignment"][-1] < 0.8 * history["alignment"][0]
    assert len(model.weights) == len(backbone.weights) + 4  # the counters, and the factor
    assert model.projector == {}
    with pytest.raises(ValueError, match=r"EMA teacher.*Received: layersync\. Sample with backbon"):
        model.ema_backbone()


def test_a_subclassed_backbone_needs_no_width_without_a_head(layersync, data):
    model = compiled(subclassed(depth=3), layersync)
    assert model.width is None
    history = fitted(model, data, epochs=2)
    assert np.isfinite(history["alignment"]).all()


def test_repa_takes_its_target_from_the_data(backbone, repa, data, targets):
    model = compiled(backbone, repa, keras.optimizers.AdamW(1e-2))
    images, labels = data
    history = fitted(model, (images, (labels, {"target_tokens": targets})), epochs=8)
    assert history["alignment"][-1] < history["alignment"][0]
    assert history["cosine"][-1] > history["cosine"][0]
    assert model.average is None


def test_target_tokens_may_stand_beside_x_or_y(repa, data, targets):
    images, labels = data
    named = {"target_tokens": targets}
    found = []
    for arguments in (
        (images, (labels, named)),
        ((images, labels), named),
        ((images, labels, named),),
    ):
        keras.utils.set_random_seed(0)
        found.append(fitted(compiled(functional(depth=4), repa), arguments)["alignment"])
    assert found[0] == found[1] == found[2]


def test_a_dataset_gives_target_tokens(backbone, repa, data, targets):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            rows = slice(8 * index, 8 * index + 8)
            return data[0][rows], (data[1][rows], {"target_tokens": targets[rows]})

    model = compiled(backbone, repa)
    model.fit(Batches(), shuffle=False, verbose=0)
    assert int(model.steps) == 4


def test_a_mask_leaves_samples_out_of_the_term(backbone, layersync, data):
    """At time 0 there is no noise: half a batch gives what a mask of the other half gives."""

    def clean(count, seed):
        return ops.zeros((count,))

    model = compiled(backbone, layersync, draw_time=clean)
    terms = []
    for rows, named in ((32, {"loss_mask": np.arange(32) < 16}), (16, {})):
        model.reset_metrics()
        model.test_on_batch(data[0][:rows], (data[1][:rows], named))
        terms.append(array(model.logged["alignment"].result()))
    np.testing.assert_allclose(*terms, rtol=1e-5)
    model.reset_metrics()
    model.test_on_batch(*data)
    assert abs(array(model.logged["alignment"].result()) - terms[0]) > 1e-4


def test_terms_of_a_list_add_up(backbone, loss, repa, data, targets):
    losses = [loss, repa, NormLoss(student_layer=3, weight=0.1)]
    model = compiled(backbone, losses)
    named = {"target_tokens": {"repa": targets}}
    history = fitted(model, (data[0], (data[1], named)))
    compared = ("alignment", "cosine", "student_norm", "teacher_norm")
    wanted = {f"{name}/{metric}" for name in ("sra", "repa") for metric in compared}
    wanted |= {"norm/alignment", "norm/student_norm", "alignment", "denoising", "loss"}
    assert set(history) == wanted
    terms = [history[f"{name}/alignment"][0] for name in ("sra", "repa", "norm")]
    assert min(terms) > 0
    np.testing.assert_allclose(history["alignment"][0], sum(terms), rtol=1e-5)
    assert set(model.projector) == {"sra", "repa", "norm"}
    assert model.projector["norm"] == {}
    assert model.taps["repa"] == ("block_2", None)


def test_a_list_of_one_bears_its_name(backbone, layersync, data):
    model = compiled(backbone, [layersync])
    logs = model.train_on_batch(*data, return_dict=True)
    assert "layersync/cosine" in logs
    assert "cosine" not in logs
    assert list(model.projector) == ["layersync"]


def test_taps_by_objective(backbone, loss, repa):
    taps = {"sra": ("block_1", "block_3"), "repa": ("block_4",)}
    model = SelfAligned(backbone, [loss, repa], taps=taps)
    assert model.taps == {"sra": ("block_1", "block_3"), "repa": ("block_4", None)}


def test_one_pair_of_taps_serves_objectives_that_agree(backbone, loss):
    losses = [loss, selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2)]
    model = SelfAligned(backbone, losses, taps=("block_1", "block_3"))
    assert set(model.taps.values()) == {("block_1", "block_3")}


def test_a_third_partys_objective_trains_as_it_is(backbone, data):
    model = compiled(backbone, LogCoshLoss(student_layer=1, teacher_layer=3))
    before = weights(model)
    history = fitted(model, data, epochs=4)
    assert history["alignment"][-1] < history["alignment"][0]
    assert {name: tuple(v.shape) for name, v in model.projector.items()} == {
        "down": (WIDTH, 2),
        "up": (2, WIDTH),
    }
    assert not np.array_equal(before[0], weights(model)[0])


def test_more_may_be_logged(backbone, layersync, data):
    """Whatever an objective measures: a metric of that name is enough."""
    model = compiled(backbone, layersync)
    for name in ("distance", "student_finite"):
        model.logged[name] = keras.metrics.Mean(name)
    logs = model.train_on_batch(*data, return_dict=True)
    np.testing.assert_allclose(0.2 * logs["distance"], logs["alignment"], rtol=1e-5)
    assert logs["student_finite"] == 1
