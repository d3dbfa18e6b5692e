"""What SRA costs a Keras training step, on the backend that KERAS_BACKEND names.

    KERAS_BACKEND=jax python benchmarks/bench_keras.py

Steps of `train_on_batch` taken in turns: the backbone's denoising alone, without teacher and EMA,
and SelfAligned around the same backbone. Above the table stands the least that the method needs:
the forward of the teacher's blocks, and the projector.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import common
import keras
import numpy as np
from keras import KerasTensor, ops
from keras_dit import dit
from rich.console import Console
from rounds import Step, measure, show_against

import selfalign
from selfalign.adapters.keras import SelfAligned

PATH = selfalign.paths.Linear()
LOSS = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7, path=PATH)


class Plain(keras.Model):
    """The same training without SRA."""

    def __init__(self, backbone: keras.Model) -> None:
        super().__init__()
        self.backbone = backbone
        self.draws = keras.random.SeedGenerator(0)
        self.built = True

    def call(self, inputs: KerasTensor, training: bool | None = None) -> KerasTensor:
        return inputs

    def compute_loss(
        self,
        x: KerasTensor,
        y: KerasTensor,
        y_pred: KerasTensor,
        sample_weight: KerasTensor | None = None,
        training: bool = True,
    ) -> KerasTensor:
        x = ops.convert_to_tensor(x)
        y = ops.convert_to_tensor(y)
        noise = keras.random.normal(ops.shape(x), seed=self.draws)
        t = keras.random.uniform((ops.shape(x)[0],), seed=self.draws)
        prediction = self.backbone([PATH.add_noise(x, noise, t), t, y], training=training)
        return keras.losses.MeanSquaredError()(PATH.velocity(x, noise, t), prediction)


def aligned(backbone: keras.Model) -> keras.Model:
    return SelfAligned(backbone, LOSS, blocks="block_{}")


def floor(width: int, depth: int) -> float:
    """The least over the plain step, in matrix products per token.

    The plain step, the teacher's first blocks, and the projector forward and backward.
    """
    block = 12 * width**2  # qkv 3, output 1, MLP 8; its modulation is per sample
    projector = 4 * width**2
    _, teacher_layer = LOSS.layers(depth)
    teacher = teacher_layer * block
    return 1 + (teacher + 3 * projector) / (3 * depth * block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    add = parser.add_argument
    add("--width", type=int, default=192)
    add("--depth", type=int, default=12)
    add("--size", type=int, default=16, help="side of the image or latent; patches of 2")
    add("--batch", type=int, default=16)
    add("--rounds", type=int, default=20)
    options = parser.parse_args()
    width = options.width
    depth = options.depth
    rng = np.random.default_rng(0)
    shape = (options.batch, options.size, options.size, 4)
    x = rng.normal(size=shape).astype("float32")
    y = rng.integers(0, 10, options.batch).astype("int32")

    def training(wrap: Callable[[keras.Model], keras.Model]) -> Step:
        backbone = dit(options.size, 4, 10, 2, width, depth, heads=max(1, width // 64))
        model = wrap(backbone)
        model.compile(optimizer=keras.optimizers.AdamW(1e-4))
        return lambda: model.train_on_batch(x, y)

    console = Console()
    console.print(
        f"keras {keras.__version__} on {keras.backend.backend()}, width {width}, depth {depth}, "
        f"{(options.size // 2) ** 2} tokens, batch {options.batch}, float32; "
        f"the method's floor: x {floor(width, depth):.3f}"
    )
    arms = {"without SRA": training(Plain), "with SRA": training(aligned)}
    seconds = measure(arms, options.rounds)
    show_against(console, "A training step", seconds, "without SRA")


if __name__ == "__main__":
    main()
