"""Fixtures of the torch adapter's tests: a model, a batch, and the user's loop around them."""

import copy
import random

import pytest
import torch
from dit_models import DiT, build_diffusers_dit, make_batch, seen

import selfalign
from selfalign.adapters.torch import SelfAlignment


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def loss():
    return selfalign.SRALoss(student_layer=2, teacher_layer=4)


class HeadlessLoss(selfalign.SRALoss):
    """SRA without a projector: tokens are compared as they are."""

    kind = "headless"
    head = selfalign.heads.NONE


@pytest.fixture
def headless():
    return HeadlessLoss


@pytest.fixture
def model():
    return DiT()


@pytest.fixture
def diffusers_dit():
    """diffusers' own DiT, unmodified, with random weights; six blocks of width 32, 16 tokens."""
    return build_diffusers_dit()


@pytest.fixture
def batch():
    return make_batch()


class Loop:
    """The user's loop of the docs, one call per step."""

    def __init__(self, model, loss, lr=1e-2, **options):
        self.model = model
        self.align = SelfAlignment(model, loss, **options)
        self.parameters = [*model.parameters(), *self.align.projector.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)

    def forward(self, x0, noise, t, y):
        prediction = self.model(*seen((x0, noise, t, y)))
        velocity = selfalign.paths.Linear().velocity(x0, noise, t)
        return torch.nn.functional.mse_loss(prediction, velocity)

    def term(self, batch, **options):
        """The term of a forward."""
        self.forward(*batch)
        return self.align(*batch, **options)

    def gradients(self, batch, **options):
        """Of the whole loss, by parameter; they are left in place for the optimizer."""
        (self.forward(*batch) + self.align(*batch, **options)).backward()
        return [p.grad.clone() for p in self.parameters]

    def step(self, batch, **options):
        total = self.forward(*batch) + self.align(*batch, **options)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.align.update()
        return total.detach()

    def twin(self, **options):
        """Another loop around a copy of the model and of the heads."""
        other = Loop(copy.deepcopy(self.model), self.align.loss, **options)
        other.align.projector.load_state_dict(self.align.projector.state_dict())
        return other


@pytest.fixture
def loop(model, loss):
    return Loop(model, loss)


@pytest.fixture
def make_loop():
    return Loop


class Spy:
    """A distance that keeps the pairs of tokens that it was given."""

    def __init__(self):
        self.pairs = []

    def __call__(self, student, target):
        self.pairs.append((student.detach(), target))
        return (student - target).square().mean(dim=-1)


@pytest.fixture
def spied(headless):
    """(layers) -> an SRA loss without head, and the list of the pairs that it compares."""

    def make(student_layer, teacher_layer):
        spy = Spy()
        loss = headless(student_layer=student_layer, teacher_layer=teacher_layer, distance=spy)
        return loss, spy.pairs

    return make
