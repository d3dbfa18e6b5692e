"""Which layers of a functional backbone are its blocks, and which are tapped."""

import keras
import pytest
from keras_models import Block, functional, unconditional

from selfalign.adapters.keras import SelfAligned
from selfalign.adapters.keras.blocks import block_names, numbered


def test_layers_of_the_users_own_are_found_by_class(loss):
    backbone = functional(Block)
    names = [layer.name for layer in backbone.layers if isinstance(layer, Block)]
    assert SelfAligned(backbone, loss).taps == (names[1], names[3])


def test_layers_of_keras_are_found_by_names_of_the_users(loss):
    assert SelfAligned(functional(), loss).taps == ("block_2", "block_4")


def test_names_that_keras_gives_are_no_blocks():
    assert list(numbered(functional())) == ["block_{}"]


def test_blocks_are_in_the_order_of_their_numbers():
    backbone = unconditional(depth=11)
    assert block_names(backbone, "block_{}")[8:] == ["block_9", "block_10", "block_11"]


def test_layers_may_be_given_by_name(backbone, loss):
    assert SelfAligned(backbone, loss, taps=("block_1", "block_3")).taps == ("block_1", "block_3")


def test_layers_may_be_given_by_index(backbone, loss):
    names = [layer.name for layer in backbone.layers]
    taps = [names.index("block_2"), names.index("block_4")]
    assert SelfAligned(backbone, loss, taps=taps).taps == ("block_2", "block_4")


def test_a_pattern_chooses_among_kinds(loss):
    x = keras.Input((5, 4))
    t = keras.Input(())
    h = x + keras.layers.Reshape((1, 1))(t)
    for kind in ("stage", "block"):
        for n in range(1, 5):
            h = keras.layers.Dense(8, name=f"{kind}_{n}")(h)
    model = SelfAligned(keras.Model([x, t], h), loss, blocks="stage_{}")
    assert model.taps == ("stage_2", "stage_4")


@pytest.mark.parametrize("select", [None, lambda output: output])
def test_the_width_is_the_tapped_layers(loss, select):
    assert SelfAligned(unconditional(depth=4, width=12), loss, select=select).width == 12
