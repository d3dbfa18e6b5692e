"""The options of the command line, and the texts of its help."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

from selfalign.adapting import check_number
from selfalign.objectives import KINDS
from selfalign.paths import PATHS

from .presets import recipe_names

T = TypeVar("T")

EXIT_CODES = """
exit codes: 0 fine, 1 a problem was found, 2 wrong usage, 130 interrupted. Errors go to stderr."""

DESCRIPTION = (
    "Self-alignment of diffusion transformers: the presets, what is installed, and a check of a "
    "model of yours."
)

EXAMPLES = """examples:
  selfalign presets --recipe paper
  selfalign info
  selfalign check my_project.models:build --input 4,32,32 --classes 1000
"""

PRESETS = """Weights are those of epochs 0, 400 and 800. The patch size in a model's name does not
matter.

examples:
  selfalign presets
  selfalign presets --recipe paper --resolution 512
  selfalign presets --objective layersync
"""

INFO = """A package that is installed and cannot be imported is a problem. One that is missing is
not, unless no adapter works.

examples:
  selfalign info
  selfalign info --json
"""

CHECK = """MODEL is called without arguments, or with those of --kwargs, and gives a torch.nn.Module
or a keras.Model.

Without --input or --example the model is looked at and does not run. With one of them, a PyTorch
model takes training steps: the term, where its gradient arrives, and the time of a step against one
without SRA. Of Keras models the layers are shown.

--example names a function without arguments that gives the model's call, (x, t, *condition), or a
dict of its arguments that begins with the sample and the time. x stands for the clean sample; t is
used as it is.

examples:
  selfalign check my_project.models:build --preset SiT-XL/2
  selfalign check train.py:make_model --input 4,32,32 --classes 1000 --student 0.25 --teacher 0.7
  selfalign check train.py:make_model --example train.py:one_call --blocks encoder.layers
  selfalign check diffusers:DiTTransformer2DModel --kwargs '{"num_layers": 12}' \\
      --example train.py:one_call --time-scale 1000
"""


def add_presets_options(parser: ArgumentParser) -> None:
    """The options of `selfalign presets`."""
    add = parser.add_argument
    add("--objective", choices=tuple(KINDS), default="sra", help="whose presets; default sra")
    add("--recipe", choices=recipe_names(), help="this one only")
    sizes = (256, 512)
    add("--resolution", type=int, choices=sizes, default=256, help="of the images; default 256")


def add_check_options(parser: ArgumentParser) -> None:
    """The options of `selfalign check`."""
    _add_model_options(parser)
    _add_input_options(parser)
    count = _read("a whole number from 1", _count)
    add = parser.add_argument
    add("--device", help="move the model there; default: it stays where it was built")
    add("--repeat", metavar="N", type=count, default=3, help="timed steps of each kind; default 3")


def _add_model_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    layer = _read("a block's number from 1, or a fraction of the depth", _layer)
    count = _read("a whole number from 1", _count)
    student = "the student's block from 1, or a fraction of the depth; default 0.25"
    blocks = "the block list; again for a list that runs after it"
    width = "feature width, where the model does not tell it"
    add("model", metavar="MODEL", help="package.module:factory or path/to/file.py:factory")
    add("--kwargs", metavar="JSON", default="{}", help="an object with the factory's arguments")
    add("--preset", metavar="NAME", help="layers and path of a named model, such as SiT-XL/2")
    add("--student", metavar="N", type=layer, help=student)
    add("--teacher", metavar="N", type=layer, help="the teacher's; default 0.7")
    add("--path", choices=tuple(PATHS), help="noise path; default: the preset's, or linear")
    add("--blocks", metavar="PATH", action="append", help=blocks)
    add("--width", metavar="D", type=count, help=width)


def _add_input_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    sizes = _read("sizes such as 4,32,32", _sizes)
    count = _read("a whole number from 1", _count)
    scale = _read("a number above 0", _scale)
    inputs = "sizes of a sample: the model is called with (x, t)"
    classes = "beside --input: the model is called with (x, t, y), y below N"
    batch = "beside --input: samples in a batch; default 2"
    example = "instead of --input: module:function that gives the model's call"
    time_scale = "the model's t is S times the path's; default 1"
    add("--input", metavar="C,H,W", type=sizes, help=inputs)
    add("--classes", metavar="N", type=count, help=classes)
    add("--batch", metavar="B", type=count, default=2, help=batch)
    add("--example", metavar="FUNCTION", help=example)
    add("--time-scale", metavar="S", type=scale, default=1.0, help=time_scale)


# How values are read


def _layer(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_count(size) for size in text.split(","))


def _count(text: str) -> int:
    count: int = check_number("count", int(text), 1)
    return count


def _scale(text: str) -> float:
    scale: float = check_number("scale", float(text), 1e-9)
    return scale


def _read(what: str, parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` for argparse, with an error that says what it reads."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError:
            raise ArgumentTypeError(f"It must be {what}. Received: {text!r}.") from None

    return read
