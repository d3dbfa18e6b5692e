"""Small transformers as JAX users have them, and one as a plain function of arrays."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

DEPTH, WIDTH, CHANNELS = 6, 16, 4

# The model of dit_models.DiT with its names and layout; `xp` is jax.numpy, or numpy for the oracle.


def make_params(seed=0, depth=DEPTH, width=WIDTH, channels=CHANNELS, dtype="float32"):
    """Parameters as NumPy arrays, by torch's names."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x_embedder": (width, channels),
        "t_embedder.0": (width, 2),
        "t_embedder.2": (width, width),
    }
    for i in range(depth):
        block = {"qkv": 3, "proj": 1, "mlp.0": 4, "modulation": 2}
        shapes |= {f"blocks.{i}.{name}": (factor * width, width) for name, factor in block.items()}
        shapes[f"blocks.{i}.mlp.2"] = (width, 4 * width)
    shapes["final_layer"] = (channels, width)
    params = {
        f"{name}.weight": rng.normal(size=shape) / np.sqrt(shape[1])
        for name, shape in shapes.items()
    }
    params |= {f"{name}.bias": 0.1 * rng.normal(size=shape[0]) for name, shape in shapes.items()}
    params["y_embedder.embedding_table.weight"] = rng.normal(size=(11, width))
    return {name: value.astype(dtype) for name, value in params.items()}


def moved(params, by=0.01):
    """Parameters of a student that has moved away from its teacher."""

    def move(leaf):
        wave = np.sin(np.arange(leaf.size, dtype=leaf.dtype))
        return jnp.asarray(np.asarray(leaf) + by * wave.reshape(leaf.shape), leaf.dtype)

    return jax.tree.map(move, params)


def forward(params, x, t, y, xp=jnp):
    """The prediction, and the tokens [B, N, D] after each block."""

    def linear(name, inputs):
        return inputs @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def silu(inputs):
        return inputs / (1 + xp.exp(-inputs))

    def norm(inputs):
        centred = inputs - inputs.mean(-1, keepdims=True)
        return centred / xp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    def softmax(scores):
        weights = xp.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def attention(name, inputs):
        heads = linear(f"{name}.qkv", inputs).reshape(*inputs.shape[:2], 3, 2, -1)
        q, k, v = xp.moveaxis(heads, (2, 3), (0, 2))  # each [B, 2, N, d]
        mixed = softmax(q @ xp.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5) @ v
        return linear(f"{name}.proj", xp.swapaxes(mixed, 1, 2).reshape(inputs.shape))

    waves = xp.stack([xp.cos(t), xp.sin(t)], -1)
    time = linear("t_embedder.2", silu(linear("t_embedder.0", waves)))
    condition = time + params["y_embedder.embedding_table.weight"][y]
    x = linear("x_embedder", x)
    depth = sum(name.endswith("qkv.bias") for name in params)
    features = []
    for i in range(depth):
        modulation = linear(f"blocks.{i}.modulation", condition)[:, None]
        shift, scale = xp.split(modulation, 2, axis=-1)
        x = x + attention(f"blocks.{i}", norm(x) * (1 + scale) + shift)
        x = x + linear(f"blocks.{i}.mlp.2", _gelu(linear(f"blocks.{i}.mlp.0", norm(x)), xp))
        features.append(x)
    return linear("final_layer", x), features


def _gelu(x, xp):
    if xp is jnp:
        return jax.nn.gelu(x, approximate=False)
    from scipy.special import erf

    return x * (1 + erf(x / np.sqrt(2))) / 2


def make_batch(size=4, tokens=5, channels=CHANNELS, seed=0):
    """x0, noise, t, y for the models here."""
    rng = np.random.default_rng(seed)
    x0, noise = (rng.normal(size=(size, tokens, channels)).astype("float32") for _ in range(2))
    t = rng.random(size, "float32")
    y = rng.integers(0, 10, size)
    return tuple(jnp.asarray(part) for part in (x0, noise, t, y))


# The same in three libraries. Each takes x [B, N, C], t [B], y [B]; none of them knows of SRA.


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(jnp.tanh(self.linear(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(CHANNELS, WIDTH, rngs=rngs)
        self.labels = nnx.Embed(11, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])
        self.head = nnx.Linear(WIDTH, CHANNELS, rngs=rngs)

    def __call__(self, x, t, y):
        x = self.embed(x) + (self.labels(y) + t[:, None])[:, None]
        for i, block in enumerate(self.blocks):
            x = block(x)
            # for the test of sow; capture needs no such line
            self.sow(nnx.Intermediate, f"tokens_{i}", x)
        return self.head(x)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(nn.Dense(WIDTH)(x))


class LinenModel(nn.Module):
    depth: int = DEPTH

    @nn.compact
    def __call__(self, x, t, y):
        x = nn.Dense(WIDTH)(x) + (nn.Embed(11, WIDTH)(y) + t[:, None])[:, None]
        for i in range(self.depth):
            x = LinenBlock(name=f"block_{i}")(x)
            self.sow("intermediates", f"tokens_{i}", x)
        return nn.Dense(CHANNELS)(x)


class LinenScanBody(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = LinenBlock(name="block")(x)
        return x, x


class LinenScannedModel(nn.Module):
    """Blocks under nn.scan: parameters with the depth as their first axis.

    Returns the prediction and all blocks' outputs [L, B, N, D].
    """

    depth: int = DEPTH

    @nn.compact
    def __call__(self, x, t, y):
        x = nn.Dense(WIDTH)(x) + (nn.Embed(11, WIDTH)(y) + t[:, None])[:, None]
        body = nn.scan(
            LinenScanBody,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, features = body(name="blocks")(x, None)
        return nn.Dense(CHANNELS)(x), features


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Linear
    labels: eqx.nn.Embedding
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, DEPTH + 3)
        self.embed = eqx.nn.Linear(CHANNELS, WIDTH, key=keys[0])
        self.labels = eqx.nn.Embedding(11, WIDTH, key=keys[1])
        self.blocks = [eqx.nn.MLP(WIDTH, WIDTH, WIDTH, depth=1, key=k) for k in keys[3:]]
        self.head = eqx.nn.Linear(WIDTH, CHANNELS, key=keys[2])

    def __call__(self, x, t, y):
        def each_token(layer, tokens):
            return jax.vmap(jax.vmap(layer))(tokens)

        x = each_token(self.embed, x) + (jax.vmap(self.labels)(y) + t[:, None])[:, None]
        features = []
        for block in self.blocks:
            x = x + each_token(block, x)
            features.append(x)
        return each_token(self.head, x), features


class EquinoxBlock(eqx.Module):
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.linear = eqx.nn.Linear(WIDTH, WIDTH, key=key)

    def __call__(self, x):
        return x + jnp.tanh(jax.vmap(self.linear)(x))


class EquinoxListed(eqx.Module):
    """Of one sample [N, C]: what jax.vmap maps over a batch. Its blocks are checkpointed."""

    embed: eqx.nn.Linear
    blocks: list

    def __init__(self, key):
        self.embed = eqx.nn.Linear(CHANNELS, WIDTH, key=key)
        self.blocks = [EquinoxBlock(each) for each in jax.random.split(key, DEPTH)]

    def __call__(self, x, t, y):
        x = jax.vmap(self.embed)(x) + t
        for block in self.blocks:
            x = eqx.filter_checkpoint(block)(x)
        return x
