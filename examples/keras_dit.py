"""A small DiT trained with Self-Representation Alignment (SRA) in Keras, by compile and fit.

    python examples/keras_dit.py                         scikit-learn's digits, with PyTorch
    KERAS_BACKEND=jax python examples/keras_dit.py       the same with JAX
    python examples/keras_dit.py --data fashion-mnist    28x28 clothes
    python examples/keras_dit.py --data FOLDER           your images, one subfolder per class
    python examples/keras_dit.py --no-sra                same weights, batches and noise
    python examples/keras_dit.py --resume                from the last checkpoint, bit for bit

Model, training, checkpoints and sampling are here, from top to bottom. What SRA adds is marked with
"# SRA"; the model is a plain functional one and knows nothing of it. With --no-sra the weight of
SRA's term is 0 and the teacher still runs: compare results of the two, not times. An epoch of fit
goes from checkpoint to checkpoint: it has --save-every steps, and --steps is rounded up to whole
epochs. Data, command line and picture are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can
Provide Representation Guidance by Themselves", 2025, arXiv 2505.02831; Peebles and Xie, "DiT",
2022, arXiv 2212.09748.
"""

import argparse
import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras's own default is TensorFlow

import common
import keras
import numpy as np
from keras import KerasTensor, layers, ops

import selfalign
from selfalign.adapters.keras import SelfAligned

# --------------------------------------------------------------------------------------------------
# The model


def waves(position: KerasTensor | np.ndarray, width: int) -> KerasTensor:
    """Cosines and sines of a number, from fast to slow: [...] -> [..., width]."""
    slowness = ops.arange(width // 2, dtype="float32") / (width // 2)
    column = ops.expand_dims(ops.cast(position, "float32"), -1)
    angles = column * ops.exp(-math.log(10_000) * slowness)
    return ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)


@keras.saving.register_keras_serializable(package="keras_dit")
class Waves(layers.Layer):
    """Times [B] as waves [B, D]."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(**options)
        self.width = width

    def call(self, t: KerasTensor) -> KerasTensor:
        return waves(1000 * t, self.width)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="keras_dit")
class Positions(layers.Layer):
    """Adds to the tokens [B, N, D] of a square image where they are in it."""

    def call(self, tokens: KerasTensor) -> KerasTensor:
        count, width = tokens.shape[1:]
        row, column = np.divmod(np.arange(count), math.isqrt(count))  # [N] each
        half = width // 2
        return tokens + ops.concatenate([waves(row, half), waves(column, half)], axis=-1)


def norm(x: KerasTensor, shift: KerasTensor, scale: KerasTensor) -> KerasTensor:
    normalised = layers.LayerNormalization(center=False, scale=False, epsilon=1e-6)(x)
    return normalised * (1 + scale) + shift


def modulation(condition: KerasTensor, parts: int) -> list[KerasTensor]:
    """Shifts, scales and gates, [B, 1, D] each. Zero at first: a block begins as the identity."""
    width = condition.shape[-1]
    zero = layers.Dense(parts * width, kernel_initializer="zeros")
    return ops.split(zero(ops.silu(condition))[:, None], parts, axis=-1)


def block(x: KerasTensor, condition: KerasTensor, heads: int, name: str) -> KerasTensor:
    """A transformer block with adaLN-Zero. Its last layer has the block's name."""
    width = x.shape[-1]
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(condition, 6)  # [B, 1, D] each
    x = x + gate1 * attention(norm(x, shift1, scale1), heads)  # [B, N, D]
    hidden = layers.Dense(4 * width, "gelu")(norm(x, shift2, scale2))
    return layers.Add(name=name)([x, gate2 * layers.Dense(width)(hidden)])


def attention(x: KerasTensor, heads: int) -> KerasTensor:  # [B, N, D] -> [B, N, D]
    count, width = x.shape[1:]
    qkv = layers.Reshape((count, 3 * heads, width // heads))(layers.Dense(3 * width)(x))
    q, k, v = ops.split(qkv, 3, axis=2)  # [B, N, heads, D / heads] each
    attended = layers.Reshape((count, width))(ops.dot_product_attention(q, k, v))
    return layers.Dense(width)(attended)


def dit(
    size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int
) -> keras.Model:
    """A diffusion transformer: the velocity of a noisy image, given its time and its class."""
    x = keras.Input((size, size, channels))
    t = keras.Input(())
    y = keras.Input((), dtype="int32")
    side = size // patch

    time = layers.Dense(width)(layers.Dense(width, "silu")(Waves(width)(t)))  # [B, D]
    small = keras.initializers.RandomNormal(stddev=0.02)
    embedder = layers.Embedding(classes + 1, width, embeddings_initializer=small)  # last: "none"
    condition = time + embedder(y)  # [B, D]

    rows = layers.Reshape((side, patch, side, patch * channels))(x)
    patches = layers.Reshape((side**2, patch**2 * channels))(layers.Permute((1, 3, 2, 4))(rows))
    tokens = Positions()(layers.Dense(width)(patches))  # [B, N, D]
    for n in range(1, depth + 1):
        tokens = block(tokens, condition, heads, name=f"block_{n}")  # [B, N, D]
    tokens = norm(tokens, *modulation(condition, 2))

    patches = layers.Dense(patch**2 * channels, kernel_initializer="zeros")(tokens)
    grid = layers.Reshape((side, side, patch, patch * channels))(patches)
    image = layers.Reshape((size, size, channels))(layers.Permute((1, 3, 2, 4))(grid))
    return keras.Model([x, t, y], image, name="dit")  # [B, H, W, C]


# --------------------------------------------------------------------------------------------------
# The training


def make_model(data: common.Images, settings: argparse.Namespace) -> SelfAligned:
    """The compiled model: backbone, EMA, optimizer and the state of the random draws."""
    keras.utils.set_random_seed(settings.seed)  # for the backbone's first weights
    backbone = dit(**common.model_sizes(data, settings))
    loss = selfalign.SRALoss(  # SRA
        student_layer=settings.student_layer,
        teacher_layer=settings.teacher_layer,
        path=selfalign.paths.Linear(),  # x_t = (1 - t) x0 + t noise
        max_gap=settings.max_gap,
        weight=settings.weight if settings.sra else 0.0,
        decay=selfalign.schedules.DecayWarmup(settings.decay),
    )
    # SRA: wraps the backbone. It draws noise, times and dropped labels, too
    model = SelfAligned(  # SRA
        backbone,
        loss,
        blocks="block_{}",
        prediction="velocity",
        label_dropout=settings.label_dropout,
        null_label=len(data.classes),
        seed=settings.seed + 1,
    )
    model.compile(optimizer=keras.optimizers.AdamW(settings.lr, weight_decay=0.0), loss="mse")
    return model


class Batches(keras.utils.PyDataset):
    """An epoch of batches, from the model's step on."""

    def __init__(
        self, data: common.Images, settings: argparse.Namespace, model: SelfAligned, count: int
    ) -> None:
        super().__init__()
        self.data = data
        self.settings = settings
        self.model = model
        self.count = count
        self.first_step = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # [B, H, W, C], [B]
        step = self.first_step + index
        indices = common.batch_indices(len(self.data.images), step, self.settings)
        return self.data.images[indices], self.data.labels[indices]

    def on_epoch_begin(self) -> None:
        # fit begins its first epoch twice, once for the shapes: so ask the model where it is
        self.first_step = int(self.model.steps)


class EveryEpoch(keras.callbacks.Callback):
    """A checkpoint and samples at the end of each epoch. Ctrl-C makes it the last one."""

    def __init__(self, data: common.Images, settings: argparse.Namespace, checkpoint: Path) -> None:
        super().__init__()
        self.data = data
        self.settings = settings
        self.checkpoint = checkpoint

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self.handler_before = signal.signal(signal.SIGINT, self.stop)

    def stop(self, *_: object) -> None:
        self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        save(self.model, self.settings, self.checkpoint)
        noise, y = common.sampling_inputs(self.data)
        x = sample(
            self.model.ema_backbone(),
            noise,
            y,
            null_label=len(self.data.classes),
            steps=self.settings.sampling_steps,
            guidance=self.settings.guidance,
        )
        common.draw_samples(x, self.data.classes, self.settings.out / "samples.png")

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        signal.signal(signal.SIGINT, self.handler_before)


def save(model: SelfAligned, settings: argparse.Namespace, file: Path) -> None:
    """One .keras file, and the settings beside it."""
    partial = file.with_suffix(".partial.keras")  # Keras insists on the suffix
    model.save(partial)
    about = json.dumps(common.fixed_settings(settings), indent=1)
    file.with_suffix(".json").write_text(about)
    os.replace(partial, file)  # at once: whatever happens, `file` is a whole checkpoint


def load(settings: argparse.Namespace, file: Path) -> SelfAligned:
    common.check_exists(file)
    about = file.with_suffix(".json")
    if not about.is_file():
        raise ValueError(
            f"A checkpoint has its settings beside it. Received: no file {about}. Begin anew."
        )
    common.check_settings(json.loads(about.read_text()), common.fixed_settings(settings))
    return keras.saving.load_model(file)


def train(
    model: SelfAligned, data: common.Images, settings: argparse.Namespace, checkpoint: Path
) -> None:
    """Train by fit, from the model's step to the last."""
    count = min(settings.save_every, settings.steps)  # steps in an epoch
    step = int(model.steps)
    epochs_done = step // count
    epochs_left = math.ceil((settings.steps - step) / count)
    model.fit(
        Batches(data, settings, model, count),
        initial_epoch=epochs_done,
        epochs=epochs_done + epochs_left,
        shuffle=False,  # the batches are shuffled
        callbacks=[EveryEpoch(data, settings, checkpoint)],
    )


# --------------------------------------------------------------------------------------------------
# The sampling


def sample(
    model: keras.Model,
    noise: np.ndarray,
    y: np.ndarray,
    null_label: int,
    steps: int = 25,
    guidance: float = 1.0,
) -> np.ndarray:
    """Images [B, H, W, C] of the classes y [B]: the velocity's ODE, by Heun's method."""

    def velocity(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        times = np.full(len(x), t)
        conditional = model.predict_on_batch([x, times, y])
        if guidance == 1.0:
            return conditional
        free = model.predict_on_batch([x, times, np.full_like(y, null_label)])
        return free + guidance * (conditional - free)

    x = noise
    times = np.linspace(1, 0, steps + 1, dtype="float32")  # from noise to data
    for t, later in itertools.pairwise(times):
        slope = velocity(x, t)
        corrected = velocity(x + (later - t) * slope, later)
        x = x + (later - t) * (slope + corrected) / 2
    return x


def main(settings: argparse.Namespace) -> None:
    """Load the data, and train or go on training."""
    checkpoint = settings.out / "checkpoint.keras"
    with common.errors_as_sentences():
        data = common.load_data(settings)
        model = make_model(data, settings)
        if settings.resume:
            model = load(settings, checkpoint)
    settings.out.mkdir(parents=True, exist_ok=True)

    train(model, data, settings, checkpoint)
    step = int(model.steps)
    if step < settings.steps:
        raise SystemExit(f"Stopped at step {step}; the same command with --resume continues.")
    print(f"Checkpoint: {checkpoint}\nSamples:    {settings.out / 'samples.png'}")


PARSER = common.command_line(__doc__, "keras_dit")
PARSER.set_defaults(save_every=250)

if __name__ == "__main__":
    main(common.parse(PARSER))
