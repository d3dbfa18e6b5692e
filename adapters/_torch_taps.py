"""Where a PyTorch model is tapped: its block list, the width of its tokens, and the record of the student's features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from selfalign._checks import invalid

Select = Callable[[Any], torch.Tensor]


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Every outermost list of at least two modules of one class in `model`, by path: the candidates for its blocks."""
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        if len({type(block) for block in module}) == 1 and not any(path.startswith(outer + ".") for outer in found):
            found[path] = module
    return found


def find_blocks(model: nn.Module, path: str | None) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The model's block list and its path: the only candidate, or the one named by the caller."""
    candidates = block_lists(model)
    listed = (
        ", ".join(f"{name!r} ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in candidates.items()) or "none"
    )
    if path is None:
        if len(candidates) != 1:
            raise invalid("The model must have exactly one list of alike blocks, or the caller names it", f"found {listed}",
                          'Pass blocks="path.to.the.list", or student= and teacher= paths of two modules.')  # fmt: skip
        return next(iter(candidates.items()))
    blocks: Any = find_module(model, path, f"Lists of alike blocks in it: {listed}.")
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise invalid("blocks= must name a non-empty nn.ModuleList or nn.Sequential", f"{path!r}, a {type(blocks).__name__}",
                      f"Lists of alike blocks in it: {listed}.")  # fmt: skip
    return path, blocks


def find_module(model: nn.Module, path: str, hint: str = "") -> nn.Module:
    """The submodule at `path`; the error lists what exists where the path breaks off."""
    module, walked = model, list[str]()
    for name in path.split("."):
        children = dict(module.named_children())
        if name not in children:
            raise invalid("A path must lead to a module of the model",
                          f"{path!r}, but {'.'.join(walked) or 'the model'} has no {name!r}",
                          f"It has: {', '.join(children) or 'nothing'}. {hint}".rstrip())  # fmt: skip
        module, walked = children[name], [*walked, name]
    return module


def read_width(block: nn.Module) -> int | None:
    """The block's token width where it is unambiguous: what its linear layers take, give and its norms normalise."""
    linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
    widths = {m.in_features for m in linear} & {m.out_features for m in linear}
    norms = {m.normalized_shape[-1] for m in block.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))}
    widths = widths & norms if norms else widths
    return widths.pop() if len(widths) == 1 else None


def tokens_of(output: Any, select: Select | None, where: str) -> torch.Tensor:
    """The tokens [B, N, D] in a block's output: itself, the only such tensor of a tuple, or what `select` takes from it."""
    if select is not None:
        tokens = select(output)
    elif isinstance(output, (tuple, list)):
        fitting = [part for part in output if isinstance(part, torch.Tensor) and part.ndim == 3 and part.is_floating_point()]
        if len(fitting) != 1:
            raise invalid("A block that returns a tuple must hold exactly one tensor [B, N, D]", f"{where}: {_shapes(output)}",
                          "Pass select=, for instance select=lambda output: output[1].")  # fmt: skip
        tokens = fitting[0]
    else:
        tokens = output
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3:
        raise invalid("A tapped block must give tokens [B, N, D]", f"{where}: {_shapes(tokens)}",
                      "Pass select=, a function from the block's output to its tokens.")  # fmt: skip
    return tokens


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
    """Hooks that keep the output of one block from the model's last forward, and nothing from recomputation in backward."""

    def __init__(self, model: nn.Module, block: nn.Module, where: str) -> None:
        owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
        if any(isinstance(owner, Tap) and owner.alive for owner in owners):
            raise invalid("A model can be attached once", f"a second SelfAlignment on {type(model).__name__}",
                          "Call detach() on the first one.")  # fmt: skip
        self.alive = True
        self.where, self.output, self.autocast = where, None, (False, torch.float32)
        self.device = next((p.device.type for p in model.parameters()), "cpu")
        self.running, self.fired, self.forwards = False, 0, 0
        self.handles = [
            model.register_forward_pre_hook(self._begin),
            block.register_forward_hook(self._record),
            model.register_forward_hook(self._end),
        ]

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self.alive:
            self.running, self.fired = True, 0
            self.forwards += torch.is_grad_enabled()  # sampling and evaluation between two steps are nobody's business

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.alive and self.running:
            self.output, self.fired = output, self.fired + 1
            self.autocast = (torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = False

    def take(self, select: Select | None) -> torch.Tensor:
        """The recorded tokens, once; an error where the step did not record exactly one set, with gradient."""
        output, fired, forwards = self.output, self.fired, self.forwards
        self.forget()
        if output is None:
            raise invalid("The model's forward must run before align()", f"no output of {self.where} since the last align()",
                          "Call the model itself (not model.forward) on the student's input first. If it was compiled "
                          "and ran before attaching, attach before the first compiled call.")  # fmt: skip
        if fired != 1 or forwards > 1:
            raise invalid("The tapped block must run once per align()",
                          f"{self.where} ran {fired} times in {max(forwards, 1)} forward(s) of the model",
                          "Call align() after each forward; run extra forwards under torch.no_grad(), before the student's. "
                          "For a block used twice in one forward choose another layer.")  # fmt: skip
        tokens = tokens_of(output, select, self.where)
        if torch.is_grad_enabled() and not tokens.requires_grad:
            raise invalid("The student's features must carry a gradient", f"features of {self.where} without one",
                          "Reentrant checkpointing (use_reentrant=True), torch.no_grad() or frozen layers cut it: use "
                          "use_reentrant=False, or tap a layer that trains.")  # fmt: skip
        return tokens

    def forget(self) -> None:
        self.output, self.fired, self.forwards = None, 0, 0

    def remove(self) -> None:
        self.forget()
        for handle in self.handles:
            handle.remove()


class _Stop(Exception):
    """Carries what was wanted out of a forward that need not go on."""

    def __init__(self, value: Any) -> None:
        self.value = value


def run_until(run: Callable[[], Any], block: nn.Module, where: str, inputs: bool = False) -> Any:
    """Run a forward only up to `block` and return its output (or its inputs): nothing after it is computed."""

    def stop(module: nn.Module, args: Any, *rest: Any) -> None:
        raise _Stop((args, rest[0]) if inputs else rest[-1])

    register = block.register_forward_pre_hook if inputs else block.register_forward_hook
    handle = register(stop, with_kwargs=True) if inputs else register(stop)
    try:
        run()
    except _Stop as reached:
        return reached.value
    finally:
        handle.remove()
    raise invalid("The teacher's forward must reach its tapped block", f"{where} never ran",
                  "Choose a layer that runs for every input.")  # fmt: skip
