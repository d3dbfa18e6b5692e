"""torch.compile: of the model, of its blocks, of the step, and of what SelfAlignment computes."""

import copy

import pytest
import torch
from dit_models import DiT, TimeTableDiT, make_batch, seen
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import selfalign
from selfalign import SRALoss, schedules
from selfalign.adapters.torch import EMATeacher, SelfAlignment

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's, at a hook
EAGER = {"backend": "eager", "fullgraph": True}  # traced whole, and run as it was traced
SRA = SRALoss(student_layer=1, teacher_layer=2, decay=0.9)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(align, forward=None, steps=3, size=4, dtype=torch.float32):
    """The terms of some training steps, on draws that do not depend on the options."""
    model = align.model
    forward = model if forward is None else forward
    optimizer = torch.optim.AdamW([*model.parameters(), *align.projector.parameters()], lr=1e-3)
    terms = []
    torch.manual_seed(1)
    for _ in range(steps):
        x0, noise, *others = make_batch(size)
        batch = (x0.to(dtype), noise.to(dtype), *others)
        prediction = forward(*seen(batch))
        terms.append(align(*batch))
        (prediction.square().mean() + terms[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        align.update()
    return torch.stack(terms).detach()


# What the user compiles


@pytest.mark.parametrize("what", ["before attaching", "after attaching", "blocks"])
def test_a_compiled_model_gives_the_same_terms(what):
    """Whole, without a graph break, or block by block."""
    model = DiT(depth=3)
    expected = trained(SelfAlignment(copy.deepcopy(model), SRA, seed=3))
    options = {"backend": "aot_eager" if what == "after attaching" else "eager", "fullgraph": True}
    compiled = torch.compile(model, **options) if what == "before attaching" else model
    align = SelfAlignment(compiled, SRA, seed=3)
    if what == "blocks":
        for block in model.blocks:
            block.compile(**options)
    elif what == "after attaching":
        compiled = torch.compile(model, **options)
    terms = trained(align, compiled)
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_compiled_step_gives_the_same_gradients(make_loop, batch):
    plain = make_loop(DiT(depth=3), SRA)
    compiled = plain.twin()
    u = torch.rand(4)

    def step(loop):
        x_t, *condition = seen(batch)
        prediction = loop.model(x_t, *condition)
        velocity = loop.align.path.velocity(*batch[:3])
        denoising = torch.nn.functional.mse_loss(prediction, velocity)
        return denoising + loop.align(*batch, u=u)

    run = torch.compile(step, backend="eager")
    for _ in range(2):
        step(plain).backward()
        run(compiled).backward()
    for mine, theirs in zip(compiled.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_blocks_wrapped_by_compile_before_attaching():
    """Of a model of two block lists."""
    from diffusers_models import FAMILIES

    family = FAMILIES["Flux2Transformer2DModel"]
    model = family.build()
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for n in range(len(blocks)):
            blocks[n] = torch.compile(blocks[n], backend="eager")
    first_single = len(model.transformer_blocks) + 1
    align = SelfAlignment(
        model, SRALoss(student_layer=first_single, teacher_layer=first_single + 1)
    )
    x0, condition = family.batch(2)
    noise = torch.randn_like(x0)
    t = torch.rand(2)
    x_t = align.path.add_noise(x0, noise, t)
    model(hidden_states=x_t, timestep=t, return_dict=False, **condition)
    align(x0, noise, t, loss_mask=torch.ones(2, family.tokens)).backward()
    assert model.transformer_blocks[0].attn.to_q.weight.grad.any()


def compiled_by(backend):
    return lambda block: torch.compile(block, backend=backend)


def checkpointed(block):
    return checkpoint_wrapper(block)


def both(block):
    return torch.compile(checkpointed(block), backend="eager")


WRAPPED = [
    (compiled_by("eager"), torch.bfloat16),
    (compiled_by("aot_eager"), torch.float32),
    (checkpointed, torch.float32),
    (both, torch.bfloat16),
]


@pytest.mark.parametrize(("wrap", "dtype"), WRAPPED)
def test_blocks_wrapped_after_attaching(wrap, dtype):
    """The taps see them, the averages follow them, and names in states stay."""
    model = DiT(depth=2).to(dtype)
    options = {
        "seed": 3,
        "teacher": EMATeacher(dtype=torch.bfloat16 if dtype.itemsize == 4 else None),
    }
    plain = SelfAlignment(copy.deepcopy(model), SRA, **options)
    align = SelfAlignment(model, SRA, **options)
    expected = trained(plain, dtype=dtype)
    before = trained(align, steps=1, dtype=dtype)
    for n, block in enumerate(model.blocks):
        model.blocks[n] = wrap(block)
    after = trained(align, steps=2, dtype=dtype)
    assert align.step == 3
    assert torch.equal(before, expected[:1])
    assert torch.isfinite(after).all()
    state = align.state_dict()
    assert state["teacher"].keys() == plain.state_dict()["teacher"].keys()
    plain.load_state_dict(state)
    trained(align, steps=1, dtype=dtype)
    now = align.state_dict()["teacher"]
    assert any(not torch.equal(now[name], tensor) for name, tensor in state["teacher"].items())
    align.load_state_dict(state)
    align.detach()
    again = SelfAlignment(model, SRA, **options)  # wrapped before attaching
    again.load_state_dict(state)
    assert again.step == 3


# What compile= compiles


@pytest.mark.parametrize("kind", [DiT, TimeTableDiT])
def test_a_compiled_term_is_the_eager_one_in_two_graphs(kind):
    """Labels that the model drops reach the compiled teacher; a weight that changes compiles
    nothing anew."""
    model = kind(depth=3, label_dropout=0.5)
    loss = SRALoss(student_layer=1, teacher_layer=2, decay=0.9, weight=schedules.Warmup(10))
    expected = trained(SelfAlignment(copy.deepcopy(model), loss, seed=3, log_metrics=True))
    torch._dynamo.utils.counters.clear()
    align = SelfAlignment(model, loss, seed=3, log_metrics=True, compile=EAGER)
    terms = trained(align)
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the teacher, and the term
    assert align.metrics["student_norm"] > 0


def test_a_compiled_teacher_stops_after_its_layer(model, loss):
    """Its graph: the embedders and four of six blocks."""
    graphs = []
    backend = lambda graph, _: graphs.append(str(graph.graph)) or graph.forward  # noqa: E731
    trained(SelfAlignment(model, loss, compile={"backend": backend}))
    layers = sorted(text.count("target=torch._C._nn.linear") for text in graphs)
    assert layers == [0, 1 + 2 + 4 * 5]  # the term, and the teacher


@pytest.mark.parametrize(
    "loss",
    [
        selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2, projector=True),
        [SRA, selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3)],
    ],
    ids=["layersync", "a list"],
)
def test_terms_of_other_objectives_are_compiled_too(loss):
    model = DiT(depth=3)
    expected = trained(SelfAlignment(copy.deepcopy(model), loss, seed=3))
    torch._dynamo.utils.counters.clear()
    terms = trained(SelfAlignment(model, loss, seed=3, compile=EAGER))
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)
    graphs = 3 if isinstance(loss, list) else 1  # each term, and the teacher
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


class Plain(torch.nn.Module):
    """Little to compile."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, t):
        for block in self.blocks:
            x = x + block(x) * t[:, None, None]
        return x


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated")  # on the way to Inductor
def test_compiled_by_inductor_beside_a_compiled_student():
    """The defaults of torch.compile, with a call of the user's."""
    model = Plain()
    terms = []
    for options in ({}, {"compile": True}):
        own = copy.deepcopy(model)
        align = SelfAlignment(own, SRA, seed=3, call=lambda m, x, t: m(x, t), **options)
        forward = torch.compile(own, backend="eager") if options else own
        torch.manual_seed(1)
        for _ in range(3):
            x0, noise, t, _ = make_batch()
            forward(*seen((x0, noise, t)))
            terms.append(align(x0, noise, t).detach())
    torch.testing.assert_close(torch.stack(terms[3:]), torch.stack(terms[:3]), rtol=1e-4, atol=1e-5)


# CUDA graphs


class Graphs:
    """A backend like CUDA graphs: each call of a graph returns the tensors of the call before it.

    Those without gradient: of the others PyTorch takes care until their backward.
    """

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        places = []

        def run(*arguments):
            self.calls += 1
            found = graph(*arguments)
            if not places:
                places.extend(part.clone() for part in found if not part.requires_grad)
            free = iter(places)
            return [p if p.requires_grad else next(free).copy_(p) for p in found]

        return run


def test_what_is_kept_of_a_graph_is_a_copy():
    model = DiT(depth=3)
    kept = {}
    for name, options in {"eager": {}, "graphs": {"compile": {"backend": Graphs()}}}.items():
        align = SelfAlignment(copy.deepcopy(model), SRA, seed=3, log_metrics=True, **options)
        cosines = []
        for _ in range(4):
            trained(align, steps=1)
            cosines.append(align.metrics["cosine"])
        kept[name] = torch.stack(cosines)
    assert len(set(kept["eager"].tolist())) == 4
    torch.testing.assert_close(kept["graphs"], kept["eager"])


def test_without_gradient_no_graph_runs():
    """It would overwrite the student's prediction, which nothing waits for."""
    graphs = Graphs()
    model = DiT(depth=3)
    align = SelfAlignment(model, SRA, seed=3, compile={"backend": graphs})
    trained(align)
    before = graphs.calls
    batch = make_batch()
    with torch.no_grad():
        model(*seen(batch))
        term = align(*batch)
    assert term > 0
    assert graphs.calls == before > 0
