"""A whole adapter in a hundred lines of PyTorch, for the model of reference.py alone.

It shows what an adapter is made of, and that the contract itself can be kept: what it imports of
the core is `selfalign.adapting`.
"""

import copy
from typing import ClassVar

import numpy as np
import reference
import torch

from selfalign import adapting


class Fixture:
    name = "minimal"
    lacks: ClassVar = {"old options": "A new adapter has no options of a first edition."}

    def attach(self, loss, weights, projector=None):
        return Run(loss, weights, projector)


class Run:
    def __init__(self, loss, weights, projector):
        self.objectives = adapting.named_objectives(loss)
        self.average_of = adapting.shared_teacher(self.objectives)
        self.path = reference.noise_path(loss)
        self.params = trained(weights)
        self.average = {n: p.detach().clone() for n, p in self.params.items()}
        given = projector if len(self.objectives) > 1 else {next(iter(self.objectives)): projector}
        self.heads = {
            name: trained((given or {}).get(name) or self.drawn(objective))
            for name, objective in self.objectives.items()
        }
        for objective in self.objectives.values():
            objective.layers(reference.DEPTH)
        self.done = 0
        self.logged = {}

    def drawn(self, objective):
        shapes = adapting.head_shapes(objective, reference.WIDTH)
        return adapting.init_head(objective, {n: torch.rand(s) for n, s in shapes.items()})

    def target(self, objective, features, given, batch):
        """The target's tokens, as the objective's source says."""
        source = objective.source
        if isinstance(source, adapting.EMATeacher):
            draws = (batch["x0"], batch["noise"], batch["t"], batch["u"])
            x, t = source.path.add_less_noise(*draws, source.largest_gap, source.random_gap)
            _, features = reference.forward(self.average, x, t, batch["y"], torch)
        if isinstance(source, adapting.EMATeacher | adapting.LaterLayer):
            return features[objective.layers(reference.DEPTH)[1] - 1].detach()
        return given

    def forward(self, batch):
        """The prediction and the term."""
        x = self.path.add_noise(batch["x0"], batch["noise"], batch["t"])
        prediction, features = reference.forward(self.params, x, batch["t"], batch["y"], torch)
        several = len(self.objectives) > 1
        given = adapting.given_targets(self.objectives, batch.get("target_tokens"), several)
        term = 0.0
        self.logged = {}
        for name, objective in self.objectives.items():
            tokens = features[objective.layers(reference.DEPTH)[0] - 1]
            target = self.target(objective, features, given.get(name), batch)
            mask = batch.get("loss_mask")
            distance, metrics = objective.evaluate(self.heads[name], tokens, target, mask, True)
            term = term + objective.weigh(distance, self.done)
            prefix = f"{name}/" if len(self.objectives) > 1 else ""
            self.logged |= {prefix + key: value for key, value in metrics.items()}
        return prediction, term

    def leaves(self):
        heads = reference.flat_heads(self.heads)
        return {**self.params, **heads}

    def step(self, batch):
        batch = tensors(batch)
        prediction, term = self.forward(batch)
        velocity = self.path.velocity(batch["x0"], batch["noise"], batch["t"])
        ((prediction - velocity).square().mean() + term).backward()
        torch.optim.SGD(self.leaves().values(), lr=reference.LEARNING_RATE).step()
        for leaf in self.leaves().values():
            leaf.grad = None
        if self.average_of:
            decay = self.average_of.decay_at(self.done)
            self.average = adapting.ema_update(self.average, self.params, decay)
        self.done += 1
        return term.item()

    def gradients(self, batch):
        _, term = self.forward(tensors(batch))
        leaves = self.leaves()
        found = torch.autograd.grad(term, leaves.values(), allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {n: np.zeros(p.shape) if g is None else g.numpy() for (n, p), g in pairs}

    def weights(self):
        return arrays(self.params)

    def projector(self):
        heads = {name: arrays(head) for name, head in self.heads.items()}
        return heads if len(heads) > 1 else next(iter(heads.values()))

    def teacher(self):
        return arrays(self.average) if self.average_of else None

    def metrics(self):
        return {name: value.item() for name, value in self.logged.items()}

    def save(self):
        return copy.deepcopy((self.params, self.heads, self.average, self.done))

    def load(self, state):
        self.params, self.heads, self.average, self.done = copy.deepcopy(state)


def trained(values):
    return {n: torch.tensor(np.asarray(v)).requires_grad_() for n, v in values.items()}


def arrays(values):
    return {name: value.detach().numpy().copy() for name, value in values.items()}


def tensors(batch):
    return {n: tensors(v) if isinstance(v, dict) else tensor(v) for n, v in batch.items()}


def tensor(value):
    return None if value is None else torch.tensor(value)
