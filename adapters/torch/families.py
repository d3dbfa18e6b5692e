"""What cannot be read off a model of many block lists and streams: diffusers' layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from selfalign.adapting import invalid

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

# What blocks of two streams return; where text and sample have different lengths, lengths would
# tell, too.
_TEXT_FIRST = (
    "AuraFlowJoint",
    "Bria",
    "Chroma",
    "Flux",
    "JointTransformerBlock",
    "LongCatImage",
    "OvisImage",
    "QwenImage",
)
_TEXT_LAST = (
    "CogVideoX",
    "CogView",
    "ConsisID",
    "GlmImage",
    "HiDream",
    "HunyuanImage",
    "HunyuanVideo",
    "JoyImage",
    "LTX2",
    "Mochi",
    "MotifVideo",
)

# Blocks that return one tensor, with the text's tokens (or one of the whole) in front of the
# sample's, or behind them.
_BEHIND_TEXT = (
    "AuraFlowSingle",
    "BriaFiboSingle",
    "ChromaSingle",
    "Flux2Single",
    "Lumina2",
    "StableAudioDiT",
)
_BEFORE_TEXT = ("HiDream",)
_JOINED = (*_BEHIND_TEXT, *_BEFORE_TEXT)


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


def has_known_stream(model: nn.Module, block: nn.Module) -> bool:
    """Whether `sample_stream` knows what this block returns."""
    known = (*_JOINED, *_TEXT_FIRST, *_TEXT_LAST)
    return in_diffusers(model) is not None and _class_name(block).startswith(known)


def sample_stream(
    model: nn.Module, block: nn.Module, x0: torch.Tensor, condition: Mapping[str, Any]
) -> Callable[[Any], Any] | None:
    """Takes the sample's tokens out of what a block of diffusers returns.

    None where nothing has to be known.

    Args:
        model: the whole model, for its patch size.
        block: the tapped block.
        x0: the sample, packed [B, N, C], or [B, C, N], or [B, C, H, W].
        condition: what else the model was called with, by name.
    """
    if not has_known_stream(model, block):
        return None
    base = in_diffusers(model)
    kind = _class_name(block)
    place = 1 if kind.startswith(_TEXT_FIRST) else 0

    def select(output: Any) -> Any:
        if isinstance(output, (tuple, list)):
            return output[place]
        if kind.startswith(_JOINED):
            return _without_text(output, kind, _count(base, kind, x0), condition)
        return output

    return select


def _class_name(block: Any) -> str:
    """The name of diffusers' class of a block, whatever wraps it or inherits from it."""
    for wrapped in ("_orig_mod", "_checkpoint_wrapped_module"):
        block = getattr(block, wrapped, block)
    kinds = [kind for kind in type(block).__mro__ if kind.__module__.startswith("diffusers.")]
    return kinds[0].__name__ if kinds else ""


def _count(model: Any, kind: str, x0: torch.Tensor) -> int:
    """Number of tokens of a sample."""
    if x0.ndim == 3:
        return x0.shape[2] if kind.startswith("StableAudio") else x0.shape[1]
    patch: int = getattr(model.config, "patch_size", 1)
    return math.prod(x0.shape[2:]) // patch**2


def _without_text(
    output: torch.Tensor, kind: str, count: int, condition: Mapping[str, Any]
) -> torch.Tensor:
    """The sample's tokens out of one sequence with the text's."""
    if output.shape[1] <= count:
        raise invalid(
            "Text and sample must be joined in the block's output",
            f"{output.shape[1]} tokens for {count} of the sample",
            "Pass select=, a function from the block's output to the sample's tokens.",
        )
    if kind.startswith(_BEFORE_TEXT):
        return output[:, :count]
    mask = condition.get("encoder_attention_mask")
    if kind.startswith("Lumina2") and mask is not None:
        # each sample's own tokens follow its own text at once
        starts = mask.sum(dim=1, dtype=torch.long)[:, None]
        places = starts + torch.arange(count, device=output.device)  # [B, N]
        return output.gather(1, places[..., None].expand(-1, -1, output.shape[-1]))
    return output[:, -count:]
