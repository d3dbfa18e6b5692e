"""Terms that cost less: compiled, on a share of the batch, with a half-precision teacher, without a teacher, a rarer EMA."""

import copy

import pytest
import torch
from dit_models import DiT, TimeTableDiT, flops, make_batch, seen

from selfalign import SRALoss, schedules
from selfalign.adapters.torch import SelfAlignment

EAGER = {"backend": "eager", "fullgraph": True}  # traced whole, and run as it was traced


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def terms_of(model, loss, steps=4, size=4, **options):
    """The terms of some training steps, on draws that do not depend on the options."""
    torch.manual_seed(1)
    with SelfAlignment(model, loss, seed=3, **options) as align:
        optimizer = torch.optim.AdamW([*model.parameters(), *align.projector.parameters()], lr=1e-3)
        terms = []
        for _ in range(steps):
            batch = make_batch(size)
            prediction = model(*seen(batch))
            terms.append(align(*batch))
            (prediction.square().mean() + terms[-1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            align.update()
    return torch.stack(terms).detach(), align


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's, on its way to a hook
@pytest.mark.parametrize("kind", [DiT, TimeTableDiT])
@pytest.mark.parametrize("weight", [0.5, schedules.Warmup(10)])
def test_a_compiled_term_is_the_eager_one_in_two_graphs(kind, weight):
    """Labels that are dropped inside the model reach the compiled teacher; a weight that changes compiles nothing anew."""
    loss, model = SRALoss(student_layer=2, teacher_layer=4, weight=weight, decay=0.9), kind(label_dropout=0.5)
    expected, _ = terms_of(copy.deepcopy(model), loss, log_metrics=True)
    torch._dynamo.utils.counters.clear()
    terms, align = terms_of(model, loss, log_metrics=True, compile=EAGER)
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the teacher, and the term
    assert align.metrics["student_norm"] > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_teacher_stops_after_its_layer(model, loss):
    graphs = []
    terms_of(model, loss, compile={"backend": lambda graph, _: graphs.append(str(graph.graph)) or graph.forward})
    layers = sorted(text.count("target=torch._C._nn.linear") for text in graphs)
    assert layers == [0, 1 + 2 + 4 * 5]  # the term, and the teacher: its embedders and four of six blocks


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated")  # on the way to Inductor
def test_compiled_by_inductor_beside_a_compiled_student(loss):
    """The defaults of torch.compile, with a call of the user's."""
    model, terms = DiT(width=16, depth=4), []
    for options in ({}, {"compile": True}):
        own = copy.deepcopy(model)
        align = SelfAlignment(own, loss, seed=3, call=lambda m, x, t, y: m(x, t, y), **options)
        forward = torch.compile(own, backend="aot_eager") if options else own
        torch.manual_seed(1)
        for _ in range(3):
            batch = make_batch()
            forward(*seen(batch))
            terms.append(align(*batch).detach())
            align._watch.stepped()
    torch.testing.assert_close(torch.stack(terms[3:]), torch.stack(terms[:3]), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- a share of the batch


@pytest.mark.parametrize("kind", [DiT, TimeTableDiT])
def test_a_share_is_the_term_of_the_first_samples(loss, kind):
    """As if the others were masked, whatever the model drops; for a third of the teacher's cost."""
    model, batch, mask = kind(label_dropout=0.5), make_batch(6), torch.tensor([1.0, 1, 0, 0, 0, 0])
    whole, part = (SelfAlignment(copy.deepcopy(model), loss, seed=3, **options) for options in ({}, {"batch_share": 1 / 3}))
    terms, gradients = [], []
    for align, options in ((whole, {"loss_mask": mask}), (part, {})):
        torch.manual_seed(2)
        align.model(*seen(batch))
        terms.append(align(*batch, **options))
        terms[-1].backward()
        gradients.append([p.grad for p in align.model.blocks[1].parameters()])
    torch.testing.assert_close(terms[0], terms[1])
    torch.testing.assert_close(*gradients)
    costs = []
    for align in (whole, part):
        align.model(*seen(batch))
        costs.append(flops(lambda align=align: align(*batch)))
    assert costs[1] == costs[0] / 3


def test_at_least_one_sample_is_aligned(loss):
    terms, _ = terms_of(DiT(), loss, steps=1, size=2, batch_share=0.1)
    assert terms[0] > 0


def test_a_share_with_a_mask_over_tokens(model, loss):
    batch, mask = make_batch(4), torch.ones(4, 5)
    mask[2:] = 0
    terms = []
    for options in ({}, {"batch_share": 0.5}):
        with SelfAlignment(model, loss, seed=3, **options) as align:
            model(*seen(batch))
            terms.append(align(*batch, loss_mask=mask))
    torch.testing.assert_close(*terms)


def test_samples_that_depend_on_each_other_are_refused(loss, batch):
    class Centred(DiT):
        def embed_label(self, y):
            embedded = super().embed_label(y)
            return embedded - embedded.mean(dim=0)

    model = Centred()
    align = SelfAlignment(model, loss, batch_share=0.5)
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"batch_share= needs samples that do not depend on each other. Received: tokens "
                                         r"\(2, 5, 16\) that differ .* \(2, 5, 16\). .*leave batch_share= out"):  # fmt: skip
        align(*batch)


@pytest.mark.parametrize("share", [0, 1.5, -1])
def test_a_share_must_be_one(model, loss, share):
    with pytest.raises(ValueError, match=r"batch_share must be in \[1e-12, 1\]. Received: "):
        SelfAlignment(model, loss, batch_share=share)


# ------------------------------------------------------------------------------------------- a teacher in half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offload", [False, True])
def test_a_half_precision_teacher_has_float32_averages(dtype, offload):
    loss, model = SRALoss(student_layer=2, teacher_layer=4, decay=0.9), DiT(label_dropout=0.5)
    expected, wide = terms_of(copy.deepcopy(model), loss)
    terms, narrow = terms_of(model, loss, teacher_dtype=dtype, offload=offload)
    torch.testing.assert_close(terms, expected, rtol=0, atol=0.01)
    assert not torch.equal(terms, expected)  # it did run in half precision
    for name, average in wide.state_dict()["teacher"].items():
        mine, p = narrow.state_dict()["teacher"][name], narrow.teacher.get_parameter(name)
        torch.testing.assert_close(mine, average, rtol=1e-2, atol=2e-3)
        assert (mine.dtype, p.dtype) == (torch.float32, dtype)
        assert torch.equal(p, mine.to(dtype))
    copied = SelfAlignment(DiT(), loss, teacher_dtype=dtype, offload=offload)
    copied.load_state_dict(narrow.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(copied.teacher.parameters(), narrow.teacher.parameters(), strict=True))


def test_the_precision_of_the_teacher_is_no_others(model, loss, batch):
    wrong = r"teacher_dtype= must be torch.bfloat16 or torch.float16, for a teacher of ours. Received: {}. Leave it out."
    with pytest.raises(ValueError, match=wrong.format("torch.float32")):
        SelfAlignment(model, loss, teacher_dtype=torch.float32)
    with pytest.raises(ValueError, match=wrong.format("teacher= of yours")):
        SelfAlignment(model, loss, teacher=copy.deepcopy(model), teacher_dtype=torch.bfloat16)


# ------------------------------------------------------------------------------------------------------- without a teacher


def test_the_models_own_later_layer_is_the_target_in_one_forward(loss, batch):
    model, loss = DiT(), SRALoss(**{**loss.settings(), "max_gap": 0})
    align = SelfAlignment(model, loss, teacher=model)
    features = []
    handles = [model.blocks[n].register_forward_hook(lambda *args: features.append(args[2])) for n in (1, 3)]
    alone = flops(lambda: model(*seen(batch)))
    with_term = alone + flops(lambda: align(*batch))
    for handle in handles:
        handle.remove()
    tokens = batch[0].shape[0] * batch[0].shape[1]
    assert with_term == alone + 2 * tokens * 4 * 16**2  # the projector, and nothing else
    prediction = model(*seen(batch))
    term = align(*batch)
    torch.testing.assert_close(term, loss(align.projector(features[0]), features[1]))
    term.backward()
    assert all(p.grad is None for block in model.blocks[2:] for p in block.parameters())
    assert all(p.grad is not None for block in model.blocks[:2] for p in block.parameters())
    assert prediction.requires_grad
    assert align.state_dict()["teacher"] == {}
    assert align.teacher is model


def test_without_a_teacher_steps_are_counted_and_a_share_is_a_share():
    loss = SRALoss(student_layer=2, teacher_layer=4, max_gap=0)
    model = DiT()
    _, align = terms_of(model, loss, teacher=model, batch_share=0.5)
    assert align.step == 4


def test_without_a_teacher_there_is_no_gap(model, loss):
    with pytest.raises(ValueError, match=r"teacher=model takes the target from .* own noise. Received: max_gap=0.2. "
                                         r"Pass SRALoss\(max_gap=0\); .*decay=0"):  # fmt: skip
        SelfAlignment(model, loss, teacher=model)


def test_without_a_teacher_the_later_layer_must_run(batch):
    class Short(DiT):
        def forward(self, x, t, y):
            x, c = self.x_embedder(x), self.embed_time(t) + self.embed_label(y)
            for block in self.blocks[:3]:
                x = block(x, c)
            return self.final_layer(x)

    model = Short()
    align = SelfAlignment(model, SRALoss(student_layer=2, teacher_layer=4, max_gap=0), teacher=model)
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"teacher's layer must run in the student's forward. Received: no output of blocks.3"):
        align(*batch)


# -------------------------------------------------------------------------------------------------------------- a rarer EMA


def test_the_average_moves_in_every_third_step_only():
    model = DiT()
    loss = SRALoss(student_layer=2, teacher_layer=4, decay=schedules.Every(3, 0.5))
    align = SelfAlignment(model, loss)
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(1, 7):
        batch = make_batch()
        (model(*seen(batch)).square().mean() + align(*batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        align.update()
        if step % 3 == 0:
            start = {name: start[name].lerp(p, 1 - 0.5**3) for name, p in model.named_parameters()}
        for name, p in align.teacher.named_parameters():
            torch.testing.assert_close(p, start[name].detach())
    assert align.step == 6
