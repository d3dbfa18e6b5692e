"""A small SiT trained with Self-Representation Alignment (SRA) in Flax NNX, all in one file.

    python examples/jax_nnx_sit.py                         scikit-learn's digits, minutes on a CPU
    python examples/jax_nnx_sit.py --data fashion-mnist    28x28 clothes
    python examples/jax_nnx_sit.py --data FOLDER           your images, one subfolder per class
    python examples/jax_nnx_sit.py --no-sra                without SRA: same weights, batches, noise
    python examples/jax_nnx_sit.py --resume                from the last checkpoint, bit for bit

Model, training, checkpoints and sampling are here, from top to bottom. What SRA adds is marked with
"# SRA"; all the rest is a flow-matching transformer as usual. The model knows nothing of SRA. Data,
command line, progress bar and picture are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can
Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831; Ma et al., "SiT", 2024,
arXiv 2401.08740.
"""

import argparse
import functools
from collections.abc import Iterator
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

# --------------------------------------------------------------------------------------------------
# The model

linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.xavier_uniform())
zero = functools.partial(nnx.Linear, kernel_init=nnx.initializers.zeros)
norm = functools.partial(nnx.LayerNorm, use_bias=False, use_scale=False)


def waves(position: jax.Array, width: int) -> jax.Array:
    """Cosines and sines of a number, from fast to slow: [...] -> [..., width]."""
    slowness = jnp.linspace(0, 1, width // 2, endpoint=False)
    angles = position[..., None] * 10_000.0**-slowness
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(nnx.Module):
    """A transformer block that the condition shifts, scales and gates (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1 = norm(width, rngs=rngs)
        self.norm2 = norm(width, rngs=rngs)
        self.qkv = linear(width, 3 * width, rngs=rngs)
        self.out = linear(width, width, rngs=rngs)
        self.mlp = nnx.Sequential(
            linear(width, 4 * width, rngs=rngs), nnx.gelu, linear(4 * width, width, rngs=rngs)
        )
        self.modulation = zero(width, 6 * width, rngs=rngs)  # a block begins as the identity

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        modulation = self.modulation(nnx.silu(condition))[:, None]  # [B, 1, 6 D]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)  # [B, N, D]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attention(self, x: jax.Array) -> jax.Array:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 2, 0)  # [B, N, heads, D / heads] each
        return self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class SiT(nnx.Module):
    """A scalable interpolant transformer: the velocity of a noisy image at a time, of a class."""

    def __init__(
        self,
        size: int,
        channels: int,
        classes: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.patch = patch
        self.side = size // patch
        self.width = width
        self.null_class = classes  # one class more: "none", for guidance
        self.patch_embedder = linear(channels * patch**2, width, rngs=rngs)
        self.time_embedder = nnx.Sequential(
            linear(width, width, rngs=rngs), nnx.silu, linear(width, width, rngs=rngs)
        )
        small = nnx.initializers.normal(0.02)
        self.class_embedder = nnx.Embed(classes + 1, width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List(Block(width, heads, rngs) for _ in range(depth))
        self.norm = norm(width, rngs=rngs)
        self.modulation = zero(width, 2 * width, rngs=rngs)
        self.head = zero(width, channels * patch**2, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        time = self.time_embedder(waves(1000 * t, self.width))  # [B, D]
        condition = time + self.class_embedder(y)  # [B, D]
        tokens = self.patch_embedder(self.patches(x)) + self.positions()  # [B, N, D]
        for block in self.blocks:
            tokens = block(tokens, condition)  # [B, N, D]
        modulation = self.modulation(nnx.silu(condition))[:, None]
        shift, scale = jnp.split(modulation, 2, axis=-1)  # [B, 1, D] each
        return self.image(self.head(self.norm(tokens) * (1 + scale) + shift))  # [B, H, W, C]

    def patches(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, N, patch * patch * C]."""
        grid = x.reshape(len(x), self.side, self.patch, self.side, self.patch, -1)
        return grid.swapaxes(2, 3).reshape(len(x), self.side**2, -1)

    def image(self, patches: jax.Array) -> jax.Array:
        """[B, N, patch * patch * C] -> [B, H, W, C]."""
        count = len(patches)
        size = self.side * self.patch
        grid = patches.reshape(count, self.side, self.side, self.patch, self.patch, -1)
        return grid.swapaxes(2, 3).reshape(count, size, size, -1)

    def positions(self) -> jax.Array:  # [N, D]
        row, column = jnp.divmod(jnp.arange(self.side**2), self.side)
        half = self.width // 2
        return jnp.concatenate([waves(row, half), waves(column, half)], axis=-1)


# --------------------------------------------------------------------------------------------------
# The training

PATH = selfalign.paths.Linear()  # x_t = (1 - t) x0 + t noise: t = 0 is data, t = 1 is noise
Losses = tuple[jax.Array, jax.Array]  # the denoising loss, and SRA's term


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
) -> tuple[sra.Teacher, Losses]:
    """One optimizer step: changes `trained` and `optimizer`, returns the new teacher."""
    label_key, noise_key, time_key, gap_key = jax.random.split(key, 4)
    dropped = jax.random.bernoulli(label_key, label_dropout, y.shape)  # [B]
    y = jnp.where(dropped, trained.model.null_class, y)  # here: both sides see the same labels
    noise = jax.random.normal(noise_key, x0.shape)  # [B, H, W, C]
    t = jax.random.uniform(time_key, y.shape)  # [B]
    x = PATH.add_noise(x0, noise, t)  # [B, H, W, C]
    student, apply = sra.tap_nnx(loss, "blocks/{}")  # SRA

    def objective(trained: nnx.Dict) -> tuple[jax.Array, Losses]:
        model = trained.model
        prediction, tokens = student(model, x, t, y)  # SRA
        denoising = jnp.mean((prediction - PATH.velocity(x0, noise, t)) ** 2)
        if not aligned:
            return denoising, (denoising, jnp.zeros(()))
        sides = (teacher, model, trained.projector, tokens)  # SRA
        alignment = sra.align(loss, apply, *sides, x0, noise, t, y, key=gap_key)  # SRA
        return denoising + alignment, (denoising, alignment)

    gradients, losses = nnx.grad(objective, has_aux=True)(trained)
    optimizer.update(trained, gradients)
    return sra.update_teacher(loss, teacher, trained.model), losses  # SRA


class Run:
    """The parts of a training: the model with its projector, the optimizer and the EMA."""

    def __init__(self, data: common.Images, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.step = 0
        self.data = data
        model = SiT(**common.model_sizes(data, settings), rngs=nnx.Rngs(settings.seed))
        projector = sra.init_projector(jax.random.key(settings.seed), settings.width)  # SRA
        parameters = nnx.Dict({name: nnx.Param(value) for name, value in projector.items()})
        self.trained = nnx.Dict(model=model, projector=parameters)
        adamw = optax.adamw(settings.lr, weight_decay=0.0)
        self.optimizer = nnx.Optimizer(self.trained, adamw, wrt=nnx.Param)
        self.teacher = sra.init_teacher(model)  # SRA; without it, the EMA that is sampled from
        self.loss = selfalign.SRALoss(  # SRA
            student_layer=settings.student_layer,
            teacher_layer=settings.teacher_layer,
            path=PATH,
            max_gap=settings.max_gap,
            weight=settings.weight,
            decay=selfalign.schedules.DecayWarmup(settings.decay),
        )

    def state(self) -> dict[str, object]:
        """All arrays that the next step depends on."""
        return {
            "trained": nnx.state(self.trained),
            "optimizer": nnx.state(self.optimizer),
            "teacher": self.teacher._replace(average=nnx.state(self.teacher.average)),
        }

    def save(self, folder: Path) -> None:
        """Orbax writes a folder, at once: whatever happens, it is a whole checkpoint."""
        run = {"step": self.step, "settings": common.fixed_settings(self.settings)}
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(self.state()), run=ocp.args.JsonSave(run)
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder.absolute(), parts, force=True)

    def load(self, folder: Path) -> None:
        common.check_exists(folder)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            parts = ocp.args.Composite(run=ocp.args.JsonRestore())
            run = checkpointer.restore(folder.absolute(), parts).run
            common.check_settings(run["settings"], common.fixed_settings(self.settings))
            parts = ocp.args.Composite(state=ocp.args.StandardRestore(self.state()))
            state = checkpointer.restore(folder.absolute(), parts).state
        nnx.update(self.trained, state["trained"])
        nnx.update(self.optimizer, state["optimizer"])
        nnx.update(self.teacher.average, state["teacher"].average)
        self.teacher = self.teacher._replace(step=state["teacher"].step)
        self.step = run["step"]


def train(run: Run, checkpoint: Path | None = None) -> Iterator[Losses]:
    """Train from `run.step` to the last step. Yields the losses of each step, to be shown."""
    settings = run.settings
    seed_key = jax.random.key(settings.seed + 1)
    for step in range(run.step, settings.steps):
        indices = common.batch_indices(len(run.data.images), step, settings)
        run.teacher, losses = training_step(
            run.trained,
            run.optimizer,
            run.teacher,
            run.data.images[indices],  # [B, H, W, C]
            run.data.labels[indices],  # [B]
            jax.random.fold_in(seed_key, step),  # all of this step's draws
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


@functools.partial(nnx.jit, static_argnames=("steps", "guidance"))
def sample(
    model: SiT, noise: jax.Array, y: jax.Array, steps: int = 25, guidance: float = 1.0
) -> jax.Array:
    """Images [B, H, W, C] of the classes y [B]: the velocity's ODE, by Heun's method."""

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

    times = jnp.linspace(1.0, 0.0, steps + 1)  # from noise to data
    x, _ = jax.lax.scan(heun, noise, jnp.stack([times[:-1], times[1:]], axis=1))
    return x


def main(settings: argparse.Namespace) -> None:
    """Load the data, train or go on training, and draw samples."""
    checkpoint = settings.out / "checkpoint"
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


PARSER = common.command_line(__doc__, "jax_nnx_sit")

if __name__ == "__main__":
    main(common.parse(PARSER))
