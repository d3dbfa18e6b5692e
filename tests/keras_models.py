"""Small Keras backbones in the shapes in which users bring them."""

from typing import ClassVar

import keras
from keras import layers, ops

WIDTH, CHANNELS, TOKENS, DEPTH = 16, 4, 5, 6


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """A block of the user's own: x + tanh(Dense(x) + condition).

    It keeps a list of the names that ran, for a test.
    """

    ran: ClassVar[list[str]] = []

    def __init__(self, width, **options):
        super().__init__(**options)
        self.dense = layers.Dense(width)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x, condition):
        Block.ran.append(self.name)
        return x + ops.tanh(self.dense(x) + condition)

    def get_config(self):
        return {**super().get_config(), "width": self.dense.units}


@keras.saving.register_keras_serializable(package="tests")
class PairBlock(Block):
    """Returns (text, image)."""

    def call(self, x, condition):
        return ops.ones_like(x[:, :1]), super().call(x, condition)


def functional(block=None, depth=DEPTH, name=None):
    """(x [B, 5, 4], t [B], y [B]) -> [B, 5, 4].

    Plain keras.layers with blocks named block_1 ..., unless `block` is a class.
    """
    x = keras.Input((TOKENS, CHANNELS))
    t = keras.Input(())
    y = keras.Input((), dtype="int32")
    labels = layers.Embedding(11, WIDTH)(y)
    time = layers.Dense(WIDTH)(layers.Reshape((1,))(t))
    condition = layers.Reshape((1, WIDTH))(layers.Add()([labels, time]))
    tokens = layers.Dense(WIDTH)(x)
    for n in range(1, depth + 1):
        if block is None:
            hidden = layers.Dense(WIDTH, "tanh")(tokens + condition)
            tokens = layers.Add(name=f"block_{n}")([tokens, hidden])
        else:
            output = block(WIDTH, name=f"{name}_{n}" if name else None)(tokens, condition)
            tokens = output[1] if isinstance(output, (list, tuple)) else output
    return keras.Model([x, t, y], layers.Dense(CHANNELS)(tokens))


def unconditional(depth=3, width=8, names="block_{}", **options):
    """(x [B, 5, 4], t [B]) -> [B, 5, 4]; `options` are those of the blocks, Dense layers."""
    x = keras.Input((TOKENS, CHANNELS))
    t = keras.Input(())
    tokens = x + layers.Reshape((1, 1))(t)
    for n in range(1, depth + 1):
        tokens = layers.Dense(width, "tanh", name=names.format(n), **options)(tokens)
    return keras.Model([x, t], layers.Dense(CHANNELS)(tokens))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """Returns (prediction, features), as its author likes it."""

    def __init__(self, depth=DEPTH, **options):
        super().__init__(**options)
        self.depth = depth
        self.embed = layers.Dense(WIDTH)
        self.head = layers.Dense(CHANNELS)
        self.labels = layers.Embedding(11, WIDTH)
        self.blocks = [layers.Dense(WIDTH, "tanh") for _ in range(depth)]

    def build(self, shapes):
        self.embed.build(shapes[0])
        tokens = (*shapes[0][:-1], WIDTH)
        for layer in (*self.blocks, self.head):
            layer.build(tokens)
        self.labels.build(shapes[2])

    def call(self, inputs, training=False):
        x, t, y = inputs
        x = self.embed(x) + (self.labels(y) + t[:, None])[:, None]
        features = []
        for block in self.blocks:
            x = x + block(x)
            features.append(x)
        return self.head(x), features

    def get_config(self):
        return {"depth": self.depth}


def subclassed(kind=Subclassed, **options):
    """A subclassed backbone that is built; `kind` is a class with another behaviour."""
    model = kind(**options)
    model.build([(None, TOKENS, CHANNELS), (None,), (None,)])
    return model
