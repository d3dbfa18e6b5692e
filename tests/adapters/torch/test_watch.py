"""What align() and update() notice of the user's loop: whether the optimizer has stepped."""

import copy

import pytest
import torch
from dit_models import DiT, seen

import selfalign
from selfalign.adapters.torch import SelfAlignment

LAYERSYNC = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4)


def test_update_twice_is_warned(loop, batch):
    loop.step(batch)
    with pytest.warns(UserWarning, match="once per optimizer step. Received: a call with neither"):
        loop.align.update()
    assert loop.align.step == 2


@pytest.mark.parametrize("has_teacher", [True, False])
def test_update_never_is_warned_once(batch, make_loop, loss, has_teacher):
    loop = make_loop(DiT(), loss if has_teacher else LAYERSYNC)

    def step():
        (loop.forward(*batch) + loop.align(*batch)).backward()
        loop.optimizer.step()

    step()
    message = r"must follow each optimizer step. Received: an optimizer step, but no update\(\)"
    with pytest.warns(UserWarning, match=message):
        step()
    step()  # warnings are errors here: a second one would fail
    assert loop.align.step == 0


def test_projector_missing_from_the_optimizer(loop, batch):
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-3)
    message = r"projector must be trained.*left the projector as it was.*align.projector.parameters"
    with pytest.raises(ValueError, match=message):
        loop.step(batch)
    assert loop.align.step == 0


def test_one_of_several_heads_missing_from_the_optimizer_counts_as_trained(batch, make_loop, loss):
    """The counters are those of all heads together."""
    layersync = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4, projector=True)
    loop = make_loop(DiT(), [loss, layersync])
    first = [*loop.model.parameters(), *loop.align.projector["sra"].parameters()]
    loop.optimizer = torch.optim.AdamW(first, lr=1e-3)
    loop.step(batch)
    assert loop.align.step == 1


def test_term_missing_from_the_loss(loop, batch):
    loop.forward(*batch).backward()
    loop.align(*batch)
    loop.optimizer.step()
    with pytest.raises(ValueError, match="projector must be trained with the model"):
        loop.align.update()


def test_frozen_projector_is_a_choice(loop, batch):
    loop.align.projector.requires_grad_(False)
    loop.step(batch)
    assert loop.align.step == 1


def test_an_objective_without_head_has_none_to_miss(batch, make_loop):
    loop = make_loop(DiT(), LAYERSYNC)
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-3)
    loop.step(batch)
    assert loop.align.step == 1


class DataSGD(torch.optim.SGD):
    """Writes where torch does not count."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad


class Choosy(torch.optim.SGD):
    """Skips its own first steps, as where a gradient is too large."""

    skips = 2

    def step(self, closure=None):
        self.skips -= 1
        if self.skips < 0:
            super().step(closure)


def resting(parameters, lr):
    return DataSGD(parameters, 0.0)


def decaying(parameters, lr):
    return torch.optim.SGD(parameters, 0.0, weight_decay=0.1)


@pytest.mark.parametrize("zeroed", [True, False])
@pytest.mark.parametrize("kind", [DataSGD, Choosy, resting, decaying])
@pytest.mark.parametrize("side", ["projector", "model"])
def test_optimizers_of_any_kind_one_for_each_side(kind, side, zeroed, loss, batch, make_loop):
    loop = make_loop(DiT(depth=4), loss)
    kinds = {"projector": torch.optim.AdamW, "model": torch.optim.AdamW, side: kind}
    optimizers = [kinds["model"](loop.model.parameters(), 1e-2)]
    optimizers += [kinds["projector"](loop.align.projector.parameters(), 1e-2)]
    for _ in range(4):
        (loop.forward(*batch) + loop.align(*batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
            if zeroed:
                optimizer.zero_grad()
        loop.align.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert loop.align.step == 4


def test_a_projector_that_rests_long_is_warned_about(loss, batch, make_loop):
    loop = make_loop(DiT(depth=4), loss)
    resting_too = resting(loop.align.projector.parameters(), 0.0)
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), 1e-2)
    for _ in range(19):
        loop.step(batch)
    with pytest.warns(UserWarning, match=r"20 steps that moved the model and left the projector"):
        loop.step(batch)
    loop.step(batch)
    assert resting_too.param_groups


def test_a_forgotten_projector_beside_a_hand_made_optimizer(loss, batch, make_loop):
    loop = make_loop(DiT(depth=4), loss)
    loop.optimizer = ByHand(loop.model)
    loop.step(batch)
    loop.step(batch)
    with pytest.raises(ValueError, match=r"projector must be trained with the model"):
        loop.step(batch)


class ByHand:
    """No optimizer of torch's."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def step(self):
        for p in self.model.parameters():
            if p.grad is not None:
                p.sub_(0.01 * p.grad)

    def zero_grad(self):
        self.model.zero_grad()


@pytest.mark.parametrize("weight", [0.9, 0.5])
def test_weights_that_are_swapped_and_put_back_are_no_step(loss, batch, make_loop, weight):
    """As ScheduleFree does around a validation, but for rounding; also between micro-batches."""
    loop = make_loop(DiT(depth=4), loss)
    other = [torch.randn_like(p) * 0.02 for p in loop.parameters]
    loop.step(batch)

    @torch.no_grad()
    def validate():
        for p, z in zip(loop.parameters, other, strict=True):
            p.lerp_(z, 1 - 1 / weight)
        loop.model(*seen(batch))
        for p, z in zip(loop.parameters, other, strict=True):
            p.lerp_(z, 1 - weight)

    validate()
    loop.term(batch).backward()
    validate()
    loop.term(batch).backward()  # warnings are errors here
    loop.optimizer.step()
    validate()
    loop.align.update()
    assert loop.align.step == 2


def test_update_never_beside_an_optimizer_past_the_counters(loss, batch, make_loop):
    loop = make_loop(DiT(depth=2), selfalign.SRALoss(student_layer=1, teacher_layer=2))
    loop.optimizer = DataSGD(loop.parameters, lr=0.1)
    loop.align._term.terms = 98
    loop.term(batch).backward()
    loop.optimizer.step()
    with pytest.warns(UserWarning, match=r"update\(\) must follow each optimizer step"):
        loop.term(batch)


@pytest.mark.parametrize("kind", [torch.optim.SGD, DataSGD])
def test_a_term_in_every_second_step_only(kind, loss, batch, make_loop):
    """A step without term that was skipped is no step, and nothing is said of it."""
    loop = make_loop(DiT(depth=4), loss)
    loop.optimizer = kind(loop.parameters, lr=0.1)
    loop.step(batch)
    loop.forward(*batch).backward()
    loop.align.update()
    assert loop.align.step == 1
    loop.optimizer.step()
    loop.align.update()
    assert loop.align.step == 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, DataSGD])
@pytest.mark.parametrize("has_teacher", [True, False])
def test_a_step_that_the_scaler_skips_is_no_step(loss, batch, kind, has_teacher):
    model = DiT(depth=4)
    align = SelfAlignment(model, loss if has_teacher else LAYERSYNC)
    optimizer = kind([*model.parameters(), *align.projector.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(overflows=False):
        total = model(*seen(batch)).square().mean() + align(*batch)
        scaler.scale(total * (float("inf") if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        align.update()

    def teacher():
        return copy.deepcopy(align.state_dict()["teacher"])

    step(overflows=True)
    assert align.step == 0
    step()
    step()
    before = teacher()
    step(overflows=True)
    assert align.step == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher().items())
    step()
    assert align.step == 3
    if has_teacher:
        assert any(not torch.equal(before[name], tensor) for name, tensor in teacher().items())


def test_a_step_past_the_counters_is_seen_with_a_projector_at_rest(loss, batch):
    model = DiT()
    align = SelfAlignment(model, loss)
    align.projector.requires_grad_(False)
    for step in range(1, 3):
        (model(*seen(batch)).square().mean() + align(*batch)).backward()
        for p in model.parameters():
            p.data = p.data - 0.1 * p.grad
        align.update()
        assert align.step == step


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_stay_visible(loss, batch, make_loop, side, value):
    loop = make_loop(DiT(), loss, log_metrics=True)
    damage(loop, batch, side, value)
    assert not torch.isfinite(loop.term(batch))
    assert not loop.align.metrics[f"{side}_finite"]


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_and_are_an_error_where_that_is_asked_for(loss, batch, make_loop, side, value):
    loop = make_loop(DiT(), loss, checks="finite")
    damage(loop, batch, side, value)
    loop.forward(*batch)
    message = (
        rf"Features must be finite. Received: NaN or infinity in the tokens of the {side}. Lower"
    )
    with pytest.raises(ValueError, match=message):
        loop.align(*batch)


def damage(loop, batch, side, value):
    """One weight of a side is no number."""
    loop.step(batch)  # the first term makes the teacher the model as it is
    model = {"student": loop.model, "teacher": loop.align.teacher}[side]
    with torch.no_grad():
        model.blocks[1].mlp[2].bias[0] = value
