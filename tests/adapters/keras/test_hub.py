"""A backbone that nobody here wrote: Stable Diffusion 3's MMDiT from keras-hub, tiny."""

import keras
import numpy as np
import pytest
from keras_fits import compiled, fitted, same

import selfalign

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4


@keras.saving.register_keras_serializable(package="tests")
def image_tokens(output):
    """A joint block returns (image, text)."""
    return output[0]


@keras.saving.register_keras_serializable(package="tests")
def named_inputs(x, t, context, pooled):
    return {
        "latent": x,
        "context": context,
        "pooled_projection": pooled,
        "timestep": 1000 * t[:, None],
    }


def mmdit():
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT

    sizes = {"latent_shape": (8, 8, 4), "context_shape": (6, 12), "pooled_projection_shape": (20,)}
    return MMDiT(2, 16, 3, 2, 8, **sizes)


def test_mmdit_trains_unedited_and_comes_back_from_its_file(tmp_path):
    backbone = mmdit()
    rng = np.random.default_rng(0)
    shapes = ((8, 8, 8, 4), (8, 6, 12), (8, 20))
    data = tuple(rng.normal(size=shape).astype("float32") for shape in shapes)
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
    options = {"blocks": "joint_block_{}", "select": image_tokens, "arrange": named_inputs}
    model = compiled(backbone, loss, keras.optimizers.AdamW(1e-2), **options)
    assert model.taps == ("joint_block_0", "joint_block_1")
    assert model.width == 16
    history = fitted(model, (data,), epochs=8, batch_size=4)
    assert history["alignment"][-1] < 0.7 * history["alignment"][0]
    ema = model.ema_backbone()
    assert type(ema) is type(backbone)
    assert not same(ema, backbone)
    model.save(tmp_path / "mmdit.keras")
    assert same(keras.saving.load_model(tmp_path / "mmdit.keras"), model)
