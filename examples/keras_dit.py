"""A small DiT trained with Self-Representation Alignment (SRA) in Keras, by compile and fit, all in one file.

    python examples/keras_dit.py                                  scikit-learn's digits, minutes on a laptop's CPU, with PyTorch
    KERAS_BACKEND=jax python examples/keras_dit.py                the same with JAX
    python examples/keras_dit.py --data fashion-mnist             28x28 clothes
    python examples/keras_dit.py --data FOLDER --image-size 32    your own images, one subfolder per class
    python examples/keras_dit.py --no-sra                         SRA's weight is 0: same weights, batches and noise. The
                                                                  teacher still runs: compare results of the two, not times
    python examples/keras_dit.py --resume                         continue from the last checkpoint, bit for bit

The model is a plain functional one and knows nothing of SRA; what SRA adds to the training is marked with "# SRA". An epoch of
fit is the stretch from checkpoint to checkpoint, with new samples at its end: --save-every steps, and --steps is rounded up to
whole ones. Images and command line are in common.py.

Reference: Jiang et al., "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation
Guidance by Themselves", 2025, arXiv 2505.02831; Peebles and Xie, "DiT", 2022, arXiv 2212.09748.
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
from keras import layers, ops

import selfalign
from selfalign.adapters.keras import SelfAligned

# ---------------------------------------------------------------------------------------------------------------- the model


def waves(position: Any, width: int) -> Any:  # [...] -> [..., width]
    """Cosines and sines of a number, from fast to slow: how times and positions enter a transformer."""
    slowness = ops.arange(width // 2, dtype="float32") / (width // 2)
    angles = ops.expand_dims(ops.cast(position, "float32"), -1) * ops.exp(-math.log(10_000) * slowness)
    return ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)


@keras.saving.register_keras_serializable(package="keras_dit")
class Waves(layers.Layer):
    """Times [B] as waves [B, D]."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(**options)
        self.width = width

    def call(self, t: Any) -> Any:
        return waves(1000 * t, self.width)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="keras_dit")
class Positions(layers.Layer):
    """Adds to the tokens [B, N, D] of a square image where they are in it."""

    def call(self, tokens: Any) -> Any:
        count, width = tokens.shape[1:]
        row, column = np.divmod(np.arange(count), math.isqrt(count))  # [N] each
        return tokens + ops.concatenate([waves(row, width // 2), waves(column, width // 2)], axis=-1)


def norm(x: Any, shift: Any, scale: Any) -> Any:
    return layers.LayerNormalization(center=False, scale=False, epsilon=1e-6)(x) * (1 + scale) + shift


def modulation(condition: Any, parts: int) -> list[Any]:  # [B, D] -> parts x [B, 1, D]
    """Shifts, scales and gates; zero at the start (adaLN-Zero): a block begins as the identity."""
    width = condition.shape[-1]
    return ops.split(layers.Dense(parts * width, kernel_initializer="zeros")(ops.silu(condition))[:, None], parts, axis=-1)


def block(x: Any, condition: Any, heads: int, name: str) -> Any:  # [B, N, D], [B, D] -> [B, N, D]
    """A transformer block that the condition shifts, scales and gates. Its last layer has the block's name."""
    width = x.shape[-1]
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(condition, 6)  # [B, 1, D] each
    x = x + gate1 * attention(norm(x, shift1, scale1), heads)
    h = layers.Dense(4 * width, "gelu")(norm(x, shift2, scale2))
    return layers.Add(name=name)([x, gate2 * layers.Dense(width)(h)])


def attention(x: Any, heads: int) -> Any:  # [B, N, D] -> [B, N, D]
    count, width = x.shape[1:]
    qkv = layers.Reshape((count, 3 * heads, width // heads))(layers.Dense(3 * width)(x))
    q, k, v = ops.split(qkv, 3, axis=2)  # [B, N, heads, D / heads] each
    return layers.Dense(width)(layers.Reshape((count, width))(ops.dot_product_attention(q, k, v)))


def dit(size: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int) -> keras.Model:
    """A diffusion transformer: the velocity of a noisy image, given its time and its class."""
    x, t, y = keras.Input((size, size, channels)), keras.Input(()), keras.Input((), dtype="int32")
    side = size // patch
    time = layers.Dense(width)(layers.Dense(width, "silu")(Waves(width)(t)))  # [B, D]
    small = keras.initializers.RandomNormal(stddev=0.02)
    condition = time + layers.Embedding(classes + 1, width, embeddings_initializer=small)(y)  # [B, D]; the last class is "none"
    patches = layers.Permute((1, 3, 2, 4))(layers.Reshape((side, patch, side, patch * channels))(x))
    patches = layers.Reshape((side**2, patch**2 * channels))(patches)  # [B, N, patch * patch * C]
    tokens = Positions()(layers.Dense(width)(patches))  # [B, N, D]
    for n in range(1, depth + 1):
        tokens = block(tokens, condition, heads, name=f"block_{n}")  # [B, N, D]
    tokens = norm(tokens, *modulation(condition, 2))
    patches = layers.Dense(patch**2 * channels, kernel_initializer="zeros")(tokens)  # [B, N, patch * patch * C]
    rows = layers.Permute((1, 3, 2, 4))(layers.Reshape((side, side, patch, patch * channels))(patches))
    return keras.Model([x, t, y], layers.Reshape((size, size, channels))(rows), name="dit")  # [B, H, W, C]


# ------------------------------------------------------------------------------------------------------------- the training


class Run(common.Run):
    """The compiled model: backbone, EMA, optimizer and the state of the random draws, all in one .keras file."""

    suffix = ".keras"

    def __init__(self, data: common.Data, settings: argparse.Namespace) -> None:
        super().__init__(data, settings)
        keras.utils.set_random_seed(settings.seed)  # the backbone's first weights
        backbone = dit(**common.shape(data, settings))
        loss = selfalign.SRALoss(
            student_layer=settings.student_layer, teacher_layer=settings.teacher_layer, path=selfalign.paths.Linear(),
            max_gap=settings.max_gap, weight=settings.weight if settings.sra else 0.0,
            decay=selfalign.schedules.DecayWarmup(settings.decay))  # SRA  # fmt: skip
        # SRA: wraps the backbone. It draws noise, times and dropped labels, too: x_t = (1 - t) x0 + t noise, t = 1 is noise
        self.model = SelfAligned(backbone, loss, blocks="block_{}", prediction="velocity", label_dropout=settings.label_dropout,
                                 null_label=len(data.classes), seed=settings.seed + 1)  # fmt: skip
        self.model.compile(optimizer=keras.optimizers.AdamW(settings.lr, weight_decay=0.0), loss="mse")

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        null_label, steps, guidance = len(self.data.classes), self.settings.sampling_steps, self.settings.guidance
        return sample(self.model.ema_backbone(), noise, labels, null_label, steps, guidance)

    def save(self, file: Path) -> None:  # at once; Keras insists on the suffix
        partial = file.with_suffix(".partial.keras")
        self.model.save(partial)
        file.with_suffix(".json").write_text(json.dumps(self.fixed(), indent=1))
        os.replace(partial, file)

    def read(self, file: Path) -> None:
        settings = file.with_suffix(".json")
        if not settings.is_file():
            raise ValueError(f"A checkpoint has its settings beside it. Received: no file {settings}. Begin anew.")
        self.check_fixed(json.loads(settings.read_text()))
        self.model = keras.saving.load_model(file)
        self.step = int(self.model.steps)


class Batches(keras.utils.PyDataset):
    """The batches from the run's step on; which images they hold is a function of seed and step alone."""

    def __init__(self, run: Run, count: int) -> None:
        super().__init__()
        self.run, self.count, self.first = run, count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:  # [B, H, W, C], [B]
        self.run.step = self.first + index
        chosen = self.run.chosen()
        return self.run.data.images[chosen], self.run.data.labels[chosen]

    def on_epoch_begin(self) -> None:  # fit begins its first epoch twice, once for the shapes: so ask the model where it is
        self.first = int(self.run.model.steps)


class Progress(keras.callbacks.Callback):
    """A checkpoint and samples at the end of each epoch. Ctrl-C ends it early."""

    def __init__(self, run: Run, checkpoint: Path) -> None:
        super().__init__()
        self.run, self.checkpoint = run, checkpoint

    def on_train_begin(self, logs: Any = None) -> None:
        self.before = signal.signal(signal.SIGINT, lambda *_: setattr(self.model, "stop_training", True))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.run.save(self.checkpoint)
        common.draw_samples(self.run, self.checkpoint.with_name("samples.png"))

    def on_train_end(self, logs: Any = None) -> None:
        signal.signal(signal.SIGINT, self.before)


def main(settings: argparse.Namespace) -> None:
    checkpoint = settings.out / f"checkpoint{Run.suffix}"
    run = common.start(settings, checkpoint, Run)
    count = min(settings.save_every, settings.steps)  # of steps in an epoch
    done, left = run.step // count, math.ceil((settings.steps - run.step) / count)
    epochs = {"initial_epoch": done, "epochs": done + left}
    run.model.fit(Batches(run, count), **epochs, shuffle=False, callbacks=[Progress(run, checkpoint)])  # `chosen` shuffles
    if int(run.model.steps) < settings.steps:
        raise SystemExit(f"Stopped at step {int(run.model.steps)}; the same command with --resume continues.")
    print(f"Checkpoint: {checkpoint}\nSamples:    {checkpoint.with_name('samples.png')}")


# ------------------------------------------------------------------------------------------------------------- the sampling


def sample(
    model: keras.Model, noise: np.ndarray, y: np.ndarray, null_label: int, steps: int = 25, guidance: float = 1.0
) -> np.ndarray:
    """Images [B, H, W, C] of the classes y [B]: the velocity's ODE by Heun's method, from noise (t = 1) to data (t = 0)."""

    def velocity(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        times = np.full(len(x), t)
        conditional = model.predict_on_batch([x, times, y])
        if guidance == 1.0:
            return conditional
        free = model.predict_on_batch([x, times, np.full_like(y, null_label)])
        return free + guidance * (conditional - free)

    x = noise
    for t, later in itertools.pairwise(np.linspace(1, 0, steps + 1, dtype="float32")):
        slope = velocity(x, t)
        corrected = velocity(x + (later - t) * slope, later)
        x = x + (later - t) * (slope + corrected) / 2
    return x


PARSER = common.command_line(__doc__, "keras_dit")
PARSER.set_defaults(save_every=250)

if __name__ == "__main__":
    main(common.parse(PARSER))
