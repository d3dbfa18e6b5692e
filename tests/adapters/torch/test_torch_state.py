"""Checkpoints of the torch adapter: a resumed run is the uninterrupted run, bit for bit; anything else is refused."""

import copy
import io

import pytest
import torch
from dit_models import DiT, make_batch

import selfalign


def saved(loop):
    """Through torch.save and a weights-only load, as users do."""
    buffer = io.BytesIO()
    state = {"model": loop.model.state_dict(), "optimizer": loop.optimizer.state_dict(), "align": loop.align.state_dict()}
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def run(loop, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        loop.step(make_batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make_loop, dtype):
    loss = selfalign.SRALoss(
        student_layer=2,
        teacher_layer=4,
        weight=0.5 * selfalign.schedules.Warmup(4),
        decay=selfalign.schedules.DecayWarmup(0.99),
    )

    def start(seed):
        torch.manual_seed(seed)
        loop = make_loop(DiT().to(dtype), loss)
        plain = loop.step
        loop.step = lambda batch: plain([x.to(dtype) if i < 2 else x for i, x in enumerate(batch)])
        return loop

    whole = start(0)
    run(whole, 3)
    state = saved(whole)
    run(whole, 3, first=3)
    resumed = start(1)
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.align.load_state_dict(state["align"])
    assert resumed.align.step == 3
    run(resumed, 3, first=3)
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)
    a, b = resumed.align.state_dict(), whole.align.state_dict()
    assert a["step"] == b["step"] == 6
    assert a["seed"] == b["seed"]
    assert all(torch.equal(a["teacher"][name], b["teacher"][name]) for name in b["teacher"])
    for mine, theirs in zip(resumed.align.teacher.parameters(), whole.align.teacher.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_of_other_settings_is_refused_and_changes_nothing(loop, make_loop, batch):
    other = make_loop(DiT(), selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=0.2))
    loop.step(batch)
    before = copy.deepcopy(other.align.state_dict())
    with pytest.raises(ValueError, match=r"must come from the same settings. Received: weight 0.5 instead of 0.2"):
        other.align.load_state_dict(loop.align.state_dict())
    after = other.align.state_dict()
    assert after["step"] == 0
    assert all(torch.equal(after["teacher"][name], value) for name, value in before["teacher"].items())


def test_state_of_another_layer_names_the_taps(loop, make_loop):
    other = make_loop(DiT(), selfalign.SRALoss(student_layer=1, teacher_layer=4))
    with pytest.raises(ValueError, match=r"student_layer 2 instead of 1, taps \['blocks.1'.*instead of \['blocks.0'"):
        other.align.load_state_dict(loop.align.state_dict())


def test_state_with_missing_entries_is_refused(loop):
    state = loop.align.state_dict()
    del state["projector"]
    with pytest.raises(ValueError, match=r"must be one of SelfAlignment.state_dict\(\). Received: entries \['seed'"):
        loop.align.load_state_dict(state)


def test_state_of_another_model_names_the_first_tensor(loop, make_loop, loss):
    with pytest.raises(
        ValueError, match=r"teacher must have the same tensors.*'blocks.6.*' missing instead of|instead of missing"
    ):
        make_loop(DiT(depth=8), loss).align.load_state_dict(loop.align.state_dict())
