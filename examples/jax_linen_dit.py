"""A small DiT trained with Self-Representation Alignment (SRA) in Flax Linen, all in one file.

    python examples/jax_linen_dit.py                         scikit-learn's digits, on a CPU
    python examples/jax_linen_dit.py --data fashion-mnist    28x28 clothes
    python examples/jax_linen_dit.py --data FOLDER           your images, one subfolder per class
    python examples/jax_linen_dit.py --no-sra                same weights, batches and noise
    python examples/jax_linen_dit.py --resume                from the last checkpoint, bit for bit

Model, diffusion, training, checkpoints and sampling are here, from top to bottom. What SRA adds is
marked with "# SRA"; all the rest is DiT as usual: 1000 steps of noise, of which the model predicts
the noise and the variance of the way back. The model knows nothing of SRA. A training step is a
function from one state to the next. Data, command line, progress bar and picture are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can
Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831; Peebles and Xie, "DiT",
2022, arXiv 2212.09748; Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models",
2021, arXiv 2102.09672.
"""

import argparse
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import serialization

import selfalign
from selfalign.adapters import jax as sra

# --------------------------------------------------------------------------------------------------
# The model

linear = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
zero = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
norm = functools.partial(nn.LayerNorm, use_bias=False, use_scale=False)


def waves(position: jax.Array, width: int) -> jax.Array:
    """Cosines and sines of a number, from fast to slow: [...] -> [..., width]."""
    slowness = jnp.linspace(0, 1, width // 2, endpoint=False)
    angles = position[..., None] * 10_000.0**-slowness
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(nn.Module):
    """A transformer block that the condition shifts, scales and gates (adaLN-Zero)."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        # zero at first: a block begins as the identity
        modulation = zero(6 * self.width, name="modulation")(nn.silu(condition))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        x = x + gate1 * self.attention(norm()(x) * (1 + scale1) + shift1)  # [B, N, D]
        return x + gate2 * self.mlp(norm()(x) * (1 + scale2) + shift2)

    def attention(self, x: jax.Array) -> jax.Array:
        qkv = linear(3 * self.width, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 2, 0)  # [B, N, heads, D / heads] each
        attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return linear(self.width, name="out")(attended)

    def mlp(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(linear(4 * self.width, name="mlp_in")(x))  # [B, N, 4 D]
        return linear(self.width, name="mlp_out")(hidden)


class DiT(nn.Module):
    """A diffusion transformer: the noise in a noisy image, and the variance of the way back.

    The variance comes as a place between its bounds.
    """

    size: int
    channels: int
    classes: int
    patch: int
    width: int
    depth: int
    heads: int

    @property
    def null_class(self) -> int:
        return self.classes  # one class more: "none", for guidance

    @property
    def side(self) -> int:
        return self.size // self.patch

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        small = nn.initializers.normal(0.02)
        hidden = nn.silu(linear(self.width, name="time_in")(waves(t, self.width)))
        time = linear(self.width, name="time_out")(hidden)  # [B, D]
        embedder = nn.Embed(
            self.classes + 1, self.width, embedding_init=small, name="class_embedder"
        )
        condition = time + embedder(y)  # [B, D]
        tokens = linear(self.width, name="patch_embedder")(self.patches(x))
        tokens = tokens + self.positions()  # [B, N, D]
        for layer in range(1, self.depth + 1):
            block = Block(self.width, self.heads, name=f"block_{layer}")
            tokens = block(tokens, condition)  # [B, N, D]
        modulation = zero(2 * self.width, name="modulation")(nn.silu(condition))[:, None]
        shift, scale = jnp.split(modulation, 2, axis=-1)  # [B, 1, D] each
        head = zero(2 * self.channels * self.patch**2, name="head")
        return self.image(head(norm()(tokens) * (1 + scale) + shift))  # [B, H, W, 2 C]

    def patches(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, N, patch * patch * C]."""
        grid = x.reshape(len(x), self.side, self.patch, self.side, self.patch, -1)
        return grid.swapaxes(2, 3).reshape(len(x), self.side**2, -1)

    def image(self, patches: jax.Array) -> jax.Array:
        """[B, N, patch * patch * 2 C] -> [B, H, W, 2 C]."""
        count = len(patches)
        grid = patches.reshape(count, self.side, self.side, self.patch, self.patch, -1)
        return grid.swapaxes(2, 3).reshape(count, self.size, self.size, -1)

    def positions(self) -> jax.Array:  # [N, D]
        row, column = jnp.divmod(jnp.arange(self.side**2), self.side)
        half = self.width // 2
        return jnp.concatenate([waves(row, half), waves(column, half)], axis=-1)


# --------------------------------------------------------------------------------------------------
# The diffusion

PATH = selfalign.paths.Discrete()  # x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, t = 0 ... 999


class Chain:
    """Steps of noise, 0 the cleanest, and the way back, q(x_(t-1) | x_t, x0), which is normal.

    All follows from abar [T]. The tables are made in float64, since 1 - abar is a difference of
    near equals at step 0.
    """

    def __init__(self, abar: np.ndarray) -> None:
        before = np.append(1.0, abar[:-1])  # abar, one step nearer to the data
        beta = 1 - abar / before
        variance = beta * (1 - before) / (1 - abar)
        # at step 0 it is 0, x0 being given, and 0 has no logarithm
        variance[0] = variance[1] if len(abar) > 1 else beta[0]
        self.alpha = np.sqrt(abar)
        self.sigma = np.sqrt(1 - abar)
        self.of_x0 = np.sqrt(before) * beta / (1 - abar)
        self.of_x = np.sqrt(1 - beta) * (1 - before) / (1 - abar)
        self.lowest = np.log(variance)  # the best variance lies between these two
        self.highest = np.log(beta)

    def data(self, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """The x0 that `noise` leaves of x_t."""
        return (x - at(self.sigma, t) * noise) / at(self.alpha, t)

    def mean(self, x0: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """The mean of q(x_(t-1) | x_t, x0)."""
        return at(self.of_x0, t) * x0 + at(self.of_x, t) * x

    def log_variance(self, v: jax.Array, t: jax.Array) -> jax.Array:
        """The model's own, from its v: -1 is the lower bound, 1 the upper."""
        return at(self.lowest, t) + (v + 1) / 2 * at(self.highest - self.lowest, t)


def at(table: np.ndarray, t: jax.Array) -> jax.Array:
    """The table's values at steps: [T], [B] -> [B, 1, 1, 1]."""
    return jnp.asarray(table, "float32")[t][..., None, None, None]


CHAIN = Chain(np.asarray(PATH.alphas_cumprod))


def hybrid_loss(
    output: jax.Array, x0: jax.Array, x: jax.Array, noise: jax.Array, t: jax.Array
) -> jax.Array:
    """L_simple, which trains the mean, plus L_vlb, which trains the variance only."""
    predicted, v = jnp.split(output, 2, axis=-1)  # [B, H, W, C] each
    simple = jnp.mean((predicted - noise) ** 2)
    x0_predicted = CHAIN.data(x, jax.lax.stop_gradient(predicted), t)
    mean = CHAIN.mean(x0_predicted, x, t)
    log_variance = CHAIN.log_variance(v, t)
    lowest = at(CHAIN.lowest, t)
    error = (CHAIN.mean(x0, x, t) - mean) ** 2
    ratios = jnp.exp(lowest - log_variance) + error * jnp.exp(-log_variance)
    divergence = (ratios - 1 + log_variance - lowest) / 2
    last_step = t[:, None, None, None] == 0
    nats = jnp.where(last_step, surprise(x0, mean, log_variance), divergence)  # [B, H, W, C]
    bits = jnp.mean(nats) / math.log(2)
    # L_vlb is the sum over all steps, of which one was drawn; its weight is 0.001
    return simple + bits * PATH.span / 1000


def surprise(x0: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """The last step's loss: -log of the probability of all that is x0 when rounded to 8 bits."""

    def below(x: jax.Array) -> jax.Array:
        return jax.scipy.special.ndtr((x - mean) * jnp.exp(-log_variance / 2))

    half = 1 / 255
    upper = jnp.where(x0 > 0.999, 1.0, below(x0 + half))  # white and black have open ends
    lower = jnp.where(x0 < -0.999, 0.0, below(x0 - half))
    return -jnp.log(jnp.maximum(upper - lower, 1e-12))


# --------------------------------------------------------------------------------------------------
# The training

Params = dict[str, Any]  # arrays by name, in dicts
Losses = tuple[jax.Array, jax.Array]  # the denoising loss, and SRA's term


class State(NamedTuple):
    """What a training step turns into the next: a pytree."""

    trained: Params  # "model" and "projector"
    optimizer: optax.OptState
    teacher: sra.Teacher  # SRA; without it, the EMA that is sampled from


STATIC = ("model", "optimizer", "loss", "label_dropout", "aligned")


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnums=0)
def training_step(
    state: State,
    x0: jax.Array,
    y: jax.Array,
    key: jax.Array,
    *,
    model: DiT,
    optimizer: optax.GradientTransformation,
    loss: selfalign.SRALoss,
    label_dropout: float,
    aligned: bool,
) -> tuple[State, Losses]:
    """One optimizer step: the next state, in the old one's memory."""
    label_key, noise_key, time_key, gap_key = jax.random.split(key, 4)
    dropped = jax.random.bernoulli(label_key, label_dropout, y.shape)  # [B]
    y = jnp.where(dropped, model.null_class, y)  # here: student and teacher see the same labels
    noise = jax.random.normal(noise_key, x0.shape)  # [B, H, W, C]
    t = jax.random.randint(time_key, y.shape, 0, PATH.span)  # [B]
    x = PATH.add_noise(x0, noise, t)  # [B, H, W, C]
    student, apply = sra.tap_linen(loss, model, "block_{}")  # SRA

    def objective(trained: Params) -> tuple[jax.Array, Losses]:
        params = trained["model"]
        output, tokens = student(params, x, t, y)  # SRA
        denoising = hybrid_loss(output, x0, x, noise, t)
        if not aligned:
            return denoising, (denoising, jnp.zeros(()))
        sides = (state.teacher, params, trained["projector"], tokens)  # SRA
        alignment = sra.align(loss, apply, *sides, x0, noise, t, y, key=gap_key)  # SRA
        return denoising + alignment, (denoising, alignment)

    gradients, losses = jax.grad(objective, has_aux=True)(state.trained)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    teacher = sra.update_teacher(loss, state.teacher, trained["model"])  # SRA
    return State(trained, optimizer_state, teacher), losses


class Run:
    """The state of a training, and what a step needs besides it."""

    def __init__(self, data: common.Images, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.step = 0
        self.data = data
        self.model = DiT(**common.model_sizes(data, settings))
        key = jax.random.key(settings.seed)
        inputs = (data.images[:1], jnp.zeros(1, "int32"), data.labels[:1])
        params = jax.jit(self.model.init)(key, *inputs)["params"]
        projector = sra.init_projector(key, settings.width)  # SRA
        trained = {"model": params, "projector": projector}
        self.optimizer = optax.adamw(settings.lr, weight_decay=0.0)
        self.state = State(trained, self.optimizer.init(trained), sra.init_teacher(params))
        self.loss = selfalign.SRALoss(  # SRA
            student_layer=settings.student_layer,
            teacher_layer=settings.teacher_layer,
            path=PATH,
            max_gap=settings.max_gap,
            weight=settings.weight,
            decay=selfalign.schedules.DecayWarmup(settings.decay),
        )

    def save(self, file: Path) -> None:
        settings = common.fixed_settings(self.settings)
        saved = {"state": self.state, "step": self.step, "settings": settings}
        partial = file.with_suffix(".partial")
        partial.write_bytes(serialization.to_bytes(saved))
        os.replace(partial, file)  # at once: whatever happens, `file` is a whole checkpoint

    def load(self, file: Path) -> None:
        common.check_exists(file)
        saved = serialization.msgpack_restore(file.read_bytes())
        common.check_settings(saved["settings"], common.fixed_settings(self.settings))
        state = serialization.from_state_dict(self.state, saved["state"])
        self.state = jax.tree.map(jnp.array, state)
        self.step = saved["step"]


def train(run: Run, checkpoint: Path | None = None) -> Iterator[Losses]:
    """Train from `run.step` to the last step. Yields the losses of each step, to be shown."""
    settings = run.settings
    seed_key = jax.random.key(settings.seed + 1)
    for step in range(run.step, settings.steps):
        indices = common.batch_indices(len(run.data.images), step, settings)
        run.state, losses = training_step(
            run.state,
            run.data.images[indices],  # [B, H, W, C]
            run.data.labels[indices],  # [B]
            jax.random.fold_in(seed_key, step),  # all of this step's draws
            model=run.model,
            optimizer=run.optimizer,
            loss=run.loss,
            label_dropout=settings.label_dropout,
            aligned=settings.sra,
        )

        run.step = step + 1
        if checkpoint and run.step % settings.save_every == 0:
            run.save(checkpoint)
        yield losses


# --------------------------------------------------------------------------------------------------
# The sampling


@functools.partial(jax.jit, static_argnames=("model", "steps", "guidance"))
def sample(
    model: DiT,
    params: Params,
    noise: jax.Array,
    y: jax.Array,
    steps: int = 25,
    guidance: float = 1.0,
) -> jax.Array:
    """Images [B, H, W, C] of the classes y [B]: DDPM, with `steps` of the steps, evenly spaced."""
    kept = np.linspace(PATH.noise_at, PATH.clean_at, steps).round().astype("int32")
    kept = np.unique(kept)  # [steps], 0 ... 999
    chain = Chain(np.asarray(PATH.alphas_cumprod)[kept])  # the same noise in fewer, larger steps

    def predict(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The noise and v: [B, H, W, C] each."""
        times = jnp.broadcast_to(t, len(x))
        output = model.apply({"params": params}, x, times, y)
        predicted, v = jnp.split(output, 2, axis=-1)
        if guidance != 1.0:
            no_class = jnp.full_like(y, model.null_class)
            free = model.apply({"params": params}, x, times, no_class)
            free, _ = jnp.split(free, 2, axis=-1)
            predicted = free + guidance * (predicted - free)
        return predicted, v

    def back(x: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        step, t, key = now  # the step's number among those kept, and among all
        predicted, v = predict(x, t)
        x0 = jnp.clip(chain.data(x, predicted, step), -1, 1)
        mean = chain.mean(x0, x, step)
        fresh = jnp.where(step > 0, jax.random.normal(key, x.shape), 0.0)  # none in the last step
        return mean + jnp.exp(chain.log_variance(v, step) / 2) * fresh, None

    keys = jax.random.split(jax.random.key(0), len(kept))  # the same pictures from the same model
    numbered = (jnp.arange(len(kept)), jnp.asarray(kept), keys)
    x, _ = jax.lax.scan(back, noise, numbered, reverse=True)
    return x


def main(settings: argparse.Namespace) -> None:
    """Load the data, train or go on training, and draw samples."""
    checkpoint = settings.out / "checkpoint.msgpack"
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
    params = sra.teacher_params(run.state.teacher, run.state.trained["model"])
    x = sample(run.model, params, noise, y, settings.sampling_steps, settings.guidance)
    common.draw_samples(np.asarray(x), data.classes, picture)
    print(f"Checkpoint: {checkpoint}\nSamples:    {picture}")


PARSER = common.command_line(__doc__, "jax_linen_dit", teacher_layer=0.57)
# classes are told apart at high noise, where L_simple is small: at 1e-3 that is learned late
PARSER.set_defaults(lr=2e-3)

if __name__ == "__main__":
    main(common.parse(PARSER))
