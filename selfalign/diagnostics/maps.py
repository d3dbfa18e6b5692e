"""Maps: what a layer sees where, as pictures of its tokens' first three principal components."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TypeAlias

import numpy as np

from .._checks import invalid
from ._arrays import Features, array, check_finite, optional_import

Colours: TypeAlias = Features
"""Colours [B, H, W, 3], or of videos [B, T, H, W, 3], in [0, 1]."""


def pca_maps(
    tokens: Features, grid: Sequence[int], percentiles: tuple[float, float] = (1.0, 99.0)
) -> np.ndarray:
    """Tokens as colours, on their grid: their first three principal components.

    Those of all tokens together. One basis and one scale for all samples, so that equal colours
    mean alike features. Each component's sign is that of its largest weight, so that a picture does
    not change from run to run.

    Args:
        tokens: [B, N, D], without class or text tokens; D at least 3.
        grid: the token grid, (H, W) for images or (T, H, W) for videos, in the order of the tokens;
            their product is N.
        percentiles: of each component, what becomes 0 and 1; a few large features would flatten the
            rest.

    Returns:
        Colours [B, *grid, 3] in [0, 1]; 0.5 where a component is constant.

    Raises:
        ValueError: tokens that are not [B, N, D] with D at least 3, not finite, fewer than three,
            or another grid.
        ImportError: scikit-learn is missing.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> tokens = np.random.default_rng(0).normal(size=(2, 6, 8))
        >>> diagnostics.pca_maps(tokens, grid=(2, 3)).shape
        (2, 2, 3, 3)
    """
    found = array(tokens)
    _check_grid(found, grid)
    _check_percentiles(percentiles)
    check_finite("tokens", found)
    components = _components(found.reshape(-1, found.shape[2]))
    low, high = np.percentile(components, percentiles, axis=0)
    flat = high - low <= 1e-12 * np.abs(found).max()
    length = np.where(flat, 1.0, high - low)
    colours = np.where(flat, 0.5, (components - low) / length)
    return np.clip(colours, 0.0, 1.0).reshape(found.shape[0], *grid, 3)


def _check_percentiles(percentiles: Sequence[float]) -> None:
    pair = isinstance(percentiles, (tuple, list)) and len(percentiles) == 2
    numbers = pair and all(isinstance(p, Real) for p in percentiles)
    if numbers and 0 <= percentiles[0] < percentiles[1] <= 100:
        return
    raise invalid(
        "percentiles must be two rising numbers in [0, 100]",
        f"{percentiles!r:.60}",
        "Pass for instance (1.0, 99.0).",
    )


def _check_grid(found: np.ndarray, grid: Sequence[int]) -> None:
    if found.ndim != 3 or found.shape[2] < 3 or found.shape[0] * found.shape[1] < 3:
        raise invalid(
            "Maps need tokens [B, N, D], at least three of them, with D at least 3",
            f"shape {found.shape}",
            "Pass one layer's tokens, not their mean.",
        )
    whole = isinstance(grid, (tuple, list)) and all(isinstance(n, Integral) for n in grid)
    if not whole or len(grid) not in (2, 3) or min(grid) < 1 or math.prod(grid) != found.shape[1]:
        raise invalid(
            "grid must be (H, W) or (T, H, W) with H W or T H W = N",
            f"{grid!r:.60}, for {found.shape[1]} tokens",
            "Divide the latent's sides by the patch size; leave out class and text tokens.",
        )


def _components(x: np.ndarray) -> np.ndarray:
    """The first three principal components, each with its largest weight positive."""
    pca = optional_import("sklearn.decomposition").PCA(3, random_state=0)
    # fractions of a variance that may be 0
    with np.errstate(invalid="ignore", divide="ignore"):
        projected = pca.fit_transform(x)
    weights = pca.components_  # [3, D]
    largest = np.abs(weights).argmax(1)
    return projected * np.sign(weights[np.arange(3), largest])


def draw_maps(
    maps: Colours | Mapping[str, Colours], file: str | os.PathLike[str], size: float = 1.2
) -> None:
    """A picture of maps: a row for each name, a column for each sample.

    The frames of a video stand side by side.

    Args:
        maps: colours [B, H, W, 3] or [B, T, H, W, 3] from `pca_maps`, or {name: colours}, such as
            one entry per layer.
        file: where the picture goes; the ending says what it becomes (png, pdf, svg).
        size: the height of a row, in inches.

    Raises:
        ValueError: maps of another shape.
        ImportError: matplotlib is missing.

    Example:
        >>> import numpy as np, os, tempfile
        >>> from selfalign import diagnostics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     maps = {"block 1": np.full((2, 4, 6, 3), 0.5)}
        ...     diagnostics.draw_maps(maps, os.path.join(folder, "maps.png"))
        ...     os.listdir(folder)
        ['maps.png']
    """
    named = maps if isinstance(maps, Mapping) else {"": maps}
    pictures = {name: _pictures(name, value) for name, value in named.items()}
    columns = max(map(len, pictures.values()))
    height, width = next(iter(pictures.values())).shape[1:3]
    inches = (size * columns * width / height + size, size * len(pictures))
    figure = optional_import("matplotlib.figure").Figure(inches, layout="tight")
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for line, (name, row) in zip(axes, pictures.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, picture in zip(line, row, strict=False):
            axis.imshow(picture, interpolation="nearest")
    figure.savefig(file, dpi=150)


def _pictures(name: str, maps: Colours) -> np.ndarray:
    """One row of pictures [n, H, W, 3], the frames of videos one after the other."""
    value = np.asarray(maps)
    if value.ndim not in (4, 5) or value.shape[-1] != 3 or 0 in value.shape:
        raise invalid(
            "Maps must be colours [B, H, W, 3] or [B, T, H, W, 3]",
            f"{name!r} of shape {value.shape}",
            "Take them from pca_maps.",
        )
    return value.reshape(-1, *value.shape[-3:])
