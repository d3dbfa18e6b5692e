"""Student and teacher see the same condition, also where the model drops labels itself.

Where that cannot be repeated the model is refused.
"""

import random

import numpy
import pytest
import torch
from dit_models import DiT, MaskedLabelDiT, PythonRandomDiT, ShiftedLabelDiT, TimeTableDiT, seen

import selfalign
from selfalign.adapters.torch import SelfAlignment


def received(module):
    """What an embedding looks up, call by call (seen behind the adapter's own hooks)."""
    calls = []
    module.register_forward_hook(lambda m, args, out: calls.append(args[0].clone()))
    return calls


def conditions_of(model):
    """What the model's fourth block receives as its condition, run by run."""
    conditions = []
    model.blocks[3].register_forward_pre_hook(lambda m, args: conditions.append(args[1].detach()))
    return conditions


def repeated(batch):
    """The batch eight times, so that some labels fall surely."""
    return tuple(part.repeat(8, *[1] * (part.ndim - 1)) for part in batch)


@pytest.mark.parametrize("kind", [DiT, TimeTableDiT, ShiftedLabelDiT])
def test_labels_dropped_inside_the_model_are_dropped_in_the_teacher(kind, loss, batch):
    """Without a gap and an update, the conditions must be equal."""
    model = kind(label_dropout=0.5)
    align = SelfAlignment(model, loss)
    whole = repeated(batch)
    student = conditions_of(model)
    teacher = conditions_of(align.teacher)
    for _ in range(3):
        model(*seen(whole))
        align(*whole, u=torch.zeros(32))
        assert torch.equal(student[-1], teacher[-1])
        _, _, t, y = whole
        undropped = model.eval().embed_time(t) + model.embed_label(y)
        assert not torch.equal(student[-1], undropped)
        model.train()


def test_time_looked_up_in_an_embedding_stays_the_teachers_own(loss, batch):
    model = TimeTableDiT(label_dropout=0.5)
    align = SelfAlignment(model, loss)
    labels = received(model.y_embedder.embedding_table)
    conditions = conditions_of(align.teacher)
    u = torch.full((4,), 0.5)
    for _ in range(2):
        model(*seen(batch))
        dropped = labels[-1]
        align(*batch, u=u)
        time = model.embed_time(loss.teacher_time(batch[2], u))
        expected = time + model.y_embedder.embedding_table(dropped)
        assert torch.equal(conditions[-1], expected)


def test_diffusers_dit_drops_per_block_and_so_does_the_teacher(diffusers_dit):
    """Each block of diffusers' DiT draws its own dropped labels."""
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, path="discrete")
    align = SelfAlignment(diffusers_dit, loss)
    x0 = torch.randn(64, 4, 8, 8)
    noise = torch.randn_like(x0)
    t = torch.randint(0, 1000, (64,))
    y = torch.randint(0, 1000, (64,))
    looked_up = []
    for side in (diffusers_dit, align.teacher):
        tables = [m for n, m in side.named_modules() if n.endswith("embedding_table")]
        looked_up.append([received(table) for table in tables])
    student, teacher = looked_up
    diffusers_dit(align.path.add_noise(x0, noise, t), t, y)
    mine = [calls[0] for calls in student]
    align(x0, noise, t, y)
    assert len(mine) == 6
    assert any(not torch.equal(indices, y) for indices in mine)
    for calls, indices in list(zip(teacher, mine, strict=True))[:4]:
        assert torch.equal(calls[0], indices)


@pytest.mark.parametrize("kind", [MaskedLabelDiT, PythonRandomDiT])
def test_models_whose_dropping_cannot_be_replayed_are_refused(kind, loss, batch):
    model = kind()
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    message = (
        r"must repeat the student's forward, on weights of its own. Received: \w+, as the "
        r"teacher, gave other tokens where the model draws random numbers.*checks=\"off\""
    )
    with pytest.raises(ValueError, match=message):
        align(*batch)


def test_objectives_without_teacher_do_not_mind(batch):
    """One forward has one condition."""
    model = MaskedLabelDiT()
    align = SelfAlignment(model, selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4))
    model(*seen(batch))
    assert align(*batch).item() > 0


def test_a_refusal_leaves_the_random_streams_alone(loss, batch):
    model = PythonRandomDiT()
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    python = random.getstate()
    arrays = numpy.random.get_state()[1].copy()
    stream = torch.get_rng_state()
    with pytest.raises(ValueError, match="must repeat the student's forward"):
        align(*batch, u=torch.zeros(4))
    assert random.getstate() == python
    assert numpy.array_equal(numpy.random.get_state()[1], arrays)
    assert torch.equal(torch.get_rng_state(), stream)


def test_it_can_be_switched_off(loss, batch):
    model = MaskedLabelDiT()
    align = SelfAlignment(model, loss, checks="off")
    model(*seen(batch))
    assert align(*batch).item() > 0


def test_trying_out_leaves_random_streams_modes_and_weights_alone(loss, batch):
    model = DiT(label_dropout=0.5)
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    stream = torch.get_rng_state()
    weights = {n: v.clone() for n, v in align.teacher.state_dict().items()}
    align(*batch)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not any(module.training for module in align.teacher.modules())
    assert all(torch.equal(v, weights[n]) for n, v in align.teacher.state_dict().items())


def test_random_streams_are_looked_at_in_the_first_steps_only(loss, batch, monkeypatch):
    from selfalign.adapters.torch import student

    looks = []
    known = student.random_state
    monkeypatch.setattr(student, "random_state", lambda: looks.append(1) or known())
    model = DiT(label_dropout=0.5)
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    align(*batch)
    assert len(looks) >= 3
    looks.clear()
    model(*seen(batch))
    align(*batch)
    assert looks == []


def test_dropout_layers_are_not_mistaken_for_a_condition(loss, batch):
    model = DiT(label_dropout=0.5)
    model.x_embedder = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5))
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    assert align(*batch).item() > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_model_that_drops_labels(loss, batch):
    torch._dynamo.reset()
    model = DiT(depth=4, label_dropout=0.5)
    align = SelfAlignment(model, loss)
    student = conditions_of(model)
    teacher = conditions_of(align.teacher)
    whole = repeated(batch)
    torch.compile(model, backend="eager")(*seen(whole))
    align(*whole, u=torch.zeros(32))
    assert torch.equal(student[-1], teacher[-1])
    _, _, t, y = whole
    assert not torch.equal(student[-1], model.eval().embed_time(t) + model.embed_label(y))


def test_sampling_with_the_teacher_is_not_replayed(loss, batch, make_loop):
    loop = make_loop(DiT(label_dropout=0.5), loss)
    loop.step(batch)
    looked_up = received(loop.align.teacher.y_embedder.embedding_table)
    loop.align.teacher(*seen(batch))
    assert torch.equal(looked_up[-1], batch[3])
