"""The parameters of an objective's head in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from selfalign.adapting import Objective, apply_head, head_shapes, init_head, invalid

from .sharding import average_gradients


def by_name(heads: Mapping[str, Projector]) -> nn.ModuleDict:
    """The heads of a list of objectives.

    Raises:
        ValueError: a name that torch's container cannot take.
    """
    empty = nn.ModuleDict()
    for name in heads:
        if hasattr(empty, name):
            raise invalid(
                "An objective's name must not be that of a torch module's attribute",
                repr(name),
                'Pass for instance name="deep".',
            )
    return nn.ModuleDict(heads)


class Projector(nn.Module):
    """The parameters of an objective's head, under the core's names and in its layout.

    Without a width they are not there yet: torch's UninitializedParameter stands for each of them,
    which an optimizer takes. `build` gives them their values.

    Args:
        objective: whose head it is.
        seed: of the initial values; the global random stream is left alone.
        like: a tensor whose device and dtype the parameters take.
        width: feature width D of the tapped block, or None where it is not known yet.

    Attributes:
        built: whether the parameters have values.

    Example:
        >>> import torch, selfalign
        >>> from selfalign.adapters.torch import Projector
        >>> loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
        >>> net = Projector(loss, seed=0, like=torch.zeros(1), width=8)
        >>> net(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self, objective: Objective, seed: int, like: torch.Tensor, width: int | None
    ) -> None:
        super().__init__()
        self.objective = objective
        self.seed = seed
        self.built = not objective.head.names
        # a model without weights yet gets them later; these are here now
        device = torch.device("cpu") if like.is_meta else like.device
        for name in objective.head.names:
            empty: Any = nn.UninitializedParameter(device=device, dtype=like.dtype)  # type: ignore[call-arg]
            self.register_parameter(name, empty)
        if width is not None:
            self.build(width)

    @torch.no_grad()
    def build(self, width: int) -> None:
        """Give the parameters their initial values, for tokens of `width`."""
        shapes = head_shapes(self.objective, width)
        generator = torch.Generator().manual_seed(self.seed)
        draws = {}
        for name, shape in shapes.items():
            draws[name] = torch.rand(shape, generator=generator, device="cpu")
        values = init_head(self.objective, draws)
        self._materialize({name: tuple(value.shape) for name, value in values.items()})
        for name, value in values.items():
            self.get_parameter(name).copy_(value)

    @torch.no_grad()
    def take_back(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load saved parameters; those without values yet get the saved ones' shapes."""
        self._materialize({name: tuple(value.shape) for name, value in state.items()})
        self.load_state_dict(state)

    def _materialize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if self.built:
            return
        self.built = True
        for name, parameter in self.named_parameters():
            if isinstance(parameter, nn.UninitializedParameter):
                parameter.materialize(shapes[name])
        average_gradients(self)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project tokens [B, N, D]."""
        if not self.built:
            raise invalid(
                "The head must know its width before it is used",
                "a head that has seen no tokens yet",
                "Run `with align.recording(): model(...)` first, or pass width=.",
            )
        params = {name: getattr(self, name) for name in self.objective.head.names}
        projected: torch.Tensor = apply_head(self.objective, params, tokens)
        return projected
