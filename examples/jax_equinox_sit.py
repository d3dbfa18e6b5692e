"""A small SiT trained with Self-Representation Alignment (SRA) in Equinox: model, training, sampling in one file.

    python examples/jax_equinox_sit.py                                scikit-learn's digits, a few minutes on a laptop's CPU
    python examples/jax_equinox_sit.py --data fashion-mnist           28x28 clothes
    python examples/jax_equinox_sit.py --data FOLDER --image-size 32  your own images, one subfolder per class
    python examples/jax_equinox_sit.py --no-sra                       the same run without SRA: same weights, batches and noise
    python examples/jax_equinox_sit.py --resume                       continue from the last checkpoint, bit for bit

What SRA adds to the training is marked with "# SRA"; all the rest is a flow-matching transformer as usual. The model is written
for one image and mapped over the batch. Its blocks are stacked and scanned over, as in large models: features come out where
the scan is cut. Images, command line and progress bar are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Ma et al., "SiT", 2024, arXiv 2401.08740.
"""

import argparse
import functools
import json
from pathlib import Path

import common
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import selfalign
from selfalign.adapters import jax as sra

# ---------------------------------------------------------------------------------------------------------------- the model

xavier, zeros = jax.nn.initializers.xavier_uniform(), jax.nn.initializers.zeros
norm = functools.partial(eqx.nn.LayerNorm, eps=1e-6, use_weight=False, use_bias=False)


def linear(inputs: int, outputs: int, key: jax.Array, initial: jax.nn.initializers.Initializer = xavier) -> eqx.nn.Linear:
    layer, weight = eqx.nn.Linear(inputs, outputs, key=key), initial(key, (outputs, inputs))
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (weight, jnp.zeros(outputs)))


def waves(position: jax.Array, width: int) -> jax.Array:  # [...] -> [..., width]
    """Cosines and sines of a number, from fast to slow: how times and positions enter a transformer."""
    angles = position[..., None] * 10_000.0 ** -jnp.linspace(0, 1, width // 2, endpoint=False)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(eqx.Module):
    """A transformer block that the condition shifts, scales and gates (adaLN-Zero): the identity at the start."""

    heads: int = eqx.field(static=True)  # no leaf: all leaves are arrays, so that blocks can be stacked and scanned over
    norm1: eqx.nn.LayerNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    modulation: eqx.nn.Linear

    def __init__(self, width: int, heads: int, key: jax.Array) -> None:
        keys = jax.random.split(key, 5)
        self.heads = heads
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = linear(width, 3 * width, keys[0]), linear(width, width, keys[1])
        self.up, self.down = linear(width, 4 * width, keys[2]), linear(4 * width, width, keys[3])
        self.modulation = linear(width, 6 * width, keys[4], zeros)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:  # [N, D], [D] -> [N, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(jax.nn.silu(condition)), 6)  # [D] each
        x = x + gate1 * self.attention(jax.vmap(self.norm1)(x) * (1 + scale1) + shift1)
        return x + gate2 * jax.vmap(self.mlp)(jax.vmap(self.norm2)(x) * (1 + scale2) + shift2)

    def attention(self, x: jax.Array) -> jax.Array:  # [N, D] -> [N, D]
        q, k, v = jnp.moveaxis(jax.vmap(self.qkv)(x).reshape(len(x), 3, self.heads, -1), 1, 0)  # [N, heads, D / heads] each
        return jax.vmap(self.out)(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))

    def mlp(self, token: jax.Array) -> jax.Array:  # [D] -> [D]
        return self.down(jax.nn.gelu(self.up(token)))


def scan(blocks: Block, tokens: jax.Array, condition: jax.Array) -> jax.Array:  # [N, D], [D] -> [N, D]
    """Run stacked blocks one after the other: one block is compiled, however many there are."""
    return jax.lax.scan(lambda tokens, block: (block(tokens, condition), None), tokens, blocks)[0]


class SiT(eqx.Module):
    """A scalable interpolant transformer: the velocity of one noisy image, given its time and its class."""

    patch: int = eqx.field(static=True)
    side: int = eqx.field(static=True)
    width: int = eqx.field(static=True)
    null_class: int = eqx.field(static=True)  # one class more: "none", for guidance
    patch_embedder: eqx.nn.Linear
    time_embedder: tuple[eqx.nn.Linear, eqx.nn.Linear]
    class_embedder: eqx.nn.Embedding
    blocks: Block  # all of them: each leaf has the depth as its first axis
    norm: eqx.nn.LayerNorm
    modulation: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int, key: jax.Array):
        keys = jax.random.split(key, 7)
        self.patch, self.side, self.width, self.null_class = patch, size // patch, width, classes
        self.patch_embedder = linear(channels * patch**2, width, keys[0])
        self.time_embedder = linear(width, width, keys[1]), linear(width, width, keys[2])
        self.class_embedder = eqx.nn.Embedding(weight=0.02 * jax.random.normal(keys[3], (classes + 1, width)))
        self.blocks = eqx.filter_vmap(lambda key: Block(width, heads, key))(jax.random.split(keys[4], depth))
        self.norm = norm(width)
        self.modulation = linear(width, 2 * width, keys[5], zeros)
        self.head = linear(width, channels * patch**2, keys[6], zeros)

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:  # [H, W, C], [], [] -> [H, W, C]
        tokens, condition = self.embed(x, t, y)
        return self.read_out(scan(self.blocks, tokens, condition), condition)

    def embed(self, x: jax.Array, t: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:  # -> [N, D], [D]
        x = x.reshape(self.side, self.patch, self.side, self.patch, -1).swapaxes(1, 2)
        patches = x.reshape(self.side**2, -1)  # [N, patch * patch * C]
        row, column = jnp.divmod(jnp.arange(self.side**2), self.side)
        positions = jnp.concatenate([waves(row, self.width // 2), waves(column, self.width // 2)], axis=-1)  # [N, D]
        first, second = self.time_embedder
        time = second(jax.nn.silu(first(waves(1000 * t, self.width))))  # [D]
        return jax.vmap(self.patch_embedder)(patches) + positions, time + self.class_embedder(y)

    def read_out(self, tokens: jax.Array, condition: jax.Array) -> jax.Array:  # [N, D], [D] -> [H, W, C]
        shift, scale = jnp.split(self.modulation(jax.nn.silu(condition)), 2)  # [D] each
        patches = jax.vmap(self.head)(jax.vmap(self.norm)(tokens) * (1 + scale) + shift)  # [N, patch * patch * C]
        x = patches.reshape(self.side, self.side, self.patch, self.patch, -1).swapaxes(1, 2)
        return x.reshape(self.side * self.patch, self.side * self.patch, -1)


# ------------------------------------------------------------------------------------------------------------- the training

PATH = selfalign.paths.Linear()  # x_t = (1 - t) x0 + t noise: t = 0 is data, t = 1 is noise

# Of a scan, only the end is seen: XLA can neither hand out what is carried on the way nor drop the blocks after a layer. So the
# student's is cut in two at its layer, to the same result and without storing all layers, and the teacher's ends at its layer.


def student_forward(layer: int, model: SiT, x: jax.Array, t: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:  # SRA
    """What `jax.vmap(model)` returns [B, H, W, C], and the tokens [B, N, D] after block `layer`, counted from 1."""
    blocks, later_blocks = sra.split_blocks(model.blocks, layer)

    def forward(x: jax.Array, t: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens, condition = model.embed(x, t, y)
        tapped = scan(blocks, tokens, condition)  # [N, D]
        return model.read_out(scan(later_blocks, tapped, condition), condition), tapped

    return jax.vmap(forward)(x, t, y)


def teacher_forward(layer: int, model: SiT, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:  # SRA
    """The tokens [B, N, D] after block `layer`: no later block runs, and no head."""
    blocks, _ = sra.split_blocks(model.blocks, layer)
    return jax.vmap(lambda *inputs: scan(blocks, *model.embed(*inputs)))(x, t, y)


Trained = tuple[SiT, dict[str, jax.Array]]  # the model and the projector


@eqx.filter_jit(donate="all")  # each argument is replaced by a result, or made anew for each step
def training_step(
    trained: Trained,
    optimizer_state: optax.OptState,
    teacher: sra.Teacher,
    x0: jax.Array,
    y: jax.Array,
    key: jax.Array,
    optimizer: optax.GradientTransformation,
    loss: selfalign.SRALoss,
    label_dropout: float,
    aligned: bool,
) -> tuple[Trained, optax.OptState, sra.Teacher, tuple[jax.Array, jax.Array]]:
    """One optimizer step: the new `trained`, `optimizer_state` and `teacher`, and both losses."""
    label_key, noise_key, time_key, gap_key = jax.random.split(key, 4)
    dropped = jax.random.bernoulli(label_key, label_dropout, y.shape)  # [B]
    y = jnp.where(dropped, trained[0].null_class, y)  # outside the model: student and teacher see the same labels
    noise = jax.random.normal(noise_key, x0.shape)  # [B, H, W, C]
    t = jax.random.uniform(time_key, y.shape)  # [B]
    student_layer, teacher_layer = loss.layers(len(trained[0].blocks.qkv.weight))  # SRA

    def objective(trained: Trained) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        model, projector = trained
        prediction, tokens = student_forward(student_layer, model, PATH.add_noise(x0, noise, t), t, y)  # SRA
        denoising = jnp.mean((prediction - PATH.velocity(x0, noise, t)) ** 2)
        if not aligned:
            return denoising, (denoising, jnp.zeros(()))
        target = functools.partial(teacher_forward, teacher_layer)  # SRA
        alignment = sra.align(loss, target, teacher, model, projector, tokens, x0, noise, t, y, key=gap_key)  # SRA
        return denoising + alignment, (denoising, alignment)

    gradients, losses = eqx.filter_grad(objective, has_aux=True)(trained)
    arrays = eqx.filter(trained, eqx.is_inexact_array)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, arrays)
    trained = eqx.apply_updates(trained, updates)
    return trained, optimizer_state, sra.update_teacher(loss, teacher, trained[0]), losses  # SRA


class Run(common.Run):
    """The model with its projector, the optimizer, and the EMA teacher."""

    suffix = ".eqx"

    def __init__(self, data: common.Data, settings: argparse.Namespace) -> None:
        super().__init__(data, settings)
        key = jax.random.key(settings.seed)
        model = eqx.filter_jit(SiT)(**common.shape(data, settings), key=key)  # one program, not hundreds of small ones
        self.trained = model, sra.init_projector(key, settings.width)  # SRA: its stream of draws is its own
        self.optimizer = optax.adamw(settings.lr, weight_decay=0.0)
        self.optimizer_state = self.optimizer.init(eqx.filter(self.trained, eqx.is_inexact_array))
        self.teacher = sra.init_teacher(model)  # SRA, and without it the EMA that is sampled from
        self.loss = selfalign.SRALoss(
            student_layer=settings.student_layer, teacher_layer=settings.teacher_layer, path=PATH, max_gap=settings.max_gap,
            weight=settings.weight, decay=selfalign.schedules.DecayWarmup(settings.decay))  # SRA  # fmt: skip

    def training_step(self) -> tuple[jax.Array, jax.Array]:
        chosen = self.chosen()
        key = jax.random.fold_in(jax.random.key(self.settings.seed + 1), self.step)  # all of this step's draws
        self.trained, self.optimizer_state, self.teacher, losses = training_step(
            self.trained, self.optimizer_state, self.teacher, self.data.images[chosen], self.data.labels[chosen], key,
            self.optimizer, self.loss, self.settings.label_dropout, self.settings.sra)  # fmt: skip
        self.step += 1
        return losses

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        x = sample(self.teacher.average, jnp.asarray(noise), jnp.asarray(labels), self.settings.sampling_steps,
                   self.settings.guidance)  # fmt: skip
        return np.asarray(x)

    def write(self, file: Path) -> None:
        with file.open("wb") as stream:
            stream.write(json.dumps({"step": self.step, "settings": self.fixed()}).encode() + b"\n")
            eqx.tree_serialise_leaves(stream, (self.trained, self.optimizer_state, self.teacher))

    def read(self, file: Path) -> None:
        like = self.trained, self.optimizer_state, self.teacher
        with file.open("rb") as stream:
            saved = json.loads(stream.readline())
            self.check_fixed(saved["settings"])
            self.trained, self.optimizer_state, self.teacher = eqx.tree_deserialise_leaves(stream, like)
        self.step = saved["step"]


# ------------------------------------------------------------------------------------------------------------- the sampling


@eqx.filter_jit
def sample(model: SiT, noise: jax.Array, y: jax.Array, steps: int = 25, guidance: float = 1.0) -> jax.Array:
    """Images [B, H, W, C] of the classes y [B]: the velocity's ODE by Heun's method, from noise (t = 1) to data (t = 0)."""

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, len(x))
        conditional = jax.vmap(model)(x, t, y)
        if guidance == 1.0:
            return conditional
        free = jax.vmap(model)(x, t, jnp.full_like(y, model.null_class))
        return free + guidance * (conditional - free)

    def heun(x: jax.Array, times: jax.Array) -> tuple[jax.Array, None]:
        t, later = times
        slope = velocity(x, t)
        corrected = velocity(x + (later - t) * slope, later)
        return x + (later - t) * (slope + corrected) / 2, None

    times = jnp.linspace(1.0, 0.0, steps + 1)
    return jax.lax.scan(heun, noise, jnp.stack([times[:-1], times[1:]], axis=1))[0]


if __name__ == "__main__":
    common.main(common.command_line(__doc__, "jax_equinox_sit"), Run)
