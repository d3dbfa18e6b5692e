"""The command `selfalign`: the presets, what is installed, and a dry step of SRA with a model of yours.

A command fills its report, a dict of plain values and of tables (lists of dicts); `main` prints it, also where a problem cut
it short. Frameworks are imported by the commands that need them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import __version__, _installed, targets
from ._backend import _tensors
from ._checks import check_number, invalid
from .loss import _RECIPES, SRALoss
from .paths import KINDS

_EXIT_CODES = "\nexit codes: 0 fine, 1 a problem was found, 2 wrong usage, 130 interrupted. Errors go to stderr."

_EXAMPLES = """examples:
  selfalign presets --recipe paper
  selfalign info
  selfalign check my_project.models:build --input 4,32,32 --classes 1000
"""

_PRESETS = """Weights are those of epochs 0, 400 and 800. The patch size in a model's name does not matter.

examples:
  selfalign presets
  selfalign presets --recipe paper --resolution 512
"""

_INFO = """A package that is installed and cannot be imported is a problem; one that is missing is not, unless no adapter works.

examples:
  selfalign info
  selfalign info --json
"""

_CHECK = """MODEL is called without arguments, or with those of --kwargs, and gives a torch.nn.Module or a keras.Model.

Without --input or --example the model is looked at and does not run. With one of them, a PyTorch model takes training steps:
the term, where its gradient arrives, and the time of a step against one without SRA. Of Keras models the layers are shown.

--example names a function without arguments that gives the model's call, (x, t, *condition), or a dict of its arguments that
begins with the sample and the time. x stands for the clean sample; t is used as it is.

examples:
  selfalign check my_project.models:build --preset SiT-XL/2
  selfalign check train.py:make_model --input 4,32,32 --classes 1000 --student 0.25 --teacher 0.7
  selfalign check train.py:make_model --example train.py:one_call --blocks encoder.layers --device cuda
  selfalign check diffusers:DiTTransformer2DModel --kwargs '{"num_layers": 12}' --example train.py:one_call --time-scale 1000
"""


class _WrongUsage(Exception):
    """What the command line asks for does not exist or does not fit: exit code 2."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit code: 0 fine, 1 a problem was found, 2 wrong usage, 130 interrupted.

    Args:
        arguments: as on the command line, which is the default.

    Raises:
        SystemExit: of argparse, after --help and --version (0), and where it cannot read the arguments (2).

    Example:
        >>> from selfalign.cli import main
        >>> code = main(["presets", "--recipe", "default"])
        model     depth  student_layer  teacher_layer  path
        SiT-S/2   12     3              8              linear
        SiT-B/2   12     3              8              linear
        SiT-L/2   24     6              16             linear
        SiT-XL/2  28     8              20             linear
        DiT-S/2   12     3              7              discrete
        DiT-B/2   12     3              7              discrete
        DiT-L/2   24     6              14             discrete
        DiT-XL/2  28     8              16             discrete
        <BLANKLINE>
        recipe   models  distance  weight  epoch_400  epoch_800  decay
        default  SiT     cosine    0.5     0.5        0.5        0.9999
        default  DiT     cosine    0.5     0.5        0.5        0.9999
        >>> code
        0
    """
    settings = _parser().parse_args(arguments)
    report: dict[str, Any] = {}
    error: Exception | None = None
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what packages and models print must not end up in the report
            settings.run(settings, report)
    except KeyboardInterrupt:
        return 130
    except Exception as problem:
        error = problem
        if settings.json:
            report["error"] = str(error)
    if report:
        print(json.dumps(report, indent=2) if settings.json else _text(report), flush=True)
    if error is None:
        return 0
    if not isinstance(error, (_WrongUsage, ValueError, TypeError)):  # nobody has put it into words: show where
        traceback.print_exception(error)
    print(f"selfalign: {error}", file=sys.stderr)
    return 2 if isinstance(error, _WrongUsage) else 1


# --------------------------------------------------------------------------------------------------------- the command line


def _parser() -> argparse.ArgumentParser:
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    text = "Self-Representation Alignment: the presets, what is installed, and a check of a model of yours."
    parser = argparse.ArgumentParser("selfalign", description=text, epilog=_EXAMPLES + _EXIT_CODES, **form)
    parser.add_argument("--version", action="version", version=f"selfalign {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, text, notes in (
        ("presets", _presets, "Show the named models, and what the recipes set.", _PRESETS),
        ("info", _info, "Show versions, devices, and which adapters work.", _INFO),
        ("check", _check, "Attach SRA to a model of yours, and run a few training steps.", _CHECK),
    ):
        command = commands.add_parser(name, help=text, description=text, epilog=notes + _EXIT_CODES, **form)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text")
        command.set_defaults(run=run)
    _add_presets_options(commands.choices["presets"].add_argument)
    _add_check_options(commands.choices["check"].add_argument)
    return parser


def _add_presets_options(add: Callable[..., Any]) -> None:
    add("--recipe", choices=_RECIPES, help="this one only")
    add("--resolution", type=int, choices=(256, 512), default=256, help="of the images; default 256")


def _add_check_options(add: Callable[..., Any]) -> None:
    layer = _read("a block's number from 1, or a fraction of the depth", lambda x: int(x) if x.isdigit() else float(x))
    sizes = _read("sizes such as 4,32,32", lambda x: tuple(check_number("size", int(size), 1) for size in x.split(",")))
    count = _read("a whole number from 1", lambda x: check_number("count", int(x), 1))
    scale = _read("a number above 0", lambda x: check_number("scale", float(x), 1e-9))
    add("model", metavar="MODEL", help="package.module:factory or path/to/file.py:factory")
    add("--kwargs", metavar="JSON", default="{}", help="an object with the factory's arguments")
    add("--preset", metavar="NAME", help="layers and path of a named model, such as SiT-XL/2")
    add("--student", metavar="N", type=layer, help="the student's block from 1, or a fraction of the depth; default 0.25")
    add("--teacher", metavar="N", type=layer, help="the teacher's; default 0.7")
    add("--path", choices=tuple(KINDS), help="noise path; default: the preset's, or linear")
    add("--blocks", metavar="PATH", action="append", help="the block list; again for a list that runs after it")
    add("--width", metavar="D", type=count, help="feature width, where the model does not tell it")
    add("--input", metavar="C,H,W", type=sizes, help="sizes of a sample: the model is called with (x, t)")
    add("--classes", metavar="N", type=count, help="beside --input: the model is called with (x, t, y), y below N")
    add("--batch", metavar="B", type=count, default=2, help="beside --input: samples in a batch; default 2")
    add("--example", metavar="FUNCTION", help="instead of --input: module:function that gives the model's call")
    add("--time-scale", metavar="S", type=scale, default=1.0, help="the model's t is S times the path's; default 1")
    add("--device", help="move the model there; default: it stays where it was built")
    add("--repeat", metavar="N", type=count, default=3, help="timed steps of each kind; default 3")


def _read(what: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, with an error that says what it reads."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"It must be {what}. Received: {text!r}.") from None

    return read


# --------------------------------------------------------------------------------------------------------------- the output


def _text(report: dict[str, Any]) -> str:
    """Plain values as aligned lines, then the tables."""
    tables = [rows for rows in report.values() if _is_table(rows)]
    facts = [[name.replace("_", " "), _shown(value)] for name, value in report.items() if not _is_table(value)]
    parts = [_aligned(facts)] if facts else []
    parts += [_aligned([list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]) for rows in tables]
    return "\n\n".join(parts)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ------------------------------------------------------------------------------------------------------------- the commands


def _presets(settings: argparse.Namespace, report: dict[str, Any]) -> None:
    families, sizes = targets._LAYERS, targets._DEPTHS
    losses = {f"{family}-{size}/2": SRALoss.preset(f"{family}-{size}/2") for family in families for size in sizes}
    report["models"] = [
        {"model": name, "depth": sizes[targets.parse_preset(name)[1]], "student_layer": loss.student_layer,
         "teacher_layer": loss.teacher_layer, "path": loss.path.name} for name, loss in losses.items()
    ]  # fmt: skip
    recipes = [settings.recipe] if settings.recipe else _RECIPES
    report["recipes"] = [_recipe(recipe, family, settings.resolution) for recipe in recipes for family in families]


def _recipe(recipe: str, family: str, resolution: int) -> dict[str, Any]:
    loss = SRALoss.preset(f"{family}-XL/2", recipe, resolution=resolution, steps_per_epoch=1)
    weights = {name: round(loss.weight_at(epoch), 5) for name, epoch in (("weight", 0), ("epoch_400", 400), ("epoch_800", 800))}
    return {"recipe": recipe, "models": family, "distance": loss.distance, **weights, "decay": loss.decay_at(10**9)}


def _info(settings: argparse.Namespace, report: dict[str, Any]) -> None:
    _installed.describe(report)


def _check(settings: argparse.Namespace, report: dict[str, Any]) -> None:
    if (settings.example and settings.input) or (settings.classes and not settings.input):
        raise _usage("Inputs come from --input, with --classes where the model takes labels, or from --example",
                     "--example beside --input" if settings.input else "--classes without --input",
                     "Give one of the two, or neither.")  # fmt: skip
    loss, model = _loss(settings), _built(settings)
    report["model"] = f"{type(model).__name__} of {settings.model}"
    if _is_a(model, "keras", "Model"):  # before PyTorch: on its torch backend it is both
        _check_keras(settings, model, loss, report)
    elif _is_a(model, "torch.nn", "Module"):
        _check_torch(settings, model, loss, report)
    elif _of_jax(model):
        raise _usage("This command is for PyTorch and Keras models", f"{type(model).__name__}, a model of JAX",
                     "docs/jax.md tells how features come out of it, and how the term is taken.")  # fmt: skip
    else:
        raise _usage("MODEL must give a torch.nn.Module or a keras.Model", f"{type(model).__name__} {model!r:.60}",
                     "Name a function or class that returns the model.")  # fmt: skip


def _check_torch(settings: argparse.Namespace, model: Any, loss: SRALoss, report: dict[str, Any]) -> None:
    from .adapters import _torch_check as torch_check

    if settings.device:
        with _running("--device must be one that torch has", "`selfalign info` lists them."):
            model.to(settings.device)
    example = None
    if settings.input:
        example = torch_check.drawn(model, loss.path, (settings.batch, *settings.input), settings.classes, settings.time_scale)
    elif settings.example:
        function = _found(settings.example)
        with _running("--example must name a function without arguments", "Let it return (x, t, *condition), or a dict."):
            example = function()
    torch_check.check(model, loss, settings.blocks, settings.width, example, settings.time_scale, settings.repeat, report)


def _check_keras(settings: argparse.Namespace, model: Any, loss: SRALoss, report: dict[str, Any]) -> None:
    from .adapters import _keras_check as keras_check

    pattern = settings.blocks[0] if settings.blocks else None
    keras_check.check(model, loss, pattern, settings.width, report)


def _is_a(value: Any, module: str, kind: str) -> bool:
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], kind))


def _of_jax(model: Any) -> bool:
    """A module of a JAX library, or a nest with arrays of JAX."""
    origins = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    return bool(origins & {"flax", "equinox", "haiku", "jax"}) or any(name == "jax" for name, _ in _tensors(model))


def _loss(settings: argparse.Namespace) -> SRALoss:
    given = {"student_layer": settings.student, "teacher_layer": settings.teacher, "path": settings.path}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        if settings.preset:
            return SRALoss.preset(settings.preset, **given)
        return SRALoss(**{"student_layer": 0.25, "teacher_layer": 0.7, **given})
    except ValueError as error:
        raise _WrongUsage(str(error)) from error


def _built(settings: argparse.Namespace) -> Any:
    try:
        options = json.loads(settings.kwargs)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise _usage("--kwargs must be a JSON object", settings.kwargs, """Write for instance --kwargs '{"depth": 12}'.""")
    factory = _found(settings.model)
    with _running("The factory must return a model", "Pass what it needs with --kwargs, or let it need nothing."):
        return factory(**options)


def _found(target: str) -> Any:
    """What "package.module:name" or "path/to/file.py:name" names."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise _usage("A function is named like package.module:name or path/to/file.py:name", repr(target),
                     "Put a colon between the module and the name.")  # fmt: skip
    with _running("The module must import", "Import it in Python to see more."):
        module = _imported(place)
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise _usage("The module must hold what is named after the colon", f"{place} without {name!r}",
                     f"It has: {', '.join(names[:20]) or 'nothing to call'}.") from None  # fmt: skip


def _imported(place: str) -> Any:
    file = Path(place).resolve()
    sys.path.insert(0, str(file.parent if file.suffix == ".py" else Path.cwd()))  # as `python file.py` and `python -m` do
    if file.suffix != ".py":
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):  # one that it imports itself
                raise
            raise _usage("The module must exist", f"no module {error.name!r} from {Path.cwd()}",
                         "Check the spelling, or name a file: path/to/file.py:name.") from error  # fmt: skip
    if not file.is_file():
        raise _usage("The file must exist", place, "Check the path.")
    name = str(file)  # one that no other module has
    if name not in sys.modules:
        specification: Any = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@contextlib.contextmanager
def _running(rule: str, fix: str) -> Iterator[None]:
    """Code that is not ours runs inside: its error comes with the place, under our rule."""
    try:
        yield
    except _WrongUsage:
        raise
    except (Exception, SystemExit) as error:  # a script may end itself
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise invalid(rule, f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})", fix) from error


def _usage(rule: str, received: object, fix: str) -> _WrongUsage:
    return _WrongUsage(str(invalid(rule, received, fix)))
