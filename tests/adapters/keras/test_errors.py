"""Bad input to the Keras adapter: the rule, what was received, what to do."""

import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras_fits import compiled
from keras_models import (
    WIDTH,
    Block,
    PairBlock,
    Subclassed,
    functional,
    subclassed,
    unconditional,
)

import selfalign
from selfalign.adapters.keras import SelfAligned

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4


def check(text):
    return pytest.raises(ValueError, match=re.escape(text))


def two_kinds():
    x = keras.Input((5, 4))
    t = keras.Input(())
    h = x + keras.layers.Reshape((1, 1))(t)
    for kind in ("block", "stage"):
        for n in (1, 2):
            h = keras.layers.Dense(8, name=f"{kind}_{n}")(h)
    return keras.Model([x, t], h)


class Other(Block):
    """A second class of the user's own."""


def two_classes():
    keras.utils.clear_session()  # names are counted anew
    x = keras.Input((5, WIDTH))
    t = keras.Input(())
    h = x
    for kind in (Block, Other, Block, Other):
        h = kind(WIDTH)(h, keras.layers.Reshape((1, 1))(t))
    return keras.Model([x, t], h)


# what is wrong: (the backbone, options, what the message says)
BACKBONES = {
    "no kind of blocks": (
        unconditional,
        {"blocks": "part_{}"},
        "blocks='part_{}'; found none. Pass blocks=\"name_{}\", or taps=.",
    ),
    "no number in blocks=": (
        functional,
        {"blocks": "block"},
        "blocks= must have one {} where the number stands. Received: 'block'.",
    ),
    "two kinds of blocks": (
        two_kinds,
        {},
        "or the caller names it. Received: blocks=None; found 'block_{}' "
        "(2: block_1 ... block_2), 'stage_{}' (2: stage_1 ... stage_2).",
    ),
    "two classes of blocks": (
        two_classes,
        {},
        "found 'Block' (2: block ... block_1), 'Other' (2: other ... other_1). Pass blocks=",
    ),
    "too few blocks": (
        lambda: functional(depth=3),
        {},
        "teacher_layer must be at most the model's depth. Received: layer 4 of 3 blocks.",
    ),
    "blocks with several outputs": (
        lambda: functional(PairBlock),
        {},
        "must give tokens [B, N, D], or [B, ..., D] on a grid. Received: pair_block_1: [(",
    ),
    "an unknown width": (
        subclassed,
        {},
        "width of the tapped blocks must be known. Received: a backbone that does not tell it, and "
        "the objective 'sra', which has a head. Pass width=D.",
    ),
    "not built": (
        Subclassed,
        {"width": WIDTH},
        "The backbone must be a keras.Model that is built. Received: Subclassed",
    ),
    "no model": (
        lambda: keras.layers.Dense(3),
        {},
        "The backbone must be a keras.Model that is built. Received: Dense",
    ),
    "blocks= of a subclassed model": (
        subclassed,
        {"blocks": "block_{}", "width": WIDTH},
        "must come with a functional backbone, whose layers they name. Received: Subclassed",
    ),
}
OPTIONS = {
    "a layer that is not there": (
        {"taps": ("block_2", "blok_4")},
        "A tapped layer must exist in the backbone. Received: 'blok_4'. Its layers: ",
    ),
    "an index that is not there": (
        {"taps": (1, 400)},
        "must be a name or an index of backbone.layers. Received: 400. Its ",
    ),
    "one layer of two": (
        {"taps": ("block_2",)},
        "must be the student's layer and the target's, without blocks= (one layer where the target "
        "is not a layer of the backbone). Received: taps=('block_2',), blocks=None. Pass "
        'taps=("block_2", "block_4"), or leave it out',
    ),
    "taps= and blocks=": (
        {"taps": ("block_2", "block_4"), "blocks": "block_{}"},
        "without blocks= (one layer where the target is not a layer of the backbone). Received: ",
    ),
    "taps= of another name": (
        {"taps": {"repa": ("block_2", "block_4")}},
        "Received: taps={'repa': ('block_2', 'block_4')}, blocks=None.",
    ),
    "an unknown prediction": (
        {"prediction": "score"},
        "prediction must be one of 'velocity', 'noise', 'data'. Received: 'score'.",
    ),
    "no null label": (
        {"label_dropout": 0.1},
        "label_dropout needs the label that stands for none. Received: null_label=None.",
    ),
    "too much label dropout": (
        {"label_dropout": 2},
        "label_dropout must be in [0, 1]. Received: 2. It is a fraction of the samples.",
    ),
    "no width": (
        {"width": 0},
        "width must be finite and at least 1. Received: 0. It is the width D of tokens.",
    ),
    "another path": (
        {"path": "cosine"},
        "path= must be the path of the objective that has an EMA teacher. Received: "
        "Cosine(noise_at=1.0), where the objective has Linear(noise_at=1.0). Leave path= out",
    ),
    "the first edition's student=": (
        {"student": "block_2", "teacher": "block_4"},
        "must be given together, as taps=(student, teacher). Received: student='block_2'. Write",
    ),
    "the first edition's teacher=": (
        {"teacher": "block_4"},
        "teacher= must be a second backbone, a keras.Model that is built. Received: "
        "teacher='block_4'. Pass another instance. Layers are now named by taps=",
    ),
    "a teacher that is not built": (
        {"teacher": Subclassed()},
        "teacher= must be a second backbone, a keras.Model that is built. Received: teacher=<",
    ),
}


@pytest.mark.parametrize("what", BACKBONES)
def test_a_backbone_that_cannot_be_wrapped_is_refused(what, loss):
    make, options, text = BACKBONES[what]
    with check(text):
        SelfAligned(make(), loss, **options)


@pytest.mark.parametrize("what", OPTIONS)
def test_an_option_that_cannot_be_used_is_refused(what, loss):
    options, text = OPTIONS[what]
    with check(text):
        SelfAligned(functional(), loss, **options)


def test_a_teacher_that_is_no_second_backbone_is_refused(loss):
    backbone = functional()
    with check("Received: the backbone itself. Pass another instance."):
        SelfAligned(backbone, loss, teacher=backbone)
    with check("must have the same structure and shapes. Received: at 'weight 15'"):
        SelfAligned(backbone, loss, teacher=functional(depth=5))


def test_a_teacher_that_no_objective_needs_is_refused():
    layersync = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2)
    with check("must come with an objective that has an EMA teacher. Received: objectives layersy"):
        SelfAligned(functional(), layersync, teacher=functional())


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
    first = subclassed(Nameless)
    second = subclassed(Nameless)
    rule = "is a second backbone, built from the first one's configuration. Received: "
    with check(f"{rule}Nameless, which gives none: no config. Give it get_config(), or pass teach"):
        SelfAligned(first, loss, width=WIDTH)
    assert SelfAligned(first, loss, width=WIDTH, teacher=second).average is second


def test_features_that_are_none_are_refused(data, loss):
    class Silent(Subclassed):
        def call(self, inputs, training=False):
            return super().call(inputs)[0]

    model = compiled(subclassed(Silent), loss, width=WIDTH, teacher=subclassed(Silent))
    rule = "not functional must return (prediction, features), a list of its blocks' outputs. "
    with check(f"{rule}Received: shape (32, 5, 4). Return them from its call"):
        model.train_on_batch(*data)


IMAGES = np.ones((8, 5, 4), "float32")
LABELS = np.ones(8, "int32")
DATA = {
    "no labels": (
        (IMAGES,),
        "inputs are x, t and the condition's parts. Received: 0 part(s) of a condition",
    ),
    "samples of another rank": (
        (IMAGES[:, :, 0], LABELS),
        "the rank of the backbone's first input. Received: shape (8, 5)",
    ),
    "samples by name": (
        ({"target_tokens": IMAGES}, LABELS),
        "fit takes samples, or (samples, labels, ...). Received: dict. Pass a tuple",
    ),
    "a sample by no name": (
        ({"image": IMAGES}, LABELS),
        "Data by name must be target_tokens and loss_mask, each once. Received: 'image'. Pass",
    ),
    "an unknown name": (
        (IMAGES, (LABELS, {"targets": IMAGES})),
        "Data by name must be target_tokens and loss_mask, each once. Received: 'targets'. Pass",
    ),
    "a name twice": (
        ((IMAGES, {"loss_mask": LABELS}), (LABELS, {"loss_mask": LABELS})),
        "each once. Received: 'loss_mask', 'loss_mask'. Pass",
    ),
    "target tokens for SRA": (
        (IMAGES, (LABELS, {"target_tokens": IMAGES})),
        "target_tokens must be of an objective that takes them. Received: target_tokens, with sra.",
    ),
    "a mask of another batch": (
        (IMAGES, (LABELS, {"loss_mask": LABELS[:7]})),
        "mask must have the shape [B] (samples) or [B, N] (tokens). Received: (7,)",
    ),
}


@pytest.mark.parametrize("what", DATA)
def test_data_that_does_not_fit_is_refused(what, loss):
    arguments, text = DATA[what]
    model = compiled(functional(depth=4), loss)
    with check(text):
        model.train_on_batch(*arguments)


WEIGHTS = {
    "negative weights": (
        {"sample_weight": -np.ones(8)},
        "Sample weights must be finite numbers of at least 0. Received: values from -1 to -1. Pass",
    ),
    "weights of other axes": (
        {"sample_weight": np.ones((8, 3))},
        "must be [B], or fit the values that the loss gives, axis by axis. Received: weights of "
        "shape (8, 3), for values of shape (8, 5). Pass one weight for each sample",
    ),
    "several weights": (
        {"sample_weight": [np.ones(8), np.ones(8)]},
        "Sample weights must be one array. Received: a list of 2. Pass one weight for",
    ),
    "two kinds of weights": (
        {"sample_weight": np.ones(8), "class_weight": {1: 2.0}},
        "weighed by themselves or by their class. Received: sample_weight and class_weight. Pass",
    ),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(what, loss):
    options, text = WEIGHTS[what]
    with check(text):
        compiled(functional(depth=4), loss).train_on_batch(IMAGES, LABELS, **options)


def test_class_weights_without_classes_are_refused(loss):
    rule = "class_weight must come with labels, the first part of the condition. Received: samples "
    with check(f"{rule}without a condition by its place. Pass labels: fit(x0, labels), or sample_"):
        model = compiled(unconditional(depth=4), loss)
        model.fit(IMAGES, class_weight={1: 2.0}, verbose=0)


def test_a_loss_without_values_of_samples_cannot_be_weighed(loss):
    model = compiled(functional(depth=4), loss)
    model.compile("sgd", lambda target, prediction: keras.ops.mean(target - prediction))
    with check("Received: weights of shape (8,), for values of shape (). Pass one weight for each"):
        model.train_on_batch(IMAGES, LABELS, np.ones(8))


def test_target_tokens_that_are_missing_are_refused():
    model = compiled(functional(), selfalign.REPALoss(student_layer=2, width=6, hidden=8))
    rule = "The objective 'repa' needs target_tokens with each batch. Received: None. Pass them "
    with check(f'{rule}beside the labels: fit(x0, (labels, {{"target_tokens": tokens}})).'):
        model.fit(IMAGES, LABELS, verbose=0)


def test_target_tokens_of_a_list_are_given_by_name(loss):
    model = compiled(functional(), [loss, selfalign.REPALoss(student_layer=2, width=4, hidden=8)])
    rule = "target_tokens of a list of objectives must be a dict by their names. Received: "
    fix = 'Pass {"target_tokens": {"repa": tokens}}.'
    for given, received in ((IMAGES, "one array"), ({"sra": IMAGES}, "those of sra")):
        with check(f"{rule}{received}. {fix}"):
            model.train_on_batch(IMAGES, (LABELS, {"target_tokens": given}))


def test_calls_out_of_order_are_refused(backbone, loss, data):
    model = SelfAligned(backbone, loss)
    with check("compile"):
        model.fit(*data, verbose=0)
    rule = "SelfAligned trains; it does not predict. Received: predict(). "
    with check(f"{rule}Sample with ema_backbone(), or call backbone."):
        model.predict(data[0])
    rule = "SelfAligned trains; it is not called. Received: a call of the model. "
    with check(f"{rule}Call backbone, or what ema_backbone() gives."):
        model(data[0])


def test_layers_without_a_common_shape_are_refused(data):
    """Found in the step: LayerSync has no head that could change the width."""
    x = keras.Input((5, 4))
    t = keras.Input(())
    h = keras.layers.Dense(8, name="block_1")(x + keras.layers.Reshape((1, 1))(t))
    h = keras.layers.Dense(6, name="block_2")(h)
    backbone = keras.Model([x, t], keras.layers.Dense(4)(h))
    model = compiled(backbone, selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2))
    with check("the same shape [B, N, D]. Received: student (32, 5, 8), target (32, 5, 6)."):
        model.train_on_batch(data[0])


@pytest.mark.only("torch", "jax")  # Keras's numpy backend imports JAX
def test_a_backend_that_cannot_train_is_refused_at_once(tmp_path):
    code = """
import keras, selfalign
from selfalign.adapters.keras import SelfAligned
x, t = keras.Input((5, 4)), keras.Input(())
backbone = keras.Model([x, t], keras.layers.Dense(3)(x))
SelfAligned(backbone, selfalign.SRALoss(student_layer=1, teacher_layer=2))
"""
    environment = os.environ | {"KERAS_BACKEND": "numpy"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    rule = "SelfAligned needs a Keras backend that trains. Received: 'numpy'. "
    assert f"{rule}Set KERAS_BACKEND to torch, jax" in done.stderr
