"""Models, calls and mistakes that `selfalign check` is pointed at."""

import torch
from torch import nn


class Chain(nn.Module):
    """(x [B, N, 8], t [B]) through blocks that are added; `build` makes one."""

    def __init__(self, build=lambda: nn.Linear(8, 8), depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(build() for _ in range(depth))

    def forward(self, x, t):
        for block in self.blocks:
            x = x + block(x)
        return x


def frozen_first():
    """Prints, as user's code does."""
    print("building")
    model = Chain()
    model.blocks[0].requires_grad_(False)
    return model


def ambiguous_width():
    return Chain(lambda: nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)))


def half():
    return Chain().bfloat16()


class Parted(Chain):
    """Cuts the gradient between its first two blocks."""

    def forward(self, x, t):
        x = self.blocks[0](x).detach().requires_grad_()
        for block in self.blocks[1:]:
            x = x + block(x)
        return x


class NoTensor(Chain):
    def forward(self, x, t):
        super().forward(x, t)
        return "a prediction"


class InDict(Chain):
    def forward(self, x, t):
        return {"sample": super().forward(x, t)}


class NoBackward(Chain):
    def forward(self, x, t):
        x = super().forward(x, t)
        x.register_hook(_fails)
        return x


def _fails(gradient):
    raise RuntimeError("no kernel for this backward")


class TwoLists(Chain):
    def __init__(self):
        super().__init__()
        self.refiners = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))


def plain():
    return nn.Linear(8, 8)


def raises():
    raise RuntimeError("no weights on disk")


def interrupts():
    raise KeyboardInterrupt


def a_number():
    return 3


class OfJax:
    __module__ = "flax.linen.module"


def call():
    return torch.randn(2, 5, 8), torch.tensor([0.25, 0.75])


def call_in_thousandths():
    return {"x": torch.randn(2, 5, 8), "t": torch.tensor([250, 750])}


def diffusers_call():
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def lone_sample():
    return torch.randn(2, 5, 8)


def words():
    return "x", "t"
