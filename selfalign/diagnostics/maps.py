"""Maps: what a layer sees where, as pictures of its tokens' first three principal components."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._checks import invalid
from ._arrays import array, need


def pca_maps(tokens: Any, grid: Sequence[int], percentiles: tuple[float, float] = (1.0, 99.0)) -> np.ndarray:
    """Tokens as colours: the first three principal components of all tokens together, on their grid.

    One basis and one scale for all samples, so that equal colours mean alike features. Each component's sign is that of its
    largest weight, so that a picture does not change from run to run.

    Args:
        tokens: [B, N, D], without class or text tokens; D at least 3.
        grid: the token grid, (H, W) for images or (T, H, W) for videos, in the order of the tokens; their product is N.
        percentiles: of each component, what becomes 0 and 1; a few large features would flatten the rest.

    Returns:
        Colours [B, *grid, 3] in [0, 1]; 0.5 where a component is constant.

    Raises:
        ValueError: tokens that are not [B, N, D] with D at least 3, not finite, fewer than three, or another grid.
        ImportError: scikit-learn is missing.

    Example:
        >>> import numpy as np
        >>> from selfalign import diagnostics
        >>> tokens = np.random.default_rng(0).normal(size=(2, 6, 8))
        >>> diagnostics.pca_maps(tokens, grid=(2, 3)).shape
        (2, 2, 3, 3)
    """
    found, grid = array(tokens), tuple(grid)
    if found.ndim != 3 or found.shape[2] < 3 or found.shape[0] * found.shape[1] < 3:
        raise invalid("Maps need tokens [B, N, D], at least three of them, with D at least 3", f"shape {found.shape}",
                      "Pass one layer's tokens, not their mean.")  # fmt: skip
    if len(grid) not in (2, 3) or math.prod(grid) != found.shape[1]:
        raise invalid("grid must be (H, W) or (T, H, W) with H W or T H W = N", f"{grid}, for {found.shape[1]} tokens",
                      "Divide the latent's sides by the patch size; leave out class and text tokens.")  # fmt: skip
    if not np.isfinite(found).all():
        raise invalid("tokens must be finite", "NaN or infinity", "Find the layer that gives them first.")
    components = _components(found.reshape(-1, found.shape[2]))
    low, high = np.percentile(components, percentiles, axis=0)
    flat = high - low <= 1e-12 * np.abs(found).max()
    colours = np.where(flat, 0.5, (components - low) / np.where(flat, 1.0, high - low))
    return np.clip(colours, 0.0, 1.0).reshape(found.shape[0], *grid, 3)


def _components(x: np.ndarray) -> np.ndarray:
    pca = need("sklearn.decomposition").PCA(3, random_state=0)
    with np.errstate(invalid="ignore", divide="ignore"):  # shares of a variance that may be 0
        projected = pca.fit_transform(x)
    weights = pca.components_  # [3, D]
    return projected * np.sign(weights[np.arange(3), np.abs(weights).argmax(1)])


def draw_maps(maps: Any, file: str | os.PathLike[str], size: float = 1.2) -> None:
    """A picture of maps: a row for each name, a column for each sample; the frames of a video side by side.

    Args:
        maps: colours [B, H, W, 3] or [B, T, H, W, 3] from `pca_maps`, or {name: colours}, such as one entry per layer.
        file: where the picture goes; the ending says what it becomes (png, pdf, svg).
        size: the height of a row, in inches.

    Raises:
        ValueError: maps of another shape.
        ImportError: matplotlib is missing.

    Example:
        >>> import numpy as np, os, tempfile
        >>> from selfalign import diagnostics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     diagnostics.draw_maps({"block 1": np.full((2, 4, 6, 3), 0.5)}, os.path.join(folder, "maps.png"))
        ...     os.listdir(folder)
        ['maps.png']
    """
    named = {name: np.asarray(value) for name, value in (maps if isinstance(maps, Mapping) else {"": maps}).items()}
    for name, value in named.items():
        if value.ndim not in (4, 5) or value.shape[-1] != 3 or 0 in value.shape:
            raise invalid("Maps must be colours [B, H, W, 3] or [B, T, H, W, 3]", f"{name!r} of shape {value.shape}",
                          "Take them from pca_maps.")  # fmt: skip
    pictures = {name: value.reshape(-1, *value.shape[-3:]) for name, value in named.items()}
    columns = max(map(len, pictures.values()))
    height, width = next(iter(pictures.values())).shape[1:3]
    figure = need("matplotlib.figure").Figure((size * columns * width / height + size, size * len(pictures)), layout="tight")
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for line, (name, row) in zip(axes, pictures.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, picture in zip(line, row, strict=False):
            axis.imshow(picture, interpolation="nearest")
    figure.savefig(file, dpi=150)
