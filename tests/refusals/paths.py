"""Noise paths: samples, and settings."""

from selfalign import paths

from .common import BOUNDS, CONVERT, SETTINGS, SPELLING, less, mix, ones, sra, tokens

FALLING = "alphas_cumprod must be at least two numbers that fall strictly inside [0, 1]"

CASES = {
    "noise of another shape": (
        lambda: mix(noise=(2, 4)),
        ValueError,
        "x0 and noise must have the same shape [B, ...]",
        "x0 (2, 3), noise (2, 4)",
        "Draw the noise like x0.",
    ),
    "a scalar sample": (
        lambda: mix(x0=(), noise=()),
        ValueError,
        "x0 and noise must have the same shape [B, ...]",
        "x0 (), noise ()",
        "Draw the noise like x0.",
    ),
    "velocity of another shape": (
        lambda: paths.Linear().velocity(ones(2), ones(3), ones(2)),
        ValueError,
        "x0 and noise must have the same shape [B, ...]",
        "x0 (2,), noise (3,)",
        "Draw the noise like x0.",
    ),
    "integer images": (
        lambda: paths.Linear().add_noise(tokens(2, 3, dtype="uint8"), ones(2, 3), ones(2)),
        TypeError,
        "x0 must be floating point",
        "dtype uint8",
        "Scale images to floats first.",
    ),
    "unknown prediction": (
        lambda: paths.Linear().target(ones(2), ones(2), ones(2), "score"),
        ValueError,
        "prediction must be one of 'velocity', 'noise', 'data'",
        "'score'",
        SPELLING,
    ),
    "no inverse": (
        lambda: paths.Discrete((0.9, 0.1)).time_at_snr(1.0),
        ValueError,
        "time_at_snr needs a path with an inverse",
        "Discrete(alphas_cumprod=(0.9, 0.1))",
        "Use a continuous path, or search in snr(t).",
    ),
    "noise in the middle": (
        lambda: paths.Linear(noise_at=0.5),
        ValueError,
        "noise_at must be one of 0.0, 1.0",
        "0.5",
        SPELLING,
    ),
    "noise nowhere": (
        lambda: paths.Cosine(noise_at="end"),
        ValueError,
        "noise_at must be one of 0.0, 1.0",
        "'end'",
        SPELLING,
    ),
    "one step": (
        lambda: paths.Discrete((0.5,)),
        ValueError,
        FALLING,
        "1 numbers, (0.5,)",
        "Pass the cumulative product of 1 - beta, step 0 first.",
    ),
    "rising schedule": (
        lambda: paths.Discrete((0.1, 0.9)),
        ValueError,
        FALLING,
        "2 numbers, (0.1, 0.9)",
        "step 0 first.",
    ),
    "schedule above 1": (
        lambda: paths.Discrete((1.5, 0.9)),
        ValueError,
        FALLING,
        "2 numbers, (1.5, 0.9)",
        "step 0 first.",
    ),
    "schedule with NaN": (
        lambda: paths.Discrete((0.9, float("nan"))),
        ValueError,
        FALLING,
        "2 numbers, (0.9, nan)",
        "step 0 first.",
    ),
    "no sigma": (
        lambda: paths.EDM(sigma_min=0.0),
        ValueError,
        "sigma_min must be finite and at least 1e-30",
        "0.0",
        BOUNDS,
    ),
    "sigmas swapped": (
        lambda: paths.EDM(80.0, 0.002),
        ValueError,
        "sigma_max must be finite and at least 80.08",
        "0.002",
        "sigma_max must exceed sigma_min.",
    ),
    "unknown path": (
        lambda: sra(path="vp"),
        ValueError,
        "path must be one of 'linear', 'cosine', 'discrete', 'edm'",
        "'vp'",
        SPELLING,
    ),
    "path settings without a name": (
        lambda: paths.resolve({"noise_at": 1}),
        ValueError,
        "path must be one of 'linear', 'cosine', 'discrete', 'edm'",
        "None",
        SPELLING,
    ),
    "a path's class": (
        lambda: sra(path=paths.Linear),
        ValueError,
        "path must be one of 'linear'",
        "<class 'selfalign.paths.unit_time.Linear'>",
        SPELLING,
    ),
    "unknown setting of a path": (
        lambda: paths.resolve({"name": "linear", "clean_at": 0}),
        ValueError,
        "The settings of the path 'linear' must be noise_at",
        "clean_at",
        SETTINGS,
    ),
    "no path": (
        lambda: sra(path=None),
        ValueError,
        "path must be one of 'linear'",
        "None",
        SPELLING,
    ),
    "noise of another shape, at less noise": (
        lambda: less(noise=(2, 4)),
        ValueError,
        "x0 and noise must have the same shape [B, ...]",
        "x0 (2, 3), noise (2, 4)",
        "Draw the noise like x0.",
    ),
    "a sample as a list": (
        lambda: paths.Linear().add_noise([[1.0]], ones(1, 1), ones(1)),
        TypeError,
        "x0 must be a tensor",
        "list [[1.0]]",
        CONVERT,
    ),
    "noise as a number": (
        lambda: paths.Linear().add_noise(ones(1, 1), 0.5, ones(1)),
        TypeError,
        "noise must be a tensor",
        "float 0.5",
        CONVERT,
    ),
}
