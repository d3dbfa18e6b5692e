"""What SRA costs a Keras training step, on the backend that KERAS_BACKEND names: `python benchmarks/bench_keras.py`.

Steps of `train_on_batch` taken in turns: the backbone's denoising alone, without teacher and EMA, and SelfAligned around the
same backbone. Above the table stands the least that the method needs: the forward of the teacher's blocks, and the projector.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import common
import keras
import numpy as np
from keras import ops
from keras_dit import dit
from rich.console import Console
from rounds import Step, measure, show

import selfalign
from selfalign.adapters.keras import SelfAligned

LOSS = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7)


class Plain(keras.Model):
    """The same training without SRA."""

    def __init__(self, backbone: keras.Model) -> None:
        super().__init__()
        self.backbone, self.draws = backbone, keras.random.SeedGenerator(0)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return inputs

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True) -> Any:
        x, y = map(ops.convert_to_tensor, (x, y))
        noise = keras.random.normal(ops.shape(x), seed=self.draws)
        t = keras.random.uniform((ops.shape(x)[0],), seed=self.draws)
        prediction = self.backbone([LOSS.path.add_noise(x, noise, t), t, y], training=training)
        return keras.losses.MeanSquaredError()(LOSS.path.velocity(x, noise, t), prediction)


def floor(width: int, depth: int) -> float:
    """Plain step + teacher's prefix + projector (forward and backward), over the plain step, in matrix products per token."""
    block, projector = 12 * width**2, 4 * width**2  # a block: qkv 3, output 1, MLP 8; its modulation is per sample
    teacher = LOSS.layers(depth)[1] * block
    return 1 + (teacher + 3 * projector) / (3 * depth * block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--size", type=int, default=16, help="side of the image or latent; patches of 2")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    sizes = {"size": options.size, "channels": 4, "classes": 10, "patch": 2, "width": options.width, "depth": options.depth,
             "heads": max(1, options.width // 64)}  # fmt: skip
    rng = np.random.default_rng(0)
    x = rng.normal(size=(options.batch, options.size, options.size, 4)).astype("float32")
    y = rng.integers(0, 10, options.batch).astype("int32")
    arms: dict[str, Step] = {}
    for name, wrap in (("without SRA", Plain), ("with SRA", lambda backbone: SelfAligned(backbone, LOSS, blocks="block_{}"))):
        model = wrap(dit(**sizes))
        model.compile(optimizer=keras.optimizers.AdamW(1e-4))
        arms[name] = lambda model=model: model.train_on_batch(x, y)
    console = Console()
    console.print(f"keras {keras.__version__} on {keras.backend.backend()}, width {options.width}, depth {options.depth}, "
                  f"{(options.size // 2) ** 2} tokens, batch {options.batch}, float32; the method's floor: "
                  f"x {floor(options.width, options.depth):.3f}")  # fmt: skip
    show(console, "A training step", measure(arms, options.rounds), dict.fromkeys(arms, "without SRA"))


if __name__ == "__main__":
    main()
