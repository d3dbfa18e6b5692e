"""Checkpoints: a resumed run is the uninterrupted run, bit for bit; anything else is refused."""

import copy
import io

import pytest
import torch
from dit_models import DiT, make_batch

import selfalign
from selfalign.adapters.torch import EMATeacher, SelfAlignment


def saved(loop):
    """Through torch.save and a weights-only load, as users do."""
    buffer = io.BytesIO()
    parts = {"model": loop.model, "optimizer": loop.optimizer, "align": loop.align}
    torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def run(loop, steps, dtype=torch.float32):
    for step in steps:
        torch.manual_seed(step)
        x0, noise, *others = make_batch()
        loop.step((x0.to(dtype), noise.to(dtype), *others))


LOSSES = {
    "sra": selfalign.SRALoss(
        student_layer=2,
        teacher_layer=4,
        weight=0.5 * selfalign.schedules.Warmup(4),
        decay=selfalign.schedules.DecayWarmup(0.99),
    ),
    "layersync": selfalign.LayerSyncLoss(
        student_layer=2,
        teacher_layer=4,
        weight=selfalign.schedules.Warmup(4),
        projector=True,
    ),
}
TEACHERS = {
    "whole": {},
    "truncated": {"teacher": EMATeacher(truncate=True)},
    "in half precision": {"teacher": EMATeacher(dtype=torch.bfloat16)},
    "of half the batch": {"teacher": EMATeacher(batch_fraction=0.5)},
}
CASES = [
    ("sra", torch.float32, "whole"),
    ("sra", torch.bfloat16, "whole"),
    ("sra", torch.float32, "truncated"),
    ("sra", torch.float32, "in half precision"),
    ("sra", torch.float32, "of half the batch"),
    ("layersync", torch.float32, "whole"),
]


@pytest.mark.parametrize(("kind", "dtype", "teacher"), CASES)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make_loop, kind, dtype, teacher):
    def start(seed):
        torch.manual_seed(seed)
        return make_loop(DiT().to(dtype), LOSSES[kind], **TEACHERS[teacher])

    whole = start(0)
    run(whole, range(3), dtype)
    state = saved(whole)
    run(whole, range(3, 6), dtype)
    resumed = start(1)
    for name, part in (("model", resumed.model), ("optimizer", resumed.optimizer)):
        part.load_state_dict(state[name])
    resumed.align.load_state_dict(state["align"])
    assert resumed.align.step == 3
    run(resumed, range(3, 6), dtype)
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)
    mine = resumed.align.state_dict()
    theirs = whole.align.state_dict()
    assert mine["step"] == theirs["step"] == 6
    assert mine["seed"] == theirs["seed"]
    averages = theirs["teacher"]
    assert mine["teacher"].keys() == averages.keys()
    assert all(torch.equal(mine["teacher"][name], averages[name]) for name in averages)
    if kind == "sra":
        pairs = zip(
            resumed.align.teacher.parameters(), whole.align.teacher.parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_state_between_two_micro_batches(loop, batch):
    """Gaps go on where they were."""
    loop.term(batch)
    twin = loop.twin(seed=99)
    twin.align.load_state_dict(loop.align.state_dict())
    assert torch.equal(twin.term(batch), loop.term(batch))


def test_what_only_a_first_call_does_happens_after_a_resume_too(loop, make_loop, loss, batch):
    """Times are looked at, and what stands beside the model goes where the model is."""
    loop.step(batch)
    other = make_loop(DiT(), loss)
    other.model.load_state_dict(loop.model.state_dict())
    other.align.load_state_dict(loop.align.state_dict())
    other.align.projector.to("meta")
    other.forward(*batch)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        other.align(*batch)


def test_a_state_of_the_first_edition_is_taken_back(loop, loss, batch):
    """It knew no kinds, names and normalisation."""
    loop.step(batch)
    state = copy.deepcopy(loop.align.state_dict())
    for name in ("kind", "name", "normalise"):
        del state["settings"][name]
    other = SelfAlignment(DiT(), loss)
    other.load_state_dict(state)
    assert other.step == 1


# What is refused


def test_state_of_other_settings_is_refused_and_changes_nothing(loop, make_loop, batch):
    other = make_loop(DiT(), selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=0.2))
    loop.step(batch)
    before = copy.deepcopy(other.align.state_dict())
    message = r"must come from the same settings. Received: weight 0.5 instead of 0.2"
    with pytest.raises(ValueError, match=message):
        other.align.load_state_dict(loop.align.state_dict())
    after = other.align.state_dict()
    assert after["step"] == 0
    for part in ("teacher", "projector"):
        assert all(torch.equal(after[part][name], value) for name, value in before[part].items())


def test_state_of_another_layer_names_the_taps(loop):
    other = SelfAlignment(DiT(), selfalign.SRALoss(student_layer=1, teacher_layer=4))
    message = r"student_layer 2 instead of 1, taps \['blocks.1'.*instead of \['blocks.0'"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(loop.align.state_dict())


def test_state_of_another_objective_names_its_kind(loop):
    layersync = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4, projector=True)
    other = SelfAlignment(DiT(), layersync)
    with pytest.raises(ValueError, match=r"same settings. .*kind 'sra' instead of 'layersync'"):
        other.load_state_dict(loop.align.state_dict())


def test_state_with_missing_entries_is_refused(loop):
    state = loop.align.state_dict()
    del state["projector"]
    message = r"must be one of SelfAlignment.state_dict\(\). Received: entries \['seed'"
    with pytest.raises(ValueError, match=message):
        loop.align.load_state_dict(state)


def test_state_of_another_model_names_the_first_tensor(loop, loss):
    message = r"teacher must have the same tensors.*Received: 'blocks.6.*' missing instead of \("
    with pytest.raises(ValueError, match=message):
        SelfAlignment(DiT(depth=8), loss).load_state_dict(loop.align.state_dict())


def test_state_of_another_width_changes_nothing(loop, loss):
    other = SelfAlignment(DiT(width=8), loss)
    before = copy.deepcopy(other.state_dict()["projector"])
    message = r"projector must have the same tensors.*'hidden_kernel' \(16, 32\) instead of \(8"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(loop.align.state_dict())
    after = other.state_dict()["projector"]
    assert all(torch.equal(after[name], value) for name, value in before.items())
