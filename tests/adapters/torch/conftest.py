"""Fixtures of the torch adapter's tests: a model, a batch, and one attached step."""

import pytest
import torch
from dit_models import DiT, build_diffusers_dit, make_batch

import selfalign
from selfalign.adapters.torch import SelfAlignment


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def loss():
    return selfalign.SRALoss(student_layer=2, teacher_layer=4)


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
    """The user's loop of design.md, one call per step."""

    def __init__(self, model, loss, lr=1e-2, **options):
        self.model, self.align = model, SelfAlignment(model, loss, **options)
        self.parameters = [*model.parameters(), *self.align.projector.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)

    def forward(self, x0, noise, t, y):
        prediction = self.model(self.align.path.add_noise(x0, noise, t), t, y)
        return torch.nn.functional.mse_loss(prediction, self.align.path.velocity(x0, noise, t))

    def step(self, batch):
        total = self.forward(*batch) + self.align(*batch)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.align.update()
        return total.detach()


@pytest.fixture
def loop(model, loss):
    return Loop(model, loss)


@pytest.fixture
def make_loop():
    return Loop
