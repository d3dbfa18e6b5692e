"""SRA in Keras: a model around your backbone for compile and fit, on every backend of Keras that trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras
import numpy
from keras import ops

from selfalign import ema_update, project
from selfalign import projector as _projector
from selfalign._checks import check_choice, check_number, invalid
from selfalign.loss import SRALoss

from ._keras_taps import block_names, copy_weights, functional_forwards, is_functional, layer_name, rebuilt, subclassed_forwards

_LOGGED = ("denoising", "alignment", "cosine", "student_norm", "teacher_norm")


@keras.saving.register_keras_serializable(package="selfalign")
class SelfAligned(keras.Model):
    """Self-Representation Alignment around a diffusion backbone, trained by `fit` on clean samples.

    Each step draws times and noise, runs the backbone on the noisy samples, adds the alignment term to the loss of `compile`,
    and moves the EMA teacher, which looks at the same samples with less noise and runs to its layer only. The backbone is
    trained as it is: save it alone, and no trace of SRA is left. `ema_backbone()` is the EMA model, for sampling.

    `fit` takes samples x0 [B, ...], or (x0, labels, ...) where the backbone takes a condition. Labels may also be the data's
    second part, `fit(x0, labels)`. Sample weights weigh the denoising loss.

    Args:
        backbone: (x [B, ...], t [B], *condition) -> prediction. A functional model (a keras-hub backbone is one) is tapped at
            its layers. Another model must be built, and return (prediction, features), a list of its blocks' outputs [B, N, D].
            Condition must not be dropped inside it: the teacher, in evaluation mode, would see another one.
        loss: the settings; `loss.decay` is the EMA's.
        blocks: of a functional backbone, the names of its blocks, such as "block_{}", where it has several kinds of numbered
            layers.
        student, teacher: of a functional backbone, names of two layers (or their indices in `backbone.layers`) instead of the
            blocks' numbers in `loss`. `teacher` also accepts a model: a second, built instance of a backbone that cannot be
            rebuilt from its configuration.
        select: takes the tokens [B, N, D] out of a block's output, where that is not one tensor.
        width: feature width D, where the backbone is not functional.
        arrange: (x, t, *condition) -> the backbone's inputs; default the list [x, t, *condition].
        prediction: what the backbone predicts: "velocity", "noise" or "data".
        draw_time: (batch size, seed generator) -> times [B]; default uniform over the path.
        label_dropout: share of samples whose label becomes `null_label`, on both sides alike.
        null_label: the label that stands for none.
        seed: of times, noise, gaps, dropped labels and the projector's first values.

    Raises:
        ValueError: a Keras backend that cannot train, layers that the backbone does not have, a backbone that is not built, no
            width, variables in half precision.

    Example:
        >>> import keras, numpy as np, selfalign
        >>> from selfalign.adapters.keras import SelfAligned
        >>> x, t = keras.Input((5, 8)), keras.Input(())
        >>> h = x
        >>> for n in range(1, 5):
        ...     h = keras.layers.Dense(8, "tanh", name=f"block_{n}")(h)
        >>> backbone = keras.Model([x, t], h)
        >>> model = SelfAligned(backbone, selfalign.SRALoss(student_layer=1, teacher_layer=3))
        >>> model.compile(optimizer="adamw")
        >>> history = model.fit(np.ones((8, 5, 8), "float32"), batch_size=4, verbose=0)
        >>> sorted(history.history)
        ['alignment', 'cosine', 'denoising', 'loss', 'student_norm', 'teacher_norm']
        >>> tuple(model.ema_backbone()([np.ones((2, 5, 8)), np.ones(2)]).shape)
        (2, 5, 8)

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """

    def __init__(
        self,
        backbone: keras.Model,
        loss: SRALoss,
        *,
        blocks: str | None = None,
        student: str | int | None = None,
        teacher: str | int | keras.Model | None = None,
        select: Callable[[Any], Any] | None = None,
        width: int | None = None,
        arrange: Callable[..., Any] | None = None,
        prediction: str = "velocity",
        draw_time: Callable[..., Any] | None = None,
        label_dropout: float = 0.0,
        null_label: int | None = None,
        seed: int | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        _check_backbone(backbone)
        super().__init__(name=name, **options)
        check_choice("prediction", prediction, ("velocity", "noise", "data"))
        check_number("label_dropout", label_dropout, 0, 1, "It is a share of the samples.")
        if label_dropout and null_label is None:
            raise invalid("label_dropout needs the label that stands for none", "null_label=None", "Pass null_label=.")
        self.backbone, self.sra, self.select, self.arrange, self.draw_time = backbone, loss, select, arrange, draw_time
        self.prediction, self.label_dropout, self.null_label, self.seed = prediction, label_dropout, null_label, seed
        self.blocks, self.student, self.teacher = blocks, student, None if isinstance(teacher, keras.Model) else teacher
        self.average = teacher if isinstance(teacher, keras.Model) else rebuilt(backbone)  # the EMA, one step behind
        self.average.trainable = False
        copy_weights(backbone, self.average)
        self.width: int | None = width
        # forwards are functions: Keras must not track the models in them a second time
        if is_functional(backbone):
            forwards = functional_forwards(backbone, self.average, self._tapped_names(), select)
            self._student_forward, self._teacher_forward, self.width = forwards
        else:
            self._student_forward, self._teacher_forward = subclassed_forwards(backbone, self.average, loss, select)
        self.draws = keras.random.SeedGenerator(seed)
        counter = {"shape": (), "initializer": "zeros", "dtype": "int32", "trainable": False}
        self.steps, self.micro_batches = (self.add_weight(name=name, **counter) for name in ("steps", "micro_batches"))
        self.projector_weights = self._make_projector()
        self.logged = {name: keras.metrics.Mean(name) for name in _LOGGED}
        self._begun = False  # looked at before the counters, which lie on the device
        self.built = True

    def _tapped_names(self) -> list[str]:
        if self.student is None and self.teacher is None:
            names = block_names(self.backbone, self.blocks)
            return [names[layer - 1] for layer in self.sra.layers(len(names))]
        if self.student is None or self.teacher is None or self.blocks is not None:
            raise invalid("Taps are given by two layers, student= and teacher=, without blocks=",
                          f"student={self.student!r}, teacher={self.teacher!r}, blocks={self.blocks!r}",
                          "Give both, or none and let the loss's layers decide.")  # fmt: skip
        return [layer_name(self.backbone, layer) for layer in (self.student, self.teacher)]

    def _make_projector(self) -> dict[str, Any]:
        if self.width is None:
            raise invalid("The width of the tapped blocks must be known",
                          f"{type(self.backbone).__name__}, which is not functional", "Pass width=D.")  # fmt: skip
        draws = [keras.random.uniform(shape, seed=self.draws) for shape in _projector.draw_shapes(self.width)]
        weights = {}
        for name, value in _projector.init_projector(*draws).items():
            weights[name] = self.add_weight(shape=tuple(value.shape), dtype="float32", name=f"projector_{name}")
            weights[name].assign(value)
        return weights

    # Training

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The batch as it is: a step needs the labels too, which only `compute_loss` gets."""
        return inputs

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The denoising loss of `compile` plus the weighted term, for clean samples `x` and a condition (in `x` or `y`)."""
        x0, *condition = self._batch(x, y)
        if training:
            self._move_teacher()
            condition = self._dropped(condition)
        noise = keras.random.normal(ops.shape(x0), seed=self.draws)
        t = self._times(ops.shape(x0)[0])
        inputs = self._arranged(self.sra.path.add_noise(x0, noise, t), t, condition)
        prediction, tokens = self._student_forward(inputs, training)
        target = self.sra.path.target(x0, noise, t, self.prediction)
        prediction = ops.cast(prediction, "float32")
        if self.loss is None:
            denoising = keras.losses.MeanSquaredError()(target, prediction, sample_weight)
        else:
            denoising = super().compute_loss(x, target, prediction, sample_weight, training)
        alignment = self._alignment(tokens, x0, noise, t, condition)
        self.logged["denoising"].update_state(denoising)
        if training:
            self._count_step()
        return denoising + alignment

    def _alignment(self, tokens: Any, x0: Any, noise: Any, t: Any, condition: list[Any]) -> Any:
        u = keras.random.uniform(ops.shape(t), seed=self.draws)
        t_teacher = self.sra.teacher_time(t, u)
        x_teacher = self.sra.path.add_noise(x0, noise, t_teacher)
        target = ops.stop_gradient(self._teacher_forward(self._arranged(x_teacher, t_teacher, condition)))
        weights = {name: ops.cast(weight, tokens.dtype) for name, weight in self.projector_weights.items()}
        projected = project(weights, tokens)
        term = self.sra(projected, target, step=self.steps.value)
        info = self.sra.metrics(projected, target)
        for name, value in {"alignment": term, **info}.items():
            if name in self.logged:
                self.logged[name].update_state(value)
        return term

    def _batch(self, x: Any, y: Any) -> list[Any]:
        """x0 and the condition's parts, out of what `fit` got."""
        parts = [part for side in (x, y) if side is not None for part in (side if isinstance(side, (list, tuple)) else [side])]
        if isinstance(x, dict) or not parts:
            raise invalid("fit takes samples, or (samples, labels, ...)", type(x).__name__,
                          "Pass a tuple, and arrange= for names.")  # fmt: skip
        if is_functional(self.backbone) and self.arrange is None:
            inputs = [tuple(i.shape) for i in self.backbone.inputs]
            if len(inputs) != len(parts) + 1:
                raise invalid("The backbone's inputs are x, t and the condition's parts",
                              f"{len(parts) - 1} part(s) of a condition, for inputs of shapes {inputs}",
                              "Pass labels: fit(x0, labels), or arrange=.")  # fmt: skip
            if len(parts[0].shape) != len(inputs[0]):
                raise invalid("Samples must have the rank of the backbone's first input",
                              f"shape {tuple(parts[0].shape)} for {inputs[0]}", "Add or remove axes.")  # fmt: skip
        return [ops.convert_to_tensor(part) for part in parts]

    def _arranged(self, x: Any, t: Any, condition: list[Any]) -> Any:
        return [x, t, *condition] if self.arrange is None else self.arrange(x, t, *condition)

    def _times(self, count: Any) -> Any:
        if self.draw_time is not None:
            return self.draw_time(count, self.draws)
        low, high = self.sra.path.bounds
        if self.sra.path.discrete:
            return keras.random.randint((count,), low, high + 1, seed=self.draws)
        return keras.random.uniform((count,), low, high, seed=self.draws)

    def _dropped(self, condition: list[Any]) -> list[Any]:
        if not self.label_dropout or not condition:
            return condition
        labels, *rest = condition
        drop = keras.random.uniform(ops.shape(labels), seed=self.draws) < self.label_dropout
        return [ops.where(drop, ops.cast(self.null_label, labels.dtype), labels), *rest]

    # The teacher: Keras's train steps carry what is assigned to variables inside compute_loss, but end with the optimizer. So
    # the EMA of one step is taken when the next begins, and in between it is pending.

    def _move_teacher(self) -> None:
        """Take the pending EMA step. Before the first step both sides are equal, and it changes nothing."""
        decay = self.sra.decay_at(ops.maximum(self.steps.value - 1, 0))
        due = None if self._accumulated() == 1 else self.micro_batches.value == 0
        for variable, value in self._moved(decay):
            variable.assign(value if due is None else ops.where(due, value, variable.value))

    def _moved(self, decay: Any) -> list[tuple[Any, Any]]:
        """(the teacher's variable, its value one EMA step further); what is not trained is copied."""
        pairs = list(zip(self.average.weights, self.backbone.weights, strict=True))
        trained = {id(variable) for variable in self.backbone.trainable_weights}
        averaged = {f"{i} {pair[1].path}": pair for i, pair in enumerate(pairs) if id(pair[1]) in trained}
        old, new = ({name: pair[side].value for name, pair in averaged.items()} for side in (0, 1))
        moved = [(averaged[name][0], value) for name, value in ema_update(old, new, decay).items()]
        return moved + [(mine, theirs.value) for mine, theirs in pairs if id(theirs) not in trained]

    def _count_step(self) -> None:
        """Count micro-batches, and optimizer steps."""
        micro_batches = self.micro_batches.value + 1
        done = micro_batches >= self._accumulated()
        self.steps.assign(self.steps.value + ops.cast(done, "int32"))
        self.micro_batches.assign(ops.where(done, 0, micro_batches))

    def _accumulated(self) -> int:
        """Micro-batches in an optimizer step."""
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)  # mixed_float16 wraps it
        return getattr(optimizer, "gradient_accumulation_steps", None) or 1

    def fit(self, *args: Any, **options: Any) -> Any:
        """Keras's fit.

        Raises:
            ValueError: compiled with metrics, which Keras would hand samples instead of predictions; not compiled.
        """
        self._begin()
        return super().fit(*args, **options)

    def train_on_batch(self, *args: Any, **options: Any) -> Any:
        """Keras's train_on_batch; raises as `fit` does."""
        self._begin()
        return super().train_on_batch(*args, **options)

    def _begin(self) -> None:
        """Before the first step the teacher becomes the backbone as it is then: weights may have been loaded in between."""
        others = [metric.name for metric in self.metrics if metric.name not in ("loss", *_LOGGED)]
        if others:
            raise invalid("compile takes no metrics here", ", ".join(others), f"The model logs {', '.join(_LOGGED)} itself.")
        if not self._begun and int(self.steps) == 0 and int(self.micro_batches) == 0:
            copy_weights(self.backbone, self.average)
        self._begun = True

    def ema_backbone(self) -> keras.Model:
        """The EMA model, for sampling: a backbone of its own, on each call a new one, with the averages after the last step."""
        backbone = rebuilt(self.backbone)
        copy_weights(self.average, backbone)
        if int(self.steps) and not int(self.micro_batches):
            values = {id(mine): value for mine, value in self._moved(self.sra.decay_at(int(self.steps) - 1))}
            for variable, mine in zip(backbone.weights, self.average.weights, strict=True):
                variable.assign(ops.copy(values[id(mine)]))  # not the student's own buffer: JAX donates that
        return backbone

    def predict(self, *args: Any, **options: Any) -> Any:
        """Refused: what to predict with is `backbone` or `ema_backbone()`."""
        raise invalid("SelfAligned trains; it does not predict", "predict()", "Sample with ema_backbone(), or call backbone.")

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """What `fit` logs; `compute_loss` has updated it."""
        return self.get_metrics_result()

    # Saving

    def _settings(self) -> dict[str, Any]:
        names = ("blocks", "student", "teacher", "width", "prediction", "label_dropout", "null_label")
        return {**self.sra.settings(), **{name: getattr(self, name) for name in names}}

    def get_config(self) -> dict[str, Any]:
        """Everything that builds the model again, the backbone included."""
        serialize = keras.saving.serialize_keras_object
        functions = {name: serialize(getattr(self, name)) for name in ("select", "arrange", "draw_time")}
        plain = {name: getattr(self, name) for name in ("blocks", "student", "teacher", "width", "prediction", "label_dropout",
                                                        "null_label", "seed", "name")}  # fmt: skip
        return {"backbone": serialize(self.backbone), "loss": self.sra.settings(), **functions, **plain}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> SelfAligned:
        """The model that `get_config` described."""
        config = dict(config)
        for name in ("backbone", "select", "arrange", "draw_time"):
            config[name] = keras.saving.deserialize_keras_object(config[name], custom_objects)
        return cls(loss=SRALoss.from_settings(config.pop("loss")), **config)

    def save_own_variables(self, store: Any) -> None:
        """Projector and counters, and beside them the state of the draws and the settings."""
        super().save_own_variables(store)
        store["draws"] = ops.convert_to_numpy(self.draws.state)
        store["settings"] = numpy.frombuffer(json.dumps(self._settings()).encode(), "uint8")

    def load_own_variables(self, store: Any) -> None:
        """Take back what `save_own_variables` wrote.

        Raises:
            ValueError: the file comes from other settings.
        """
        saved = json.loads(numpy.asarray(store["settings"]).tobytes())
        mine = json.loads(json.dumps(self._settings()))
        changed = [f"{name} {saved.get(name)!r} instead of {mine[name]!r}" for name in mine if saved.get(name) != mine[name]]
        if changed:
            raise invalid("Weights must come from a model of the same settings", ", ".join(changed),
                          "Build it with those settings, or load the whole .keras file.")  # fmt: skip
        super().load_own_variables({name: store[name] for name in store.keys() if name not in ("draws", "settings")})  # noqa: SIM118
        self.draws.state.assign(store["draws"])


def _check_backbone(backbone: Any) -> None:
    backend = keras.backend.backend()
    if backend not in ("torch", "jax", "tensorflow"):
        raise invalid("SelfAligned needs a Keras backend that trains", repr(backend),
                      "Set KERAS_BACKEND to torch, jax or tensorflow before Keras is imported.")  # fmt: skip
    if not isinstance(backbone, keras.Model) or not backbone.built:
        raise invalid("The backbone must be a keras.Model that is built", f"{type(backbone).__name__} {backbone!r:.60}",
                      "Call it once on a batch first, or give it an Input.")  # fmt: skip
    half = [variable.path for variable in backbone.weights if variable.dtype in ("float16", "bfloat16")]
    if half:
        raise invalid("Variables must be float32: an EMA in half precision never moves", f"{half[0]} in half precision",
                      'Use the dtype policy "mixed_float16" or "mixed_bfloat16".')  # fmt: skip
