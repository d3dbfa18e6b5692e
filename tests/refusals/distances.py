"""Distances, masks and normalisations."""

import numpy as np

import selfalign
from selfalign import distances, masks, normalise

from .common import CONVERT, SPELLING, both, layersync, ones, sra, tokens

WEIGHTS = "mask must hold booleans, or finite weights of at least 0"
LEFT_OUT = "Pass 0 where a sample or token is to be left out."
PAPER_BETA = "The paper takes 0.05."
MASK = "mask must have the shape [B] (samples) or [B, N] (tokens)"
ONLY_SAMPLES = (
    "With a distance that does not tell tokens apart, such as the token-axis cosine, only a mask "
    "over samples has a meaning."
)

CASES = {
    "beta 0": (
        lambda: distances.smooth_l1(tokens(1, 1, 1), tokens(1, 1, 1), 0),
        ValueError,
        "beta must be finite and at least 1e-12",
        "0",
        PAPER_BETA,
    ),
    "beta in the loss": (
        lambda: sra(beta=-1),
        ValueError,
        "beta must be finite and at least 1e-12",
        "-1",
        PAPER_BETA,
    ),
    "beta NaN": (
        lambda: sra(beta=float("nan")),
        ValueError,
        "beta must be finite and at least 1e-12",
        "nan",
        PAPER_BETA,
    ),
    "mask as a list": (
        lambda: sra()(tokens(2, 3, 4), tokens(2, 3, 4), mask=[True, False]),
        TypeError,
        "mask must be a tensor",
        "list [True, False]",
        "Convert it first.",
    ),
    "mask as a list, with the token-axis cosine": (
        lambda: sra(distance="token_axis_cosine")(
            tokens(2, 3, 4), tokens(2, 3, 4), mask=[True, False]
        ),
        TypeError,
        "mask must be a tensor",
        "list [True, False]",
        "Convert it first.",
    ),
    "mask over another batch": (
        lambda: sra()(tokens(2, 3, 4), tokens(2, 3, 4), mask=ones(3)),
        ValueError,
        MASK,
        "(3,), for distances of shape (2, 3)",
        ONLY_SAMPLES,
    ),
    "a negative weight": (
        lambda: sra()(*both(2, 3, 4), mask=ones(2) - 2),
        ValueError,
        WEIGHTS,
        "values from -1 to -1",
        LEFT_OUT,
    ),
    "a weight that is not finite": (
        lambda: masks.masked_mean(ones(2, 3), ones(2, 3) * float("inf")),
        ValueError,
        WEIGHTS,
        "values from inf to inf",
        LEFT_OUT,
    ),
    "a weight that is no number": (
        lambda: layersync().evaluate({}, *both(2, 3, 4), mask=ones(2) * float("nan")),
        ValueError,
        WEIGHTS,
        "values from nan to nan",
        LEFT_OUT,
    ),
    "a mean of integers": (
        lambda: masks.masked_mean(tokens(2, 3, dtype="int32")),
        ValueError,
        "values must be floating point, of the shape [B, N] or [B], and not empty",
        "shape (2, 3) of dtype int32",
        "Reduce over the features first.",
    ),
    "complex weights": (
        lambda: masks.check_mask(np.ones(2, "complex64"), (2, 3)),
        TypeError,
        "mask must hold booleans or weights",
        "dtype complex64",
        "Pass booleans, or real numbers of at least 0.",
    ),
    "mask over features": (
        lambda: sra()(tokens(2, 3, 4), tokens(2, 3, 4), mask=ones(2, 3, 4)),
        ValueError,
        MASK,
        "(2, 3, 4), for distances of shape (2, 3)",
        ONLY_SAMPLES,
    ),
    "token mask with the token-axis cosine": (
        lambda: sra(distance="token_axis_cosine")(
            tokens(2, 3, 4), tokens(2, 3, 4), mask=ones(2, 3)
        ),
        ValueError,
        MASK,
        "(2, 3), for distances of shape (2,)",
        ONLY_SAMPLES,
    ),
    "token mask with the token-axis cosine, as many tokens as features": (
        lambda: sra(distance="token_axis_cosine")(
            tokens(2, 3, 3), tokens(2, 3, 3), mask=ones(2, 3)
        ),
        ValueError,
        MASK,
        "(2, 3), for distances of shape (2,)",
        ONLY_SAMPLES,
    ),
    "unknown distance": (
        lambda: sra(distance="huber"),
        ValueError,
        "distance must be one of 'cosine', 'smooth_l1', 'l1', 'l2'",
        "'huber'",
        SPELLING,
    ),
    "distance that is reduced already": (
        lambda: sra(distance=lambda s, t: ((s - t) ** 2).mean())(tokens(2, 3, 4), tokens(2, 3, 4)),
        ValueError,
        "A distance must return one value per token, [B, N], or per sample, [B]",
        "shape ()",
        "Reduce over the last axis only: (2, 3) is expected.",
    ),
    "mask over another batch, with a normalisation": (
        lambda: sra(normalise="standardise")(*both(2, 3, 4), mask=ones(3)),
        ValueError,
        MASK,
        "(3,), for distances of shape (2, 3)",
        ONLY_SAMPLES,
    ),
    "mask as a list, with a normalisation": (
        lambda: sra(normalise="centre")(*both(2, 3, 4), mask=[True, False]),
        TypeError,
        "mask must be a tensor",
        "list [True, False]",
        CONVERT,
    ),
    "token mask with a distance of samples": (
        lambda: sra(distance=lambda s, t: (s - t).mean((1, 2)))(*both(2, 3, 4), mask=ones(2, 3)),
        ValueError,
        MASK,
        "(2, 3), for distances of shape (2,)",
        ONLY_SAMPLES,
    ),
    "mask of another shape, for a mean": (
        lambda: selfalign.masks.masked_mean(ones(2, 3), ones(3)),
        ValueError,
        MASK,
        "(3,), for distances of shape (2, 3)",
        ONLY_SAMPLES,
    ),
    "unknown normalisation": (
        lambda: sra(normalise="whiten"),
        ValueError,
        "normalise must be one of 'none', 'standardise', 'centre'",
        "'whiten'",
        SPELLING,
    ),
    "no normalisation": (
        lambda: sra(normalise=None),
        ValueError,
        "normalise must be one of 'none', 'standardise', 'centre'",
        "None",
        SPELLING,
    ),
    "one token to standardise": (
        lambda: sra(normalise="standardise")(*both(1, 1, 4)),
        ValueError,
        'normalise="standardise" needs at least two tokens',
        "target tokens of shape (1, 1, 4)",
        'Pass normalise="none".',
    ),
    "one sample to centre": (
        lambda: sra(normalise="centre")(*both(1, 3, 4)),
        ValueError,
        'normalise="centre" needs a batch of at least two samples',
        "target tokens of shape (1, 3, 4)",
        'Enlarge the batch, or pass normalise="none".',
    ),
    "one target to standardise": (
        lambda: normalise.standardise(tokens(1, 1, 4)),
        ValueError,
        'normalise="standardise" needs at least two tokens',
        "target tokens of shape (1, 1, 4)",
        'Pass normalise="none".',
    ),
    "one target to centre": (
        lambda: normalise.centre(tokens(1, 3, 4)),
        ValueError,
        'normalise="centre" needs a batch of at least two samples',
        "target tokens of shape (1, 3, 4)",
        'Enlarge the batch, or pass normalise="none".',
    ),
    "a target without tokens to standardise": (
        lambda: normalise.standardise(tokens(3, 4)),
        ValueError,
        "Tokens must have the shape [B, N, D]",
        "target tokens of shape (3, 4)",
        "Flatten the token grid, or select the features in the adapter.",
    ),
    "an integer target to centre": (
        lambda: normalise.centre(tokens(2, 3, 4, dtype="int32")),
        TypeError,
        "Tokens must be floating point",
        "target tokens of dtype int32",
        "Pass a block's features, not indices.",
    ),
    "mask over another batch, to standardise": (
        lambda: normalise.standardise(tokens(2, 3, 4), ones(3)),
        ValueError,
        MASK,
        "(3,), for distances of shape (2, 3)",
        ONLY_SAMPLES,
    ),
}
