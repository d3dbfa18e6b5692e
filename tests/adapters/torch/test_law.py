"""Student and teacher see the same condition, also where the model drops labels itself.

Where that cannot be repeated the model is refused.
"""

import copy
import functools
import pickle
import random

import numpy
import pytest
import torch
from dit_models import (
    Block,
    DiT,
    MaskedLabelDiT,
    PythonRandomDiT,
    ShiftedLabelDiT,
    TimeTableDiT,
    seen,
    take_first_step,
)

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


# What training mode draws, and what it makes of the features


class StochasticDepth(torch.nn.Module):
    """Drops whole samples of what it is given."""

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((len(x), *(1,) * (x.ndim - 1)), 0.5))


class Drawing(DiT):
    """Draws in its forward, in one of many ways."""

    def __init__(self, way, **options):
        super().__init__(**options)
        self.way = way
        self.generator = torch.Generator().manual_seed(0)
        self.null = torch.nn.Parameter(torch.randn(16))
        self.dropout = torch.nn.Dropout(0.5 if "layer" in way else 0.0)
        self.depth = StochasticDepth()

    def kept(self, *shape):
        own = self.generator if self.way.endswith("own generator") else None
        return torch.rand(*shape, generator=own) < 0.5

    def forward(self, x, t, y):
        size = len(x)
        if self.training and self.way.startswith("labels"):
            y = torch.where(self.kept(size), 10, y)
        x, c = self.embed(x, t, y)
        if self.training and self.way.startswith("null"):
            c = torch.where(self.kept(size)[:, None], self.null, c)
        if self.training and self.way == "masked tokens":
            x = torch.where(self.kept(size, 5)[..., None], self.null, x)
        if self.way == "noise in both modes":
            x = x + torch.randn_like(x)
        if self.way == "dropout of a condition":
            c = c * (torch.nn.functional.dropout(torch.ones(size, 1), 0.5, self.training) > 0)
        if self.way == "a layer's dropout of a condition":
            c = c * (self.dropout(torch.ones(size, 1)) > 0)
        if self.way == "stochastic depth of a condition":
            c = self.depth(c)
        if self.way == "a dropout that drops rows":
            c = torch.nn.functional.dropout1d(c, 0.5, self.training)
        if self.way == "functional dropout":
            x = torch.nn.functional.dropout(x, 0.2, self.training)
        if self.training and self.way == "another scale":
            x = 2 * x
        for number, block in enumerate(self.blocks):
            if self.training and self.way == "late" and number == 1:
                c = c * self.kept(size, 1)
            if self.training and self.way == "after the student" and number == 2:
                c = c * self.kept(size, 1)
            if self.training and self.way == "after the student, of all samples" and number == 2:
                c = c * self.kept(1)
            if self.training and self.way == "routed later" and number == 2:
                x = x[:, torch.rand(5).argsort()]
            if self.training and self.way == "masked later" and number == 2:
                x = torch.where(self.kept(size, 5)[..., None], self.null, x)
            if self.training and self.way == "fewer later" and number == 2:
                x = x[:, torch.rand(5).argsort()[:3]]
            x = block(x, c)
        return self.final_layer(x)


REPEATED = ("labels", "labels, own generator", "noise in both modes", "functional dropout")
REFUSED = (
    *("null", "null, own generator", "masked tokens", "late"),
    *("dropout of a condition", "a layer's dropout of a condition"),
    *("stochastic depth of a condition", "a dropout that drops rows"),
)
LATER = ("after the student", "after the student, of all samples")


def train(align, batch, steps=3):
    parameters = [*align.model.parameters(), *align.projector.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(steps):
        align.model(*seen(batch))
        align(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        align.update()
    return align.step


@pytest.mark.parametrize("way", [*REPEATED, "routed later", "fewer later", "masked later"])
def test_what_can_be_repeated_is(loss, batch, way):
    assert train(SelfAlignment(Drawing(way), loss), repeated(batch)) == 3


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_repeated_is_refused(loss, batch, way):
    message = r"gave other tokens where the model draws random numbers. Drop labels, or draw"
    with pytest.raises(ValueError, match=message):
        train(SelfAlignment(Drawing(way), loss), repeated(batch))


@pytest.mark.parametrize("way", LATER)
def test_a_condition_that_is_dropped_after_the_students_block_is_refused(loss, batch, way):
    message = r"other tokens at blocks\.3 for some of the samples only. Drop a condition before"
    with pytest.raises(ValueError, match=message):
        train(SelfAlignment(Drawing(way), loss), repeated(batch))


def test_what_training_mode_does_to_the_features_is_refused(loss, batch):
    align = SelfAlignment(Drawing("another scale"), loss)
    message = r"gave (tokens that are off by|other tokens)"
    with pytest.raises(ValueError, match=message):
        train(align, batch)


def test_noise_in_both_modes_is_the_students_in_the_teacher(loss, batch):
    """The same random numbers on both sides, and the stream goes on as without the term."""
    model = Drawing("noise in both modes")
    align = SelfAlignment(model, loss)
    inputs = []
    for side in (model, align.teacher):
        side.blocks[0].register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    for _ in range(2):
        model(*seen(batch))
        student = inputs[-1]
        stream = torch.get_rng_state()
        align(*batch, u=torch.zeros(4))
        assert torch.equal(torch.get_rng_state(), stream)
        torch.testing.assert_close(inputs[-1], student)


class ClosedGates(Block):
    """As adaLN-Zero: at first no block shows its condition."""

    def __init__(self, width):
        super().__init__(width)
        torch.nn.init.zeros_(self.modulation.weight)
        torch.nn.init.zeros_(self.modulation.bias)


def test_gates_at_zero_hide_no_condition(loss, batch):
    align = SelfAlignment(Drawing("null", block=ClosedGates), loss)
    gates = [block.modulation.weight for block in align.teacher.blocks]
    with pytest.raises(ValueError, match="draws random numbers"):
        train(align, repeated(batch))
    assert align.step == 0
    assert not any(gate.any() for gate in gates)


def test_few_steps_are_looked_at_while_the_condition_does_not_show(loss, batch):
    align = SelfAlignment(DiT(block=ClosedGates), loss)
    runs = []
    align.teacher.register_forward_pre_hook(lambda m, args: runs.append(1))
    counts = []
    for _ in range(34):
        runs.clear()
        take_first_step(align, batch)
        counts.append(len(runs))
    assert [step for step, count in enumerate(counts) if count > 1] == [0, 1, 2, 7, 15, 31]


# The weights


ELSEWHERE = {}


def hold(model, way):
    """A hook on the second block that runs the first block's layer."""
    layer = model.blocks[0].proj
    ELSEWHERE["layer"] = layer

    def closure(module, args, output):
        return output + layer(output)

    def default(module, args, output, held=layer):
        return output + held(output)

    def of_partial(held, module, args, output):
        return output + held(output)

    def elsewhere(module, args, output):
        return output + ELSEWHERE["layer"](output)

    ways = {
        "closure": closure,
        "default": default,
        "partial": functools.partial(of_partial, layer),
        "elsewhere": elsewhere,
    }
    model.blocks[1].register_forward_hook(ways[way])


@pytest.mark.parametrize("way", ["closure", "default", "partial"])
def test_hooks_that_hold_a_layer_hold_the_copys_in_the_teacher(loss, batch, way):
    model = DiT()
    hold(model, way)
    align = SelfAlignment(model, loss)
    assert train(align, batch) == 3
    before = align.teacher(*seen(batch))
    torch.nn.init.normal_(model.blocks[0].proj.weight)
    assert torch.equal(align.teacher(*seen(batch)), before)


def test_a_layer_that_cannot_be_seen_in_a_function_is_noticed(loss, batch):
    model = DiT()
    hold(model, "elsewhere")
    message = (
        r"gave tokens that change with the student's weights. Look for functions and hooks that "
        r"reach a module of the model by a global name"
    )
    with pytest.raises(ValueError, match=message):
        train(SelfAlignment(model, loss), batch)


def test_forwards_replaced_before_attaching_run_the_teachers_weights(loss, batch):
    """As diffusers' hooks for offloading and casting do."""
    model = DiT()
    for block in model.blocks:
        plain = block.forward
        block.forward = functools.partial(lambda plain, *args: plain(*args), plain)
    align = SelfAlignment(model, loss)
    assert train(align, batch) == 3


class Uncopied(DiT):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


def test_a_model_that_cannot_be_copied(loss):
    message = r"one that copy.deepcopy copies: .* Received: RuntimeError: no copies. Build Self"
    with pytest.raises(ValueError, match=message):
        SelfAlignment(Uncopied(), loss)


def test_tied_weights_are_the_teachers_own_afterwards(loss, batch):
    model = DiT()
    model.blocks[1].proj.weight = model.blocks[0].proj.weight
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    align(*batch)
    mine = {p.data_ptr() for p in align.teacher.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in model.parameters())
    assert align.teacher.blocks[1].proj.weight is align.teacher.blocks[0].proj.weight


# After the student's block


def scaled(module, args, output):
    return 1.5 * output


class Attribute(DiT):
    """A condition that is set beside the call, and a scale; both enter after the second block."""

    context = torch.zeros(4, 1, 1)
    scale = 1.0

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        for number, block in enumerate(self.blocks):
            x = block(x, self.scale * c if number > 1 else c)
            x = x + self.context if number > 1 else x
        return self.final_layer(x)


def patch(model):
    before = model.blocks[2].forward
    model.blocks[2].forward = lambda *args: 1.5 * before(*args)


ONE_SIDED = {
    "the student's block": lambda model: model.blocks[1].register_forward_hook(scaled),
    "a block between": lambda model: model.blocks[2].register_forward_hook(scaled),
    "the target's block": lambda model: model.blocks[3].register_forward_hook(scaled),
    "a forward replaced": patch,
    "a condition": lambda model: setattr(model, "context", torch.ones(4, 1, 1)),
    "a scale": lambda model: setattr(model, "scale", 0.3),
}


@pytest.mark.parametrize("way", ONE_SIDED)
def test_what_stands_on_one_side_after_attaching_is_noticed(loss, batch, way):
    align = SelfAlignment(Attribute(), loss)
    ONE_SIDED[way](align.model)
    with pytest.raises(ValueError, match=r"gave tokens that are off by .* of their length"):
        train(align, batch)


class Filling(DiT):
    """Fills and empties what it is given, and drops labels in place."""

    def forward(self, x, t, y, features, condition):
        if self.training:
            y[torch.rand(len(y)) < 0.5] = 10
        x, c = self.embed(x + condition.pop("scale"), t, y)
        for block in self.blocks:
            x = block(x, c)
            features.append(x)
        return self.final_layer(x)


def test_what_the_caller_gives_is_the_callers(loss, batch):
    x0, noise, t, y = batch
    align = SelfAlignment(Filling(), loss)
    for _ in range(3):
        features, given = [], y.clone()
        x = align.path.add_noise(x0, noise, t)
        align.model(x, t, given, features, {"scale": torch.ones(())})
        dropped = given.clone()
        align(x0, noise, t)
        assert len(features) == 6
        assert torch.equal(given, dropped)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_teacher_run(loss, batch, copied):
    align = SelfAlignment(DiT(), loss)
    train(align, batch)
    twin = copied(align.teacher)
    assert torch.equal(twin(*seen(batch)), align.teacher(*seen(batch)))
