"""Which modules of a model are its blocks, which of them are tapped, and how wide they are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from selfalign.adapting import EMATeacher, LaterLayer, Objective, invalid

from .families import configured_widths, trunk

BlockList = nn.ModuleList | nn.ModuleDict | nn.Sequential
Paths = str | Sequence[str]


class Tapped(NamedTuple):
    """Where one objective looks.

    Attributes:
        student: path of the student's tapped module.
        target: path of the module whose output is the target; None where it comes from elsewhere.
    """

    student: str
    target: str | None


class Taps(NamedTuple):
    """Where a model is tapped.

    Attributes:
        by_name: for each objective.
        later: paths of the blocks after the last target of a teacher.
    """

    by_name: dict[str, Tapped]
    later: list[str]


def find_taps(
    model: nn.Module,
    objectives: Mapping[str, Objective],
    blocks: Paths | None,
    taps: Sequence[str] | Mapping[str, Sequence[str]] | None,
) -> Taps:
    """The tapped modules: by the objectives' layers, or by paths that the user gave.

    Args:
        model: the user's.
        objectives: by name.
        blocks: path of the block list, or of several that run in a row.
        taps: paths of the student's and the target's module; by name where there are several
            objectives.

    Raises:
        ValueError: layers or paths that the model does not have.
    """
    if taps is not None:
        return _given_taps(model, objectives, blocks, taps)
    found = find_blocks(model, blocks)
    modules = [model.get_submodule(path) for path in found]
    if len({id(module) for module in modules}) < len(found):
        raise invalid(
            "Blocks must be modules of their own",
            f"one module at several places of {found[0]!r} ...",
            "Where a block runs several times in a forward, its output has no place of its own.",
        )
    by_name: dict[str, Tapped] = {}
    last = 0
    for name, objective in objectives.items():
        numbers = objective.layers(len(found))
        target = found[numbers[1] - 1] if len(numbers) > 1 else None
        by_name[name] = Tapped(found[numbers[0] - 1], target)
        if isinstance(objective.source, EMATeacher):
            last = max(last, *numbers)
        check_called(model, [path for path in by_name[name] if path is not None])
    return Taps(by_name, found[last:])


def _given_taps(
    model: nn.Module,
    objectives: Mapping[str, Objective],
    blocks: Paths | None,
    taps: Sequence[str] | Mapping[str, Sequence[str]],
) -> Taps:
    """Taps by paths. Which blocks run after them is not known."""
    named = taps if isinstance(taps, Mapping) else dict.fromkeys(objectives, taps)
    if blocks is not None or isinstance(taps, str) or set(named) != set(objectives):
        raise _wrong_taps(objectives, blocks, taps)
    by_name = {}
    for name, objective in objectives.items():
        paths = named[name]
        wanted = 2 if isinstance(objective.source, (EMATeacher, LaterLayer)) else 1
        listed = isinstance(paths, (list, tuple)) and len(paths) == wanted
        if not listed or not all(isinstance(path, str) for path in paths):
            raise _wrong_taps(objectives, blocks, taps)
        for path in paths:
            find_module(model, path)
        by_name[name] = Tapped(paths[0], paths[1] if wanted == 2 else None)
    return Taps(by_name, [])


def _wrong_taps(objectives: Mapping[str, Objective], blocks: object, taps: object) -> ValueError:
    several = len(objectives) > 1
    example = '("encoder.3", "encoder.8")'
    named = f'{{"{next(iter(objectives))}": {example}, ...}}'
    return invalid(
        "taps= must be paths of the student's module and of the target's, without blocks= (one "
        "path where the target is not a layer of the model)",
        f"taps={taps!r}, blocks={blocks!r}",
        f"Pass taps={named if several else example}, or leave it out and let layers decide.",
    )


def block_lists(model: nn.Module) -> dict[str, BlockList]:
    """Every outermost list of at least two alike modules in `model`, by path.

    These are the candidates for its blocks.
    """
    found: dict[str, BlockList] = {}
    for path, module in model.named_modules():
        if not isinstance(module, BlockList) or len(_elements(module)) < 2:
            continue
        if isinstance(module, nn.ModuleDict) and not _holds_blocks(module):
            continue
        inner = any(path.startswith(f"{outer}.") for outer in found)
        if not inner and _alike(module):
            found[path] = module
    for is_trunk in (_trains, _has_parts):
        found = {path: blocks for path, blocks in found.items() if is_trunk(blocks)} or found
    return found


def _trains(modules: BlockList) -> bool:
    """Whether anything in a list is trained: not so in an encoder that is frozen."""
    return any(parameter.requires_grad for parameter in modules.parameters())


def _has_parts(modules: BlockList) -> bool:
    """Whether the elements are more than single layers of torch's own, such as projections."""
    elements = _elements(modules).values()
    return any(m._modules or not type(m).__module__.startswith("torch.nn.") for m in elements)


def _elements(modules: BlockList) -> dict[str, nn.Module]:
    """The modules in a list, by name; torch allows None in it."""
    return {name: module for name, module in modules._modules.items() if module is not None}


def _holds_blocks(modules: nn.ModuleDict) -> bool:
    """Whether a dict holds modules with parts, not lists and not single layers."""
    elements = _elements(modules).values()
    lists = (nn.ModuleList, nn.ModuleDict)
    return not any(isinstance(m, lists) or not m._modules for m in elements)


def _alike(modules: BlockList) -> bool:
    """Of one class; or, where the list is not called itself, called with the same arguments."""
    blocks = _elements(modules).values()
    if len({type(block) for block in blocks}) == 1:
        return True
    if isinstance(modules, nn.Sequential):
        return False
    calls = {tuple(inspect.signature(block.forward).parameters) for block in blocks}
    return len(calls) == 1 and len(next(iter(calls))) > 1


def mixing_blocks(model: nn.Module, tapped: Sequence[str]) -> list[str]:
    """Paths of the modules in which tokens may mix: the largest ones that contain no tapped module.

    Lists are not called: it is their elements.
    """
    found: list[str] = []

    def walk(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            where = f"{path}.{name}".lstrip(".")
            listed = isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if listed or any(tap.startswith(f"{where}.") for tap in tapped):
                walk(where, child)
            else:
                found.append(where)

    walk("", model)
    return found


def find_blocks(model: nn.Module, paths: Paths | None) -> list[str]:
    """Paths of the model's blocks in the order in which they run.

    They are those of the only list, of the lists named, or of a known layout.
    """
    candidates = block_lists(model)
    listed = _listed(candidates)
    if paths is None:
        lists = list(candidates) if len(candidates) == 1 else trunk(model, list(candidates))
    else:
        lists = [paths] if isinstance(paths, str) else list(paths)
    if not lists:
        sizes = {path: _size(blocks) for path, blocks in candidates.items()}
        largest = max(sizes, key=lambda path: sizes[path], default="path.to.the.list")
        raise invalid(
            "The model must have exactly one list of alike blocks, or the caller names it",
            f"found {listed}",
            f'Pass blocks="{largest}", several paths where lists run in a row, or taps=, paths of '
            "two modules.",
        )
    found: list[str] = []
    for path in lists:
        blocks = find_module(model, path, f"Lists of alike blocks in it: {listed}.")
        if not isinstance(blocks, BlockList) or not _elements(blocks):
            raise invalid(
                "blocks= must name a non-empty nn.ModuleList, nn.ModuleDict or nn.Sequential",
                f"{path!r}, a {type(blocks).__name__}",
                f"Lists of alike blocks in it: {listed}.",
            )
        found += [f"{path}.{name}".lstrip(".") for name in _elements(blocks)]
    return found


def _size(modules: BlockList) -> int:
    """The number of a list's parameters: a trunk has most."""
    return sum(parameter.numel() for parameter in modules.parameters())


def check_called(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse blocks that are lists: a list never runs, what is in it does."""
    blocks = {path: model.get_submodule(path) for path in paths}
    for path, block in blocks.items():
        if not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
            continue
        if type(block).forward is not nn.Module.forward:
            continue
        last = {path: next(reversed(block._modules), "") for path, block in blocks.items()}
        example = tuple(f"{path}.{name}".rstrip(".") for path, name in last.items())
        raise invalid(
            "A block must be a module that is called",
            f"{path!r}, a {type(block).__name__} of {len(block)} modules",
            f"Pass paths of modules that are, such as taps={example}.",
        )


def _listed(lists: Mapping[str, BlockList]) -> str:
    named = []
    for path, blocks in lists.items():
        elements = list(_elements(blocks).values())
        named.append(f"{path!r} ({len(elements)} x {type(elements[0]).__name__})")
    return ", ".join(named) or "none"


def find_module(model: nn.Module, path: str, hint: str = "") -> nn.Module:
    """The submodule at `path`; the error lists what exists where the path breaks off."""
    module = model
    walked: list[str] = []
    for name in path.split(".") if path else ():
        children = dict(module.named_children())
        if name not in children:
            raise invalid(
                "A path must lead to a module of the model",
                f"{path!r}, but {'.'.join(walked) or 'the model'} has no {name!r}",
                f"It has: {', '.join(children) or 'nothing'}. {hint}".rstrip(),
            )
        module = children[name]
        walked.append(name)
    return module


def read_width(model: nn.Module, block: nn.Module) -> int | None:
    """The block's token width where it is unambiguous, else None.

    It is what the block's linear layers take and give and its norms normalise. Where several widths
    fit, or the norms tell none, a configuration that names one of the linear layers' decides.
    """
    linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
    taken = {m.in_features for m in linear}
    fitting = taken & {m.out_features for m in linear}
    normalised = [m for m in block.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    norms = {m.normalized_shape[-1] for m in normalised}
    widths = fitting & norms if norms else fitting
    if len(widths) != 1:
        widths = taken & configured_widths(model)
    return widths.pop() if len(widths) == 1 else None
