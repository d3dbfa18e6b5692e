"""One small model and its training in NumPy and float64: what every adapter is compared with.

The model, the same in every framework (`xp` is numpy, jax.numpy or keras.ops):

    condition = concat(cos(t f), sin(t f)) @ time_kernel + labels[y]      [B, 4],  f = 1, 2, 3, 4
    x = x @ in_kernel + in_bias + positions                               [B, 5, 4]
    block n of four:  x = x + tanh(x @ block_n_kernel + block_n_bias + condition[:, None])
    prediction = x @ out_kernel + out_bias                                [B, 5, 4]

Layer n is x after block n. The loop is the user's of every adapter: plain gradient descent on
denoising + term, then the average.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import oracle

from selfalign import adapting

DEPTH, WIDTH, TOKENS, CHANNELS, CLASSES = 4, 4, 5, 4, 10
FREQUENCIES = (1.0, 2.0, 3.0, 4.0)
LEARNING_RATE = 0.05
BATCH = 6


def weight_shapes():
    """Names and shapes of the model's weights."""
    shapes = {
        "in_kernel": (CHANNELS, WIDTH),
        "in_bias": (WIDTH,),
        "positions": (TOKENS, WIDTH),
        "time_kernel": (2 * len(FREQUENCIES), WIDTH),
        "labels": (CLASSES, WIDTH),
    }
    for n in range(1, DEPTH + 1):
        shapes |= {f"block_{n}_kernel": (WIDTH, WIDTH), f"block_{n}_bias": (WIDTH,)}
    return shapes | {"out_kernel": (WIDTH, CHANNELS), "out_bias": (CHANNELS,)}


def make_weights(seed=0):
    """The model's weights, float32 NumPy arrays by name."""
    rng = np.random.default_rng(seed)
    shapes = weight_shapes()
    return {name: (0.4 * rng.normal(size=s)).astype("float32") for name, s in shapes.items()}


def forward(weights, x, t, y, xp=np):
    """The prediction, and the tokens [B, N, D] after each block."""
    angles = t[:, None] * xp.asarray(FREQUENCIES, dtype=x.dtype)
    waves = xp.concatenate([xp.cos(angles), xp.sin(angles)], axis=-1)
    condition = waves @ weights["time_kernel"] + weights["labels"][y]
    x = x @ weights["in_kernel"] + weights["in_bias"] + weights["positions"]
    features = []
    for n in range(1, DEPTH + 1):
        inside = x @ weights[f"block_{n}_kernel"] + weights[f"block_{n}_bias"]
        x = x + xp.tanh(inside + condition[:, None])
        features.append(x)
    return x @ weights["out_kernel"] + weights["out_bias"], features


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective as the oracle knows it: what `selfalign` says, in NumPy."""

    name: str
    source: str  # "teacher", "later", "given" or "nothing"
    student_layer: int = 2
    target_layer: int | None = None
    target_width: int = WIDTH
    head: Callable = lambda params, tokens: tokens
    head_shapes: dict = dataclasses.field(default_factory=dict)
    compare: Callable = oracle.term  # (student, target, mask=) -> the unweighted term
    weight: Callable = lambda step: 0.5
    path: oracle.Path = dataclasses.field(default_factory=lambda: oracle.linear(1))
    max_gap: float = 0.2
    decay: Callable = lambda step: 0.9999


def mlp(layers, hidden=2 * WIDTH, target_width=WIDTH):
    """The fields of an objective whose head is a perceptron of `layers` linear layers."""
    return {
        "head": functools.partial(oracle.mlp, layers),
        "head_shapes": oracle.mlp_shapes(layers, WIDTH, hidden, target_width),
        "target_width": target_width,
    }


def make_projector(objectives, seed=1):
    """Weights of the heads by name; of several objectives a dict of them by objective."""
    rng = np.random.default_rng(seed)
    heads = {
        objective.name: {
            name: (0.3 * rng.normal(size=shape)).astype("float32")
            for name, shape in objective.head_shapes.items()
        }
        for objective in objectives
    }
    return heads if len(objectives) > 1 else next(iter(heads.values()))


def make_batch(objectives, seed=2, mask=None):
    """A batch as NumPy arrays: x0, noise, t, y, u, and where needed target_tokens and loss_mask."""
    rng = np.random.default_rng(seed)
    path = path_of(objectives)
    shape = (BATCH, TOKENS, CHANNELS)
    t = rng.uniform(0.02, 0.98, BATCH)
    if path.steps:
        t = np.floor(t * path.steps)
    batch = {
        "x0": rng.normal(size=shape).astype("float32"),
        "noise": rng.normal(size=shape).astype("float32"),
        "t": t.astype("int32" if path.steps else "float32"),
        "y": rng.integers(0, CLASSES, BATCH).astype("int32"),
        "u": ((np.floor(rng.random(BATCH) * 190) + 0.5) / 200).astype("float32"),
    }
    targets = {
        o.name: rng.normal(size=(BATCH, TOKENS, o.target_width)).astype("float32")
        for o in objectives
        if o.source == "given"
    }
    if targets:
        batch["target_tokens"] = targets if len(objectives) > 1 else next(iter(targets.values()))
    if mask is not None:
        batch["loss_mask"] = mask
    return batch


def path_of(objectives):
    """The noise path of the loop: the EMA teacher's; without one the linear path."""
    with_teacher = [o for o in objectives if o.source == "teacher"]
    return with_teacher[0].path if with_teacher else oracle.linear(1)


def noise_path(loss):
    """The same for what a user passes, one of selfalign's objectives or a list: its noise path."""
    teacher = adapting.shared_teacher(adapting.named_objectives(loss))
    return teacher.path if teacher else adapting.paths.Linear()


class Run:
    """The training of one model, in float64; the methods are those of an adapter's run."""

    def __init__(self, objectives, weights, projector):
        self.objectives = list(objectives)
        heads = projector if len(self.objectives) > 1 else {self.objectives[0].name: projector}
        self._weights = _wide(weights)
        self._heads = {name: _wide(head) for name, head in heads.items()}
        self._average = _wide(weights)
        self._step = 0
        self._metrics = {}

    # The term

    def _noised(self, batch):
        return oracle.add_noise(path_of(self.objectives), batch["x0"], batch["noise"], batch["t"])

    def _target(self, objective, weights, batch):
        """The target tokens [B, N, D] of one objective."""
        if objective.source == "teacher":
            draws = (batch["x0"], batch["noise"], batch["t"], batch["u"])
            x, t = oracle.add_less_noise(objective.path, *draws, objective.max_gap)
            return forward(self._average, x, t, batch["y"])[1][objective.target_layer - 1]
        if objective.source == "later":
            features = forward(weights, self._noised(batch), batch["t"], batch["y"])[1]
            return features[objective.target_layer - 1]
        if objective.source == "given":
            given = batch["target_tokens"]
            return given[objective.name] if isinstance(given, dict) else given
        return None

    def _targets(self, batch):
        """The targets at the present weights: constants, as no gradient reaches them."""
        return {o.name: self._target(o, self._weights, batch) for o in self.objectives}

    def _terms(self, weights, heads, batch, targets):
        """The unweighted terms by name, and the prediction."""
        prediction, features = forward(weights, self._noised(batch), batch["t"], batch["y"])
        terms = {}
        for o in self.objectives:
            tokens = o.head(heads[o.name], features[o.student_layer - 1])
            terms[o.name] = o.compare(tokens, targets[o.name], mask=batch.get("loss_mask"))
        return terms, prediction

    def _term(self, weights, heads, batch, targets):
        terms, _ = self._terms(weights, heads, batch, targets)
        return sum(o.weight(self._step) * terms[o.name] for o in self.objectives)

    def _total(self, weights, heads, batch, targets):
        """Denoising + term: what the loop goes down on."""
        terms, prediction = self._terms(weights, heads, batch, targets)
        term = sum(o.weight(self._step) * terms[o.name] for o in self.objectives)
        return np.mean((prediction - batch["velocity"]) ** 2) + term

    def _with_velocity(self, batch):
        wide = _float64(batch)
        path = path_of(self.objectives)
        return wide | {"velocity": oracle.velocity(path, wide["x0"], wide["noise"], wide["t"])}

    def _gradient(self, function, batch):
        """Gradients by central differences, of the weights and of the heads' weights."""
        targets = self._targets(batch)
        of_weights = {}
        for name, value in self._weights.items():

            def moved(x, name=name):
                return function(self._weights | {name: x}, self._heads, batch, targets)

            of_weights[name] = oracle.gradient(moved, value)
        of_heads = {}
        for objective, head in self._heads.items():
            of_heads[objective] = {}
            for name, value in head.items():

                def moved(x, objective=objective, head=head, name=name):
                    heads = self._heads | {objective: head | {name: x}}
                    return function(self._weights, heads, batch, targets)

                of_heads[objective][name] = oracle.gradient(moved, value)
        return of_weights, of_heads

    # What an adapter's run offers

    def step(self, batch):
        """One step of the loop; returns the term."""
        batch = self._with_velocity(batch)
        targets = self._targets(batch)
        term = self._term(self._weights, self._heads, batch, targets)
        unmasked = {name: value for name, value in batch.items() if name != "loss_mask"}
        unweighted, _ = self._terms(self._weights, self._heads, unmasked, targets)
        self._metrics = {name: float(value) for name, value in unweighted.items()}
        of_weights, of_heads = self._gradient(self._total, batch)
        self._weights = _descended(self._weights, of_weights)
        self._heads = {name: _descended(head, of_heads[name]) for name, head in self._heads.items()}
        teachers = [o for o in self.objectives if o.source == "teacher"]
        if teachers:
            decay = teachers[0].decay(self._step)
            for name, value in self._weights.items():
                self._average[name] = oracle.ema(self._average[name], value, decay)
        self._step += 1
        return float(term)

    def gradients(self, batch):
        """Of the term alone, by parameter name; "projector.<name>" for a head."""
        of_weights, of_heads = self._gradient(self._term, _float64(batch))
        return of_weights | flat_heads(of_heads)

    def weights(self):
        return dict(self._weights)

    def projector(self):
        return self._heads if len(self.objectives) > 1 else dict(self._heads[self._name()])

    def teacher(self):
        """The average, or None without an EMA teacher."""
        averaged = any(o.source == "teacher" for o in self.objectives)
        return dict(self._average) if averaged else None

    def metrics(self):
        """The unweighted terms of all tokens, under the names that adapters give them."""
        if len(self.objectives) > 1:
            return {f"{name}/distance": value for name, value in self._metrics.items()}
        return {"distance": self._metrics[self._name()]}

    def _name(self):
        return self.objectives[0].name


def flat_heads(heads):
    """Heads by objective as one dict: "projector.<name>", or "projector.<objective>.<name>"."""
    if len(heads) == 1:
        head = next(iter(heads.values()))
        return {f"projector.{name}": value for name, value in head.items()}
    return {
        f"projector.{objective}.{name}": value
        for objective, head in heads.items()
        for name, value in head.items()
    }


def _descended(values, gradients):
    return {name: value - LEARNING_RATE * gradients[name] for name, value in values.items()}


def _wide(values):
    return {name: np.asarray(value, "float64") for name, value in values.items()}


def _float64(batch):
    """Floating-point arrays in float64; integers and masks as they are."""
    return {name: _float64_leaf(value) for name, value in batch.items()}


def _float64_leaf(value):
    if isinstance(value, dict):
        return _float64(value)
    value = np.asarray(value)
    return value.astype("float64") if value.dtype.kind == "f" else value
