"""Heads: their parameters, draws and widths."""

import selfalign
from selfalign import heads

from .common import BOUNDS, layersync, ones, project, projector, repa, sra, tokens

MATRICES = "The projector's draws must be matrices [D, H] and [H, D]"
DRAW_SHAPES = "Draw them with the shapes of selfalign.heads.draw_shapes(width)."
PARAMETERS = "The head's parameters must be hidden_kernel, hidden_bias, output_kernel, output_bias"
FROM_INIT = "Take them from selfalign.init_projector, or from the head's own init."
WIDTH = "It is the feature width D of the student's block."


def init(first, second):
    return selfalign.init_projector(ones(*first), ones(*second))


CASES = {
    "tokens of another width": (
        lambda: project(4, 5),
        ValueError,
        "Tokens must have the head's width",
        "width 5, head of width 4",
        "Build the head with width= the student block's output width.",
    ),
    "draws that are vectors": (
        lambda: init((4,), (8, 4)),
        ValueError,
        MATRICES,
        "shapes (4,) and (8, 4)",
        DRAW_SHAPES,
    ),
    "draws that do not fit": (
        lambda: init((4, 8), (4, 8)),
        ValueError,
        MATRICES,
        "shapes (4, 8) and (4, 8)",
        DRAW_SHAPES,
    ),
    "width 0": (
        lambda: heads.draw_shapes(0),
        ValueError,
        "width must be finite and at least 1",
        "0",
        WIDTH,
    ),
    "width that is not a number": (
        lambda: heads.draw_shapes("768"),
        TypeError,
        "width must be an integer",
        "'768'",
        WIDTH,
    ),
    "fractional width": (
        lambda: heads.draw_shapes(4.5),
        TypeError,
        "width must be an integer",
        "4.5",
        WIDTH,
    ),
    "no hidden units": (
        lambda: heads.draw_shapes(4, 0),
        ValueError,
        "hidden must be finite and at least 1",
        "0",
        BOUNDS,
    ),
    "projector without parameters": (
        lambda: selfalign.project({}, ones(1, 2, 3)),
        ValueError,
        PARAMETERS,
        "none",
        FROM_INIT,
    ),
    "projector of another library": (
        lambda: selfalign.project({"weight": ones(3, 3)}, ones(1, 2, 3)),
        ValueError,
        PARAMETERS,
        "weight",
        FROM_INIT,
    ),
    "a head of one layer": (
        lambda: heads.MLP(layers=1),
        ValueError,
        "layers must be finite and at least 2",
        "1",
        BOUNDS,
    ),
    "layers in words": (
        lambda: heads.MLP(layers="three"),
        TypeError,
        "layers must be an integer",
        "'three'",
        "Pass a Python int or float.",
    ),
    "no hidden units in REPA's head": (
        lambda: repa(hidden=0),
        ValueError,
        "hidden must be finite and at least 1",
        "0",
        BOUNDS,
    ),
    "a head without parameters": (
        lambda: repa().evaluate({}, tokens(2, 3, 4), tokens(2, 3, 4)),
        ValueError,
        "The head's parameters must be hidden_kernel, hidden_bias, hidden_2_kernel",
        "none",
        FROM_INIT,
    ),
    "parameters of another head": (
        lambda: repa().evaluate(projector(4), tokens(2, 3, 4), tokens(2, 3, 4)),
        ValueError,
        "The head's parameters must be hidden_kernel, hidden_bias, hidden_2_kernel",
        "hidden_bias, hidden_kernel, output_bias, output_kernel",
        FROM_INIT,
    ),
    "parameters where there is no head": (
        lambda: layersync().evaluate(projector(4), tokens(2, 3, 4), tokens(2, 3, 4)),
        ValueError,
        "The head's parameters must be none",
        "hidden_bias, hidden_kernel, output_bias, output_kernel",
        FROM_INIT,
    ),
    "a head of another width, in evaluate": (
        lambda: sra().evaluate(projector(5), tokens(2, 3, 4), tokens(2, 3, 4)),
        ValueError,
        "Tokens must have the head's width",
        "width 4, head of width 5",
        "Build the head with width= the student block's output width.",
    ),
}
