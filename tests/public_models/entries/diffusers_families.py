"""The classes of diffusers that tests/diffusers_models.py builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers_models import FAMILIES, UNITS, Family
from entry import Condition, Entry, first
from torch import nn

Pick = Callable[[Any, Condition], torch.Tensor]


def behind_text(count: int) -> Pick:
    """Text and sample are one sequence, the sample's `count` tokens at its end."""
    return lambda output, condition: output[:, -count:]


def second(output: Any, condition: Condition) -> Any:
    """A block returns the text and the sample."""
    return output[1]


def one_of_two(output: Any, condition: Condition) -> Any:
    """A block returns the sample and the text."""
    return output[0]


def told(unit: str) -> Callable[..., Any]:
    """The call of a class that takes `hidden_states` and `timestep`, told in this unit."""

    def run(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
        time = UNITS[unit](t)
        return model(hidden_states=x, timestep=time, return_dict=False, **condition)

    return run


def _double_or_single(layout: str, count: int) -> Pick:
    """The double blocks return two streams; the single ones may return one sequence."""
    place = 1 if layout.startswith("text") else 0
    joined = layout.endswith("text + image")

    def pick(output: Any, condition: Condition) -> Any:
        if joined and isinstance(output, torch.Tensor):
            return output[:, -count:]
        return output[place]

    return pick


def _pick(name: str, family: Family) -> Pick:
    layout = family.layout
    if name.startswith("Lumina2"):
        return lambda output, condition: output[:, -family.tokens :]  # its masks are all True
    if layout in ("one", "frames, positions"):
        return first
    if layout == "text + image":
        return behind_text(family.tokens)
    return _double_or_single(layout, family.tokens)


# Where the trunk stands; everywhere else it is `transformer_blocks`
LISTS = {
    "AuraFlowTransformer2DModel": ("joint_transformer_blocks", "single_transformer_blocks"),
    "HunyuanDiT2DModel": ("blocks",),
    "Kandinsky5Transformer3DModel": ("visual_transformer_blocks",),
    "Lumina2Transformer2DModel": ("layers",),
    "PRXTransformer2DModel": ("blocks",),
    "WanTransformer3DModel": ("blocks",),
}
# Each block drops and embeds labels itself
DROPPED = {
    "DiTTransformer2DModel": tuple(
        f"transformer_blocks.{block}.norm1.emb.class_embedder.embedding_table" for block in (0, 1)
    )
}
# In words; of double and single blocks, what both return
NOTES = {
    "one": "",
    "frames, positions": "one frame's tokens in each sequence",
    "text, image": "text and image side by side",
    "image, text": "image and text side by side",
    "text + image": "text before image, in one sequence",
    "text, image | text, image": "text and image side by side",
    "image, text | image, text": "image and text side by side",
    "text, image | text + image": "text and image side by side, then text before image",
}
_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")


def _entry(name: str, family: Family) -> Entry:
    two_lists = "|" in family.layout
    lists = LISTS.get(name, _DOUBLE_SINGLE if two_lists else ("transformer_blocks",))
    teacher = 2 if family.depth == 2 or two_lists else family.depth - 1
    target = f"{lists[1]}.0" if two_lists else f"{lists[0]}.{teacher - 1}"
    return Entry(
        name,
        family.build,
        family.batch,
        family.tokens,
        (f"{lists[0]}.0", target),
        (1, 3 if two_lists else teacher),
        _pick(name, family),
        told(family.time),
        dropped=DROPPED.get(name, ()),
        note=NOTES[family.layout],
    )


ENTRIES = [_entry(name, family) for name, family in FAMILIES.items()]
