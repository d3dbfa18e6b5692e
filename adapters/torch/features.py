"""Features of a PyTorch model after each block, at noise levels of the caller's choice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from selfalign.adapting import check_function, check_number, check_switch, invalid, paths

from .arguments import samples
from .blocks import Paths, check_called, find_blocks, mixing_blocks, read_width
from .probing import Probe, find_streams, passed_over
from .sharding import unwrap
from .stopping import evaluating
from .student import random_streams_kept
from .tokens import Output, Select, TokenReader

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
    check_called(base, found)
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
                forward = functools.partial(_forward, base, run, t[part], args, kwargs)
                outputs = forward(found, x[part])
                _learn(base, readers, forward, x[part], outputs)
                batches.append([_tokens(readers[w], outputs[w], x[part], mean) for w in found])
            result[time] = [torch.cat(layer) for layer in zip(*batches, strict=True)]
    return result


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _reader(model: nn.Module, where: str, select: Select | None) -> TokenReader:
    width = read_width(model, model.get_submodule(where))
    return TokenReader(model, where, select, width)


def _forward(
    model: nn.Module,
    run: Callable[..., Any],
    t: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: Sequence[str],
    x: torch.Tensor,
) -> dict[str, Output]:
    """What each block returns for the samples `x`; refuses one that does not run once."""
    outputs: dict[str, list[Output]] = {where: [] for where in found}

    def note(where: str, module: nn.Module, args: Any, output: Output) -> None:
        outputs[where].append(output)

    handles = []
    for where in found:
        block = model.get_submodule(where)
        handles.append(block.register_forward_hook(functools.partial(note, where)))
    try:
        run(model, x, t, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for where, ran in outputs.items():
        if len(ran) != 1:
            raise invalid(
                "A block must run once per forward",
                f"{where!r}, which ran {len(ran)} times",
                "Pass blocks=, the list whose blocks run for every input.",
            )
    return {where: ran[0] for where, ran in outputs.items()}


def _learn(
    model: nn.Module,
    readers: dict[str, TokenReader],
    forward: Callable[[Sequence[str], torch.Tensor], dict[str, Output]],
    x: torch.Tensor,
    outputs: dict[str, Output],
) -> None:
    """Find out where the sample's tokens are, where it is not known yet."""
    if all(reader.knows(outputs[where], x) for where, reader in readers.items()):
        return
    blocks = [model.get_submodule(path) for path in mixing_blocks(model, list(readers))]

    def passing(sample: torch.Tensor) -> dict[str, Output]:
        with passed_over(blocks), random_streams_kept():
            return forward(list(readers), sample)

    probe = Probe(passing, x, readers.values())
    for reader, stream in zip(probe.readers, find_streams(probe, x), strict=True):
        reader.learn(stream)


def _tokens(reader: TokenReader, output: Output, x: torch.Tensor, mean: bool) -> torch.Tensor:
    """One block's tokens [B, N, D], or their means [B, D], on the CPU."""
    tokens = reader(output, x).float()
    return (tokens.mean(1) if mean else tokens).cpu()
