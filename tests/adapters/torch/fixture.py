"""The contract's model in PyTorch, attached to as it is: see contract.py."""

import copy
from typing import ClassVar

import numpy as np
import reference
import torch
from torch import nn

from selfalign.adapters.torch import SelfAlignment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Fixture:
    name = "torch"
    lacks: ClassVar = {}
    old_options: ClassVar = {
        "student": ("block_2", r"taps="),
        "example": (None, r"align\.recording\(\)"),
        "truncate": (True, r"EMATeacher\(truncate=True\)"),
        "offload": (True, r"EMATeacher\(offload=True\)"),
        "teacher_dtype": (torch.bfloat16, r"EMATeacher\(dtype=torch\.bfloat16\)"),
        "batch_share": (0.5, r"EMATeacher\(batch_fraction=0\.5\)"),
        "check_condition": (False, r'checks="on" or "off"'),
        "check_finite": (True, r'checks="finite"'),
        "teacher": ("path", r"taps="),
    }

    def attach(self, loss, weights, projector=None, **options):
        return Run(loss, weights, projector, options)


class Layer(nn.Module):
    """x + tanh(x @ kernel + bias + condition)."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(reference.WIDTH, reference.WIDTH))
        self.bias = nn.Parameter(torch.empty(reference.WIDTH))

    def forward(self, x, condition):
        return x + torch.tanh(x @ self.kernel + self.bias + condition[:, None])


class Model(nn.Module):
    """The model of reference.py, with blocks in a list."""

    def __init__(self):
        super().__init__()
        for name, shape in reference.weight_shapes().items():
            if not name.startswith("block"):
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.blocks = nn.ModuleList(Layer() for _ in range(reference.DEPTH))

    def forward(self, x, t, y):
        angles = t[:, None] * torch.tensor(reference.FREQUENCIES, device=t.device)
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        condition = waves @ self.time_kernel + self.labels[y]
        x = x @ self.in_kernel + self.in_bias + self.positions
        for block in self.blocks:
            x = block(x, condition)
        return x @ self.out_kernel + self.out_bias

    def named(self):
        """The parameters by the names of reference.py."""
        found = {}
        for name, p in self.named_parameters():
            if name.startswith("blocks."):
                _, index, part = name.split(".")
                name = f"block_{int(index) + 1}_{part}"
            found[name] = p
        return found


def write(parameters, values):
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(torch.tensor(np.asarray(value)))


def arrays(parameters):
    return {name: p.detach().cpu().numpy().copy() for name, p in parameters.items()}


def tensors(batch):
    return {
        name: tensors(value) if isinstance(value, dict) else torch.tensor(value, device=DEVICE)
        for name, value in batch.items()
        if value is not None
    }


class Run:
    """The user's loop. Metrics are logged, as the contract asks for them."""

    def __init__(self, loss, weights, projector, options):
        self.path = reference.noise_path(loss)
        self.several = isinstance(loss, list)
        self.model = Model().to(DEVICE)
        write(self.model.named(), weights)
        options = {"width": reference.WIDTH, "log_metrics": True} | options
        self.align = SelfAlignment(self.model, loss, **options)
        if projector is not None:
            given = projector if self.several else {None: projector}
            for name, head in self.heads().items():
                write(dict(head.named_parameters()), given[name])
        parameters = [*self.model.parameters(), *self.align.projector.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=reference.LEARNING_RATE)

    def heads(self):
        return dict(self.align.projector.items()) if self.several else {None: self.align.projector}

    def forward(self, batch):
        """The prediction and the term."""
        given = {name: batch.get(name) for name in ("u", "loss_mask", "target_tokens")}
        x0, noise, t = batch["x0"], batch["noise"], batch["t"]
        prediction = self.model(self.path.add_noise(x0, noise, t), t, batch["y"])
        return prediction, self.align(x0, noise, t, batch["y"], **given)

    def leaves(self):
        found = dict(self.model.named())
        for name, head in self.heads().items():
            prefix = f"projector.{name}." if self.several else "projector."
            found |= {prefix + key: p for key, p in head.named_parameters()}
        return found

    def step(self, batch):
        batch = tensors(batch)
        try:
            prediction, term = self.forward(batch)
        except (TypeError, ValueError):
            self.align.forget()
            raise
        velocity = self.path.velocity(batch["x0"], batch["noise"], batch["t"])
        ((prediction - velocity).square().mean() + term).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.align.update()
        return term.item()

    def gradients(self, batch):
        _, term = self.forward(tensors(batch))
        leaves = self.leaves()
        found = torch.autograd.grad(term, leaves.values(), allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {n: np.zeros(p.shape) if g is None else g.cpu().numpy() for (n, p), g in pairs}

    def weights(self):
        return arrays(self.model.named())

    def projector(self):
        heads = {name: arrays(dict(head.named_parameters())) for name, head in self.heads().items()}
        return heads if self.several else heads[None]

    def teacher(self):
        return None if self.align.teacher is None else arrays(self.align.teacher.named())

    def metrics(self):
        return {name: value.item() for name, value in self.align.metrics.items()}

    def save(self):
        return copy.deepcopy([part.state_dict() for part in (self.model, self.align)])

    def load(self, state):
        for part, saved in zip((self.model, self.align), state, strict=True):
            part.load_state_dict(saved)
