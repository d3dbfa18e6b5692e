"""Where a PyTorch model is tapped: its block list, the width of its tokens, and the record of the student's features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from selfalign._checks import invalid

from ._torch_families import configured_widths, trunk

Select = Callable[[Any], torch.Tensor]


class Reached(NamedTuple):
    """What a tapped block returned, and what it was called with where that helps to understand it."""

    output: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Every outermost list of at least two alike modules in `model`, by path: the candidates for its blocks."""
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        if _alike(module) and not any(path.startswith(outer + ".") for outer in found):
            found[path] = module
    return found


def _alike(modules: nn.ModuleList | nn.Sequential) -> bool:
    """Of one class; or, in a ModuleList, called in one way with several arguments."""
    if len({type(block) for block in modules}) == 1:
        return True
    calls = {tuple(inspect.signature(block.forward).parameters) for block in modules}
    return isinstance(modules, nn.ModuleList) and len(calls) == 1 and len(next(iter(calls))) > 1


def find_blocks(model: nn.Module, paths: str | Sequence[str] | None) -> list[str]:
    """Paths of the model's blocks in the order in which they run: of the only list, of those named, or of a known layout."""
    candidates = block_lists(model)
    listed = (
        ", ".join(f"{name!r} ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in candidates.items()) or "none"
    )
    if paths is None:
        lists = list(candidates) if len(candidates) == 1 else trunk(model, list(candidates))
        if not lists:
            raise invalid("The model must have exactly one list of alike blocks, or the caller names it", f"found {listed}",
                          'Pass blocks="path.to.the.list", several paths where lists run in a row, or student= and teacher= '
                          "paths of two modules.")  # fmt: skip
    else:
        lists = [paths] if isinstance(paths, str) else list(paths)
    found: list[str] = []
    for path in lists:
        blocks: Any = find_module(model, path, f"Lists of alike blocks in it: {listed}.")
        if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
            raise invalid("blocks= must name a non-empty nn.ModuleList or nn.Sequential",
                          f"{path!r}, a {type(blocks).__name__}", f"Lists of alike blocks in it: {listed}.")  # fmt: skip
        found += [f"{path}.{n}".lstrip(".") for n in range(len(blocks))]
    return found


def find_module(model: nn.Module, path: str, hint: str = "") -> nn.Module:
    """The submodule at `path`; the error lists what exists where the path breaks off."""
    module, walked = model, list[str]()
    for name in path.split(".") if path else ():
        children = dict(module.named_children())
        if name not in children:
            raise invalid("A path must lead to a module of the model",
                          f"{path!r}, but {'.'.join(walked) or 'the model'} has no {name!r}",
                          f"It has: {', '.join(children) or 'nothing'}. {hint}".rstrip())  # fmt: skip
        module, walked = children[name], [*walked, name]
    return module


def read_width(model: nn.Module, block: nn.Module) -> int | None:
    """The block's token width where it is unambiguous: what its linear layers take, give and its norms normalise.

    Where several widths fit, or the norms tell none, a configuration that names one of the linear layers' decides.
    """
    linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
    fitting = {m.in_features for m in linear} & {m.out_features for m in linear}
    norms = {m.normalized_shape[-1] for m in block.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))}
    widths = fitting & norms if norms else fitting
    if len(widths) != 1:
        widths = {m.in_features for m in linear} & configured_widths(model)
    return widths.pop() if len(widths) == 1 else None


def tokens_of(reached: Reached, select: Select | None, block: nn.Module, where: str, width: int | None = None) -> torch.Tensor:
    """The tokens [B, N, D] in a block's output.

    They are what `select` takes from it; or the output itself; or in a tuple the only tensor [B, N, D]. Of a block that takes
    and gives several streams, they have the shape of its argument that is named like a sample. Features on a grid, [B, D, ...]
    or, where only the last axis has the width, [B, ..., D], become tokens.
    """
    output = tokens = reached.output
    if select is not None:
        tokens = select(output)
    elif isinstance(output, (tuple, list)):
        fitting = [part for part in output if is_features(part) and part.ndim == 3] or list(filter(is_features, output))
        if len(fitting) > 1:
            fitting = _like_the_sample(fitting, block, reached)
        if len(fitting) != 1:
            raise invalid("A block that returns a tuple must hold one tensor [B, N, D], or give back the streams that it takes",
                          f"{where}: {_shapes(output)}", "Pass select=, such as select=lambda output: output[1].")  # fmt: skip
        tokens = fitting[0]
    if not is_features(tokens):
        raise invalid("A tapped block must give tokens [B, N, D], or features [B, D, H, W] or [B, D, T, H, W]",
                      f"{where}: {_shapes(tokens)}",
                      "Pass select=, a function from the block's output to its tokens.")  # fmt: skip
    if tokens.ndim == 3:
        return tokens
    fitting = [axis for axis in (1, -1) if tokens.shape[axis] in ({width} if width else _widths(block))]
    if len(fitting) != 1:
        raise invalid("Features on a grid must have the width on one axis, the second or the last",
                      f"{where}: {_shapes(tokens)}, width {width or 'unknown'}",
                      "Pass width=, and select=, a function from the block's output to its tokens.")  # fmt: skip
    return tokens.flatten(2).transpose(1, 2) if fitting == [1] else tokens.flatten(1, -2)


def _widths(block: nn.Module) -> set[int]:
    """Numbers of features that the block's layers give."""
    layers = [m for m in block.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    return {m.out_features if isinstance(m, nn.Linear) else m.out_channels for m in layers}


def _like_the_sample(streams: list[torch.Tensor], block: nn.Module, reached: Reached) -> list[torch.Tensor]:
    """The streams that have the shape of the sample's tokens among a block's arguments; all, where it did not take them in."""
    try:
        given = inspect.signature(block.forward).bind(*reached.args, **reached.kwargs).arguments
    except TypeError:
        return streams
    names = ("hidden_states", "x", "img", "image", "latents")
    sample = next((given[name] for name in names if is_features(given.get(name))), None)
    taken = [value.shape for value in given.values() if isinstance(value, torch.Tensor)]
    if sample is None or any(stream.shape not in taken for stream in streams):
        return streams
    return [stream for stream in streams if stream.shape == sample.shape]


def is_features(part: Any) -> bool:
    """Whether this is a floating tensor of three to five axes."""
    return isinstance(part, torch.Tensor) and part.is_floating_point() and 3 <= part.ndim <= 5


def _shapes(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"shape {tuple(output.shape)}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of ({', '.join(map(_shapes, output))})"
    return type(output).__name__


class Hooks:
    """Owner of hooks on the user's model. A deep copy or a pickle of the model takes along only dead ones, which do nothing."""

    alive = False

    def __deepcopy__(self, memo: Any) -> Hooks:
        return object.__new__(type(self))

    def __reduce__(self) -> Any:
        return object.__new__, (type(self),)


class Tap(Hooks):
    """Hooks that keep one block's output from the model's last forward, a second's without gradient, and how it was called.

    Recomputation in backward leaves no trace.
    """

    def __init__(self, model: nn.Module, block: nn.Module, where: str, target: nn.Module | None = None) -> None:
        owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
        if any(isinstance(owner, Tap) and owner.alive for owner in owners):
            raise invalid("A model can be attached once", f"a second SelfAlignment on {type(model).__name__}",
                          "Call detach() on the first one.")  # fmt: skip
        self.alive = True
        self.block, self.where, self.autocast = block, where, (False, torch.float32)
        self.reached: Reached | None = None
        self.target: Reached | None = None
        self.called: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.running, self.fired, self.forwards = False, 0, 0
        self.handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            block.register_forward_hook(self._record, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        if target is not None:
            self.handles.append(target.register_forward_hook(self._record_target, with_kwargs=True))

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.alive:
            self.running, self.fired = True, 0
            trains = torch.is_grad_enabled()  # sampling and evaluation between two steps are nobody's business
            self.forwards += trains
            if trains or not self.forwards:
                self.called = (args, dict(kwargs))

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.alive and self.running:
            self.reached, self.fired = reached_of(args, kwargs, _kept(output)), self.fired + 1
            device = next((p.device.type for p in module.parameters()), "cpu")
            self.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def _record_target(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.alive and self.running:
            self.target = reached_of(args, kwargs, _kept(output))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = False

    def take(self, select: Select | None, width: int | None = None) -> torch.Tensor:
        """The recorded tokens, once; an error where the step did not record exactly one set, with gradient."""
        reached, fired, forwards = self.reached, self.fired, self.forwards
        self.forget()
        if reached is None:
            raise invalid("The model's forward must run before align()", f"no output of {self.where} since the last align()",
                          "Call the model itself (not model.forward) on the student's input first. If it was compiled "
                          "and ran before attaching, attach before the first compiled call.")  # fmt: skip
        if fired != 1 or forwards > 1:
            raise invalid("The tapped block must run once per align()",
                          f"{self.where} ran {fired} times in {max(forwards, 1)} forward(s) of the model",
                          "Call align() after each forward; run extra forwards under torch.no_grad(), before the student's. "
                          "For a block used twice in one forward choose another layer.")  # fmt: skip
        tokens = tokens_of(reached, select, self.block, self.where, width)
        if torch.is_grad_enabled() and not tokens.requires_grad:
            raise invalid("The student's features must carry a gradient", f"features of {self.where} without one",
                          "Reentrant checkpointing (use_reentrant=True), torch.no_grad() or frozen layers cut it: use "
                          "use_reentrant=False, or tap a layer that trains.")  # fmt: skip
        return tokens

    def forget(self) -> None:
        self.reached, self.target, self.called, self.fired, self.forwards = None, None, ((), {}), 0, 0

    def remove(self) -> None:
        self.forget()
        for handle in self.handles:
            handle.remove()


def _kept(output: Any) -> Any:
    """The output, safe from what the model does to it in place later. Inside a reentrant checkpoint it has no gradient yet:
    only the tensor itself will get one."""
    if isinstance(output, (tuple, list)):
        return type(output)(map(_kept, output)) if type(output) in (tuple, list) else output
    return output.clone() if isinstance(output, torch.Tensor) and output.requires_grad else output


def reached_of(args: Any, kwargs: Any, output: Any) -> Reached:
    """The record of a call; without its arguments where the output speaks for itself, so that nothing is kept alive."""
    return Reached(output, args, kwargs) if isinstance(output, (tuple, list)) else Reached(output)


class _Stop(Exception):
    """Carries what was wanted out of a forward that need not go on."""

    def __init__(self, value: Any) -> None:
        self.value = value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def stopping_after(block: nn.Module) -> Iterator[None]:
    """Forwards end with `block`: nothing after it is computed. `reached` catches what comes out of them."""

    def stop(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        raise _Stop(reached_of(args, kwargs, output))

    handle = block.register_forward_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def reached(run: Callable[[], Any], where: str) -> Any:
    """What a forward that stops at a block has reached; apart from the hook, so that it can be compiled whole."""
    try:
        run()
    except _Stop as stopped:
        return stopped.value
    raise invalid("The teacher's forward must reach its tapped block", f"{where} never ran",
                  "Choose a layer that runs for every input.")  # fmt: skip


def run_until(run: Callable[[], Any], block: nn.Module, where: str) -> Reached:
    """Run a forward only up to the end of `block`."""
    with stopping_after(block):
        return reached(run, where)


def run_before(run: Callable[[], Any], block: nn.Module, where: str) -> tuple[Any, Any]:
    """Run a forward only up to the start of `block`, and return the arguments that it would get, by position and by name."""

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Stop((args, kwargs))

    # first of all hooks: those of sharded models would gather weights for a forward that never ends
    handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        return reached(run, where)
    finally:
        handle.remove()
