"""Features of a PyTorch model after each block, at noise levels of the caller's choice, for `selfalign.diagnostics`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from selfalign import paths
from selfalign._checks import check_number, invalid

from ._torch_call import samples
from ._torch_distributed import unwrap
from ._torch_families import stream
from ._torch_taps import Select, evaluating, find_blocks, reached_of, read_width, tokens_of


@torch.no_grad()
def features(model: nn.Module, x0: torch.Tensor, noise: torch.Tensor, *condition: Any, times: Sequence[float],
             path: Any = "linear", blocks: str | Sequence[str] | None = None, select: Select | None = None,
             call: Callable[..., Any] | None = None, mean: bool = True, batch_size: int = 256,
             **conditions: Any) -> dict[float, list[torch.Tensor]]:  # fmt: skip
    """What a model's blocks give at several noise levels: the mean token of each sample after each block.

    The same samples, noise and condition at every time. The model runs in eval mode, without gradient, and is left as it was.
    With a `SelfAlignment` attached, call it between two steps, or pass `align.teacher`.

    Args:
        model: the model, or its EMA.
        x0: clean samples [n, ...].
        noise: standard normal noise of the shape of `x0`, drawn by you.
        *condition, **conditions: what else the model is called with; tensors with n rows are split along with `x0`. For probes,
            an empty condition: a model that is told the class repeats it.
        times: noise levels, in the path's own time.
        path: "linear", "cosine", "discrete", "edm", or an object of `selfalign.paths`.
        blocks: path of the list of blocks, or several, where they are not found.
        select: from a block's output to its tokens, as for `SelfAlignment`.
        call: (model, x, t, *condition) -> anything, as for `SelfAlignment`.
        mean: False keeps the tokens, [n, N, D], for `diagnostics.pca_maps`: mind the memory.
        batch_size: samples per forward.

    Returns:
        {time: [features [n, D] after each block]}, float32, on the CPU.

    Raises:
        ValueError: no list of blocks, times outside the path, shapes that differ, or a block that does not run once.

    Example:
        >>> import torch
        >>> from selfalign.adapters.torch import features
        >>> class Model(torch.nn.Sequential):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> model = Model(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> found = features(model, torch.randn(6, 5, 8), torch.randn(6, 5, 8), times=[0.1, 0.5])
        >>> len(found[0.1]), found[0.1][0].shape
        (4, torch.Size([6, 8]))
    """
    base, path, count = unwrap(model), paths.resolve(path), len(x0)
    check_number("batch_size", batch_size, 1, integer=True)
    run = call or (lambda model, *args, **options: model(*args, **options))
    found = find_blocks(base, blocks)
    result: dict[float, list[torch.Tensor]] = {}
    with evaluating(base):
        for time in times:
            t = torch.full((count,), time, device=x0.device)
            x = path.add_noise(x0, noise, t)
            batches = []
            for start in range(0, count, batch_size):
                part = slice(start, start + batch_size)
                args, options = samples(condition, count, part), samples(conditions, count, part)
                with _recording(base, found) as (outputs, called):
                    run(base, x[part], t[part], *args, **options)
                batches.append(list(_tokens(base, outputs, called, select, x0[part], mean)))
            result[time] = [torch.cat(layer) for layer in zip(*batches, strict=True)]
    return result


@contextmanager
def _recording(model: nn.Module, found: list[str]) -> Iterator[tuple[dict[str, list[Any]], dict[str, Any]]]:
    """What each block returns meanwhile, by its path; and what the model is called with, by name."""
    outputs: dict[str, list[Any]] = {name: [] for name in found}
    called: dict[str, Any] = {}

    def hook(kept: list[Any]) -> Callable[..., None]:
        return lambda module, args, kwargs, output: kept.append(reached_of(args, kwargs, output))

    handles = [model.get_submodule(name).register_forward_hook(hook(outputs[name]), with_kwargs=True) for name in found]
    handles.append(model.register_forward_pre_hook(lambda module, args, kwargs: called.update(kwargs), with_kwargs=True))
    try:
        yield outputs, called
    finally:
        for handle in handles:
            handle.remove()


def _tokens(model: nn.Module, outputs: dict[str, list[Any]], called: dict[str, Any], select: Select | None, x0: torch.Tensor,
            mean: bool) -> Iterator[torch.Tensor]:  # fmt: skip
    for name, ran in outputs.items():
        if len(ran) != 1:
            raise invalid("A block must run once per forward", f"{name!r}, which ran {len(ran)} times",
                          "Pass blocks=, the list whose blocks run for every input.")  # fmt: skip
        block = model.get_submodule(name)
        select_here = select or stream(model, block, x0, called)
        tokens = tokens_of(ran[0], select_here, block, repr(name), read_width(model, block))
        yield (tokens.float().mean(1) if mean else tokens.float()).cpu()
