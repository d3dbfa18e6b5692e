"""Bad input to the Keras adapter: the rule, what was received, what to do."""

import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras_models import WIDTH, Block, PairBlock, Subclassed, functional, subclassed

from selfalign.adapters.keras import SelfAligned

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def check(text):
    return pytest.raises(ValueError, match=re.escape(text))


def two_kinds():
    x, t = keras.Input((5, 4)), keras.Input(())
    h = x + keras.layers.Reshape((1, 1))(t)
    for kind in ("block", "stage"):
        for n in (1, 2):
            h = keras.layers.Dense(8, name=f"{kind}_{n}")(h)
    return keras.Model([x, t], h)


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (functional, {"student": "block_2", "teacher": "blok_4"},
         "A tapped layer must exist in the backbone. Received: 'blok_4'. Its layers: input_layer"),
        (functional, {"student": "block_2"}, "Taps are given by two layers, student= and teacher=, without blocks=. Received"),
        (functional, {"student": 1, "teacher": 400}, "must be a name or an index of backbone.layers. Received: 400. Its "),
        (functional, {"blocks": "part_{}"}, "found none. Pass blocks=\"name_{}\", or student= and teacher=."),
        (functional, {"blocks": "block"}, "blocks= must have one {} where the number stands. Received: 'block'."),
        (two_kinds, {}, "or the caller names it. Received: blocks=None; found 'block_{}' (2: block_1 ... block_2), 'stage_{}'"),
        (lambda: functional(depth=3), {}, "teacher_layer must be at most the model's depth. Received: layer 4 of 3 blocks."),
        (lambda: functional(PairBlock), {}, "must give tokens [B, N, D], or [B, ..., D] on a grid. Received: pair_block_1: [("),
        (subclassed, {}, "tapped blocks must be known. Received: Subclassed, which is not functional. Pass width=D."),
        (Subclassed, {"width": WIDTH}, "The backbone must be a keras.Model that is built. Received: Subclassed"),
        (lambda: keras.layers.Dense(3), {}, "The backbone must be a keras.Model that is built. Received: Dense"),
        (functional, {"prediction": "score"}, "prediction must be one of 'velocity', 'noise', 'data'. Received: 'score'."),
        (functional, {"label_dropout": 0.1}, "label_dropout needs the label that stands for none. Received: null_label=None."),
        (functional, {"label_dropout": 2}, "label_dropout must be in [0, 1]. Received: 2. It is a share of the samples."),
    ],
)  # fmt: skip
def test_what_cannot_be_wrapped_is_refused(make, options, text, loss):
    with check(text):
        SelfAligned(make(), loss, **options)


def test_half_precision_variables_are_refused(loss):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    try:
        with check("Variables must be float32: an EMA in half precision never moves. Received: "):
            SelfAligned(functional(), loss)
    finally:
        keras.config.set_dtype_policy(before)


@keras.saving.register_keras_serializable(package="tests")
class Nameless(Subclassed):
    def get_config(self):
        raise NotImplementedError("no config")


def test_a_backbone_that_cannot_be_rebuilt_asks_for_a_second_one(loss):
    first, second = Nameless(), Nameless()
    for model in (first, second):
        model.build([(None, 5, 4), (None,), (None,)])
    with check("is a second backbone, built from the first one's configuration. Received: Nameless, which gives none: "):
        SelfAligned(first, loss, width=WIDTH)
    assert SelfAligned(first, loss, width=WIDTH, teacher=second).average is second


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((np.ones((8, 5, 4), "float32"),), "inputs are x, t and the condition's parts. Received: 0 part(s) of a condition"),
        ((np.ones((8, 5), "float32"), np.ones(8, "int32")), "the rank of the backbone's first input. Received: shape (8, 5)"),
        (({"image": np.ones((8, 5, 4), "float32")},), "fit takes samples, or (samples, labels, ...). Received: dict."),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_refused(backbone, loss, arguments, text):
    model = SelfAligned(backbone, loss)
    model.compile(optimizer="sgd")
    with check(text):
        model.fit(*arguments, batch_size=8, verbose=0)


def test_features_that_are_none_are_refused(data, loss):
    class Silent(Subclassed):
        def call(self, inputs, training=False):
            return super().call(inputs)[0]

    models = Silent(), Silent()
    for model in models:
        model.build([(None, 5, 4), (None,), (None,)])
    model = SelfAligned(models[0], loss, width=WIDTH, teacher=models[1])
    model.compile(optimizer="sgd")
    with check("not functional must return (prediction, features), a list of its blocks' outputs. Received: shape"):
        model.fit(*data, batch_size=8, verbose=0)


def test_calls_out_of_order_are_refused(backbone, loss, data):
    model = SelfAligned(backbone, loss)
    with check("compile"):
        model.fit(*data, verbose=0)
    model.compile(optimizer="sgd", metrics=["mae"])
    with check("compile takes no metrics here. Received: compile_metrics. The model logs denoising, alignment"):
        model.fit(*data, verbose=0)
    with check("SelfAligned trains; it does not predict. Received: predict(). Sample with ema_backbone(), or call backbone."):
        model.predict(data[0])


def test_layers_of_the_users_own_are_found_by_class(loss):
    assert SelfAligned(functional(Block), loss)._tapped_names() == ["block_1", "block_3"]


def test_a_backend_that_cannot_train_is_refused_at_once(tmp_path):
    code = """
import keras, selfalign
from selfalign.adapters.keras import SelfAligned
x, t = keras.Input((5, 4)), keras.Input(())
SelfAligned(keras.Model([x, t], keras.layers.Dense(3)(x)), selfalign.SRALoss(student_layer=1, teacher_layer=2))
"""
    environment = os.environ | {"KERAS_BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "SelfAligned needs a Keras backend that trains. Received: 'numpy'. Set KERAS_BACKEND to torch, jax" in done.stderr


def test_layers_may_be_given_by_index(backbone, loss):
    names = [layer.name for layer in backbone.layers]
    model = SelfAligned(backbone, loss, student=names.index("block_2"), teacher=names.index("block_4"))
    assert model._tapped_names() == ["block_2", "block_4"]
