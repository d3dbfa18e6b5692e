"""Whether the last of several forwards is the one that align() is called for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from selfalign.adapting import Objective, invalid, paths

from .arguments import Arguments, tensors_in

_ROUNDING = 0.01  # of half precision, with room


def check_last(
    call: Arguments,
    forwards: int,
    objectives: Sequence[Objective],
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
) -> None:
    """Refuse a last forward whose sample is not the one of align().

    A batch may have been skipped after its forward: nothing is wrong then. Two forwards before one
    align() may be a mistake. The sample tells: it is x_t, or a multiple of it, or without a path
    any mixture of x0 and noise. Looking waits for the device, in this rare case only.

    Args:
        call: of the last forward.
        forwards: how many forwards there were.
        objectives: those whose paths say what x_t is.
        x0, noise, t: what align() was given.

    Raises:
        ValueError: no tensor of the call is that sample.
    """
    found = [getattr(objective, "path", None) for objective in objectives]
    path = next((path for path in found if isinstance(path, paths.Path)), None)
    basis = [x0, noise] if path is None else [path.add_noise(x0, noise, t)]
    tensors = [tensor for _, tensor in tensors_in([call.args, call.kwargs])]
    if not any(_is_mixture(tensor, basis) for tensor in tensors):
        wanted = "mixture of x0 and noise" if path is None else "path.add_noise(x0, noise, t)"
        raise invalid(
            "The model's last forward must be that of the sample which align() is given",
            f"{forwards} forwards with gradient since the last align(), and no {wanted} in the "
            "call of the last",
            "Call align() right after the forward that it belongs to. Run other forwards in `with "
            "align.paused():` or torch.no_grad(), and call align.forget() after a batch that is "
            "skipped.",
        )


@torch.no_grad()
def _is_mixture(value: torch.Tensor, basis: Sequence[torch.Tensor]) -> bool:
    """Whether each sample of `value` is a sum of multiples of those in `basis`."""
    first = basis[0]
    alike = all(value.shape == other.shape for other in basis)
    if not alike or not value.is_floating_point() or value.ndim < 2:
        return False
    target = value.to(first.device, torch.float32).flatten(1)[..., None]
    columns = torch.stack([other.float().flatten(1) for other in basis], dim=-1)
    gram = columns.mT @ columns
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] + 1e-30
    eye = torch.eye(len(basis), device=first.device)
    weights = torch.linalg.solve(gram + ridge * eye, columns.mT @ target)
    rest = (target - columns @ weights).flatten(1).norm(dim=1)
    size = target.flatten(1).norm(dim=1)
    return bool(((rest <= _ROUNDING * size) & (size > 0)).all())
