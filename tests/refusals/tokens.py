"""Tokens of the wrong kind or shape, and targets that are missing or not wanted."""

import selfalign
from selfalign import distances

from .common import CONVERT, SKIP, layersync, ones, repa, sra, tokens

SAME_SHAPE = "Student and target tokens must have the same shape [B, N, D]"
SAME_TOKENS = "Align the same tokens of the same batch, and give the head the target's width."
FLATTEN = "Flatten the token grid, or select the features in the adapter."


class Short(selfalign.Objective):
    """An objective without a target."""

    kind = "short"
    source = selfalign.sources.Nothing()

    def compare(self, student, target, mask=None):
        return (student**2).mean()


def head_of_repa():
    draws = {name: ones(*shape) for name, shape in repa().head.draw_shapes(4, 4).items()}
    return repa().head.init(draws)


CASES = {
    "tokens as lists": (
        lambda: sra()([[[1.0]]], [[[1.0]]]),
        TypeError,
        "The student's tokens must be a tensor",
        "list [[[1.0]]]",
        CONVERT,
    ),
    "student [N, D]": (
        lambda: sra()(tokens(3, 4), tokens(2, 3, 4)),
        ValueError,
        "Tokens must have the shape [B, N, D]",
        "student tokens of shape (3, 4)",
        FLATTEN,
    ),
    "target [B, H, W, D]": (
        lambda: sra()(tokens(2, 3, 4), tokens(2, 3, 3, 4)),
        ValueError,
        "Tokens must have the shape [B, N, D]",
        "target tokens of shape (2, 3, 3, 4)",
        FLATTEN,
    ),
    "no samples": (
        lambda: sra()(tokens(0, 3, 4), tokens(0, 3, 4)),
        ValueError,
        "Tokens must not be empty",
        "student tokens of shape (0, 3, 4)",
        SKIP,
    ),
    "no tokens on the target's side": (
        lambda: distances.l2(tokens(2, 3, 4), tokens(2, 0, 4)),
        ValueError,
        "Tokens must not be empty",
        "target tokens of shape (2, 0, 4)",
        SKIP,
    ),
    "integer student": (
        lambda: sra()(tokens(2, 3, 4, dtype="int32"), tokens(2, 3, 4)),
        TypeError,
        "Tokens must be floating point",
        "student tokens of dtype int32",
        "Pass a block's features, not indices.",
    ),
    "boolean target": (
        lambda: sra()(tokens(2, 3, 4), tokens(2, 3, 4, dtype="bool")),
        TypeError,
        "Tokens must be floating point",
        "target tokens of dtype bool",
        "Pass a block's features, not indices.",
    ),
    "two widths": (
        lambda: sra()(tokens(2, 3, 4), tokens(2, 3, 5)),
        ValueError,
        SAME_SHAPE,
        "student (2, 3, 4), target (2, 3, 5)",
        SAME_TOKENS,
    ),
    "two batches, in metrics": (
        lambda: sra().metrics(tokens(1, 3, 4), tokens(2, 3, 4)),
        ValueError,
        SAME_SHAPE,
        "student (1, 3, 4), target (2, 3, 4)",
        SAME_TOKENS,
    ),
    "no target": (
        lambda: sra().metrics(tokens(2, 3, 4), None),
        ValueError,
        "The objective 'sra' needs a target",
        "target tokens None",
        "Pass the target's tokens [B, N, D].",
    ),
    "no target for REPA": (
        lambda: repa()(tokens(2, 3, 4), None),
        ValueError,
        "The objective 'repa' needs a target",
        "target tokens None",
        "Pass the target's tokens [B, N, D].",
    ),
    "a target where there is none": (
        lambda: Short(student_layer=1)(tokens(2, 3, 4), tokens(2, 3, 4)),
        ValueError,
        "The objective 'short' has no target",
        "target tokens, a ",
        "Pass None in their place.",
    ),
    "a target in words": (
        lambda: layersync()(tokens(2, 3, 4), "later"),
        TypeError,
        "The target's tokens must be a tensor",
        "str 'later'",
        CONVERT,
    ),
    "an encoder of another width": (
        lambda: repa()(tokens(2, 3, 4), tokens(2, 3, 6)),
        ValueError,
        SAME_SHAPE,
        "student (2, 3, 4), target (2, 3, 6)",
        SAME_TOKENS,
    ),
    "an encoder of another grid, behind the head": (
        lambda: repa().evaluate(head_of_repa(), tokens(2, 3, 4), tokens(2, 5, 4)),
        ValueError,
        SAME_SHAPE,
        "student (2, 3, 4), target (2, 5, 4)",
        SAME_TOKENS,
    ),
}
