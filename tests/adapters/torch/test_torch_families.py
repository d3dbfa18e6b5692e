"""diffusers' transformers as they are: every cell of the table in docs/models.md is one of these tests."""

import copy
import functools
import warnings
from pathlib import Path

import pytest
import torch
from diffusers_models import FAMILIES
from torch.utils.checkpoint import checkpoint

import selfalign
from selfalign.adapters import _torch_forward as forward
from selfalign.adapters.torch import SelfAlignment

UNITS = {
    "unit": lambda t: t,
    "thousand": lambda t: 1000 * t,
    "reversed": lambda t: 1 - t,
    "reversed thousand": lambda t: 1000 - 1000 * t,
}


class Case:
    """A tiny model of one family, a batch in its form, and how its users call it."""

    def __init__(self, name):
        self.family = FAMILIES[name]
        self.model = self.family.build().train()
        depth = 4 if name.startswith("Latte") else self.family.depth  # its other four look along time
        self.loss = selfalign.SRALoss(student_layer=2, teacher_layer=depth - 1, decay=0.9)
        self.x0, self.condition = self.family.batch(2)
        self.noise, self.t, self.u = torch.randn_like(self.x0), torch.rand(2), torch.rand(2)

    def predict(self, model=None):
        """The user's own call."""
        x_t = selfalign.paths.Linear().add_noise(self.x0, self.noise, self.t)
        torch.manual_seed(1)  # DiT drops labels in training
        model = self.model if model is None else model
        return model(hidden_states=x_t, timestep=UNITS[self.family.time](self.t), return_dict=False, **self.condition)[0]

    def total(self, align, model=None):
        prediction = self.predict(model)
        term = align(self.x0, self.noise, self.t, u=self.u)
        return prediction.float().square().mean() + term, term

    def gradients(self, align):
        self.model.zero_grad(), align.projector.zero_grad()
        self.total(align)[0].backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


@pytest.fixture(params=FAMILIES)
def case(request):
    if request.param == "MochiTransformer3DModel":
        warnings.filterwarnings("ignore", "In CPU autocast")  # the model's own use of autocast
    return Case(request.param)


def test_attach(case):
    keys = list(case.model.state_dict())
    with SelfAlignment(case.model, case.loss) as align:
        assert next(iter(align.projector.parameters())).shape[0] == case.family.width
        assert len(align.taps) == 2
    assert list(case.model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_forward(case, monkeypatch):
    with torch.no_grad():
        before = case.predict()
    align, tokens = SelfAlignment(case.model, case.loss), []
    taken = forward.tokens_of
    monkeypatch.setattr(forward, "tokens_of", lambda *a: tokens.append(taken(*a)) or tokens[-1])
    student = align._tap.take
    align._tap.take = lambda *a: tokens.append(student(*a)) or tokens[-1]
    _, term = case.total(align)
    with torch.no_grad():
        assert torch.equal(case.predict(), before)
    assert 0 < term.item() < 1
    assert [part.shape[1] * part.shape[0] for part in tokens] == [case.family.tokens * 2] * 2
    assert {part.shape[2] for part in tokens} == {case.family.width}


def test_backward(case):
    align = SelfAlignment(case.model, case.loss)
    case.total(align)[1].backward()
    block = case.model.get_submodule(align.taps[0])
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    later = case.model.get_submodule(align.taps[1])
    assert all(p.grad is None or not p.grad.any() for p in later.parameters())
    assert all(p.grad is None for p in align.teacher.parameters())
    assert all(p.grad is not None for p in align.projector.parameters())


def test_update(case):
    align = SelfAlignment(case.model, case.loss)
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
    align = SelfAlignment(case.model, case.loss)
    expected = case.total(align)[1]
    compiled = torch.compile(case.model, backend="eager")
    torch.testing.assert_close(case.total(align, compiled)[1], expected, rtol=1e-4, atol=1e-5)


def test_checkpointing(case):
    align = SelfAlignment(case.model, case.loss)
    expected = case.gradients(align)
    if case.model._supports_gradient_checkpointing:
        case.model.enable_gradient_checkpointing()
    else:  # HunyuanDiT has none of its own
        for block in case.model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for name, gradient in case.gradients(align).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_state_dict(case):
    align = SelfAlignment(case.model, case.loss)
    state = copy.deepcopy(align.state_dict())
    expected = case.total(align)[1].item()
    again = Case.__new__(Case)
    again.__dict__.update(case.__dict__)
    again.model = copy.deepcopy(case.model)
    other = SelfAlignment(again.model, case.loss, seed=5)
    with torch.no_grad():
        for name, p in other.teacher.named_parameters():
            if name in state["teacher"]:  # the rest is frozen, and the model's own
                p.zero_()
    other.load_state_dict(state)
    assert again.total(other)[1].item() == expected


def test_the_table_in_the_docs_names_every_model_and_every_test():
    table = (Path(__file__).resolve().parents[3] / "docs" / "models.md").read_text()
    header = next(line for line in table.splitlines() if line.startswith("| model |"))
    columns = [column.strip().replace(" ", "_") for column in header.strip("| ").split("|")[1:]]
    assert set(columns) == {n.removeprefix("test_") for n, f in globals().items() if n.startswith("test_") and "table" not in n}
    for name in FAMILIES:
        assert f"| `{name}` |" + " yes |" * len(columns) in table
