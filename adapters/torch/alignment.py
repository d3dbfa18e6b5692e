"""SelfAlignment: objectives on a PyTorch model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from selfalign.adapting import Metrics, Objective, load_keras, named_objectives, shared_teacher

from . import state
from .arguments import Arguments
from .attached import Attached
from .blocks import Paths, find_taps, mixing_blocks
from .finding import Finder
from .heads import by_name as heads_by_name
from .options import check_model, check_options, check_values, make_teacher, refuse_unknown
from .parts import Tensors, make_parts
from .sharding import unwrap
from .student import Recorder
from .term import Term
from .tokens import Select
from .watch import VERSION, Watch


class SelfAlignment(Attached):
    """Objectives such as SRA around an unmodified PyTorch model.

    Hooks record the student's features in the model's own forward. Calling the object finds the
    target (for SRA it runs the EMA teacher on the same sample with less noise, up to its layer
    only) and returns the weighted term. `update()` after each optimizer step moves the EMA.

    Args:
        model: the diffusion transformer being trained, in its dtype. Nothing in it is changed. What
            is frozen in it is the teacher's as well, not copied (LoRA). Wrap it in DDP, or shard
            it, afterwards.
        loss: an objective such as `selfalign.SRALoss`, or a list of them. Terms add up. Those with
            an EMA teacher have it in common.
        blocks: path of the block list, or of several that run in a row, where the model does not
            tell.
        taps: paths of the student's and the target's module, instead of the layers in `loss`; a
            dict by name for a list of objectives.
        width: feature width D of the tapped blocks. Where it can neither be read from the model nor
            is given, the heads get their parameters at the first forward, or in `recording()`.
        select: takes the sample's tokens [B, N, D] out of a block's output. Default: as found.
        call: how to call the model, (module, x, t, *condition, **condition) -> anything. Default:
            as the student was called, with another sample and another time in their places.
        seed: of the heads' initial values and of the gaps, default torch.initial_seed(). Both have
            generators of their own: the global random stream is the same with and without the term.
        compile: compile the teacher's forward up to its layer, and the term, in training: True, or
            options of torch.compile.
        log_metrics: keep `loss.metrics` of each call in `metrics`, scalars on the device (no host
            sync); of a list as "name/...".
        teacher: an `EMATeacher`, which says how the EMA is kept; or an EMA that you keep up to date
            yourself (a module; torch's AveragedModel; ema-pytorch's, timm's or diffusers' EMA):
            `update()` then only counts steps.
        checks: "on": see that student and teacher are called alike (on the CPU in each step,
            elsewhere in the first), and, in the first steps, that the teacher repeats the student's
            forward on weights of its own. "finite": also raise where a feature is not finite, in
            every step (a host sync). "off": neither.

    Attributes:
        projector: the head, a module; of a list, the heads by name.
        step: optimizer steps done.
        metrics: of the last call.
        taps: paths of the tapped modules; of a list, by name.

    Raises:
        ValueError: layers, paths or width that do not fit the model, a model already attached or
            already sharded, an EMA with other tensors or in half precision.
        TypeError: no module, an option that does not exist; Keras runs on another backend than
            torch.

    Example:
        >>> import torch, selfalign
        >>> from selfalign.adapters.torch import SelfAlignment
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))
        ...     def forward(self, x, t):
        ...         for block in self.blocks:
        ...             x = x + block(x)
        ...         return x
        >>> model = Model()
        >>> align = SelfAlignment(model, selfalign.SRALoss(student_layer=1, teacher_layer=3))
        >>> parameters = [*model.parameters(), *align.projector.parameters()]
        >>> optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        >>> x0, noise, t = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2)
        >>> prediction = model(align.path.add_noise(x0, noise, t), t)
        >>> denoising = torch.nn.functional.mse_loss(prediction, align.path.velocity(x0, noise, t))
        >>> (denoising + align(x0, noise, t)).backward()
        >>> optimizer.step()
        >>> align.update()
        >>> align.step
        1

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Objective | Sequence[Objective],
        *,
        blocks: Paths | None = None,
        taps: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        width: int | None = None,
        select: Select | None = None,
        call: Callable[..., Any] | None = None,
        seed: int | None = None,
        compile: bool | Mapping[str, Any] = False,
        log_metrics: bool = False,
        teacher: Any = None,
        checks: str = "on",
        **unknown: Any,
    ) -> None:
        refuse_unknown(unknown)
        compiled = check_options(checks, compile, log_metrics)
        check_values(blocks, width, select, call, seed)
        check_model(model)
        load_keras("torch")
        self.loss = loss
        self.model = unwrap(model)
        seed = torch.initial_seed() if seed is None else seed
        several = isinstance(loss, (list, tuple))
        objectives = named_objectives(loss)
        found = find_taps(self.model, objectives, blocks, taps)
        source = shared_teacher(objectives)
        self._average, fraction = make_teacher(self.model, source, teacher, found.later)
        parts = make_parts(self.model, objectives, found, width, select, seed, compiled)
        heads = {part.name: part.head for part in parts}
        self.projector: Any = heads_by_name(heads) if several else parts[0].head
        by_name = {part.name: part.taps() for part in parts}
        self.taps: Any = by_name if several else by_name[parts[0].name]

        replayed = source is not None
        watches_draws = replayed and checks != "off"
        hooked = dict.fromkeys(path for part in parts for path in part.own_taps())
        later = {part.target.where for part in parts if part.from_teacher and part.target}
        looked = later - set(hooked) if watches_draws else ()
        self._recorder = Recorder(self.model, hooked, looked, replayed, watches_draws)
        self._term = Term(parts, self._recorder, self._average, fraction, several, seed)
        self._term.finite = checks == "finite"
        self._term.logged = log_metrics or self._term.finite
        if source is not None and self._average is not None:
            self._term.call_teacher(self.model, source, call, checks, compiled)
        own = (self._term.parts, self._recorder, self._term.call)
        tapped = [reader.where for part in parts for reader in part.readers()]
        self._term.finder = Finder(self.model, mixing_blocks(self.model, tapped), *own)
        self._watch = Watch(self.model, heads.values())

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._term.step

    @property
    def metrics(self) -> Metrics:
        """What the last call logged."""
        return self._term.metrics

    @torch.compiler.disable  # it looks at what has run; a compiled step is two graphs around it
    def __call__(
        self,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        *condition: Any,
        u: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        target_tokens: Tensors | None = None,
        **conditions: Any,
    ) -> torch.Tensor:
        """The weighted term for the student's last forward, a float32 scalar.

        Call it once after each forward of the model.

        Args:
            x0: clean samples [B, ...], the ones the student saw noised.
            noise: the same noise as the student's.
            t: the student's times [B].
            *condition, **conditions: what else the model was called with, after classifier-free
                dropout, for `call=`. Without one the student's own is repeated; what is given here
                is compared with it, and may be left out.
            u: draws for the gap, uniform in [0, 1), [B]. Unless given, drawn from seed, step and
                rank; give them where several processes work on one sample (tensor parallelism).
            loss_mask: booleans or weights over samples [B] or tokens [B, N].
            target_tokens: what REPA aligns to, [B, N, width]; of a list of objectives a dict by
                name.

        Raises:
            ValueError: no forward before it, features without gradient, times outside the path,
                shapes that differ, a time or condition that differs between the sides, a target
                that is missing or not wanted; with checks="finite", features that are not finite.
                Another sample than the student's is a warning.

        Example: see the class.
        """
        if self._detached:
            self._check_attached()
        trains = torch.is_grad_enabled()
        given = Arguments(condition, conditions)
        term = self._term(x0, noise, t, given, u, loss_mask, target_tokens, trains)
        if self._term.just_built or not self._watch.collected:
            self._term.just_built = False
            self._watch.begin()
        if trains:
            if self._term.terms > 1:
                self._watch.check_followed(self._term.terms)
            self._watch.aligned = True
            model, heads = self._watch.groups
            self._watch.counted = [sum(map(VERSION, model)), sum(map(VERSION, heads))]
        return term

    def update(self) -> None:
        """Move the EMA one step toward the model. Once per optimizer step, after it.

        Computed in float32 (float64 for float64 parameters); buffers are copied. Where the
        optimizer step was skipped, as GradScaler does for infinite gradients, this one is skipped,
        too. Warns where there was nothing to follow. Without a teacher it counts steps.

        Raises:
            ValueError: the optimizer moved the model and not the projector; something frozen trains
                now.

        Example: see the class.
        """
        if self._detached:
            self._check_attached()
        if self._watch.sees_step(ran=True in self._recorder.passes):
            if self._average is not None:
                self._average.update(self._term.decay())
            self._term.step += 1
            self._term.terms = 0
            self._term.starting = False
        self._watch.stepped()
        self._recorder.forget()  # a forward that had no term

    def state_dict(self) -> dict[str, Any]:
        """Projector, teacher, step, seed and settings: what a resumed run needs beside the model.

        Of the teacher, averages at the EMA's precision, and nothing that is frozen in the model.
        Tensors are copies: training on does not change a state.

        Example:
            >>> import torch, selfalign
            >>> from selfalign.adapters.torch import SelfAlignment
            >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
            >>> loss = selfalign.SRALoss(student_layer=1, teacher_layer=3)
            >>> sorted(SelfAlignment(model, loss).state_dict())
            ['projector', 'seed', 'settings', 'step', 'teacher', 'terms']
        """
        return state.saved(self._term)

    def load_state_dict(self, saved: Mapping[str, Any], changed: Iterable[str] = ()) -> None:
        """Take back what `state_dict` gave. Everything is checked first: an error changes nothing.

        Args:
            saved: the state.
            changed: settings that may differ from the saved ones, such as ("weight", "decay").

        Raises:
            ValueError: what is no state, other settings, or tensors of other names or shapes.

        Example: `align.load_state_dict(torch.load("checkpoint.pt")["align"])`.
        """
        state.load(self._term, saved, changed)
        self._watch.start_anew()
