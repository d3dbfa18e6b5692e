"""Files of the Keras adapter: a resumed fit is the uninterrupted one, the backbone alone bears no trace of SRA."""

import re
import zipfile

import keras
import numpy as np
import pytest
from keras_fits import same, trained
from keras_models import WIDTH, Block, functional, subclassed
from support import array

import selfalign
from selfalign.adapters.keras import SelfAligned

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def scheduled():
    return selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=0.5 * selfalign.schedules.Warmup(20),
                             decay=selfalign.schedules.DecayWarmup(0.99))  # fmt: skip


@pytest.mark.parametrize("make", [functional, lambda: functional(Block), subclassed], ids=["functional", "class", "subclassed"])
def test_a_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(make, data, tmp_path):
    options = {"width": WIDTH} if make is subclassed else {}
    model, _ = trained(make(), scheduled(), data, **options)
    model.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(resumed, SelfAligned)
    assert int(resumed.steps) == 4
    for m in (model, resumed):
        m.fit(*data, batch_size=8, verbose=0, shuffle=False)
    assert same(model, resumed)
    assert same(model.ema_backbone(), resumed.ema_backbone())


def test_the_backbone_alone_bears_no_trace(backbone, loss, data, tmp_path):
    config = backbone.get_config()
    model, _ = trained(backbone, loss, data)
    assert backbone.get_config() == config
    model.backbone.save(tmp_path / "backbone.keras")
    model.ema_backbone().save(tmp_path / "ema.keras")
    for file, source in (("backbone.keras", backbone), ("ema.keras", model.ema_backbone())):
        with zipfile.ZipFile(tmp_path / file) as archive:
            assert "selfalign" not in archive.read("config.json").decode()
        assert same(keras.saving.load_model(tmp_path / file), source)


def test_weights_of_other_settings_are_refused(loss, data, tmp_path):
    model, _ = trained(functional(), loss, data)
    model.save_weights(tmp_path / "sra.weights.h5")
    same_settings = SelfAligned(functional(), loss)
    same_settings.load_weights(tmp_path / "sra.weights.h5")
    assert same(model, same_settings)
    other = SelfAligned(functional(), selfalign.SRALoss(student_layer=1, teacher_layer=4, weight=0.2))
    projector = array(other.projector_weights["hidden_kernel"].value)
    text = "a model of the same settings. Received: student_layer 2 instead of 1, weight 0.5 instead of 0.2. Build"
    with pytest.raises(ValueError, match=re.escape(text)):
        other.load_weights(tmp_path / "sra.weights.h5")
    np.testing.assert_array_equal(projector, array(other.projector_weights["hidden_kernel"].value))
