"""diffusers' own transformer classes, tiny and with random weights, and batches for them.

Batches have the form that diffusers' pipelines give them.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

TEXT = 7  # text tokens
TEXT_WIDTH = 24  # their features
POOLED = 12  # features of a pooled text

Others = dict[str, Any]  # forward's arguments beside the sample and `timestep`


class Family(NamedTuple):
    """One class.

    Attributes:
        build: makes the model.
        batch: size -> clean samples, and forward's other arguments beside `timestep`.
        depth: number of blocks in the trunk.
        width: their features.
        tokens: image (video, audio) tokens in them.
        time: unit and direction of `timestep`: "unit", "thousand" (high = noise), "reversed"
            (0..1, 1 = data), "reversed thousand".
        layout: what a block returns: "one", "text, image" (a tuple), "text + image" (joined);
            "double | single".
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[torch.Tensor, Others]]
    depth: int
    width: int
    tokens: int
    time: str
    layout: str


# the linear path's time in what `timestep` is called in
UNITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "unit": lambda t: t,
    "thousand": lambda t: 1000 * t,
    "reversed": lambda t: 1 - t,
    "reversed thousand": lambda t: 1000 - 1000 * t,
}
FAMILIES: dict[str, Family] = {}


def _get(name: str, module: str = "diffusers") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers' own imports
        return getattr(importlib.import_module(module), name)


def _build(name: str, config: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Chroma's: it uses a deprecated name
        return _get(name)(**config)


def _draw(
    shape: tuple[int, ...], rest: Callable[[int], Others], size: int
) -> tuple[torch.Tensor, Others]:
    return torch.randn(size, *shape), rest(size)


def _add(
    name: str,
    facts: tuple[int, int, int, str, str],
    shape: tuple[int, ...],
    rest: Callable[[int], Others],
    **config: Any,
) -> None:
    """Register a class.

    Args:
        name: of the class.
        facts: its depth, width, tokens, time and layout, see `Family`.
        shape: of a sample.
        rest: size -> the other arguments.
        **config: of the model.
    """
    FAMILIES[name] = Family(partial(_build, name, config), partial(_draw, shape, rest), *facts)


def _text(size: int, **others: Any) -> Others:
    return {"encoder_hidden_states": torch.randn(size, TEXT, TEXT_WIDTH), **others}


def _text_mask(size: int) -> Others:
    return _text(size, encoder_attention_mask=torch.ones(size, TEXT, dtype=torch.bool))


def _text_pooled(size: int) -> Others:
    return _text(size, pooled_projections=torch.randn(size, POOLED))


def _ids(height: int, width: int) -> torch.Tensor:
    sides = (1.0, float(height), float(width))
    return torch.cartesian_prod(*(torch.arange(side) for side in sides))


def _text_ids(size: int, **others: Any) -> Others:
    return _text(size, img_ids=_ids(4, 6), txt_ids=torch.zeros(TEXT, 3), **others)


def _text_pooled_ids(size: int) -> Others:
    return _text_ids(size, pooled_projections=torch.randn(size, POOLED))


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_CHANNELS = {"in_channels": 4, "out_channels": 4}


# Text apart from the trunk: cross-attention, or labels

_add(
    "DiTTransformer2DModel",
    (2, 32, 16, "thousand", "one"),
    (4, 8, 8),
    lambda size: {"class_labels": torch.randint(0, 10, (size,))},
    **_HEADS,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=10,
)


def _pixart(size: int) -> Others:
    return _text_mask(size) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


_add(
    "PixArtTransformer2DModel",
    (2, 32, 16, "thousand", "one"),
    (4, 8, 8),
    _pixart,
    **_HEADS,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=8,
    cross_attention_dim=32,
    caption_channels=TEXT_WIDTH,
)
_add(
    "SanaTransformer2DModel",
    (2, 32, 24, "thousand", "one"),
    (4, 4, 6),
    _text_mask,
    **_HEADS,
    **_CHANNELS,
    num_layers=2,
    sample_size=4,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=TEXT_WIDTH,
)


def _hunyuan(size: int) -> Others:
    rotary = _get("get_2d_rotary_pos_embed", "diffusers.models.embeddings")
    return _text(
        size,
        text_embedding_mask=torch.ones(size, TEXT, dtype=torch.long),
        encoder_hidden_states_t5=torch.randn(size, 5, 16),
        text_embedding_mask_t5=torch.ones(size, 5, dtype=torch.long),
        image_meta_size=torch.tensor([[64.0, 64, 64, 64, 0, 0]]).repeat(size, 1),
        style=torch.zeros(size, dtype=torch.long),
        image_rotary_emb=rotary(16, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
    )


# Its later half takes skips from the first one: an even number of blocks
_add(
    "HunyuanDiT2DModel",
    (4, 32, 16, "thousand", "one"),
    (4, 8, 8),
    _hunyuan,
    **_HEADS,
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=32,
    num_layers=4,
    cross_attention_dim=TEXT_WIDTH,
    cross_attention_dim_t5=16,
    pooled_projection_dim=POOLED,
    text_len=TEXT,
    text_len_t5=5,
)
_add(
    "WanTransformer3DModel",
    (2, 32, 32, "thousand", "one"),
    (4, 2, 8, 8),
    _text,
    **_HEADS,
    **_CHANNELS,
    text_dim=TEXT_WIDTH,
    freq_dim=16,
    ffn_dim=48,
    num_layers=2,
    rope_max_seq_len=16,
)


def _ltx(size: int) -> Others:
    return _text_mask(size) | {
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


_add(
    "LTXVideoTransformer3DModel",
    (2, 32, 32, "thousand", "one"),
    (32, 4),
    _ltx,
    **_HEADS,
    **_CHANNELS,
    num_layers=2,
    cross_attention_dim=32,
    caption_channels=TEXT_WIDTH,
)


def _stable_audio(size: int) -> Others:
    rotary = _get("get_1d_rotary_pos_embed", "diffusers.models.embeddings")
    others = {"rotary_embedding": rotary(8, 21, use_real=True, repeat_interleave_real=False)}
    return _text(size, global_hidden_states=torch.randn(size, 1, POOLED), **others)


# One token, the time and the clip's length, stands where text would
_add(
    "StableAudioDiTModel",
    (2, 32, 20, "unit", "text + image"),
    (4, 20),
    _stable_audio,
    **_HEADS,
    **_CHANNELS,
    sample_size=20,
    num_layers=2,
    num_key_value_attention_heads=1,
    cross_attention_dim=16,
    time_proj_dim=16,
    global_states_input_dim=POOLED,
    cross_attention_input_dim=TEXT_WIDTH,
)


def _allegro(size: int) -> Others:
    rotary = _get("get_3d_rotary_pos_embed_allegro", "diffusers.models.embeddings")
    *frequencies, t, h, w = rotary(12, ((0, 0), (4, 4)), (4, 4), 2, (2.2, 2.0, 2.0))
    grid = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    return _text_mask(size) | {"image_rotary_emb": (tuple(frequencies), tuple(grid))}


_add(
    "AllegroTransformer3DModel",
    (2, 24, 32, "thousand", "one"),
    (4, 2, 8, 8),
    _allegro,
    **_CHANNELS,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    cross_attention_dim=24,
    sample_height=8,
    sample_width=8,
    sample_frames=2,
    caption_channels=TEXT_WIDTH,
)
_add(
    "SanaVideoTransformer3DModel",
    (2, 32, 32, "thousand", "one"),
    (4, 2, 8, 8),
    _text_mask,
    **_HEADS,
    **_CHANNELS,
    num_layers=2,
    sample_size=8,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=TEXT_WIDTH,
    rope_max_seq_len=16,
)
# As Cosmos Predict 2 is configured and called; Cosmos 1 takes log(sigma) / 4
_add(
    "CosmosTransformer3DModel",
    (2, 32, 32, "unit", "one"),
    (4, 2, 8, 8),
    _text,
    **_HEADS,
    **_CHANNELS,
    num_layers=2,
    text_embed_dim=TEXT_WIDTH,
    adaln_lora_dim=8,
    max_size=(8, 16, 16),
    concat_padding_mask=False,
    extra_pos_embed_type=None,
)
# Spatial blocks return [B * frames, positions, D]. They are the trunk; as many temporal ones, which
# return [B * positions, frames, D], run between them
_add(
    "LatteTransformer3DModel",
    (2, 32, 32, "thousand", "frames, positions"),
    (4, 2, 8, 8),
    _text,
    **_HEADS,
    **_CHANNELS,
    num_layers=2,
    cross_attention_dim=32,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    caption_channels=TEXT_WIDTH,
    video_length=2,
)
_add(
    "PRXTransformer2DModel",
    (2, 32, 24, "unit", "one"),
    (4, 8, 12),
    _text,
    in_channels=4,
    context_in_dim=TEXT_WIDTH,
    hidden_size=32,
    num_heads=2,
    depth=2,
    axes_dim=[8, 8],
)


def _kandinsky(size: int) -> Others:
    positions = {
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
    }
    return _text_pooled(size) | positions


# forward returns a bare tensor, not a tuple, when return_dict is False; channels come last
_add(
    "Kandinsky5Transformer3DModel",
    (2, 32, 32, "thousand", "one"),
    (2, 8, 8, 4),
    _kandinsky,
    in_visual_dim=4,
    in_text_dim=TEXT_WIDTH,
    in_text_dim2=POOLED,
    time_dim=16,
    out_visual_dim=4,
    model_dim=32,
    ff_dim=48,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(4, 6, 6),
)

# Text in the trunk

_add(
    "Lumina2Transformer2DModel",
    (2, 32, 16, "reversed", "text + image"),
    (4, 8, 8),
    _text_mask,
    sample_size=8,
    in_channels=4,
    hidden_size=32,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=2,
    num_kv_heads=1,
    multiple_of=16,
    axes_dim_rope=(8, 4, 4),
    axes_lens=(32, 16, 16),
    cap_feat_dim=TEXT_WIDTH,
)
# The last block returns None for the text
_add(
    "SD3Transformer2DModel",
    (2, 32, 16, "thousand", "text, image"),
    (4, 8, 8),
    _text_pooled,
    **_HEADS,
    **_CHANNELS,
    sample_size=8,
    num_layers=2,
    joint_attention_dim=TEXT_WIDTH,
    caption_projection_dim=32,
    pooled_projection_dim=POOLED,
    pos_embed_max_size=8,
)
_add(
    "FluxTransformer2DModel",
    (4, 32, 24, "unit", "text, image | text, image"),
    (24, 16),
    _text_pooled_ids,
    **_HEADS,
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    joint_attention_dim=TEXT_WIDTH,
    pooled_projection_dim=POOLED,
    axes_dims_rope=(4, 6, 6),
)
# 8 register tokens precede the text
_add(
    "AuraFlowTransformer2DModel",
    (4, 32, 16, "unit", "text, image | text + image"),
    (4, 8, 8),
    _text,
    **_HEADS,
    **_CHANNELS,
    sample_size=8,
    num_mmdit_layers=2,
    num_single_dit_layers=2,
    joint_attention_dim=TEXT_WIDTH,
    caption_projection_dim=32,
    pos_embed_max_size=16,
)
_add(
    "QwenImageTransformer2DModel",
    (2, 32, 24, "unit", "text, image"),
    (24, 16),
    lambda size: _text(size, img_shapes=[[(1, 4, 6)]] * size),
    **_HEADS,
    in_channels=16,
    out_channels=4,
    num_layers=2,
    joint_attention_dim=TEXT_WIDTH,
    axes_dims_rope=(4, 6, 6),
)
_add(
    "CogVideoXTransformer3DModel",
    (2, 32, 32, "thousand", "image, text"),
    (2, 4, 8, 8),
    _text,
    **_HEADS,
    **_CHANNELS,
    time_embed_dim=16,
    text_embed_dim=TEXT_WIDTH,
    num_layers=2,
    sample_width=8,
    sample_height=8,
    sample_frames=5,
    max_text_seq_length=TEXT,
)


def _flux2(size: int) -> Others:
    img = nn.functional.pad(_ids(4, 6), (0, 1))
    txt = nn.functional.pad(torch.arange(float(TEXT))[:, None], (3, 0))
    return _text(size, img_ids=img.expand(size, -1, -1), txt_ids=txt.expand(size, -1, -1))


_add(
    "Flux2Transformer2DModel",
    (4, 32, 24, "unit", "text, image | text + image"),
    (24, 16),
    _flux2,
    **_HEADS,
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    joint_attention_dim=TEXT_WIDTH,
    timestep_guidance_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
    guidance_embeds=False,
)
_add(
    "ChromaTransformer2DModel",
    (4, 32, 24, "unit", "text, image | text + image"),
    (24, 16),
    _text_ids,
    **_HEADS,
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    joint_attention_dim=TEXT_WIDTH,
    axes_dims_rope=(4, 6, 6),
    approximator_num_channels=16,
    approximator_hidden_dim=16,
    approximator_layers=1,
)
_add(
    "BriaTransformer2DModel",
    (4, 32, 24, "thousand", "text, image | text, image"),
    (24, 16),
    _text_ids,
    **_HEADS,
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    joint_attention_dim=TEXT_WIDTH,
    axes_dims_rope=[4, 6, 6],
)
_add(
    "HunyuanVideoTransformer3DModel",
    (4, 32, 32, "thousand", "image, text | image, text"),
    (4, 2, 8, 8),
    lambda size: _text_mask(size) | {"pooled_projections": torch.randn(size, POOLED)},
    **_HEADS,
    **_CHANNELS,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=1,
    guidance_embeds=False,
    text_embed_dim=TEXT_WIDTH,
    pooled_projection_dim=POOLED,
    rope_axes_dim=(4, 6, 6),
)


def _cogview4(size: int) -> Others:
    sides = torch.tensor([[64.0, 96.0]]).repeat(size, 1)
    return _text(size, original_size=sides, target_size=sides, crop_coords=torch.zeros(size, 2))


_add(
    "CogView4Transformer2DModel",
    (2, 32, 24, "thousand", "image, text"),
    (4, 8, 12),
    _cogview4,
    **_HEADS,
    **_CHANNELS,
    num_layers=2,
    text_embed_dim=TEXT_WIDTH,
    time_embed_dim=16,
    condition_dim=8,
    sample_size=8,
    rope_axes_dim=(16, 16),
)
# Time is 0..1000, 1000 = data; forward warns on the CPU, of an autocast to float32
_add(
    "MochiTransformer3DModel",
    (2, 32, 32, "reversed thousand", "image, text"),
    (4, 2, 8, 8),
    _text_mask,
    **_HEADS,
    in_channels=4,
    num_layers=2,
    pooled_projection_dim=16,
    text_embed_dim=TEXT_WIDTH,
    time_embed_dim=16,
)
