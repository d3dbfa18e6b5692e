"""diffusers' transformers as they are: every cell of the table in docs/models.md is a test here."""

import copy
import functools
import warnings
from pathlib import Path

import pytest
import torch
from diffusers_models import FAMILIES, UNITS
from dit_models import hooks_on
from torch.utils.checkpoint import checkpoint

import selfalign
from selfalign.adapters.torch import SelfAlignment


class Case:
    """A tiny model of one family, a batch in its form, and how its users call it."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.family = FAMILIES[name]
        self.model = self.family.build().train()
        self.state = copy.deepcopy(self.model.state_dict())
        self.layer = max(2, self.family.depth - 1)  # the teacher's
        self.loss = selfalign.SRALoss(student_layer=1, teacher_layer=self.layer, decay=0.9)
        self.x0, self.condition = self.family.batch(2)
        self.noise = torch.randn_like(self.x0)
        self.t = torch.rand(2)
        self.u = torch.rand(2)
        self.attached = []

    def attach(self, model=None, loss=None, **options):
        model = self.model if model is None else model
        align = SelfAlignment(model, self.loss if loss is None else loss, **options)
        self.attached.append(align)
        return align

    def put_back(self):
        """The model as it was built."""
        while self.attached:
            self.attached.pop().detach()
        self.model.load_state_dict(self.state)
        self.model.zero_grad()

    def predict(self, model=None):
        """The user's own call."""
        model = self.model if model is None else model
        x_t = selfalign.paths.Linear().add_noise(self.x0, self.noise, self.t)
        time = UNITS[self.family.time](self.t)
        torch.manual_seed(1)  # DiT drops labels in training
        return model(hidden_states=x_t, timestep=time, return_dict=False, **self.condition)[0]

    def total(self, align, model=None):
        """Loss and term."""
        prediction = self.predict(model)
        term = align(self.x0, self.noise, self.t, u=self.u)
        return prediction.float().square().mean() + term, term

    def gradients(self, align, model=None):
        model = self.model if model is None else model
        model.zero_grad()
        align.projector.zero_grad()
        self.total(align, model)[0].backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: gradient.clone() for name, gradient in found.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def built(request):
    """One model for all tests of its family."""
    return Case(request.param)


@pytest.fixture
def case(built):
    if type(built.model).__name__.startswith("Mochi"):
        warnings.filterwarnings("ignore", "In CPU autocast")  # the model's own use of autocast
    yield built
    built.put_back()


def test_attach(case):
    keys = list(case.model.state_dict())
    align = case.attach()
    assert next(iter(align.projector.parameters())).shape[0] == case.family.width
    assert len(align.taps) == 2
    align.detach()
    assert list(case.model.state_dict()) == keys
    assert hooks_on(case.model) == 0


def test_forward(case, spied):
    """The outputs are the same, and what is compared are the sample's own tokens."""
    with torch.no_grad():
        before = case.predict()
    loss, pairs = spied(1, case.layer)
    align = case.attach(loss=loss)
    _, term = case.total(align)
    with torch.no_grad():
        assert torch.equal(case.predict(), before)
    assert term.item() > 0
    ((student, teacher),) = pairs
    for tokens in (student, teacher):
        batch, count, width = tokens.shape
        assert batch * count == case.family.tokens * 2
        assert width == case.family.width


def test_backward(case):
    align = case.attach()
    case.total(align)[1].backward()
    block, later = (case.model.get_submodule(path) for path in align.taps)
    assert any(p.grad is not None and p.grad.any() for p in block.parameters())
    assert all(p.grad is None or not p.grad.any() for p in later.parameters())
    assert all(p.grad is None for p in align.teacher.parameters())
    assert all(p.grad is not None for p in align.projector.parameters())


def test_update(case):
    align = case.attach()
    optimizer = torch.optim.SGD([*case.model.parameters(), *align.projector.parameters()], lr=0.1)
    old = {name: p.clone() for name, p in case.model.named_parameters()}
    case.total(align)[0].backward()
    optimizer.step()
    align.update()
    new = dict(case.model.named_parameters())
    for name, p in align.teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * old[name] + 0.1 * new[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(old[name], new[name]) for name in old)


@pytest.mark.filterwarnings("ignore")  # of Dynamo about what the models do
def test_compile(case):
    torch._dynamo.reset()
    align = case.attach()
    expected = case.total(align)[1]
    compiled = torch.compile(case.model, backend="eager")
    torch.testing.assert_close(case.total(align, compiled)[1], expected, rtol=1e-4, atol=1e-5)


def test_checkpointing(case):
    expected = case.gradients(case.attach(seed=1))
    model = copy.deepcopy(case.model)
    if model._supports_gradient_checkpointing:
        model.enable_gradient_checkpointing()
    align = case.attach(model, seed=1)
    if not model._supports_gradient_checkpointing:  # HunyuanDiT has none of its own
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for name, gradient in case.gradients(align, model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_state_dict(case):
    align = case.attach()
    state = copy.deepcopy(align.state_dict())
    expected = case.total(align)[1].item()
    model = copy.deepcopy(case.model)
    other = case.attach(model, seed=5)
    with torch.no_grad():
        for name, p in other.teacher.named_parameters():
            if name in state["teacher"]:  # the rest is frozen, and the model's own
                p.zero_()
    other.load_state_dict(state)
    assert case.total(other, model)[1].item() == expected


def test_the_table_in_the_docs_names_every_model_and_every_test():
    table = (Path(__file__).resolve().parents[3] / "docs" / "models.md").read_text()
    header = next(line for line in table.splitlines() if line.startswith("| model |"))
    columns = [column.strip().replace(" ", "_") for column in header.strip("| ").split("|")[1:]]
    tests = [name.removeprefix("test_") for name in globals() if name.startswith("test_")]
    assert set(columns) == {name for name in tests if "table" not in name}
    for name in FAMILIES:
        assert f"| `{name}` |" + " yes |" * len(columns) in table
