"""The Keras adapter under the contract of adapters (tests/adapters/contract.py).

`fit` draws noise, times and gaps itself. So the model here is a SelfAligned that takes them with
the batch; everything else is the adapter's own way: compile, train_on_batch, save, load_model.
"""

import tempfile
from pathlib import Path
from typing import ClassVar

import keras
import numpy as np
import reference
from keras import layers, ops

from selfalign import adapting
from selfalign.adapters.keras import SelfAligned

DRAWS = ("noise", "t", "u")
MEASURED = (
    "distance",
    "cosine",
    "student_norm",
    "teacher_norm",
    "student_finite",
    "teacher_finite",
)


@keras.saving.register_keras_serializable(package="tests")
class Embedding(layers.Layer):
    """Samples, times and labels -> tokens [B, N, D] and the condition [B, 1, D]."""

    def build(self, *shapes):
        sizes = reference.weight_shapes()
        names = ("in_kernel", "in_bias", "positions", "time_kernel", "labels")
        self.parts = {name: self.add_weight(shape=sizes[name], name=name) for name in names}

    def call(self, x, t, y):
        parts = self.parts
        angles = t[:, None] * ops.convert_to_tensor(reference.FREQUENCIES, "float32")
        waves = ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)
        condition = waves @ parts["time_kernel"] + ops.take(parts["labels"], y, axis=0)
        tokens = x @ parts["in_kernel"] + parts["in_bias"] + parts["positions"]
        return tokens, condition[:, None]


def make_backbone(weights):
    """The model of reference.py, functional, with these weights."""
    x = keras.Input((reference.TOKENS, reference.CHANNELS))
    t = keras.Input(())
    y = keras.Input((), dtype="int32")
    tokens, condition = Embedding(name="embedding")(x, t, y)
    for n in range(1, reference.DEPTH + 1):
        inside = layers.Dense(reference.WIDTH, name=f"inside_{n}")(tokens)
        hidden = layers.Activation("tanh", name=f"tanh_{n}")(inside + condition)
        tokens = layers.Add(name=f"block_{n}")([tokens, hidden])
    backbone = keras.Model([x, t, y], layers.Dense(reference.CHANNELS, name="out")(tokens))
    for name, variable in by_name(backbone).items():
        variable.assign(weights[name])
    return backbone


def by_name(backbone):
    """The backbone's variables under reference.py's names."""
    found = {variable.name: variable for variable in backbone.get_layer("embedding").weights}
    for layer in backbone.layers:
        if isinstance(layer, layers.Dense):
            name = layer.name.replace("inside", "block")
            found |= {f"{name}_kernel": layer.kernel, f"{name}_bias": layer.bias}
    return found


class Drawn:
    """Stands for the adapter's draws, with numbers that came with the batch."""

    def __init__(self, numbers):
        self.numbers = numbers

    def dropped(self, condition):
        return condition

    def noise(self, x0):
        return self.numbers["noise"]

    def times(self, count):
        return self.numbers["t"]

    def gaps(self, t):
        return self.numbers["u"]


@keras.saving.register_keras_serializable(package="tests")
class WithGivenDraws(SelfAligned):
    """`x` is (x0, noise, t, u)."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        x0, *draws = x
        tensors = map(ops.convert_to_tensor, draws)
        self._step.drawing = Drawn(dict(zip(DRAWS, tensors, strict=True)))
        return super().compute_loss(x0, y, y_pred, sample_weight, training)


class Fixture:
    name = "keras"
    lacks: ClassVar = {}
    if keras.backend.backend() != "torch":
        lacks["values of masks"] = "fit compiles the step: nobody can look at a traced mask."
    old_options: ClassVar = {"student": ("block_2", "taps="), "teacher": ("block_4", "taps=")}

    def attach(self, loss, weights, projector=None, **options):
        return Run(loss, weights, projector, **options)


class Run:
    def __init__(self, loss, weights, projector, **options):
        self.loss = loss
        self.listed = isinstance(loss, list)
        options = {"blocks": "block_{}", "seed": 0, **options}
        self.model = WithGivenDraws(make_backbone(weights), loss, **options)
        heads = self.model.projector if self.listed else {"": self.model.projector}
        for name, head in heads.items():
            given = (projector or {}).get(name, {}) if self.listed else projector or {}
            for part, value in given.items():
                head[part].assign(value)
        self.log_all()
        self.model.compile(optimizer=keras.optimizers.SGD(reference.LEARNING_RATE))

    def log_all(self):
        """Beside what fit logs, everything that the objectives measure."""
        names = self.model.objectives if self.listed else [""]
        for name in names:
            for metric in MEASURED:
                label = f"{name}/{metric}" if self.listed else metric
                if label not in self.model.logged:
                    self.model.logged[label] = keras.metrics.Mean(label)

    def step(self, batch):
        self.model.reset_metrics()
        self.logs = train(self.model, batch, 1.0)
        return float(self.logs["alignment"])

    def gradients(self, batch):
        """What plain descent at rate 1 goes down by, where the denoising loss weighs nothing."""
        other = Run(self.loss, self.weights(), self.projector())
        other.model.optimizer.learning_rate = 1.0
        before = other.trained()
        train(other.model, batch, 0.0)
        after = other.trained()
        return {name: value - after[name] for name, value in before.items()}

    def trained(self):
        heads = self.projector() if self.listed else {"": self.projector()}
        return self.weights() | reference.flat_heads(heads)

    def weights(self):
        return arrays(by_name(self.model.backbone))

    def projector(self):
        heads = self.model.projector
        return (
            {name: arrays(head) for name, head in heads.items()} if self.listed else arrays(heads)
        )

    def teacher(self):
        if adapting.shared_teacher(self.model.objectives) is None:
            return None
        return arrays(by_name(self.model.ema_backbone()))

    def metrics(self):
        return {name: float(value) for name, value in self.logs.items()}

    def save(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.keras")
            self.model.save(file)
            return file.read_bytes()

    def load(self, state):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.keras")
            file.write_bytes(state)
            self.model = keras.saving.load_model(file)


def train(model, batch, weight):
    """One step, in which the denoising loss has this weight; the logs."""
    x = (batch["x0"], *(batch[name] for name in DRAWS))
    names = ("target_tokens", "loss_mask")
    named = {name: batch[name] for name in names if batch.get(name) is not None}
    weights = np.full((reference.BATCH, reference.TOKENS), weight, "float32")
    return model.train_on_batch(x, (batch["y"], named), weights, return_dict=True)


def arrays(variables):
    return {name: np.array(ops.convert_to_numpy(value)) for name, value in variables.items()}
