"""What TensorFlow has of its own: datasets whose last batch is short, and XLA."""

import keras
import numpy as np
import pytest
from keras_models import functional

import selfalign
from selfalign.adapters.keras import SelfAligned

LOSSES = [
    selfalign.SRALoss(student_layer=2, teacher_layer=4),
    selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3, normalise="standardise"),
    selfalign.REPALoss(student_layer=2, width=6, hidden=8, normalise="centre"),
]


@pytest.mark.only("tensorflow")
@pytest.mark.parametrize("jit_compile", ["auto", True, False])
def test_datasets_train_and_validate(jit_compile, data):
    import tensorflow

    named = {
        "target_tokens": {"repa": np.ones((32, 5, 6), "float32")},
        "loss_mask": np.ones((32, 5), "float32"),
    }
    parts = data[0], (data[1], named), np.ones(32, "float32")
    whole = tensorflow.data.Dataset.from_tensor_slices(parts)
    model = SelfAligned(functional(depth=4), LOSSES)
    model.compile(keras.optimizers.AdamW(1e-2), "mae", jit_compile=jit_compile)
    batches = whole.batch(7)
    history = model.fit(
        batches, validation_data=batches, epochs=3, shuffle=False, verbose=0
    ).history
    assert history["denoising"][-1] < history["denoising"][0]
    total = np.add(history["val_denoising"], history["val_alignment"])
    np.testing.assert_allclose(history["val_loss"], total, rtol=1e-4)
    assert int(model.steps) == 15
