"""Checkpoints: a resumed run is the uninterrupted run, bit for bit; anything else is refused."""

import copy
import io
import math

import pytest
import torch
from dit_models import DiT, make_batch, seen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

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


# Any one leaf that is wrong


def leaves(state, path=()):
    """Paths of all leaves of a state, and of what holds them."""
    found = [path] if path else []
    if isinstance(state, dict):
        for name, value in state.items():
            found += leaves(value, (*path, name))
    return found


def wrong_for(value, path, draw):
    """Something else in the place of a leaf."""
    general = [None, "many", [1], object(), math.nan]
    if isinstance(value, torch.Tensor):
        tensors = [
            torch.full_like(value, math.nan),
            torch.full_like(value, -math.inf),
            value.long(),
            value.to(torch.complex64),
            value.bool(),
            value.to("meta"),
            value[..., None],
            value.flatten()[1:],
            value.to_sparse(),
            value.numpy(),
        ]
        return draw(st.sampled_from([*general, *tensors]))
    if path[0] in ("step", "seed", "terms"):
        counts = [-1, 1.5, 2.0, True, math.inf, torch.tensor(1), torch.ones(2), b"1"]
        return draw(st.sampled_from([*general, *counts]))
    others = [{}, torch.ones(3), "other", 17, not value, [torch.ones(2)]]
    wrong = draw(st.sampled_from([*general, *others]))
    return "other" if type(wrong) is type(value) and wrong == value else wrong


@pytest.fixture(scope="module")
def victim():
    """An alignment, and a state that fits it."""
    torch.manual_seed(0)
    model = DiT(depth=4)
    model.register_buffer("table", torch.randn(3, 2))
    align = SelfAlignment(model, LOSSES["sra"])
    batch = make_batch()
    model(*seen(batch))
    align(*batch)
    return align, align.state_dict()


def exact(value):
    """Something that compares bit for bit."""
    if isinstance(value, dict):
        return {name: exact(inner) for name, inner in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_state_with_one_wrong_leaf_is_refused_and_changes_nothing(victim, data):
    align, state = victim
    before = exact(align.state_dict())
    wrong = copy.deepcopy(state)
    *way, last = path = data.draw(st.sampled_from(leaves(state)))
    place = wrong
    for name in way:
        place = place[name]
    kind = data.draw(st.sampled_from(["replaced", "replaced", "gone", "another"]))
    if kind == "gone":
        del place[last]
    elif kind == "another":
        place["unknown"] = place[last]
    else:
        place[last] = wrong_for(place[last], path, data.draw)
    named = ("kind", "name", "normalise")  # the first edition lacks them
    if path[0] == "settings" and last in named and kind == "gone":
        return
    with pytest.raises(ValueError, match=r"^The |^Settings ") as caught:
        align.load_state_dict(wrong)
    assert str(caught.value).count(". Received: ") == 1
    assert exact(align.state_dict()) == before


@pytest.mark.parametrize("state", [None, 5, "align", [], torch.ones(2), {}, {1: 2, "a": 3}])
def test_what_is_no_state(loop, state):
    with pytest.raises(ValueError, match=r"^The state must be .*Received: "):
        loop.align.load_state_dict(state)


def test_a_state_in_half_precision_is_taken_back(loop, loss):
    state = loop.align.state_dict()
    for part in ("projector", "teacher"):
        state[part] = {name: tensor.half() for name, tensor in state[part].items()}
    other = SelfAlignment(DiT(), loss)
    other.load_state_dict(state)
    for name, tensor in other.state_dict()["teacher"].items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, state["teacher"][name].float())


class Narrow(nn.Module):
    """Blocks that do not tell their width."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(4))


def test_a_head_without_width_takes_what_fits_some_width():
    loss = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3, projector=True)
    state = SelfAlignment(DiT(), loss).state_dict()
    whole = copy.deepcopy(state)
    unknown = SelfAlignment(Narrow(), loss)
    assert not unknown.projector.built
    state["projector"]["hidden_bias"] = state["projector"]["hidden_bias"][1:]
    with pytest.raises(ValueError, match=r"projector must have the same tensors.*fit no width"):
        unknown.load_state_dict(state)
    unknown.load_state_dict(whole)
    assert unknown.projector.built


def test_a_state_stays_as_it_is_while_training_goes_on(loop, batch):
    loop.step(batch)
    state = loop.align.state_dict()
    before = exact(state)
    for _ in range(2):
        loop.step(batch)
    assert exact(state) == before
    loop.align.load_state_dict(state)
    assert exact(loop.align.state_dict()) == before


# Settings that may differ


@pytest.mark.parametrize(
    "options",
    [
        {"weight": 0.2},
        {"decay": 0.5},
        {"weight": selfalign.schedules.Warmup(7), "decay": selfalign.schedules.DecayWarmup(0.9)},
        {"max_gap": 0.1, "random_gap": False},
    ],
)
def test_a_run_goes_on_with_other_settings_where_that_is_asked_for(loop, batch, options):
    loop.step(batch)
    state = loop.align.state_dict()
    other = SelfAlignment(DiT(), selfalign.SRALoss(student_layer=2, teacher_layer=4, **options))
    with pytest.raises(ValueError, match=r"if the change is meant, .*changed=\('") as caught:
        other.load_state_dict(state)
    assert all(repr(name) in str(caught.value) for name in options)
    other.load_state_dict(state, changed=tuple(options))
    assert other.step == 1


def test_other_settings_may_not_differ(loop):
    state = loop.align.state_dict()
    for name in ("student_layer", "path", "distance", "taps", "weights", 5):
        with pytest.raises(ValueError, match=r"changed= takes names of settings that may differ"):
            loop.align.load_state_dict(state, changed=(name,))
    other = SelfAlignment(DiT(), selfalign.SRALoss(student_layer=1, teacher_layer=4, weight=0.1))
    with pytest.raises(ValueError, match=r"student_layer 2 instead of 1.*or start afresh"):
        other.load_state_dict(state, changed="weight")


def test_of_a_list_too(make_loop):
    def both(weight):
        deep = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3, weight=weight, name="deep")
        return SelfAlignment(DiT(), [selfalign.SRALoss(student_layer=2, teacher_layer=4), deep])

    state = both(0.1).state_dict()
    with pytest.raises(ValueError, match=r"deep/weight 0.1 instead of 0.3.*changed=\('weight',\)"):
        both(0.3).load_state_dict(state)
    both(0.3).load_state_dict(state, changed=["weight"])
