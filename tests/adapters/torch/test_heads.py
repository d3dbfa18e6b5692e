"""Heads whose width the model does not tell: parameters come at the first forward, or earlier."""

import copy
import io
import random

import numpy
import pytest
import torch
from dit_models import DiT, UnknownWidth, make_batch, seen
from torch import nn

import selfalign
from selfalign.adapters.torch import Projector, SelfAlignment

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def lazy(loss, **options):
    """An alignment whose head has no parameters yet."""
    torch.manual_seed(0)
    align = SelfAlignment(UnknownWidth(depth=4), loss, seed=1, **options)
    assert not align.projector.built
    return align


def known(loss):
    """The same with the width given."""
    torch.manual_seed(0)
    return SelfAlignment(UnknownWidth(depth=4), loss, seed=1, width=16)


@pytest.fixture
def loss():
    return selfalign.SRALoss(student_layer=1, teacher_layer=3, decay=0.9)


def trained(align, steps=3, make=OPTIMIZERS["AdamW"], clip=False):
    """The terms of some steps; the optimizer is made before the first forward."""
    parameters = [*align.model.parameters(), *align.projector.parameters()]
    optimizer = make(parameters)
    terms = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = make_batch()
        prediction = align.model(*seen(batch))
        terms.append(align(*batch))
        (prediction.square().mean() + terms[-1]).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        align.update()
    return torch.stack(terms).detach()


def same_values(mine, theirs):
    pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# At the first forward


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("clip", [False, True])
def test_an_optimizer_made_before_trains_the_head_as_if_the_width_were_given(loss, make, clip):
    first = known(loss)
    expected = trained(first, make=make, clip=clip)
    begun = copy.deepcopy(known(loss).projector)
    second = lazy(loss)
    assert torch.equal(trained(second, make=make, clip=clip), expected)
    assert same_values(second.projector, first.projector)
    assert not same_values(second.projector, begun)


def test_a_validation_may_be_the_first_forward(loss):
    """It builds the head; the steps after it are those of a head that was there."""
    expected = trained(known(loss))
    align = lazy(loss)
    batch = make_batch()
    with torch.no_grad():
        align.model(*seen(batch))
        assert align(*batch).item() > 0
    assert align.projector.built
    assert torch.equal(trained(align), expected)
    assert align.step == 3


def test_a_head_without_its_optimizer_is_noticed(loss):
    align = lazy(loss)
    optimizer = torch.optim.SGD(align.model.parameters(), lr=0.1)
    batch = make_batch()
    align.model(*seen(batch))
    align(*batch).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="projector must be trained with the model"):
        align.update()


def test_a_frozen_head_stays_frozen(loss):
    align = lazy(loss)
    with align.recording():
        align.model(*seen(make_batch()))
    align.projector.requires_grad_(False)
    trained(align, make=lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.1))
    assert same_values(align.projector, known(loss).projector)
    assert not any(p.requires_grad for p in align.projector.parameters())


def test_an_unknown_width_says_so_before(loss):
    align = lazy(loss)
    message = r"must know its width before it is used. Received: a head that has seen no tokens yet"
    with pytest.raises(ValueError, match=message):
        align.projector(torch.zeros(1, 2, 16))


def test_the_head_is_in_the_models_precision_and_place(loss):
    model = UnknownWidth(depth=4).bfloat16()
    align = SelfAlignment(model, loss)
    x0, noise, t, y = make_batch()
    model(*seen((x0.bfloat16(), noise.bfloat16(), t, y)))
    align(x0.bfloat16(), noise.bfloat16(), t)
    assert {p.dtype for p in align.projector.parameters()} == {torch.bfloat16}


def test_building_leaves_the_random_stream_alone(loss):
    align = lazy(loss)
    batch = make_batch()
    align.model(*seen(batch))
    before = torch.get_rng_state()
    align(*batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_width_that_the_model_tells_needs_no_forward(loss):
    assert SelfAlignment(DiT(depth=4), loss).projector.hidden_kernel.shape == (16, 32)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_beside_a_compiled_model(loss):
    torch._dynamo.reset()
    expected = trained(known(loss), steps=2)
    align = lazy(loss)
    model = align.model
    align.model = torch.compile(model, backend="eager")
    torch.testing.assert_close(trained(align, steps=2), expected)


# In align.recording()


def test_recording_gives_the_parameters_that_the_first_forward_would(loss):
    first = lazy(loss)
    trained(first, steps=1, make=lambda p: torch.optim.SGD(p, lr=0.0))
    second = lazy(loss)
    x_t, t, y = seen(make_batch(2))
    with second.recording():
        second.model(x_t, t, y)
    assert second.projector.built
    assert same_values(first.projector, second.projector)
    assert torch.equal(trained(second), trained(known(loss)))


def test_recording_on_the_meta_device(loss):
    """Before the weights are there, with shapes alone."""
    with torch.device("meta"):
        model = UnknownWidth(depth=4)
        x_t, t, y = seen((torch.empty(2, 5, 4), torch.empty(2, 5, 4), torch.empty(2), None))
        y = torch.empty(2, dtype=torch.long)
    align = SelfAlignment(model, loss, seed=1)
    with align.recording():
        model(x_t, t, y)
    assert {p.device.type for p in align.projector.parameters()} == {"cpu"}
    assert same_values(align.projector, known(loss).projector)
    torch.manual_seed(0)
    weights = UnknownWidth(depth=4).state_dict()
    for part in (model, align.teacher):
        part.to_empty(device="cpu")
    model.load_state_dict(weights)
    assert torch.equal(trained(align), trained(known(loss)))


def test_inside_a_context_of_the_meta_device(loss):
    with torch.device("meta"):
        model = DiT(depth=4)
        align = SelfAlignment(model, loss, seed=1)
    assert same_values(align.projector, known(loss).projector)


class Counting(UnknownWidth):
    """Has batch normalisation and a counter, and draws from every random stream."""

    def __init__(self):
        super().__init__(depth=4)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x, t, y):
        self.count += 1
        noise = torch.randn(()) + random.random() + numpy.random.rand()
        return super().forward(self.norm(x) + 0 * noise, t, y)


def test_recording_leaves_streams_buffers_modes_and_gradients_alone(loss):
    model = Counting()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    align = SelfAlignment(model, loss)
    inputs = seen(make_batch())
    before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy())
    with align.recording():
        output = model(*inputs)
    assert not output.requires_grad
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.array_equal(numpy.random.get_state()[1], before[2])
    assert [module.training for module in model.modules()] == modes
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert align.step == 0


def test_recording_leaves_a_students_forward_alone(loss, batch):
    align = known(loss)
    align.model(*seen(batch))
    with align.recording():
        align.model(*seen(make_batch(2)))
    assert align(*batch).item() > 0


def test_a_forward_that_fails_while_recording_leaves_nothing_behind(loss):
    align = lazy(loss)
    x_t, t, _ = seen(make_batch())
    with pytest.raises(TypeError, match="missing 1 required"), align.recording():
        align.model(x_t, t)
    assert align.model.training
    assert not align.projector.built
    trained(align, steps=1)


def test_no_forward_while_recording_is_an_error(loss):
    align = lazy(loss)
    with pytest.raises(ValueError, match=r"forward must run before.*blocks.0"), align.recording():
        pass


def test_recording_a_sample_that_is_no_tensor(loss):
    class Listed(UnknownWidth):
        def forward(self, x, t, y):
            return super().forward(torch.stack(x), t, y)

    call = lambda m, x, t, y: m(list(x), t, y)  # noqa: E731
    model = Listed(depth=4)
    align = SelfAlignment(model, loss, call=call)
    x_t, t, y = seen(make_batch())
    with align.recording():
        model(list(x_t), t, y)
    assert align.projector.hidden_kernel.shape == (16, 32)


# Saving


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_state_before_the_first_forward_has_no_head_and_the_same_run_follows(loss):
    align = lazy(loss)
    state = through_a_file(align.state_dict())
    assert state["projector"] == {}
    torch.manual_seed(0)
    other = SelfAlignment(UnknownWidth(depth=4), loss, seed=7)
    other.load_state_dict(state)
    assert torch.equal(trained(other), trained(align))


def test_a_state_after_it_is_taken_back_into_a_head_without_parameters(loss):
    align = lazy(loss)
    trained(align, steps=2)
    state = through_a_file({"model": align.model.state_dict(), "align": align.state_dict()})
    assert set(state["align"]["projector"]) == set(align.projector.objective.head.names)
    other = lazy(loss)
    other.model.load_state_dict(state["model"])
    other.load_state_dict(state["align"])
    assert other.projector.built
    assert same_values(other.projector, align.projector)
    assert torch.equal(trained(other), trained(align))


def test_a_state_of_another_objectives_head_is_refused(loss):
    state = lazy(loss).state_dict()
    for names in (["hidden_kernel"], ["down", "up"]):
        state["projector"] = {name: torch.zeros(16, 32) for name in names}
        with pytest.raises(ValueError, match=r"state's projector must have the same.*Received: "):
            lazy(loss).load_state_dict(state)


# The module itself


def test_a_projector_alone(loss):
    net = Projector(loss, seed=3, like=torch.zeros(1, dtype=torch.float64), width=8)
    assert net(torch.ones(2, 3, 8, dtype=torch.float64)).shape == (2, 3, 8)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    again = Projector(loss, seed=3, like=torch.zeros(1, dtype=torch.float64), width=None)
    again.build(8)
    assert same_values(net, again)
    assert not net.output_bias.any()
    with pytest.raises(ValueError, match=r"must have the head's width. Received: width 6, head of"):
        net(torch.ones(2, 3, 6, dtype=torch.float64))


def test_a_head_that_is_none_is_an_identity(headless):
    net = Projector(headless(student_layer=1, teacher_layer=3), 0, torch.zeros(1), None)
    assert net.built
    tokens = torch.randn(2, 3, 4)
    assert torch.equal(net(tokens), tokens)
