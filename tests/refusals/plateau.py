"""The plateau rule."""

from selfalign import plateau

from .common import BOUNDS, NUMBER, ones

CASES = {
    "a state that is none": (
        lambda: plateau.Plateau()(None, 0.5),
        TypeError,
        "state must be a PlateauState",
        "None",
        "Take it from init(), or from the last call.",
    ),
    "no patience": (
        lambda: plateau.Plateau(patience=0),
        ValueError,
        "patience must be finite and at least 1",
        "0",
        BOUNDS,
    ),
    "patience of half a step": (
        lambda: plateau.Plateau(patience=0.5),
        TypeError,
        "patience must be an integer",
        "0.5",
        NUMBER,
    ),
    "warm-up below 0": (
        lambda: plateau.Plateau(warmup=-1),
        ValueError,
        "warmup must be finite and at least 0",
        "-1",
        BOUNDS,
    ),
    "negative gain": (
        lambda: plateau.Plateau(min_gain=-1),
        ValueError,
        "min_gain must be finite and at least 0",
        "-1",
        BOUNDS,
    ),
    "a factor that rises": (
        lambda: plateau.Plateau(shrink=2),
        ValueError,
        "shrink must be in [0, 1]",
        "2",
        BOUNDS,
    ),
    "smoothing that never moves": (
        lambda: plateau.Plateau(smoothing=1),
        ValueError,
        "smoothing must be in [0, 0.999999]",
        "1",
        "It is the old value's weight.",
    ),
    "a cosine per sample": (
        lambda: plateau.Plateau()(plateau.PlateauState(), ones(3)),
        ValueError,
        "cosine must be a scalar",
        "shape (3,)",
        "Take its mean over the batch.",
    ),
    "a cosine in words": (
        lambda: plateau.Plateau()(plateau.PlateauState(), "0.5"),
        TypeError,
        "cosine must be a tensor",
        "str '0.5'",
        "Convert it first.",
    ),
}
