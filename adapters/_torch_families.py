"""What cannot be read off a model of many block lists and streams, for the layouts that diffusers' transformers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from selfalign._checks import invalid

# Lists of diffusers' models that carry the sample through the model; others refine text, embed conditions or control.
_TRUNK = ("transformer_blocks", "joint_transformer_blocks", "double_blocks", "double_stream_blocks",
          "visual_transformer_blocks", "blocks", "layers")  # fmt: skip

# What blocks of two streams return; where text and sample have different lengths, lengths would tell, too.
_TEXT_FIRST = ("AuraFlowJoint", "Bria", "Chroma", "Flux", "JointTransformerBlock", "LongCatImage", "OvisImage", "QwenImage")
_TEXT_LAST = ("CogVideoX", "CogView", "ConsisID", "GlmImage", "HiDream", "HunyuanImage", "HunyuanVideo", "JoyImage", "LTX2",
              "Mochi", "MotifVideo")  # fmt: skip

# Blocks that return one tensor, with the text's tokens (or one of the whole) in front of the sample's, or behind them.
_BEHIND_TEXT = ("AuraFlowSingle", "BriaFiboSingle", "ChromaSingle", "Flux2Single", "Lumina2", "StableAudioDiT")
_BEFORE_TEXT = ("HiDream",)


def in_diffusers(model: Any) -> nn.Module | None:
    """The model, or what PEFT has wrapped, where its class or an ancestor is one of diffusers'."""
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    return base if any(kind.__module__.startswith("diffusers.models") for kind in type(base).__mro__) else None


def trunk(model: nn.Module, candidates: list[str]) -> list[str]:
    """Which of several block lists run in a row: X_blocks and single_X_blocks, or diffusers' usual names; else none."""
    pairs = [[first, second] for first in candidates for second in candidates if _single(first) == second]
    if len(pairs) == 1:
        return pairs[0]
    base = in_diffusers(model)
    prefix = next((f"{path}." for path, module in model.named_modules() if module is base and path), "")
    named = [path for path in candidates if path.startswith(prefix) and path.removeprefix(prefix) in _TRUNK]
    return named if base is not None and len(named) == 1 else []


def _single(path: str) -> str:
    """The list that follows this one where a model goes from two streams to one."""
    parent, dot, name = path.rpartition(".")
    return f"{parent}{dot}single_{name.removeprefix('joint_').removeprefix('double_')}"


def configured_widths(model: nn.Module) -> set[int]:
    """Widths that the model's configuration names."""
    config = getattr(in_diffusers(model) or model, "config", None)
    get = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    heads, size = get("num_attention_heads"), get("attention_head_dim")
    widths = {get("hidden_size"), get("inner_dim"), heads * size if heads and size else None}
    return {width for width in widths if isinstance(width, int)}


def stream(model: nn.Module, block: nn.Module, x0: torch.Tensor, condition: dict[str, Any]) -> Callable[[Any], Any] | None:
    """Takes the sample's tokens out of what a block of diffusers returns; None where nothing has to be known.

    Args:
        model: the whole model, for its patch size.
        block: the tapped block.
        x0: the sample, packed [B, N, C], or [B, C, N], or [B, C, H, W].
        condition: what else the model was called with, by name.
    """
    base, kind = in_diffusers(model), _kind(block)
    if base is None:
        return None
    joined = kind.startswith((*_BEHIND_TEXT, *_BEFORE_TEXT))
    place = 1 if kind.startswith(_TEXT_FIRST) else 0
    if not joined and not kind.startswith((*_TEXT_FIRST, *_TEXT_LAST)):
        return None

    def select(output: Any) -> Any:
        if isinstance(output, (tuple, list)):
            return output[place]
        return _without_text(output, kind, _count(base, kind, x0), condition) if joined else output

    return select


def _kind(block: Any) -> str:
    """The name of diffusers' class of a block, whatever compiles, checkpoints, shards or inherits from it."""
    for wrapped in ("_orig_mod", "_checkpoint_wrapped_module"):
        block = getattr(block, wrapped, block)
    return next((kind.__name__ for kind in type(block).__mro__ if kind.__module__.startswith("diffusers.")), "")


def _count(model: Any, kind: str, x0: torch.Tensor) -> int:
    """Tokens of a sample."""
    if x0.ndim == 3:
        return x0.shape[2] if kind.startswith("StableAudio") else x0.shape[1]
    return math.prod(x0.shape[2:]) // getattr(model.config, "patch_size", 1) ** 2


def _without_text(output: torch.Tensor, kind: str, count: int, condition: dict[str, Any]) -> torch.Tensor:
    if output.shape[1] <= count:
        raise invalid("Text and sample must be joined in the block's output",
                      f"{output.shape[1]} tokens for {count} of the sample",
                      "Pass select=, a function from the block's output to the sample's tokens.")  # fmt: skip
    if kind.startswith(_BEFORE_TEXT):
        return output[:, :count]
    mask = condition.get("encoder_attention_mask")
    if kind.startswith("Lumina2") and mask is not None:  # each sample's own tokens follow its own text at once
        places = mask.sum(dim=1, dtype=torch.long)[:, None] + torch.arange(count, device=output.device)  # [B, N]
        return output.gather(1, places[..., None].expand(-1, -1, output.shape[-1]))
    return output[:, -count:]
