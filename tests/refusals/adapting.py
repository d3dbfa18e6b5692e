"""What adapters refuse with the core's words: objectives, lists of them, and targets."""

import numpy as np

import selfalign
from selfalign import adapting

from .common import CONVERT, layersync, ones, repa, sra

DERIVE = "An objective must derive from selfalign.Objective"
DEFINE = "Define it in your class; docs/extending.md shows a whole one."
AGREE = "Objectives share one EMA teacher, and must agree on path, gap and decay"
TARGETS = "target_tokens= must be the targets that the objectives take"
ENCODER = "Pass the encoder's tokens [B, N, width] for each that takes them, and nothing else."


def shared(*losses):
    return adapting.shared_teacher(adapting.named_objectives(losses))


def targets(given, *losses, several=False):
    return adapting.given_targets(adapting.named_objectives(losses), given, several)


class Unnamed(selfalign.Objective):
    """Has no kind."""

    source = selfalign.sources.Nothing()

    def compare(self, student, target, mask=None):
        return 0.0


class Sourceless(Unnamed):
    kind = "sourceless"
    source = None


class Headless(Unnamed):
    kind = "headless"
    head = None


class Incomparable(selfalign.Objective):
    kind = "incomparable"
    source = selfalign.sources.Nothing()


CASES = {
    "sources of an object": (
        lambda: adapting.with_source({"sra": sra()}, sra().source),
        TypeError,
        "kind must be a class of selfalign.sources",
        "EMATeacher(",
        "Pass for instance sources.EMATeacher.",
    ),
    "a function by its name": (
        lambda: adapting.check_function("select", "first"),
        TypeError,
        "select must be a function",
        "str 'first'",
        "Pass the function itself, not its name or its result.",
    ),
    "draws that are missing": (
        lambda: adapting.init_head(sra(), {"hidden_kernel": ones(4, 8)}),
        ValueError,
        "draws must be those that head_shapes names",
        "hidden_kernel, without output_kernel",
        "Draw one array for each of its entries.",
    ),
    "a function as objective": (
        lambda: adapting.named_objectives(len),
        TypeError,
        DERIVE,
        "builtin_function_or_method <built-in function len>",
        "Pass for instance selfalign.SRALoss, or derive your class from Objective.",
    ),
    "no objective": (
        lambda: adapting.named_objectives(None),
        TypeError,
        DERIVE,
        "NoneType None",
        "Pass for instance selfalign.SRALoss",
    ),
    "a class as objective": (
        lambda: adapting.named_objectives(selfalign.SRALoss),
        TypeError,
        DERIVE,
        "type <class 'selfalign.objectives.sra.SRALoss'>",
        "Pass for instance selfalign.SRALoss",
    ),
    "a word in a list": (
        lambda: adapting.named_objectives([sra(), "repa"]),
        TypeError,
        DERIVE,
        "str 'repa'",
        "Pass for instance selfalign.SRALoss",
    ),
    "an empty list": (
        lambda: adapting.named_objectives([]),
        ValueError,
        "There must be an objective",
        "an empty list",
        "Pass an objective, or a list of at least one.",
    ),
    "two of one name": (
        lambda: adapting.named_objectives([layersync(), repa(), layersync(weight=0.1)]),
        ValueError,
        "Objectives of one model must have different names",
        "two objectives named 'layersync'",
        'Give one of them a name of its own: name="deep".',
    ),
    "a name that is another's kind": (
        lambda: adapting.named_objectives([layersync(), repa(name="layersync")]),
        ValueError,
        "Objectives of one model must have different names",
        "two objectives named 'layersync'",
        'Give one of them a name of its own: name="deep".',
    ),
    "an objective without a kind": (
        lambda: adapting.check_objective(Unnamed(student_layer=1)),
        TypeError,
        'An objective must have `kind`, a name such as "sra"',
        "Unnamed without it",
        DEFINE,
    ),
    "a source that is none": (
        lambda: adapting.check_objective(Sourceless(student_layer=1)),
        TypeError,
        "An objective must have `source`, one of selfalign.sources",
        "Sourceless without it",
        DEFINE,
    ),
    "a head that is none": (
        lambda: adapting.check_objective(Headless(student_layer=1)),
        TypeError,
        "An objective must have `head`, one of selfalign.heads",
        "Headless without it",
        DEFINE,
    ),
    "an objective without compare": (
        lambda: adapting.check_objective(Incomparable(student_layer=1)),
        TypeError,
        "An objective must have `compare`, a method (student, target, mask) -> scalar",
        "Incomparable without it",
        DEFINE,
    ),
    "teachers of two decays": (
        lambda: shared(sra(), sra(name="deep", decay=0.99)),
        ValueError,
        AGREE,
        "decay Constant(constant=0.99) of 'deep', and Constant(constant=0.9999)",
        "Give them the same, or train with one of them.",
    ),
    "teachers on two paths": (
        lambda: shared(layersync(), sra(path="cosine"), sra(name="deep")),
        ValueError,
        AGREE,
        "path Linear(noise_at=1.0) of 'deep', and Cosine(noise_at=1.0)",
        "Give them the same, or train with one of them.",
    ),
    "no target": (
        lambda: targets(None, repa()),
        ValueError,
        TARGETS,
        "none, for the objectives ['repa']",
        ENCODER,
    ),
    "a target that is not taken": (
        lambda: targets(ones(2, 3, 4), sra()),
        ValueError,
        TARGETS,
        ", for objectives that take none",
        ENCODER,
    ),
    "one target for a list": (
        lambda: targets(ones(2, 3, 4), repa(), layersync(), several=True),
        ValueError,
        TARGETS + ", a dict by name for a list of them",
        ", for the objectives ['repa']",
        ENCODER,
    ),
    "a target by another name": (
        lambda: targets({"encoder": ones(2, 3, 4)}, repa(), layersync(), several=True),
        ValueError,
        TARGETS,
        "a dict with ['encoder'], for the objectives ['repa']",
        ENCODER,
    ),
    "a target too many": (
        lambda: targets(
            {"repa": ones(2, 3, 4), "layersync": ones(2, 3, 4)}, repa(), layersync(), several=True
        ),
        ValueError,
        TARGETS,
        "a dict with ['layersync', 'repa'], for the objectives ['repa']",
        ENCODER,
    ),
    "a target in words": (
        lambda: targets("dino", repa()),
        TypeError,
        "target_tokens= of 'repa' must be a tensor",
        "str 'dino'",
        CONVERT,
    ),
    "a head without a width": (
        lambda: adapting.head_shapes(sra(), None),
        TypeError,
        "width must be an integer",
        "None",
        "It is the feature width D of the student's block.",
    ),
    "tokens of another width": (
        lambda: adapting.apply_head(sra(), head(), ones(2, 3, 5)),
        ValueError,
        "Tokens must have the head's width",
        "width 5, head of width 4",
        "Build the head with width= the student block's output width.",
    ),
    "tokens without a grid": (
        lambda: adapting.apply_head(sra(), head(), ones(3, 4)),
        ValueError,
        "Tokens must have the shape [B, N, D]",
        "student tokens of shape (3, 4)",
        "Flatten the token grid, or select the features in the adapter.",
    ),
}


def head():
    shapes = adapting.head_shapes(sra(), 4)
    return adapting.init_head(sra(), {n: np.ones(s, "float32") for n, s in shapes.items()})
