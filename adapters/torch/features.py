"""Features of a PyTorch model after each block, at noise levels of the caller's choice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import nn

from selfalign.adapting import check_function, check_number, check_switch, invalid, paths

from .arguments import samples
from .blocks import Paths, find_blocks, read_width
from .sharding import unwrap
from .stopping import evaluating
from .tokens import BlockOutput, Output, Select, TokenReader

Features = dict[float, list[torch.Tensor]]


@torch.no_grad()
def features(
    model: nn.Module,
    x0: torch.Tensor,
    noise: torch.Tensor,
    *condition: Any,
    times: Sequence[float],
    path: str | paths.Path = "linear",
    blocks: Paths | None = None,
    select: Select | None = None,
    call: Callable[..., Any] | None = None,
    mean: bool = True,
    batch_size: int = 256,
    **conditions: Any,
) -> Features:
    """What a model's blocks give at several noise levels, for `selfalign.diagnostics`.

    The mean token of each sample after each block. The same samples, noise and condition at every
    time. The model runs in evaluation mode, without gradient, and is left as it was. With a
    `SelfAlignment` attached, call it between two steps, or pass `align.teacher`.

    Args:
        model: the model, or its EMA.
        x0: clean samples [n, ...].
        noise: standard normal noise of the shape of `x0`, drawn by you.
        *condition, **conditions: what else the model is called with; tensors with n rows are split
            along with `x0`. For probes, an empty condition: a model that is told the class repeats
            it.
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
        ValueError: no list of blocks, times outside the path, shapes that differ, or a block that
            does not run once.

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
    base = unwrap(model)
    path = paths.resolve(path)
    count = len(x0)
    check_number("batch_size", batch_size, 1, integer=True)
    mean = check_switch("mean", mean)
    for name, function in (("select", select), ("call", call)):
        if function is not None:
            check_function(name, function)
    if isinstance(times, (str, bytes)) or not all(isinstance(t, Real) for t in times):
        raise TypeError(
            f"times must be a list of numbers. Received: {times!r:.60}. Pass noise levels of the "
            "path, such as [0.1, 0.5]."
        )
    run = call or _call
    found = find_blocks(base, blocks)
    readers = {where: _reader(base, where, select) for where in found}
    result: Features = {}
    with evaluating(base):
        for time in times:
            t = torch.full((count,), time, device=x0.device)
            x = path.add_noise(x0, noise, t)
            batches = []
            for start in range(0, count, batch_size):
                part = slice(start, start + batch_size)
                args = samples(condition, part, count)
                kwargs = samples(conditions, part, count)
                with _recording(base, found) as seen:
                    run(base, x[part], t[part], *args, **kwargs)
                batches.append([_tokens(readers[w], seen, x0[part], mean) for w in found])
            result[time] = [torch.cat(layer) for layer in zip(*batches, strict=True)]
    return result


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _reader(model: nn.Module, where: str, select: Select | None) -> TokenReader:
    width = read_width(model, model.get_submodule(where))
    return TokenReader(model, where, select, width)


class _Seen:
    """What each block returned, by its path, and what the model was called with, by name."""

    def __init__(self, found: Sequence[str]) -> None:
        self.outputs: dict[str, list[BlockOutput]] = {where: [] for where in found}
        self.called: dict[str, Any] = {}

    def note_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The model's pre-hook."""
        self.called.update(kwargs)

    def note_output(
        self, where: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Output
    ) -> None:
        """A block's hook."""
        self.outputs[where].append(BlockOutput.of(output, args, kwargs))


@contextmanager
def _recording(model: nn.Module, found: Sequence[str]) -> Iterator[_Seen]:
    """Record what runs meanwhile."""
    seen = _Seen(found)
    handles = [model.register_forward_pre_hook(seen.note_call, with_kwargs=True)]
    for where in found:
        hook = functools.partial(seen.note_output, where)
        handles.append(model.get_submodule(where).register_forward_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tokens(reader: TokenReader, seen: _Seen, x0: torch.Tensor, mean: bool) -> torch.Tensor:
    """One block's tokens [B, N, D], or their means [B, D], on the CPU."""
    ran = seen.outputs[reader.where]
    if len(ran) != 1:
        raise invalid(
            "A block must run once per forward",
            f"{reader.where!r}, which ran {len(ran)} times",
            "Pass blocks=, the list whose blocks run for every input.",
        )
    tokens = reader(ran[0], x0, seen.called).float()
    return (tokens.mean(1) if mean else tokens).cpu()
