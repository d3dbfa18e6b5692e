"""What cannot be read off a model of many block lists and streams: diffusers' layouts."""

from __future__ import annotations

from typing import Any

from torch import nn

# Lists of diffusers' models that carry the sample through the model; others refine text, embed
# conditions or control.
_TRUNK = (
    "transformer_blocks",
    "joint_transformer_blocks",
    "double_blocks",
    "double_stream_blocks",
    "visual_transformer_blocks",
    "blocks",
    "layers",
)


def in_diffusers(model: Any) -> nn.Module | None:
    """The model, or what PEFT has wrapped, where its class derives from one of diffusers'."""
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    origins = [kind.__module__ for kind in type(base).__mro__]
    return base if any(origin.startswith("diffusers.models") for origin in origins) else None


def trunk(model: nn.Module, candidates: list[str]) -> list[str]:
    """Which of several block lists run in a row; empty where that is not known.

    These are X_blocks and single_X_blocks, or a list with one of diffusers' usual names.
    """
    pairs = [(first, _single_of(first)) for first in candidates]
    known = [list(pair) for pair in pairs if pair[1] in candidates]
    if len(known) == 1:
        return known[0]
    base = in_diffusers(model)
    if base is None:
        return []
    paths = (path for path, module in model.named_modules() if module is base and path)
    prefix = next((f"{path}." for path in paths), "")
    inside = [path for path in candidates if path.startswith(prefix)]
    named = [path for path in inside if path.removeprefix(prefix) in _TRUNK]
    return named if len(named) == 1 else []


def _single_of(path: str) -> str:
    """The list that follows this one where a model goes from two streams to one."""
    parent, dot, name = path.rpartition(".")
    return f"{parent}{dot}single_{name.removeprefix('joint_').removeprefix('double_')}"


def configured_widths(model: nn.Module) -> set[int]:
    """Widths that the model's configuration names."""
    config = getattr(in_diffusers(model) or model, "config", None)

    def get(name: str) -> Any:
        return config.get(name) if isinstance(config, dict) else getattr(config, name, None)

    heads = get("num_attention_heads")
    size = get("attention_head_dim")
    product = heads * size if heads and size else None
    widths = {get("hidden_size"), get("inner_dim"), product}
    return {width for width in widths if isinstance(width, int)}
