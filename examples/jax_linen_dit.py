"""A small DiT trained with Self-Representation Alignment (SRA) in Flax Linen: model, diffusion, training, sampling in one file.

    python examples/jax_linen_dit.py                                  scikit-learn's digits, a few minutes on a laptop's CPU
    python examples/jax_linen_dit.py --data fashion-mnist             28x28 clothes
    python examples/jax_linen_dit.py --data FOLDER --image-size 32    your own images, one subfolder per class
    python examples/jax_linen_dit.py --no-sra                         the same run without SRA: same weights, batches and noise
    python examples/jax_linen_dit.py --resume                         continue from the last checkpoint, bit for bit

What SRA adds to the training is marked with "# SRA"; all the rest is DiT as usual: 1000 steps of noise, of which the model
predicts the noise and the variance of the way back. The model knows nothing of SRA: Linen's `capture_intermediates` records
what its blocks return. Nothing here has state but `Run`: a training step is a function from one state to the next. Images,
command line and progress bar are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Peebles and Xie, "DiT", 2022, arXiv 2212.09748; Nichol and Dhariwal, "Improved
Denoising Diffusion Probabilistic Models", 2021, arXiv 2102.09672.
"""

import argparse
import functools
import math
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

# ---------------------------------------------------------------------------------------------------------------- the model

linear = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
zero = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
norm = functools.partial(nn.LayerNorm, use_bias=False, use_scale=False)


def waves(position: jax.Array, width: int) -> jax.Array:  # [...] -> [..., width]
    """Cosines and sines of a number, from fast to slow: how times and positions enter a transformer."""
    angles = position[..., None] * 10_000.0 ** -jnp.linspace(0, 1, width // 2, endpoint=False)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(nn.Module):
    """A transformer block that the condition shifts, scales and gates (adaLN-Zero): the identity at the start."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:  # [B, N, D], [B, D] -> [B, N, D]
        modulation = zero(6 * self.width, name="modulation")(nn.silu(condition))[:, None]  # [B, 1, 6 D]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)  # [B, 1, D] each
        qkv = linear(3 * self.width, name="qkv")(norm()(x) * (1 + scale1) + shift1)  # [B, N, 3 D]
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)  # [B, N, heads, D / heads] each
        x = x + gate1 * linear(self.width, name="out")(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        hidden = nn.gelu(linear(4 * self.width, name="mlp_in")(norm()(x) * (1 + scale2) + shift2))  # [B, N, 4 D]
        return x + gate2 * linear(self.width, name="mlp_out")(hidden)


class DiT(nn.Module):
    """A diffusion transformer: the noise in a noisy image, and where between its bounds the variance of the way back lies."""

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

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:  # [B, H, W, C], [B], [B] -> [B, H, W, 2 C]
        time = linear(self.width, name="time_out")(nn.silu(linear(self.width, name="time_in")(waves(t, self.width))))
        classes = nn.Embed(self.classes + 1, self.width, embedding_init=nn.initializers.normal(0.02), name="class_embedder")
        condition = time + classes(y)  # [B, D]
        tokens = linear(self.width, name="patch_embedder")(self.patches(x)) + self.positions()  # [B, N, D]
        for layer in range(1, self.depth + 1):
            tokens = Block(self.width, self.heads, name=f"block_{layer}")(tokens, condition)  # [B, N, D]
        shift, scale = jnp.split(zero(2 * self.width, name="modulation")(nn.silu(condition))[:, None], 2, axis=-1)
        return self.image(zero(2 * self.channels * self.patch**2, name="head")(norm()(tokens) * (1 + scale) + shift))

    def patches(self, x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, N, patch * patch * C]
        side = self.size // self.patch
        x = x.reshape(len(x), side, self.patch, side, self.patch, -1).swapaxes(2, 3)
        return x.reshape(len(x), side**2, -1)

    def image(self, patches: jax.Array) -> jax.Array:  # [B, N, patch * patch * 2 C] -> [B, H, W, 2 C]
        side = self.size // self.patch
        x = patches.reshape(len(patches), side, side, self.patch, self.patch, -1).swapaxes(2, 3)
        return x.reshape(len(patches), self.size, self.size, -1)

    def positions(self) -> jax.Array:  # [N, D]
        row, column = jnp.divmod(jnp.arange((self.size // self.patch) ** 2), self.size // self.patch)
        return jnp.concatenate([waves(row, self.width // 2), waves(column, self.width // 2)], axis=-1)


# ------------------------------------------------------------------------------------------------------------ the diffusion

PATH = selfalign.paths.Discrete()  # x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, t = 0 ... 999: 0 is (nearly) data


class Chain:
    """Steps of noise, 0 the cleanest, and the way back, q(x_(t-1) | x_t, x0), which is normal. All follows from abar [T]."""

    def __init__(self, abar: np.ndarray) -> None:  # tables in float64: 1 - abar is a difference of near equals at step 0
        before = np.append(1.0, abar[:-1])  # abar, one step nearer to the data
        beta = 1 - abar / before
        variance = beta * (1 - before) / (1 - abar)
        variance[0] = variance[1] if len(abar) > 1 else beta[0]  # it is 0, x0 being given, and 0 has no logarithm
        self.alpha, self.sigma = np.sqrt(abar), np.sqrt(1 - abar)
        self.of_x0, self.of_x = np.sqrt(before) * beta / (1 - abar), np.sqrt(1 - beta) * (1 - before) / (1 - abar)
        self.lowest, self.highest = np.log(variance), np.log(beta)  # the best variance lies between

    def data(self, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """The x0 that `noise` leaves of x_t."""
        return (x - at(self.sigma, t) * noise) / at(self.alpha, t)

    def mean(self, x0: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """The mean of q(x_(t-1) | x_t, x0)."""
        return at(self.of_x0, t) * x0 + at(self.of_x, t) * x

    def log_variance(self, v: jax.Array, t: jax.Array) -> jax.Array:
        """The model's own, from its v: -1 is the lower bound, 1 the upper."""
        return at(self.lowest, t) + (v + 1) / 2 * at(self.highest - self.lowest, t)


def at(table: np.ndarray, t: jax.Array) -> jax.Array:  # [T], [B] -> [B, 1, 1, 1]
    return jnp.asarray(table, "float32")[t][..., None, None, None]


CHAIN = Chain(np.asarray(PATH.alphas_cumprod))


def hybrid_loss(output: jax.Array, x0: jax.Array, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """L_simple, which trains the mean, plus L_vlb, which trains the variance only."""
    predicted, v = jnp.split(output, 2, axis=-1)  # [B, H, W, C] each
    simple = jnp.mean((predicted - noise) ** 2)
    mean = CHAIN.mean(CHAIN.data(x, jax.lax.stop_gradient(predicted), t), x, t)
    log_variance, least = CHAIN.log_variance(v, t), at(CHAIN.lowest, t)
    error = (CHAIN.mean(x0, x, t) - mean) ** 2
    divergence = (jnp.exp(least - log_variance) + error * jnp.exp(-log_variance) - 1 + log_variance - least) / 2
    nats = jnp.where(t[:, None, None, None] == 0, surprise(x0, mean, log_variance), divergence)  # [B, H, W, C]
    bits = jnp.mean(nats) / math.log(2)
    return simple + bits * PATH.span / 1000  # L_vlb is the sum over all steps, of which one was drawn; its weight is 0.001


def surprise(x0: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """The last step's loss: -log of the probability of all that is x0 when rounded to 8 bits."""
    upper, lower = (jax.scipy.special.ndtr((x0 - mean + half) * jnp.exp(-log_variance / 2)) for half in (1 / 255, -1 / 255))
    upper, lower = jnp.where(x0 > 0.999, 1.0, upper), jnp.where(x0 < -0.999, 0.0, lower)  # white and black have open ends
    return -jnp.log(jnp.maximum(upper - lower, 1e-12))


# ------------------------------------------------------------------------------------------------------------- the training


class State(NamedTuple):
    """What a training step turns into the next: a pytree."""

    trained: dict[str, Any]  # "model" and "projector"
    optimizer: optax.OptState
    teacher: sra.Teacher  # SRA, and without it the EMA that is sampled from


def captured(model: DiT, params: Any, *inputs: jax.Array) -> tuple[jax.Array, Any]:  # SRA
    """The model's prediction, and what its blocks returned on the way."""
    blocks = lambda module, method: isinstance(module, Block) and method == "__call__"  # noqa: E731
    output, kept = model.apply({"params": params}, *inputs, capture_intermediates=blocks, mutable=["intermediates"])
    return output, kept["intermediates"]


def block_output(captures: Any, layer: int) -> jax.Array:  # SRA
    """The tokens [B, N, D] after block `layer`, counted from 1."""
    return sra.tap(captures, f"block_{layer}/__call__")


@functools.partial(jax.jit, static_argnames=("model", "optimizer", "loss", "label_dropout", "aligned"), donate_argnums=0)
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
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """One optimizer step: the next state, in the old one's memory, and both losses."""
    label_key, noise_key, time_key, gap_key = jax.random.split(key, 4)
    dropped = jax.random.bernoulli(label_key, label_dropout, y.shape)  # [B]
    y = jnp.where(dropped, model.null_class, y)  # outside the model: student and teacher see the same labels
    noise = jax.random.normal(noise_key, x0.shape)  # [B, H, W, C]
    t = jax.random.randint(time_key, y.shape, 0, PATH.span)  # [B]
    x = PATH.add_noise(x0, noise, t)  # [B, H, W, C]
    student_layer, teacher_layer = loss.layers(model.depth)

    def target(params: Any, *inputs: jax.Array) -> jax.Array:  # SRA: of the teacher, XLA drops all that comes after
        return block_output(captured(model, params, *inputs)[1], teacher_layer)

    def objective(trained: dict[str, Any]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        output, captures = captured(model, trained["model"], x, t, y)
        denoising = hybrid_loss(output, x0, x, noise, t)
        if not aligned:
            return denoising, (denoising, jnp.zeros(()))
        alignment = sra.align(loss, target, state.teacher, trained["model"], trained["projector"],
                              block_output(captures, student_layer), x0, noise, t, y, key=gap_key)  # SRA  # fmt: skip
        return denoising + alignment, (denoising, alignment)

    gradients, losses = jax.grad(objective, has_aux=True)(state.trained)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    return State(trained, optimizer_state, sra.update_teacher(loss, state.teacher, trained["model"])), losses  # SRA


class Run(common.Run):
    """The state, and what a training step needs besides it."""

    suffix = ".msgpack"

    def __init__(self, data: common.Data, settings: argparse.Namespace) -> None:
        super().__init__(data, settings)
        self.model = DiT(**common.shape(data, settings))
        key = jax.random.key(settings.seed)
        params = jax.jit(self.model.init)(key, data.images[:1], jnp.zeros(1, "int32"), data.labels[:1])["params"]
        trained = {"model": params, "projector": sra.init_projector(key, settings.width)}  # SRA
        self.optimizer = optax.adamw(settings.lr, weight_decay=0.0)
        self.state = State(trained, self.optimizer.init(trained), sra.init_teacher(params))
        self.loss = selfalign.SRALoss(
            student_layer=settings.student_layer, teacher_layer=settings.teacher_layer, path=PATH, max_gap=settings.max_gap,
            weight=settings.weight, decay=selfalign.schedules.DecayWarmup(settings.decay))  # SRA  # fmt: skip

    def training_step(self) -> tuple[jax.Array, jax.Array]:
        chosen = self.chosen()
        key = jax.random.fold_in(jax.random.key(self.settings.seed + 1), self.step)  # all of this step's draws
        self.state, losses = training_step(
            self.state, self.data.images[chosen], self.data.labels[chosen], key, model=self.model, optimizer=self.optimizer,
            loss=self.loss, label_dropout=self.settings.label_dropout, aligned=self.settings.sra)  # fmt: skip
        self.step += 1
        return losses

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        params = sra.teacher_params(self.state.teacher, self.state.trained["model"])
        x = sample(self.model, params, jnp.asarray(noise), jnp.asarray(labels), self.settings.sampling_steps,
                   self.settings.guidance)  # fmt: skip
        return np.asarray(x)

    def write(self, file: Path) -> None:
        file.write_bytes(serialization.to_bytes({"state": self.state, "step": self.step, "settings": self.fixed()}))

    def read(self, file: Path) -> None:
        saved = serialization.msgpack_restore(file.read_bytes())
        self.check_fixed(saved["settings"])
        self.state = jax.tree.map(jnp.array, serialization.from_state_dict(self.state, saved["state"]))
        self.step = saved["step"]


# ------------------------------------------------------------------------------------------------------------- the sampling


@functools.partial(jax.jit, static_argnames=("model", "steps", "guidance"))
def sample(model: DiT, params: Any, noise: jax.Array, y: jax.Array, steps: int = 25, guidance: float = 1.0) -> jax.Array:
    """Images [B, H, W, C] of the classes y [B]: back from noise to data with `steps` of the steps, evenly spaced (DDPM)."""
    kept = np.unique(np.linspace(PATH.noise_at, PATH.clean_at, steps).round().astype("int32"))  # [steps], 0 ... 999
    chain = Chain(np.asarray(PATH.alphas_cumprod)[kept])  # the same noise in fewer steps: larger betas

    def back(x: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        step, t, key = now  # the step's number among those kept, and among all, as the model knows it
        inputs = x, jnp.broadcast_to(t, len(x))
        predicted, v = jnp.split(model.apply({"params": params}, *inputs, y), 2, axis=-1)  # [B, H, W, C] each
        if guidance != 1.0:
            free, _ = jnp.split(model.apply({"params": params}, *inputs, jnp.full_like(y, model.null_class)), 2, axis=-1)
            predicted = free + guidance * (predicted - free)
        x0 = jnp.clip(chain.data(x, predicted, step), -1, 1)
        fresh = jnp.where(step > 0, jax.random.normal(key, x.shape), 0.0)  # the last step is the mean alone
        return chain.mean(x0, x, step) + jnp.exp(chain.log_variance(v, step) / 2) * fresh, None

    keys = jax.random.split(jax.random.key(0), len(kept))  # the same pictures from the same model
    return jax.lax.scan(back, noise, (jnp.arange(len(kept)), jnp.asarray(kept), keys), reverse=True)[0]


PARSER = common.command_line(__doc__, "jax_linen_dit", teacher_layer=0.57)
PARSER.set_defaults(lr=2e-3)  # classes are told apart at high noise, where L_simple is small: at 1e-3 that is learned late

if __name__ == "__main__":
    common.main(PARSER, Run)
