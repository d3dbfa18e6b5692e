"""What a PyTorch model is called with in `selfalign check`: drawn, or the user's example."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from selfalign.adapting import invalid
from selfalign.paths import Path


class Batch(NamedTuple):
    """A clean sample, noise, times on the path, and the model's call on the noised sample."""

    x0: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, model: nn.Module) -> Any:
        """What the model gives for the noised sample."""
        return model(*self.args, **self.kwargs)


def drawn(
    model: nn.Module, path: Path, shape: tuple[int, ...], classes: int | None, time_scale: float
) -> tuple[torch.Tensor, ...]:
    """Random inputs: (x, t), or (x, t, y) with labels below `classes`.

    In the model's dtype, on its device.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.randn(shape, device=like.device, dtype=like.dtype)
    t = _drawn_times(path, shape[0], like.device)
    if time_scale != 1:
        t = t * time_scale
    if not classes:
        return x, t
    return x, t, torch.randint(0, classes, shape[:1], device=like.device)


def _drawn_times(path: Path, count: int, device: torch.device) -> torch.Tensor:
    """Times over the whole path, from its clean end to its noisy one."""
    if path.discrete:
        return torch.randint(0, path.span, (count,), device=device)
    length: float = path.noise_at - path.clean_at
    return path.clean_at + length * torch.rand(count, device=device)


def make_batch(model: nn.Module, path: Path, example: Any, time_scale: float) -> Batch:
    """The example as a batch: its sample counts as clean, and is noised at the example's time."""
    values = _values(model, example)
    x0 = values[0]
    t = values[1].float() / time_scale
    if path.discrete:
        t = t.round().long()
    try:
        path.check_times(t.cpu(), batch=len(x0))
    except ValueError as error:
        raise ValueError(f"{error} Or pass --time-scale, or another --path.") from error
    noise = torch.randn_like(x0)
    values[0] = path.add_noise(x0, noise, t)
    if isinstance(example, dict):
        return Batch(x0, noise, t, (), dict(zip(example, values, strict=True)))
    return Batch(x0, noise, t, tuple(values), {})


def _values(model: nn.Module, example: Any) -> list[Any]:
    """The arguments in an example, on the model's device: a sample and a time first."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given: list[Any] = []
    if isinstance(example, (dict, tuple, list)):
        given = list(example.values() if isinstance(example, dict) else example)
    kinds = ", ".join(type(value).__name__ for value in given)
    if len(given) < 2 or not all(isinstance(value, torch.Tensor) for value in given[:2]):
        raise invalid(
            "An example must be (x, t, *condition), or a dict that begins with the sample and the "
            "time",
            kinds if len(given) >= 2 else type(example).__name__,
            "Return the sample and the time, two tensors, first.",
        )
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in given]
