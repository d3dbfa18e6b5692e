"""The projector's parameters in PyTorch."""

from __future__ import annotations

import torch
from torch import nn

from selfalign import projector


class Projector(nn.Module):
    """The projector's parameters, under the core's names and in its layout; `selfalign.project` does the rest.

    Args:
        width: feature width D of the tapped blocks.
        generator: a CPU generator for the initial draws; the global random stream is left alone.
        like: a tensor whose device and dtype the parameters take.

    Example:
        >>> import torch
        >>> from selfalign.adapters.torch import Projector
        >>> net = Projector(8, torch.Generator().manual_seed(0), like=torch.zeros(1))
        >>> net(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, generator: torch.Generator, like: torch.Tensor) -> None:
        super().__init__()
        draws = [torch.rand(shape, generator=generator) for shape in projector.draw_shapes(width)]
        device = "cpu" if like.is_meta else like.device  # a model without weights yet gets them later; these are here now
        for name, value in projector.init_projector(*draws).items():
            self.register_parameter(name, nn.Parameter(value.to(device, like.dtype)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return projector.project(dict(self.named_parameters()), tokens)
