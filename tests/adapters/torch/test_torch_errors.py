"""Everything that can be attached or called wrongly says so: the rule, what was received, what to do."""

import subprocess
import sys

import pytest
import torch
from dit_models import DiT, PairBlock, seen
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment


class TwoLists(DiT):
    def __init__(self):
        super().__init__()
        self.more_blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))


class Ambiguous(DiT):
    """A block whose layers do not tell its width."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.norm = nn.Identity()


def loss_of(student, teacher, **settings):
    return selfalign.SRALoss(student_layer=student, teacher_layer=teacher, **settings)


ATTACH = {
    "no block list": (lambda: nn.Linear(4, 4), {}, r"exactly one list of alike blocks.*Received: found none.*Pass blocks="),
    "two block lists": (TwoLists, {}, r"found 'blocks' \(6 x Block\), 'more_blocks' \(3 x Linear\).*Pass blocks="),
    "path that does not exist": (
        DiT,
        {"blocks": "transformer_blocks"},
        r"must lead to a module.*Received: 'transformer_blocks'.*It has: x_embedder.*Lists of alike blocks in it: 'blocks'",
    ),
    "path that is no list": (
        DiT,
        {"blocks": "final_layer"},
        r"must name a non-empty nn.ModuleList.*'final_layer', a Linear.*'blocks'",
    ),
    "student path alone": (DiT, {"student": "blocks.1"}, r"given by two paths.*student='blocks.1', teacher=None.*Give both"),
    "paths and blocks": (
        DiT,
        {"student": "blocks.1", "teacher": "blocks.2", "blocks": "blocks"},
        r"without blocks=.*Give both",
    ),
    "student path that breaks off": (
        DiT,
        {"student": "blocks.9", "teacher": "blocks.4"},
        r"must lead to a module.*'blocks.9', but blocks has no '9'.*It has: 0, 1, 2, 3, 4, 5",
    ),
    "layer beyond the depth": (
        DiT,
        {"loss": loss_of(2, 8)},
        r"teacher_layer must be at most the model's depth.*layer 8 of 6 blocks",
    ),
    "same layer by fractions": (
        DiT,
        {"loss": loss_of(0.3, 0.35)},
        r"student_layer must come before teacher_layer.*student 2, teacher 2",
    ),
    "width unknown": (Ambiguous, {}, r"width of the tapped block must be known.*'blocks.1'.*Pass width=D, or example="),
    "teacher of another model": (DiT, {"teacher": DiT(depth=8)}, r"teacher= must have the same tensors.*'blocks.6\."),
}


@pytest.mark.parametrize(("make", "options", "message"), ATTACH.values(), ids=ATTACH)
def test_wrong_attachment(make, options, message, loss):
    with pytest.raises(ValueError, match=message):
        SelfAlignment(make(), options.pop("loss", loss), **options)


def test_width_or_example_solves_an_unknown_width(loss, batch):
    for options in ({"width": 16}, {"example": (batch[0], *batch[2:])}):
        model = Ambiguous()
        with SelfAlignment(model, loss, **options) as align:
            model(*seen(batch))
            assert align.projector.hidden_kernel.shape == (16, 32)
            assert align(*batch).item() > 0


def test_paths_of_two_modules(model, batch):
    align = SelfAlignment(model, loss_of(1, 2), student="blocks.2", teacher="blocks.5")
    model(*seen(batch))
    assert align(*batch).item() > 0
    assert align.taps == ["blocks.2", "blocks.5"]


def test_second_attachment(model, loss):
    with SelfAlignment(model, loss), pytest.raises(ValueError, match=r"attached once.*a second SelfAlignment on DiT.*detach"):
        SelfAlignment(model, loss)
    assert SelfAlignment(model, loss).step == 0


def test_wrong_width(model, loss, batch):
    align = SelfAlignment(model, loss, width=8)
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"must have the projector's width. Received: width 16, projector of width 8.*width="):
        align(*batch)


def test_align_before_forward_twice_and_after_two_forwards(loop, batch):
    with pytest.raises(ValueError, match=r"forward must run before align\(\).*no output of blocks.1"):
        loop.align(*batch)
    loop.forward(*batch)
    loop.align(*batch)
    with pytest.raises(ValueError, match=r"forward must run before align\(\).*since the last align"):
        loop.align(*batch)
    loop.forward(*batch)
    loop.forward(*batch)
    with pytest.raises(
        ValueError, match=r"must run once per align\(\).*blocks.1 ran 1 times in 2 forward\(s\).*after each forward"
    ):
        loop.align(*batch)


def test_block_that_runs_twice_or_never(loss, batch):
    class Looped(DiT):
        def forward(self, x, t, y):
            x, c = self.x_embedder(x), self.embed_time(t)
            for index in self.order:
                x = self.blocks[index](x, c)
            return self.final_layer(x)

    for order, message in (((0, 1, 1, 3), r"blocks.1 ran 2 times in 1 forward"), ((0, 3), r"forward must run before align")):
        model = Looped()
        model.order = order
        align = SelfAlignment(model, loss)
        model(*seen(batch))
        with pytest.raises(ValueError, match=message):
            align(*batch)
    model.order = (0, 1)
    align.teacher.order = (0, 1)
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"teacher's forward must reach its tapped block. Received: blocks.3 never ran"):
        align(*batch)


def test_frozen_student(model, loss, batch):
    align = SelfAlignment(model, loss)
    model.requires_grad_(False)
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"must carry a gradient. Received: features of blocks.1 without one"):
        align(*batch)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0.1, 0.2, 0.3, 1.5]), r"t must lie in \[0, 1\]. Received: values from 0.1 to 1.5"),
        (0.5, r"one time per sample, shape \[B\]. Received: shape \(\)"),
        (torch.rand(3), r"one time per sample, shape \[B\] = \(4,\). Received: shape \(3,\)"),
        (torch.rand(4, 1), r"one time per sample, shape \[B\]. Received: shape \(4, 1\)"),
        (torch.tensor([1, 2, 3, 4]), r"takes floating-point times. Received: t of dtype int64"),
    ],
)
def test_wrong_times(loop, batch, t, message):
    loop.forward(*batch)
    with pytest.raises((ValueError, TypeError), match=message):
        loop.align(batch[0], batch[1], t, batch[3])


def test_another_batch_than_the_students(loop, batch):
    loop.forward(*batch)
    with pytest.raises(ValueError, match=r"the x0, noise and t of align\(\). Received: no arguments like x_t"):
        loop.align(*(part[:2] for part in batch))
    loop.step(batch)
    loop.forward(*batch)
    with pytest.raises(
        ValueError,
        match=r"argument 0: shape \(4, 5, 4\) .* for the student, shape \(2, 5, 4\)",
    ):
        loop.align(*(part[:2] for part in batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"must hold one tensor \[B, N, D\], or .* Received: blocks.1: tuple of \(shape \(4, 5, 16\), shape \(4, 1, 16\)\)",
        ),
        ({"select": lambda output: output}, r"must give tokens \[B, N, D\], or features .* Received: blocks.1: tuple of"),
        (
            {"select": lambda output: output[0].flatten(1)},
            r"must give tokens \[B, N, D\], or features .* Received: blocks.1: shape \(4, 80\)",
        ),
    ],
)
def test_outputs_that_are_not_tokens(loss, batch, options, message):
    model = DiT(block=PairBlock)
    align = SelfAlignment(model, loss, **options)
    model(*seen(batch))
    with pytest.raises(ValueError, match=message):
        align(*batch)


def test_update_twice_is_warned(loop, batch):
    loop.step(batch)
    with pytest.warns(UserWarning, match="once per optimizer step. Received: a call with neither"):
        loop.align.update()
    assert loop.align.step == 2


def test_update_never_is_warned_once(loop, batch):
    def step():
        (loop.forward(*batch) + loop.align(*batch)).backward()
        loop.optimizer.step()

    step()
    with pytest.warns(UserWarning, match=r"must follow each optimizer step. Received: an optimizer step, but no update\(\)"):
        step()
    step()  # warnings are errors here: a second one would fail
    assert loop.align.step == 0


def test_projector_missing_from_the_optimizer(model, loss, batch, make_loop):
    loop = make_loop(model, loss)
    loop.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(
        ValueError, match=r"projector must be trained.*left the projector as it was.*align.projector.parameters"
    ):
        loop.step(batch)


def test_term_missing_from_the_loss(loop, batch):
    loop.align.projector.zero_grad()
    loop.forward(*batch).backward()
    loop.align(*batch)
    loop.optimizer.step()
    with pytest.raises(ValueError, match="projector must be trained with the model"):
        loop.align.update()


def test_frozen_projector_is_a_choice(model, loss, batch, make_loop):
    loop = make_loop(model, loss)
    loop.align.projector.requires_grad_(False)
    loop.step(batch)
    assert loop.align.step == 1


def test_after_detach(loop, batch):
    loop.align.detach()
    for call in (lambda: loop.align(*batch), loop.align.update):
        with pytest.raises(ValueError, match=r"attached to its model. Received: a call after detach\(\)"):
            call()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sick_features_stay_visible_and_are_named(model, loss, batch, make_loop, side, value):
    loop = make_loop(model, loss, log_metrics=True)
    loop.step(batch)  # the first term makes the teacher the model as it is
    sick = {"student": model, "teacher": loop.align.teacher}[side]
    with torch.no_grad():
        sick.blocks[1].mlp[2].bias[0] = value
    loop.forward(*batch)
    assert not torch.isfinite(loop.align(*batch))
    assert not loop.align.metrics[f"{side}_finite"]
    loop.align.check_finite = True
    loop.forward(*batch)
    with pytest.raises(ValueError, match=rf"Features must be finite. Received: NaN or infinity in the tokens of the {side}. "):
        loop.align(*batch)


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"KERAS_BACKEND": "jax"}, "", "a torch tensor, with the Keras backend 'jax' (the environment variable KERAS_BACKEND"),
        (
            {},
            "import os; os.environ['KERAS_BACKEND'] = 'jax'; import keras; ",
            "with the Keras backend 'jax' (Keras already runs",
        ),
    ],
)
def test_another_backend_is_named_when_attaching(environment, code, message):
    code += (
        "import torch, selfalign; from selfalign.adapters.torch import SelfAlignment; "
        "SelfAlignment(torch.nn.Sequential(torch.nn.Linear(2, 2)), selfalign.SRALoss(student_layer=1, teacher_layer=2))"
    )
    import os

    clean = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Set KERAS_BACKEND=torch before the first import of Keras" in done.stderr
