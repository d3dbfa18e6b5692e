"""Buffers that grow, come, go, are replaced, or were made in inference mode."""

import copy

import pytest
import torch
from dit_models import DiT, seen
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment
from selfalign.adapters.torch.buffers import buffers_kept


def grow(module):
    module.cache = torch.randn(len(module.cache) + 3, 2)


def come(module):
    module.register_buffer("late", torch.ones(2))


def come_hidden(module):
    module.register_buffer("late", torch.ones(2), persistent=False)


def go(module):
    del module.cache


def become_none(module):
    module.cache = None


def widen(module):
    module.cache = module.cache.double()


def be_whole(module):
    module.cache = torch.arange(4)


def infer(module):
    with torch.inference_mode():
        module.cache = torch.randn(5, 2)


def expand(module):
    module.cache = torch.randn(1, 2).expand(4, 2)


CHANGES = [grow, come, come_hidden, go, become_none, widen, be_whole, infer, expand]


def cached(persistent=True):
    model = DiT(depth=4)
    model.blocks[1].register_buffer("cache", torch.randn(4, 2), persistent=persistent)
    return model


def buffers_of(module):
    return {**module._buffers}, set(module._non_persistent_buffers_set)


def same(mine, theirs):
    assert mine[0].keys() == theirs[0].keys()
    assert mine[1] == theirs[1]
    for name, value in theirs[0].items():
        other = mine[0][name]
        assert (other is None) == (value is None)
        if value is not None:
            assert other is not value
            assert other.dtype == value.dtype
            assert torch.equal(other, value)


@pytest.mark.parametrize("side", ["model", "teacher"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_teachers_are_the_models_after_each_update(change, side, loss, batch, make_loop):
    loop = make_loop(cached(persistent=change is not expand), loss)
    loop.step(batch)
    before = loop.model.blocks[1]
    change({"model": before, "teacher": loop.align.teacher.blocks[1]}[side])
    for _ in range(2):  # the second time what has changed is written to
        loop.step(batch)
        same(buffers_of(loop.align.teacher.blocks[1]), buffers_of(before))
    assert loop.align.step == 3


@pytest.mark.parametrize("change", [grow, come, come_hidden, become_none, infer])
def test_a_state_gives_buffers_back_as_they_were(change, loss, batch, make_loop):
    loop = make_loop(cached(), loss)
    change(loop.model.blocks[1])
    loop.step(batch)
    state = loop.align.state_dict()
    other = make_loop(cached(), loss)
    if change is come:  # as its user must, to load the model
        come(other.model.blocks[1])
    other.align.load_state_dict(state)
    saved = other.align.state_dict()["teacher"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in state["teacher"].items())
    assert torch.isfinite(other.step(batch))


def test_a_saved_buffer_that_the_model_does_not_know(loss):
    model = cached()
    come(model.blocks[1])
    state = SelfAlignment(model, loss).state_dict()
    with pytest.raises(ValueError, match=r"Received: 'blocks.1.late' \(2,\) instead of missing"):
        SelfAlignment(cached(), loss).load_state_dict(state)


def test_recording_puts_them_back(batch):
    model = cached()
    before = buffers_of(model.blocks[1])
    values = copy.deepcopy(before)
    for change in CHANGES:
        with buffers_kept(model):
            model.blocks[1].cache.add_(1.0)
            change(model.blocks[1])
        assert all(model.blocks[1]._buffers[name] is kept for name, kept in before[0].items())
        same(buffers_of(model.blocks[1]), values)


@pytest.mark.parametrize("kind", ["module", "list"])
def test_an_ema_of_the_users_may_have_other_buffers(kind, loss, batch, make_loop):
    from diffusers.training_utils import EMAModel

    model = cached()
    average = copy.deepcopy(model) if kind == "module" else EMAModel(model.parameters())
    grow(model.blocks[1])
    loop = make_loop(model, loss, teacher=average)
    if kind == "list":
        grow(model.blocks[1])
    assert torch.isfinite(loop.step(batch))
    if kind == "list":
        same(buffers_of(loop.align.teacher.blocks[1]), buffers_of(model.blocks[1]))


def test_what_a_forward_has_left_on_the_model_does_not_hinder_attaching(loss, batch):
    """A tensor with a graph, as an attribute or in a list of one, cannot be copied as it is."""
    model = DiT(depth=4)
    model.last = nn.Linear(2, 2)(torch.ones(2))
    model.features = [model.last * 2]
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    assert align(*batch).item() > 0
    assert align.teacher.last.grad_fn is None


class Stateful(DiT):
    """Counts its forwards, and reads a table that is in the graph."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.register_buffer("scale", torch.full((16,), 1.5))
        if way == "frozen":
            self.count = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        else:
            self.register_buffer("count", torch.zeros(()))

    def embed(self, x, t, y):
        if self.training or self.way == "always":
            self.count += 1
        x, c = super().embed(x, t, y)
        return x * self.scale, c


OBJECTIVES = {
    "sra": selfalign.SRALoss(student_layer=2, teacher_layer=4),
    "layersync": selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("way", ["always", "in training", "frozen"])
def test_looks_write_into_copies(way, objective, batch):
    """The model's own state is that of its own forwards, and backward finds what it waits for."""
    model = Stateful(way)
    align = SelfAlignment(model, OBJECTIVES[objective])
    for step in range(3):
        prediction = model(*seen(batch))
        (prediction.square().mean() + align(*batch)).backward()
        assert model.count == step + 1
        model.zero_grad()


class Balanced(DiT):
    """What training writes into a buffer is read in the next forward."""

    def __init__(self, first):
        super().__init__()
        self.first = first
        self.register_buffer("bias", torch.zeros(16))

    def embed(self, x, t, y):
        x, c = super().embed(x, t, y)
        if self.first:
            self.note(x)
        out = x + self.bias
        if not self.first:
            self.note(x)
        return out, c

    @torch.no_grad()
    def note(self, x):
        if self.training:
            self.bias += x.mean((0, 1))


@pytest.mark.parametrize("first", [True, False], ids=["written before", "written after"])
def test_buffers_that_training_writes_and_reads(first, loss, batch, make_loop):
    loop = make_loop(Balanced(first), loss)
    for _ in range(3):
        assert torch.isfinite(loop.step(batch))
