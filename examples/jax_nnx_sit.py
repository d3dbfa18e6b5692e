"""A small SiT trained with Self-Representation Alignment (SRA) in Flax NNX: model, training, sampling in one file.

    python examples/jax_nnx_sit.py                                  scikit-learn's digits, a few minutes on a laptop's CPU
    python examples/jax_nnx_sit.py --data fashion-mnist             28x28 clothes
    python examples/jax_nnx_sit.py --data FOLDER --image-size 32    your own images, one subfolder per class
    python examples/jax_nnx_sit.py --no-sra                         the same run without SRA: same weights, batches and noise
    python examples/jax_nnx_sit.py --resume                         continue from the last checkpoint, bit for bit

What SRA adds to the training is marked with "# SRA"; all the rest is a flow-matching transformer as usual. The model knows
nothing of SRA: `nnx.capture` records what its blocks return. Images, command line and progress bar are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Ma et al., "SiT", 2024, arXiv 2401.08740.
"""

import argparse
import functools
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import selfalign
from selfalign.adapters import jax as sra

# ---------------------------------------------------------------------------------------------------------------- the model

linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.xavier_uniform())
zero = functools.partial(nnx.Linear, kernel_init=nnx.initializers.zeros)
norm = functools.partial(nnx.LayerNorm, use_bias=False, use_scale=False)


def waves(position: jax.Array, width: int) -> jax.Array:  # [...] -> [..., width]
    """Cosines and sines of a number, from fast to slow: how times and positions enter a transformer."""
    angles = position[..., None] * 10_000.0 ** -jnp.linspace(0, 1, width // 2, endpoint=False)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(nnx.Module):
    """A transformer block that the condition shifts, scales and gates (adaLN-Zero): the identity at the start."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1, self.norm2 = norm(width, rngs=rngs), norm(width, rngs=rngs)
        self.qkv, self.out = linear(width, 3 * width, rngs=rngs), linear(width, width, rngs=rngs)
        self.mlp = nnx.Sequential(linear(width, 4 * width, rngs=rngs), nnx.gelu, linear(4 * width, width, rngs=rngs))
        self.modulation = zero(width, 6 * width, rngs=rngs)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:  # [B, N, D], [B, D] -> [B, N, D]
        modulation = self.modulation(nnx.silu(condition))[:, None]  # [B, 1, 6 D]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)  # [B, 1, D] each
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attention(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)  # [B, N, heads, D / heads] each
        return self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class SiT(nnx.Module):
    """A scalable interpolant transformer: the velocity of a noisy image, given its time and its class."""

    def __init__(self, size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int, rngs: nnx.Rngs):
        self.patch, self.side, self.width, self.null_class = patch, size // patch, width, classes  # one class more: "none"
        self.patch_embedder = linear(channels * patch**2, width, rngs=rngs)
        self.time_embedder = nnx.Sequential(linear(width, width, rngs=rngs), nnx.silu, linear(width, width, rngs=rngs))
        self.class_embedder = nnx.Embed(classes + 1, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.blocks = nnx.List(Block(width, heads, rngs) for _ in range(depth))
        self.norm = norm(width, rngs=rngs)
        self.modulation = zero(width, 2 * width, rngs=rngs)
        self.head = zero(width, channels * patch**2, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:  # [B, H, W, C], [B], [B] -> [B, H, W, C]
        condition = self.time_embedder(waves(1000 * t, self.width)) + self.class_embedder(y)  # [B, D]
        tokens = self.patch_embedder(self.patches(x)) + self.positions()  # [B, N, D]
        for block in self.blocks:
            tokens = block(tokens, condition)  # [B, N, D]
        shift, scale = jnp.split(self.modulation(nnx.silu(condition))[:, None], 2, axis=-1)  # [B, 1, D] each
        return self.image(self.head(self.norm(tokens) * (1 + scale) + shift))  # [B, H, W, C]

    def patches(self, x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, N, patch * patch * C]
        x = x.reshape(len(x), self.side, self.patch, self.side, self.patch, -1).swapaxes(2, 3)
        return x.reshape(len(x), self.side**2, -1)

    def image(self, patches: jax.Array) -> jax.Array:  # [B, N, patch * patch * C] -> [B, H, W, C]
        x = patches.reshape(len(patches), self.side, self.side, self.patch, self.patch, -1).swapaxes(2, 3)
        return x.reshape(len(patches), self.side * self.patch, self.side * self.patch, -1)

    def positions(self) -> jax.Array:  # [N, D]
        row, column = jnp.divmod(jnp.arange(self.side**2), self.side)
        return jnp.concatenate([waves(row, self.width // 2), waves(column, self.width // 2)], axis=-1)


# ------------------------------------------------------------------------------------------------------------- the training

PATH = selfalign.paths.Linear()  # x_t = (1 - t) x0 + t noise: t = 0 is data, t = 1 is noise


def captured(model: SiT, *inputs: jax.Array) -> tuple[jax.Array, nnx.State]:  # SRA
    """The model's prediction, and what its modules returned on the way."""
    return nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(*inputs)


def block_output(captures: nnx.State, layer: int) -> jax.Array:  # SRA
    """The tokens [B, N, D] after block `layer`, counted from 1."""
    return sra.tap(captures, f"blocks/{layer - 1}/__call__")


@functools.partial(nnx.jit, static_argnames=("loss", "label_dropout", "aligned"))
def training_step(
    trained: nnx.Dict,
    optimizer: nnx.Optimizer,
    teacher: sra.Teacher,
    x0: jax.Array,
    y: jax.Array,
    key: jax.Array,
    loss: selfalign.SRALoss,
    label_dropout: float,
    aligned: bool,
) -> tuple[sra.Teacher, tuple[jax.Array, jax.Array]]:
    """One optimizer step: moves `trained` and `optimizer`, returns the new teacher and both losses."""
    label_key, noise_key, time_key, gap_key = jax.random.split(key, 4)
    dropped = jax.random.bernoulli(label_key, label_dropout, y.shape)  # [B]
    y = jnp.where(dropped, trained.model.null_class, y)  # outside the model: student and teacher see the same labels
    noise = jax.random.normal(noise_key, x0.shape)  # [B, H, W, C]
    t = jax.random.uniform(time_key, y.shape)  # [B]
    student_layer, teacher_layer = loss.layers(len(trained.model.blocks))

    def target(model: SiT, *inputs: jax.Array) -> jax.Array:  # SRA: of the teacher, XLA drops all that comes after
        return block_output(captured(model, *inputs)[1], teacher_layer)

    def objective(trained: nnx.Dict) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        prediction, captures = captured(trained.model, PATH.add_noise(x0, noise, t), t, y)
        denoising = jnp.mean((prediction - PATH.velocity(x0, noise, t)) ** 2)
        if not aligned:
            return denoising, (denoising, jnp.zeros(()))
        alignment = sra.align(loss, target, teacher, trained.model, trained.projector, block_output(captures, student_layer),
                              x0, noise, t, y, key=gap_key)  # SRA  # fmt: skip
        return denoising + alignment, (denoising, alignment)

    gradients, losses = nnx.grad(objective, has_aux=True)(trained)
    optimizer.update(trained, gradients)
    return sra.update_teacher(loss, teacher, trained.model), losses  # SRA


class Run(common.Run):
    """The model with its projector, the optimizer, and the EMA teacher."""

    def __init__(self, data: common.Data, settings: argparse.Namespace) -> None:
        super().__init__(data, settings)
        model = SiT(**common.shape(data, settings), rngs=nnx.Rngs(settings.seed))
        projector = sra.init_projector(jax.random.key(settings.seed), settings.width)  # SRA
        self.trained = nnx.Dict(model=model, projector=nnx.Dict({name: nnx.Param(p) for name, p in projector.items()}))
        self.optimizer = nnx.Optimizer(self.trained, optax.adamw(settings.lr, weight_decay=0.0), wrt=nnx.Param)
        self.teacher = sra.init_teacher(model)  # SRA, and without it the EMA that is sampled from
        self.loss = selfalign.SRALoss(
            student_layer=settings.student_layer, teacher_layer=settings.teacher_layer, path=PATH, max_gap=settings.max_gap,
            weight=settings.weight, decay=selfalign.schedules.DecayWarmup(settings.decay))  # SRA  # fmt: skip

    def training_step(self) -> tuple[jax.Array, jax.Array]:
        chosen = self.chosen()
        key = jax.random.fold_in(jax.random.key(self.settings.seed + 1), self.step)  # all of this step's draws
        self.teacher, losses = training_step(
            self.trained, self.optimizer, self.teacher, self.data.images[chosen], self.data.labels[chosen], key,
            self.loss, self.settings.label_dropout, self.settings.sra)  # fmt: skip
        self.step += 1
        return losses

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        x = sample(self.teacher.average, jnp.asarray(noise), jnp.asarray(labels), self.settings.sampling_steps,
                   self.settings.guidance)  # fmt: skip
        return np.asarray(x)

    def _state(self) -> dict[str, object]:
        return {"trained": nnx.state(self.trained), "optimizer": nnx.state(self.optimizer),
                "teacher": self.teacher._replace(average=nnx.state(self.teacher.average))}  # fmt: skip

    def save(self, file: Path) -> None:  # orbax writes a folder, at once
        state = ocp.args.StandardSave(self._state())
        parts = ocp.args.Composite(state=state, run=ocp.args.JsonSave({"step": self.step, "settings": self.fixed()}))
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(file.absolute(), parts, force=True)

    def read(self, file: Path) -> None:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            run = checkpointer.restore(file.absolute(), ocp.args.Composite(run=ocp.args.JsonRestore())).run
            self.check_fixed(run["settings"])
            state = ocp.args.StandardRestore(self._state())
            state = checkpointer.restore(file.absolute(), ocp.args.Composite(state=state)).state
        for part, value in ((self.trained, "trained"), (self.optimizer, "optimizer"), (self.teacher.average, "teacher")):
            nnx.update(part, state[value].average if value == "teacher" else state[value])
        self.teacher = self.teacher._replace(step=state["teacher"].step)
        self.step = run["step"]


# ------------------------------------------------------------------------------------------------------------- the sampling


@functools.partial(nnx.jit, static_argnames=("steps", "guidance"))
def sample(model: SiT, noise: jax.Array, y: jax.Array, steps: int = 25, guidance: float = 1.0) -> jax.Array:
    """Images [B, H, W, C] of the classes y [B]: the velocity's ODE by Heun's method, from noise (t = 1) to data (t = 0)."""

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, len(x))
        conditional = model(x, t, y)
        if guidance == 1.0:
            return conditional
        free = model(x, t, jnp.full_like(y, model.null_class))
        return free + guidance * (conditional - free)

    def heun(x: jax.Array, times: jax.Array) -> tuple[jax.Array, None]:
        t, later = times
        slope = velocity(x, t)
        corrected = velocity(x + (later - t) * slope, later)
        return x + (later - t) * (slope + corrected) / 2, None

    times = jnp.linspace(1.0, 0.0, steps + 1)
    return jax.lax.scan(heun, noise, jnp.stack([times[:-1], times[1:]], axis=1))[0]


if __name__ == "__main__":
    common.main(common.command_line(__doc__, "jax_nnx_sit"), Run)
