"""SRA for PyTorch models as they are: taps by hooks, an EMA teacher that stops after its layer, a native projector."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from selfalign._backend import load_keras
from selfalign._checks import check_number, check_time, invalid
from selfalign.loss import SRALoss
from selfalign.paths import Path

from ._torch_distributed import average_gradients, share, unwrap, world
from ._torch_ema import HALF, Teacher, check_same_tensors
from ._torch_families import stream
from ._torch_features import features as features
from ._torch_forward import Forward, Inputs, autocasting, check_share, own_tokens
from ._torch_projector import Projector as Projector
from ._torch_taps import Select, Tap, find_blocks, find_module, read_width, run_until, tokens_of
from ._torch_watch import Watch


class SelfAlignment:
    """Self-Representation Alignment around an unmodified PyTorch model.

    Hooks record the student's features in the model's own forward. Calling the object runs the EMA teacher on the same sample
    with less noise, up to its layer only, and returns the weighted term. `update()` after each optimizer step moves the EMA.

    Args:
        model: the diffusion transformer being trained, in its dtype. Nothing in it is changed. What is frozen
            in it is shared with the teacher, not copied (LoRA). Wrap it in DDP, or shard it, afterwards.
        loss: the settings; `loss.decay` is the EMA's.
        blocks: path of the block list, or of several that run in a row, where the model does not tell.
        student, teacher: paths of the two tapped modules, instead of the layers in `loss`. `teacher` also accepts an EMA that
            you keep up to date yourself (a module; torch's AveragedModel; ema-pytorch's, timm's or diffusers' EMA);
            `update()` then only counts steps. Or the model itself, with max_gap=0: its own later layer in the same forward
            is the target, and there is no second forward and no EMA.
        width: feature width D of the tapped blocks, where it cannot be read from the model.
        example: instead of width, inputs for a dry run that finds it: (x, t, *condition), or a dict of the model's arguments.
        select: takes the tokens [B, N, D] out of a block's output, where that is not one tensor.
        call: how to call the model, (module, x, t, *condition, **condition) -> anything. Default: as the student was called,
            with another sample and another time in their places.
        seed: of the projector's initial values and of the gaps, default torch.initial_seed(). Both have generators of their
            own: the global random stream is the same with and without SRA.
        truncate: do without the blocks after the teacher's layer. Saves their memory; one cannot sample from `teacher` then.
        offload: keep float32 averages in CPU memory, and on the model's device only the teacher's copy in the model's dtype.
        teacher_dtype: torch.bfloat16 or torch.float16: the teacher's copy of a float32 model, beside float32 averages; it runs
            under autocast in that dtype.
        batch_share: align only the first samples of each batch, this share of it, in (0, 1].
        compile: compile the teacher's forward up to its layer, and the term: True, or options of torch.compile.
        check_condition: see that student and teacher are called alike (on the CPU in each step, elsewhere in the first), and,
            before the first term, that what the model drops of its condition in training is dropped on both sides.
        check_finite: look at all features in every step (a host sync) and raise where one is not finite.
        log_metrics: keep `loss.metrics` of each call in `metrics`, scalars on the device (no host sync).

    Raises:
        ValueError: layers, paths or width that do not fit the model, a model already attached or already sharded, an EMA with
            other tensors or in half precision.
        TypeError: Keras runs on another backend than torch.

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
        >>> optimizer = torch.optim.AdamW([*model.parameters(), *align.projector.parameters()], lr=1e-3)
        >>> x0, noise, t = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2)
        >>> prediction = model(align.path.add_noise(x0, noise, t), t)
        >>> loss = torch.nn.functional.mse_loss(prediction, align.path.velocity(x0, noise, t)) + align(x0, noise, t)
        >>> loss.backward(); optimizer.step(); align.update()
        >>> align.step
        1

    Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: SRALoss,
        *,
        blocks: str | Sequence[str] | None = None,
        student: str | None = None,
        teacher: Any = None,
        width: int | None = None,
        example: tuple[Any, ...] | dict[str, Any] | None = None,
        select: Select | None = None,
        call: Callable[..., Any] | None = None,
        seed: int | None = None,
        truncate: bool = False,
        offload: bool = False,
        teacher_dtype: torch.dtype | None = None,
        batch_share: float = 1.0,
        compile: bool | Mapping[str, Any] = False,
        check_condition: bool = True,
        check_finite: bool = False,
        log_metrics: bool = False,
    ) -> None:
        load_keras("torch")
        self.model, self.loss, self.select, self.call = unwrap(model), loss, select, call
        self.batch_share = check_number("batch_share", batch_share, 1e-12, 1)
        self.check_finite, self.log_metrics = check_finite, log_metrics
        self.metrics: dict[str, torch.Tensor] = {}
        self.step, self._terms, self._validated = 0, 0, 0  # optimizer steps, terms since the last, terms without gradient
        self._seed = torch.initial_seed() if seed is None else seed

        path, given = (teacher, None) if isinstance(teacher, str) else (None, teacher)
        first, self.taps, later = self._find_taps(blocks, student, path)
        block = self.model.get_submodule(self.taps[0])
        itself = given is not None and given in (model, self.model)
        self._check_teacher(given, itself, truncate, later)
        self._ema = Teacher(self.model, given, later if truncate else (), offload, teacher_dtype)
        self._width = self._find_width(block, example) if width is None else width
        self.projector = self._make_projector(block)

        target = self.model.get_submodule(self.taps[1]) if itself else None
        self._tap: Tap | None = Tap(self.model, block, self.taps[0], target)
        options = None if compile is False else dict(compile) if isinstance(compile, Mapping) else {}
        rest = self._width, select, call, not check_condition, options
        self._forward = None if itself else Forward(self.model, self.teacher, loss, self._tap, first, self.taps[1], *rest)
        self._check_share = check_condition and self.batch_share < 1
        # weighted outside of what is compiled: another weight would be another function
        self._unit = dataclasses.replace(loss, weight=1.0)
        self._compare = self._compare_eagerly if options is None else torch.compile(self._compare_eagerly, **options)
        self._watch = Watch(self.model, self.projector)

    def _find_taps(self, blocks: Any, student: str | None, teacher: str | None) -> tuple[str, list[str], list[str]]:
        """Paths of the first block, of the student's and the teacher's tapped modules, and of the blocks after these."""
        if student is None and teacher is None:
            found = find_blocks(self.model, blocks)
            numbers = self.loss.layers(len(found))
            taps = [found[number - 1] for number in numbers]
            if len({id(self.model.get_submodule(path)) for path in found}) < len(found):
                raise invalid("Blocks must be modules of their own", f"one module at several places of {found[0]!r} ...",
                              "Where a block runs several times in a forward, its output has no place of its own.")  # fmt: skip
            return found[0], taps, found[max(numbers) :]
        if student is None or teacher is None or blocks is not None:
            raise invalid("Taps are given by two paths, student= and teacher=, without blocks=",
                          f"student={student!r}, teacher={teacher!r}, blocks={blocks!r}",
                          "Give both paths, or none and let the loss's layers decide.")  # fmt: skip
        for path in (student, teacher):
            find_module(self.model, path)
        parent = student.rpartition(".")[0]
        alike = isinstance(self.model.get_submodule(parent), (nn.ModuleList, nn.Sequential))
        return f"{parent}.0".lstrip(".") if alike else student, [student, teacher], []

    def _check_teacher(self, given: Any, itself: bool, truncate: bool, later: list[str]) -> None:
        """Refuse options that a teacher of the user's, or none, cannot have."""
        if truncate and (given is not None or not later):
            raise invalid("truncate= cuts the blocks after the teacher's layer off a teacher of ours",
                          "teacher= of yours" if given is not None else f"no blocks after {self.taps[1]!r}",
                          "Leave truncate= out.")  # fmt: skip
        if itself and self.loss.max_gap:
            raise invalid("teacher=model takes the target from the student's own forward, at its own noise",
                          f"max_gap={self.loss.max_gap}", "Pass SRALoss(max_gap=0); for a second forward of the model as it "
                          "is, leave teacher= out and pass SRALoss(decay=0).")  # fmt: skip

    def _find_width(self, block: nn.Module, example: Any) -> int:
        width = read_width(self.model, block) if example is None else self._dry_run(example)
        if width is None:
            raise invalid("The width of the tapped block must be known", f"{self.taps[0]!r}, which does not tell it clearly",
                          "Pass width=D, or example=(x, t, *condition) for a dry run.")  # fmt: skip
        return width

    def _dry_run(self, example: Any) -> int:
        """The width of the student's tokens in a forward of the teacher."""
        where = self.taps[0]
        block, call = self.teacher.get_submodule(where), self.call or (lambda module, *args, **kwargs: module(*args, **kwargs))
        args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
        with torch.no_grad(), torch.random.fork_rng():
            reached = run_until(lambda: call(self.teacher, *args, **kwargs), block, where)
        x0 = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        select = self.select or stream(self.model, block, x0, kwargs)
        return tokens_of(reached, select, block, where).shape[-1]

    def _make_projector(self, block: nn.Module) -> Projector:
        like = next((p for p in [*block.parameters(), *self.model.parameters()] if p.is_floating_point()), torch.empty(0))
        made = Projector(self._width, torch.Generator().manual_seed(self._drawn("projector")), like)
        average_gradients(made)
        return made

    def _drawn(self, *what: Any) -> int:
        """A seed for one purpose: streams of their own, also beside generators that the user has seeded alike."""
        return random.Random(repr((self._seed, *what))).getrandbits(32)

    @property
    def path(self) -> Path:
        """The noise path of the loss."""
        return self.loss.path

    @property
    def teacher(self) -> nn.Module:
        """The EMA model, for sampling: in eval mode, without gradient; what is frozen in the model is the model's own."""
        return self._ema.module

    @torch.compiler.disable  # it looks at what has run; in a compiled step it stands between two graphs
    def __call__(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, *condition: Any, u: torch.Tensor | None = None,
                 loss_mask: torch.Tensor | None = None, **conditions: Any) -> torch.Tensor:  # fmt: skip
        """The weighted term for the student's last forward, a float32 scalar; call it once after each forward of the model.

        Args:
            x0: clean samples [B, ...], the ones the student saw noised.
            noise: the same noise as the student's.
            t: the student's times [B].
            *condition, **conditions: what else the model was called with, after classifier-free dropout, for `call=`. Without
                one the student's own is repeated; what is given here is compared with it, and may be left out.
            u: draws for the gap, uniform in [0, 1), [B]. Unless given, drawn from seed, step and rank; give them where several
                processes work on one sample (tensor parallelism).
            loss_mask: booleans or weights over samples [B] or tokens [B, N].

        Raises:
            ValueError: no forward before it, features without gradient, times outside the path, shapes that differ, a time or
                condition that differs between the sides; with check_finite=True, features that are not finite. Another
                sample than the student's is a warning.

        Example:
            >>> import torch, selfalign
            >>> from selfalign.adapters.torch import SelfAlignment
            >>> class Model(torch.nn.Sequential):
            ...     def forward(self, x, t):
            ...         return super().forward(x)
            >>> model = Model(*(torch.nn.Linear(8, 8) for _ in range(4)))
            >>> align = SelfAlignment(model, selfalign.SRALoss(student_layer=1, teacher_layer=3))
            >>> x0, noise, t = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2)
            >>> prediction = model(align.path.add_noise(x0, noise, t), t)
            >>> align(x0, noise, t).shape
            torch.Size([])
        """
        tap = self._attached()
        trains = torch.is_grad_enabled()
        if self.step == 0:
            if self._terms == 0 and trains:  # a validation may run on one process alone
                self.projector.to(next(tap.block.parameters(), x0).device)  # the model may have been moved
                share(self.projector)
            # on a GPU in the first step only: it waits for the device
            check_time(self.path, t.cpu() if isinstance(t, torch.Tensor) else t)
        self._ema.start(trains)
        called, autocast, own = tap.called, tap.autocast, tap.target
        student = tap.take(self.select or stream(self.model, tap.block, x0, called[1]), self._width)
        if self._forward is None:
            whole = own_tokens(self.model, self.taps[1], own, self.select, self._width, x0, called[1])
            tokens = whole[: self._aligned(len(whole))]
        else:
            draws = self._gaps(t, trains) if u is None else u
            inputs = Inputs(x0, noise, t, draws, called, (condition, conditions), self._forward.condition.take())
            tokens = self._teacher_tokens(inputs, autocast, student.dtype)
        count = len(tokens)
        with autocasting(student.device, autocast):
            mask = None if loss_mask is None else loss_mask[:count]
            distance, self.metrics = self._compare(student[:count], tokens[:count], mask)
            if self.check_finite:
                self._check_finite()
            term = (distance * self.loss.weight_at(self.step)).float()
        if trains:
            self._watch.note_align()
            self._terms += 1
        return term

    def _compare_eagerly(self, student: torch.Tensor, tokens: torch.Tensor, mask: Any) -> tuple[Any, dict[str, Any]]:
        projected = self.projector(student)
        logged = self.check_finite or self.log_metrics
        return self._unit(projected, tokens, mask=mask), self.loss.metrics(projected, tokens) if logged else {}

    def _gaps(self, t: torch.Tensor, trains: bool) -> torch.Tensor:
        """Draws [B] that differ between processes and do not depend on how many there are; validation has its own."""
        self._validated += not trains
        where = ("gap", self.step, self._terms) if trains else ("validation", self._validated)
        generator = torch.Generator(t.device).manual_seed(self._drawn(*where, world()[0]))
        return torch.rand(t.shape, generator=generator, device=t.device)

    def _teacher_tokens(self, whole: Inputs, autocast: tuple[bool, torch.dtype], dtype: torch.dtype) -> torch.Tensor:
        """The teacher's tokens for the first samples of the batch, as many as are aligned."""
        forward: Any = self._forward
        if self._ema.dtype is not None:
            autocast = True, self._ema.dtype
        elif not self._ema.owned and dtype in HALF:  # the user's EMA is float32, what the student was called with is not
            autocast = True, dtype
        count = self._aligned(len(whole.t))
        inputs = whole if count == len(whole.t) else whole.first(count)
        with autocasting(whole.t.device, autocast):
            expected = forward(whole)[:count] if self._check_share and inputs is not whole else None
            tokens = forward(inputs)
        if expected is not None:
            check_share(tokens, expected)
            self._check_share = False
        return tokens

    def _aligned(self, batch: int) -> int:
        """How many samples of a batch have a term."""
        return max(1, round(self.batch_share * batch))

    def _check_finite(self) -> None:
        sick = [side for side in ("student", "teacher") if not self.metrics[f"{side}_finite"]]
        if sick:
            raise invalid("Features must be finite", f"NaN or infinity in the tokens of the {' and the '.join(sick)}",
                          "Lower the learning rate or clip gradients; in float16 look for overflow.")  # fmt: skip

    def _attached(self) -> Tap:
        if self._tap is None:
            raise invalid("The object must be attached to its model", "a call after detach()", "Build a new SelfAlignment.")
        return self._tap

    def update(self) -> None:
        """Move the EMA one step toward the model. Once per optimizer step (not per micro-batch), after it.

        Computed in float32 (float64 for float64 parameters); buffers are copied. Where the optimizer step was skipped, as
        GradScaler does for infinite gradients, this one is skipped, too. Warns where there was nothing to follow.

        Raises:
            ValueError: the optimizer moved the model and not the projector; something frozen trains now.

        Example: see the class.
        """
        tap = self._attached()
        if self._watch.sees_step():
            self._ema.update(float(self.loss.decay_at(self.step)))
            self.step += 1
            self._terms = 0
        self._watch.stepped()
        tap.forget()  # of a forward that had no term

    def state_dict(self) -> dict[str, Any]:
        """Projector, teacher, step, seed and settings: all that a resumed run needs beside the model.

        Of the teacher, averages at the EMA's precision, and nothing that is frozen in the model.

        Example:
            >>> import torch, selfalign
            >>> from selfalign.adapters.torch import SelfAlignment
            >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
            >>> loss = selfalign.SRALoss(student_layer=1, teacher_layer=3)
            >>> align = SelfAlignment(model, loss, student="0", teacher="2")
            >>> sorted(align.state_dict())
            ['projector', 'seed', 'settings', 'step', 'teacher', 'terms']
        """
        return {
            "settings": {**self.loss.settings(), "taps": self.taps},
            "step": self.step,
            "seed": self._seed,
            "terms": self._terms,
            "projector": self.projector.state_dict(),
            "teacher": self._ema.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave. Everything is checked first: an error changes nothing.

        Raises:
            ValueError: missing or unknown entries, other settings, or tensors of other names or shapes.

        Example: `align.load_state_dict(torch.load("checkpoint.pt")["align"])`.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise invalid("The state must be one of SelfAlignment.state_dict()", f"entries {sorted(state)}",
                          f"Pass a dict with {sorted(mine)}.")  # fmt: skip
        theirs, ours = state["settings"], mine["settings"]
        differing = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        if differing:
            raise invalid("The state must come from the same settings",
                          ", ".join(f"{name} {theirs.get(name)!r:.80} instead of {ours.get(name)!r:.80}" for name in differing),
                          "Build the loss with the settings that were saved, or start afresh.")  # fmt: skip
        for name in ("projector", "teacher"):
            check_same_tensors(f"The state's {name}", state[name], mine[name])
        self.projector.load_state_dict(state["projector"])
        self._ema.load_state_dict(state["teacher"])
        self._seed, self.step, self._terms = (int(state[name]) for name in ("seed", "step", "terms"))
        self._watch.stepped()

    def __reduce__(self) -> Any:
        raise TypeError("A SelfAlignment cannot be copied or pickled: its hooks are on one model. Received: copy, deepcopy or "
                        "pickle. Build a new one on the copied model, and hand it state_dict().")  # fmt: skip

    def detach(self) -> None:
        """Remove every hook: the model is as it was. The teacher stays, for sampling. A `with` block ends in it."""
        if self._tap is not None:
            self._tap.remove()
            if self._forward is not None:
                self._forward.condition.remove()
            self._tap = None

    def __enter__(self) -> SelfAlignment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
