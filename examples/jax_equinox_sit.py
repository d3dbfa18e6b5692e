"""A small SiT trained with Self-Representation Alignment (SRA) in Equinox, all in one file.

    python examples/jax_equinox_sit.py                         scikit-learn's digits, on a CPU
    python examples/jax_equinox_sit.py --data fashion-mnist    28x28 clothes
    python examples/jax_equinox_sit.py --data FOLDER           your images, one subfolder per class
    python examples/jax_equinox_sit.py --no-sra                same weights, batches and noise
    python examples/jax_equinox_sit.py --resume                from the last checkpoint, bit for bit

Model, training, checkpoints and sampling are here, from top to bottom. What SRA adds is marked with
"# SRA"; all the rest is a flow-matching transformer as usual. The model is written for one image
and mapped over the batch. Its blocks are stacked and scanned over, as in large models. It knows
nothing of SRA. Data, command line, progress bar and picture are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can
Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831; Ma et al., "SiT", 2024,
arXiv 2401.08740.
"""

import argparse
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import common
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import selfalign
from selfalign.adapters import jax as sra

# --------------------------------------------------------------------------------------------------
# The model

xavier = jax.nn.initializers.xavier_uniform()
zeros = jax.nn.initializers.zeros
norm = functools.partial(eqx.nn.LayerNorm, eps=1e-6, use_weight=False, use_bias=False)


def linear(
    inputs: int, outputs: int, key: jax.Array, initial: jax.nn.initializers.Initializer = xavier
) -> eqx.nn.Linear:
    layer = eqx.nn.Linear(inputs, outputs, key=key)
    weight = initial(key, (outputs, inputs))
    return eqx.tree_at(lambda each: (each.weight, each.bias), layer, (weight, jnp.zeros(outputs)))


def waves(position: jax.Array, width: int) -> jax.Array:
    """Cosines and sines of a number, from fast to slow: [...] -> [..., width]."""
    slowness = jnp.linspace(0, 1, width // 2, endpoint=False)
    angles = position[..., None] * 10_000.0**-slowness
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(eqx.Module):
    """A transformer block that the condition shifts, scales and gates (adaLN-Zero).

    All its leaves are arrays, so that blocks can be stacked and scanned over.
    """

    heads: int = eqx.field(static=True)
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
        self.norm1 = norm(width)
        self.norm2 = norm(width)
        self.qkv = linear(width, 3 * width, keys[0])
        self.out = linear(width, width, keys[1])
        self.up = linear(width, 4 * width, keys[2])
        self.down = linear(4 * width, width, keys[3])
        self.modulation = linear(width, 6 * width, keys[4], zeros)  # at first the identity

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:  # [N, D], [D] -> [N, D]
        modulation = self.modulation(jax.nn.silu(condition))  # [6 D]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6)  # [D] each
        x = x + gate1 * self.attention(jax.vmap(self.norm1)(x) * (1 + scale1) + shift1)
        return x + gate2 * jax.vmap(self.mlp)(jax.vmap(self.norm2)(x) * (1 + scale2) + shift2)

    def attention(self, x: jax.Array) -> jax.Array:  # [N, D] -> [N, D]
        qkv = jax.vmap(self.qkv)(x).reshape(len(x), 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 1, 0)  # [N, heads, D / heads] each
        return jax.vmap(self.out)(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))

    def mlp(self, token: jax.Array) -> jax.Array:  # [D] -> [D]
        return self.down(jax.nn.gelu(self.up(token)))


def scan(blocks: Block, tokens: jax.Array, condition: jax.Array) -> jax.Array:
    """Run stacked blocks one after the other: only one is compiled. [N, D], [D] -> [N, D]."""

    def run(tokens: jax.Array, block: Block) -> tuple[jax.Array, None]:
        return block(tokens, condition), None

    return jax.lax.scan(run, tokens, blocks)[0]


class SiT(eqx.Module):
    """A scalable interpolant transformer: the velocity of one noisy image at a time, of a class."""

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

    def __init__(
        self,
        size: int,
        channels: int,
        classes: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        key: jax.Array,
    ) -> None:
        keys = jax.random.split(key, 7)
        self.patch = patch
        self.side = size // patch
        self.width = width
        self.null_class = classes
        self.patch_embedder = linear(channels * patch**2, width, keys[0])
        self.time_embedder = (linear(width, width, keys[1]), linear(width, width, keys[2]))
        embeddings = 0.02 * jax.random.normal(keys[3], (classes + 1, width))
        self.class_embedder = eqx.nn.Embedding(weight=embeddings)
        stacked = eqx.filter_vmap(lambda key: Block(width, heads, key))
        self.blocks = stacked(jax.random.split(keys[4], depth))
        self.norm = norm(width)
        self.modulation = linear(width, 2 * width, keys[5], zeros)
        self.head = linear(width, channels * patch**2, keys[6], zeros)

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:  # [H, W, C], [], []
        tokens, condition = self.embed(x, t, y)
        return self.read_out(scan(self.blocks, tokens, condition), condition)  # [H, W, C]

    def embed(self, x: jax.Array, t: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [N, D] and condition [D]."""
        grid = x.reshape(self.side, self.patch, self.side, self.patch, -1).swapaxes(1, 2)
        patches = grid.reshape(self.side**2, -1)  # [N, patch * patch * C]
        row, column = jnp.divmod(jnp.arange(self.side**2), self.side)
        half = self.width // 2
        positions = jnp.concatenate([waves(row, half), waves(column, half)], axis=-1)  # [N, D]
        first, second = self.time_embedder
        time = second(jax.nn.silu(first(waves(1000 * t, self.width))))  # [D]
        return jax.vmap(self.patch_embedder)(patches) + positions, time + self.class_embedder(y)

    def read_out(self, tokens: jax.Array, condition: jax.Array) -> jax.Array:
        """[N, D], [D] -> [H, W, C]."""
        shift, scale = jnp.split(self.modulation(jax.nn.silu(condition)), 2)  # [D] each
        patches = jax.vmap(self.head)(jax.vmap(self.norm)(tokens) * (1 + scale) + shift)
        grid = patches.reshape(self.side, self.side, self.patch, self.patch, -1).swapaxes(1, 2)
        return grid.reshape(self.side * self.patch, self.side * self.patch, -1)


# --------------------------------------------------------------------------------------------------
# The training

PATH = selfalign.paths.Linear()  # x_t = (1 - t) x0 + t noise: t = 0 is data, t = 1 is noise
Trained = tuple[SiT, dict[str, jax.Array]]  # the model and the projector
Losses = tuple[jax.Array, jax.Array]  # the denoising loss, and SRA's term


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
) -> tuple[Trained, optax.OptState, sra.Teacher, Losses]:
    """One optimizer step: the new `trained`, `optimizer_state` and `teacher`, and both losses."""
    label_key, noise_key, time_key, gap_key = jax.random.split(key, 4)
    dropped = jax.random.bernoulli(label_key, label_dropout, y.shape)  # [B]
    y = jnp.where(dropped, trained[0].null_class, y)  # here: both sides see the same labels
    noise = jax.random.normal(noise_key, x0.shape)  # [B, H, W, C]
    t = jax.random.uniform(time_key, y.shape)  # [B]
    x = PATH.add_noise(x0, noise, t)  # [B, H, W, C]
    student, apply = sra.tap_equinox(loss, "blocks", call=jax.vmap)  # SRA

    def objective(trained: Trained) -> tuple[jax.Array, Losses]:
        model, projector = trained
        prediction, tokens = student(model, x, t, y)  # SRA
        denoising = jnp.mean((prediction - PATH.velocity(x0, noise, t)) ** 2)
        if not aligned:
            return denoising, (denoising, jnp.zeros(()))
        sides = (teacher, model, projector, tokens)  # SRA
        alignment = sra.align(loss, apply, *sides, x0, noise, t, y, key=gap_key)  # SRA
        return denoising + alignment, (denoising, alignment)

    gradients, losses = eqx.filter_grad(objective, has_aux=True)(trained)
    arrays = eqx.filter(trained, eqx.is_inexact_array)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, arrays)
    trained = eqx.apply_updates(trained, updates)
    teacher = sra.update_teacher(loss, teacher, trained[0])  # SRA
    return trained, optimizer_state, teacher, losses


class Run:
    """The parts of a training: the model with its projector, the optimizer and the EMA."""

    def __init__(self, data: common.Images, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.step = 0
        self.data = data
        key = jax.random.key(settings.seed)
        make = eqx.filter_jit(SiT)  # one program, not hundreds of small ones
        model = make(**common.model_sizes(data, settings), key=key)
        projector = sra.init_projector(key, settings.width)  # SRA: its stream of draws is its own
        self.trained: Trained = (model, projector)
        self.optimizer = optax.adamw(settings.lr, weight_decay=0.0)
        arrays = eqx.filter(self.trained, eqx.is_inexact_array)
        self.optimizer_state = self.optimizer.init(arrays)
        self.teacher = sra.init_teacher(model)  # SRA; without it, the EMA that is sampled from
        self.loss = selfalign.SRALoss(  # SRA
            student_layer=settings.student_layer,
            teacher_layer=settings.teacher_layer,
            path=PATH,
            max_gap=settings.max_gap,
            weight=settings.weight,
            decay=selfalign.schedules.DecayWarmup(settings.decay),
        )

    def save(self, file: Path) -> None:
        """A line of JSON, then the arrays."""
        run = {"step": self.step, "settings": common.fixed_settings(self.settings)}
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:
            stream.write(json.dumps(run).encode() + b"\n")
            state = (self.trained, self.optimizer_state, self.teacher)
            eqx.tree_serialise_leaves(stream, state)
        os.replace(partial, file)  # at once: whatever happens, `file` is a whole checkpoint

    def load(self, file: Path) -> None:
        common.check_exists(file)
        with file.open("rb") as stream:
            run = json.loads(stream.readline())
            common.check_settings(run["settings"], common.fixed_settings(self.settings))
            state = (self.trained, self.optimizer_state, self.teacher)
            state = eqx.tree_deserialise_leaves(stream, state)
        self.trained, self.optimizer_state, self.teacher = state
        self.step = run["step"]


def train(run: Run, checkpoint: Path | None = None) -> Iterator[Losses]:
    """Train from `run.step` to the last step. Yields the losses of each step, to be shown."""
    settings = run.settings
    for step in range(run.step, settings.steps):
        indices = common.batch_indices(len(run.data.images), step, settings)
        key = jax.random.key(settings.seed + 1)
        run.trained, run.optimizer_state, run.teacher, losses = training_step(
            run.trained,
            run.optimizer_state,
            run.teacher,
            run.data.images[indices],  # [B, H, W, C]
            run.data.labels[indices],  # [B]
            jax.random.fold_in(key, step),  # all of this step's draws
            run.optimizer,
            run.loss,
            settings.label_dropout,
            settings.sra,
        )

        run.step = step + 1
        if checkpoint and run.step % settings.save_every == 0:
            run.save(checkpoint)
        yield losses


# --------------------------------------------------------------------------------------------------
# The sampling


@eqx.filter_jit
def sample(
    model: SiT, noise: jax.Array, y: jax.Array, steps: int = 25, guidance: float = 1.0
) -> jax.Array:
    """Images [B, H, W, C] of the classes y [B]: the velocity's ODE, by Heun's method."""

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

    times = jnp.linspace(1.0, 0.0, steps + 1)  # from noise to data
    x, _ = jax.lax.scan(heun, noise, jnp.stack([times[:-1], times[1:]], axis=1))
    return x


def main(settings: argparse.Namespace) -> None:
    """Load the data, train or go on training, and draw samples."""
    checkpoint = settings.out / "checkpoint.eqx"
    picture = settings.out / "samples.png"
    with common.errors_as_sentences():
        data = common.load_data(settings)
        run = Run(data, settings)
        if settings.resume:
            run.load(checkpoint)
    settings.out.mkdir(parents=True, exist_ok=True)

    with common.Progress(settings, run.step) as progress:
        for denoising, alignment in train(run, checkpoint):
            progress.show(run.step, denoising, alignment)
            if progress.interrupted:
                break
        run.save(checkpoint)
    if progress.interrupted:
        raise SystemExit(f"Stopped at step {run.step}; the same command with --resume continues.")

    noise, y = map(jnp.asarray, common.sampling_inputs(data))
    x = sample(run.teacher.average, noise, y, settings.sampling_steps, settings.guidance)
    common.draw_samples(np.asarray(x), data.classes, picture)
    print(f"Checkpoint: {checkpoint}\nSamples:    {picture}")


PARSER = common.command_line(__doc__, "jax_equinox_sit")

if __name__ == "__main__":
    main(common.parse(PARSER))
