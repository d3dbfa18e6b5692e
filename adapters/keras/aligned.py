"""The model around a backbone that `compile` and `fit` train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from selfalign.adapting import Objective, Scalar, Settings, Tensor, invalid, paths, shared_teacher

from . import saving
from .average import PendingAverage
from .batches import Batch, check_inputs, input_names, read_batch
from .blocks import find_taps
from .counting import StepCounter
from .drawing import Drawing
from .fitting import Fitting
from .forwards import make_forwards
from .heads import add_heads
from .options import DrawTime, Layers, Options, Select, checked_objectives, training_path
from .step import Step
from .terms import Terms
from .weights import of_samples


@keras.saving.register_keras_serializable(package="selfalign")
class SelfAligned(Fitting):
    """Self-alignment around a diffusion backbone, trained by `fit` on clean samples.

    Each step draws times and noise, runs the backbone on the noisy samples, and adds the terms of
    the objectives to the loss of `compile`. The backbone is trained as it is: save it alone, and no
    trace of the alignment is left. An EMA teacher, where an objective has one, looks at the same
    samples with less noise and runs to its layer only. `ema_backbone()` is that EMA, for sampling.

    `fit` takes samples x0 [B, ...], or (x0, labels, ...) where the backbone takes a condition.
    Labels may also be the data's second part, `fit(x0, labels)`. A dict beside them holds
    "target_tokens" [B, N, D] of yours for an objective that takes them (for a list of objectives a
    dict by name), and a "loss_mask" of the terms over samples [B] or tokens [B, N]:
    `fit(x0, (labels, {"target_tokens": tokens}))`. Weights of samples [B], by class or by sample,
    weigh denoising loss and terms; weights of places in them [B, ...] the denoising loss.

    Args:
        backbone: (x [B, ...], t [B], *condition) -> prediction. A functional model (a keras-hub
            backbone is one) is tapped at its layers. Another model must be built, and return
            (prediction, features), a list of its blocks' outputs [B, N, D]. Condition must not be
            dropped inside it: the teacher, in evaluation mode, would see another one.
        loss: an objective, such as `selfalign.SRALoss`, or a list of them: their terms add up.
        blocks: of a functional backbone, the names of its blocks, such as "block_{}", where it has
            several kinds of numbered layers.
        taps: instead of the blocks' numbers in `loss`, names of two layers, the student's and the
            target's, or their indices in `backbone.layers`; one layer where the target is not a
            layer. A dict by name for objectives that differ.
        teacher: a second, built instance of a backbone that cannot be rebuilt from its
            configuration.
        select: takes the tokens [B, N, D] out of a block's output, where that is not one tensor.
        width: feature width D, where the backbone is not functional and an objective has a head.
        arrange: (x, t, *condition) -> the backbone's inputs; default the list [x, t, *condition].
        path: the noise path, by name or from `selfalign.paths`; default the EMA teacher's, or
            "linear".
        prediction: what the backbone predicts: "velocity", "noise" or "data".
        draw_time: (batch size, seed generator) -> times [B]; default as the path draws them.
        label_dropout: fraction of samples whose label becomes `null_label`, on both sides alike.
        null_label: the label that stands for none.
        seed: of times, noise, gaps, dropped labels and the heads' first values.
        checks: "off" does without the look for conditions that the backbone drops inside.

    Attributes:
        factor: a variable that multiplies all terms, 1 unless a callback assigns another number.

    Raises:
        ValueError: a Keras backend that cannot train, layers that the backbone does not have, a
            backbone that is not built, no width, variables in half precision.
        TypeError: something that is no objective.

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
        loss: Objective | Sequence[Objective],
        *,
        blocks: str | None = None,
        taps: Layers | Mapping[str, Layers] | None = None,
        teacher: keras.Model | None = None,
        select: Select | None = None,
        width: int | None = None,
        arrange: Callable[..., Any] | None = None,
        path: paths.Path | str | None = None,
        prediction: str = "velocity",
        draw_time: DrawTime | None = None,
        label_dropout: float = 0.0,
        null_label: int | None = None,
        seed: int | None = None,
        checks: str = "on",
        name: str | None = None,
        **options: Any,
    ) -> None:
        objectives = checked_objectives(backbone, loss, teacher, options)
        super().__init__(name=name, **options)
        self._options = Options(
            blocks=blocks,
            taps=taps,
            select=select,
            width=width,
            arrange=arrange,
            path=path,
            prediction=prediction,
            draw_time=draw_time,
            label_dropout=label_dropout,
            null_label=null_label,
            seed=seed,
            checks=checks,
        )
        self.backbone = backbone
        self.objectives = objectives
        self.noise_path = training_path(objectives, path)
        self._taps = find_taps(backbone, objectives, self._options)
        source = shared_teacher(objectives)
        # plain objects, here and below: Keras must not track the models in them a second time
        self._average = PendingAverage(backbone, teacher, source) if source else None
        self.average = self._average.average if self._average else None
        self.draws = keras.random.SeedGenerator(seed)
        self._forwards = make_forwards(
            backbone, self.average, objectives, self._taps, self._options
        )
        drawing, held_out = (
            Drawing(generator, self.noise_path, self._options)
            for generator in (self.draws, self.held_out)
        )
        self._step = Step(self.noise_path, drawing, held_out, self._forwards, source, self._options)
        self._terms = Terms(objectives, listed=isinstance(loss, (list, tuple)))
        self._counter = StepCounter(self)
        self.factor = self.add_weight(name="factor", shape=(), initializer="ones", trainable=False)
        self._heads = add_heads(self, objectives, self._forwards, self.draws)
        logged = ("denoising", *self._terms.logged())
        self.logged = {name: keras.metrics.Mean(name) for name in logged}
        self.built = True

    @property
    def width(self) -> int | None:
        """The feature width of the tapped tokens, the first objective's where they differ."""
        return self._forwards.width(next(iter(self.objectives)))

    @property
    def steps(self) -> Tensor:
        """Optimizer steps done."""
        return self._counter.now()

    @property
    def projector(self) -> Any:
        """The variables of the objective's head by name; of a list a dict of them by objective."""
        return self._of_one_or_all(self._heads)

    @property
    def taps(self) -> Any:
        """Names of the tapped layers, the student's and the target's; of a list by objective."""
        return self._of_one_or_all(self._taps)

    def _of_one_or_all(self, by_objective: Mapping[str, Any]) -> Any:
        return by_objective if self._terms.listed else next(iter(by_objective.values()), None)

    # Training

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Tensor | None = None,
        training: bool = True,
    ) -> Scalar:
        """The denoising loss of `compile` plus the terms.

        Args:
            x: clean samples, or (samples, condition, ...).
            y: the condition, unless `x` has it, and target tokens.
            y_pred: not used.
            sample_weight: of samples [B], or of places in them [B, ...].
            training: False moves nothing and drops no labels.
        """
        batch = self._read(x, y, sample_weight)
        check_inputs(self.backbone, batch, self._options)
        step = self._counter.look() if training else self._counter.now()
        if training and self._average is not None:
            self._average.take_step(self._counter)
        outcome = self._step.run(batch, training)
        target = outcome.target
        prediction = outcome.prediction
        denoising = super().compute_loss(x, target, prediction, batch.weights, training)
        self.measure(target, prediction, batch.weights)
        weights = of_samples(batch.weights)
        term, metrics = self._terms.evaluate(
            self._heads,
            outcome.tokens,
            outcome.target_tokens,
            batch.mask,
            weights,
            step,
            self.factor.value,
        )
        metrics["denoising"] = denoising
        for name, metric in self.logged.items():
            metric.update_state(metrics[name], sample_weight=ops.shape(batch.x0)[0])
        return denoising + term + sum(ops.sum(added) for added in outcome.added)

    def _read(self, x: Any, y: Any, weights: Any = None) -> Batch:
        names = input_names(self.backbone, self._options)
        return read_batch(x, y, weights, self.objectives, self._terms.listed, names)

    def samples(self, x: Any, y: Any) -> Tensor:
        """The clean samples of a batch."""
        return self._read(x, y).x0

    def begin(self) -> None:
        """Before the first step the teacher becomes the backbone as it is then.

        Weights may have been loaded since the model was built.
        """
        self._counter.follow(getattr(self, "optimizer", None))
        if self._average is not None:
            self._average.check()
            if int(self.steps) == 0:
                self._average.restart()
                self._forwards.check(self._options)

    def ema_backbone(self) -> keras.Model:
        """The EMA model, for sampling: on each call a new backbone, as after the last step.

        Raises:
            ValueError: no objective has an EMA teacher.
        """
        if self._average is None:
            raise invalid(
                "ema_backbone() needs an objective with an EMA teacher, such as SRALoss",
                ", ".join(self.objectives),
                "Sample with backbone.",
            )
        return self._average.finished(self._counter)

    # Saving

    def get_config(self) -> Settings:
        """Everything that builds the model again, the backbone included."""
        config = saving.config_of(self.objectives, self._terms.listed, self._options)
        backbone = keras.saving.serialize_keras_object(self.backbone)
        return {"backbone": backbone, **config, "name": self.name}

    @classmethod
    def from_config(cls, config: Settings, custom_objects: Settings | None = None) -> SelfAligned:
        """The model that `get_config` described; objectives of yours are in `custom_objects`."""
        return cls(**saving.arguments_of(config, custom_objects))

    def save_own_variables(self, store: Any) -> None:
        """Heads and counters, and beside them the state of the draws and the settings."""
        self._counter.settle()
        super().save_own_variables(store)
        store["draws"] = ops.convert_to_numpy(self.draws.state)
        settings = saving.settings_of(self.objectives, self._options)
        store["settings"] = saving.as_array(settings)

    def load_own_variables(self, store: Any) -> None:
        """Take back what `save_own_variables` wrote.

        Raises:
            ValueError: the file comes from other settings.
        """
        mine = saving.settings_of(self.objectives, self._options)
        saving.check_settings(saving.from_array(store["settings"]), mine)
        names = [name for name in store.keys() if name not in ("draws", "settings")]  # noqa: SIM118
        super().load_own_variables({name: store[name] for name in names})
        self.draws.state.assign(store["draws"])
        self._counter.forget()
