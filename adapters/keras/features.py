"""Features of a functional backbone after each block, at noise levels of the caller's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import keras
import numpy
from keras import ops

from selfalign.adapting import Tensor, check_number, check_switch, invalid, paths

from .blocks import block_names, is_functional, layer_tokens
from .options import Select


def features(
    backbone: keras.Model,
    x0: Tensor,
    noise: Tensor,
    *condition: Tensor,
    times: Sequence[float],
    path: str | paths.Path = "linear",
    blocks: str | None = None,
    select: Select | None = None,
    arrange: Callable[..., Any] | None = None,
    mean: bool = True,
    batch_size: int = 256,
) -> dict[float, list[numpy.ndarray]]:
    """What a backbone's blocks give at several noise levels, for `selfalign.diagnostics`.

    The same samples, noise and condition at every time, in evaluation mode.

    Args:
        backbone: functional: the one that is trained, or what `ema_backbone()` gives.
        x0: clean samples [n, ...].
        noise: standard normal noise of the shape of `x0`, drawn by you.
        *condition: what else the backbone takes. For probes, an empty condition: a model that is
            told the class repeats it.
        times: noise levels, in the path's own time.
        path: "linear", "cosine", "discrete", "edm", or an object of `selfalign.paths`.
        blocks, select, arrange: as for `SelfAligned`.
        mean: False keeps the tokens, [n, N, D]: mind the memory.
        batch_size: samples per forward.

    Returns:
        {time: [features [n, D] after each block]}, float32 NumPy arrays.

    Raises:
        ValueError: a backbone that is not functional, or no kind of numbered blocks.
        TypeError: times that are no list of numbers.

    Example:
        >>> import keras, numpy as np
        >>> from selfalign.adapters.keras import features
        >>> x, t = keras.Input((5, 8)), keras.Input(())
        >>> h = x
        >>> for n in range(1, 5):
        ...     h = keras.layers.Dense(8, name=f"block_{n}")(h)
        >>> backbone = keras.Model([x, t], h)
        >>> found = features(backbone, np.ones((6, 5, 8)), np.ones((6, 5, 8)), times=[0.1, 0.5])
        >>> len(found[0.1]), found[0.1][0].shape
        (4, (6, 8))
    """
    path = paths.resolve(path)
    check_number("batch_size", batch_size, 1, integer=True)
    mean = check_switch("mean", mean)
    if isinstance(times, (str, bytes)) or not all(isinstance(t, Real) for t in times):
        raise TypeError(
            f"times must be a list of numbers. Received: {times!r:.60}. Pass noise levels of the "
            "path, such as [0.1, 0.5]."
        )
    tapped = _tapped(backbone, blocks, select)
    tensors = [ops.convert_to_tensor(part) for part in (x0, noise, *condition)]
    result = {}
    for time in times:
        batches = []
        for start in range(0, len(x0), batch_size):
            part, noised, *rest = (tensor[start : start + batch_size] for tensor in tensors)
            t = ops.full((len(part),), time, "int32" if path.discrete else "float32")
            inputs = (path.add_noise(part, noised, t), t, *rest)
            arranged = list(inputs) if arrange is None else arrange(*inputs)
            outputs = tapped(arranged, training=False)
            batches.append([_array(tokens, mean) for tokens in outputs.values()])
        result[time] = [numpy.concatenate(each) for each in zip(*batches, strict=True)]
    return result


def _tapped(backbone: keras.Model, blocks: str | None, select: Select | None) -> keras.Model:
    """A model on the backbone's layers that gives the tokens after each block, by its name."""
    if not is_functional(backbone):
        raise invalid(
            "features() needs a functional backbone, whose layers it taps",
            type(backbone).__name__,
            "Another model returns its features itself.",
        )
    names = block_names(backbone, blocks)
    return keras.Model(backbone.input, {n: layer_tokens(backbone, n, select) for n in names})


def _array(tokens: Tensor, mean: bool) -> numpy.ndarray:
    tokens = ops.cast(tokens, "float32")
    return ops.convert_to_numpy(ops.mean(tokens, axis=1) if mean else tokens)
