"""Video models of diffusers that tests/diffusers_models.py does not build."""

from __future__ import annotations

from typing import Any

import torch
from entry import Condition
from telling import TEXT, WIDTH, Entries, last, part, text, told
from torch import nn

ENTRIES = Entries()
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
CHANNELS = {"in_channels": 4, "out_channels": 4}
TRUNK = ("transformer_blocks",)
TWO = ("transformer_blocks", "single_transformer_blocks")
BLOCKS = ("blocks",)
WAN = {
    **HEADS,
    **CHANNELS,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 3,
    "rope_max_seq_len": 16,
}
VIDEO = (4, 2, 8, 8)  # 32 tokens

# Wan and what has grown from it

ENTRIES.add("ChronoEditTransformer3DModel", VIDEO, text, 32, BLOCKS, WAN, unit="thousand")
ENTRIES.add("SkyReelsV2Transformer3DModel", VIDEO, text, 32, BLOCKS, WAN, unit="thousand")
ENTRIES.add(
    "WanVACETransformer3DModel",
    VIDEO,
    lambda size: text(size, control_hidden_states=torch.randn(size, 6, 2, 8, 8)),
    32,
    BLOCKS,
    WAN | {"vace_layers": [0, 2], "vace_in_channels": 6},
    unit="thousand",
    note="a second list for control",
)


def animated(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    """The noised video has the reference's channels behind its own."""
    rest = dict(condition)
    joined = torch.cat([x, rest.pop("reference")], dim=1)
    return model(hidden_states=joined, timestep=1000 * t, return_dict=False, **rest)


ENTRIES.add(
    "WanAnimateTransformer3DModel",
    VIDEO,
    lambda size: text(
        size,
        reference=torch.randn(size, 8, 2, 8, 8),
        pose_hidden_states=torch.randn(size, 4, 1, 8, 8),
        face_pixel_values=torch.randn(size, 3, 4, 16, 16),
    ),
    32,
    BLOCKS,
    WAN
    | {
        "in_channels": None,
        "latent_channels": 4,
        "image_dim": None,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 8,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 3,
    },
    run=animated,
    note="the reference's channels behind the sample's",
)


def flow_map(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    """The end of the step, r, is a fraction of the time t."""
    rest = dict(condition)
    r = t * rest.pop("fraction")
    frames = x.shape[1]
    return model(
        hidden_states=x,
        timestep=1000 * t[:, None].expand(-1, frames),
        r_timestep=1000 * r[:, None].expand(-1, frames),
        return_dict=False,
        **rest,
    )


ENTRIES.add(
    "AnyFlowTransformer3DModel",
    (2, 4, 8, 8),
    lambda size: text(size, fraction=torch.rand(size)),
    32,
    BLOCKS,
    WAN,
    run=flow_map,
    note="two times, for each frame",
)


def history(size: int) -> Condition:
    return text(
        size,
        indices_hidden_states=torch.arange(2, 4).expand(size, -1),
        indices_latents_history_short=torch.arange(2).expand(size, -1),
        latents_history_short=torch.randn(size, 4, 2, 8, 8),
    )


# The history's tokens stand before the sample's
ENTRIES.add(
    "HeliosTransformer3DModel",
    VIDEO,
    history,
    32,
    BLOCKS,
    {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
    | {"rope_dim": (4, 6, 6)},
    last(32),
    "thousand",
    note="history before the sample, in one sequence",
)


def framewise(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    """One time for each frame, [B, 1, T]."""
    times = 1000 * t[:, None, None].expand(-1, 1, x.shape[2])
    return model(x, times, return_dict=False, **condition)


ENTRIES.add(
    "SanaWMTransformer3DModel",
    (4, 2, 4, 4),
    lambda size: {
        "encoder_hidden_states": torch.randn(size, 1, TEXT, WIDTH),
        "mask": torch.ones(size, TEXT, dtype=torch.long),
    },
    32,
    BLOCKS,
    {
        "in_channels": 4,
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "linear_head_dim": 16,
        "caption_channels": WIDTH,
        "chunk_plucker_channels": 4,
    },
    run=framewise,
    note="a time for each frame",
)

# Hunyuan and others of two streams


def joined(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    """The noised video has the condition's channels behind its own."""
    rest = dict(condition)
    wider = torch.cat([x, rest.pop("reference")], dim=1)
    return model(hidden_states=wider, timestep=1000 * t, return_dict=False, **rest)


def hunyuan15(size: int) -> Condition:
    return {
        "reference": torch.randn(size, 5, 2, 4, 4),
        "encoder_hidden_states": torch.randn(size, TEXT, WIDTH),
        "encoder_attention_mask": torch.ones(size, TEXT, dtype=torch.bool),
        "encoder_hidden_states_2": torch.randn(size, 5, 12),
        "encoder_attention_mask_2": torch.ones(size, 5, dtype=torch.bool),
        "image_embeds": torch.randn(size, 3, 8),
    }


ENTRIES.add(
    "HunyuanVideo15Transformer3DModel",
    (4, 2, 4, 4),
    hunyuan15,
    32,
    TRUNK,
    {
        **HEADS,
        "in_channels": 9,
        "out_channels": 4,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "text_embed_dim": WIDTH,
        "text_embed_2_dim": 12,
        "image_embed_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    },
    part(0),
    run=joined,
    note="the condition's channels behind the sample's",
)


def framepack(size: int) -> Condition:
    return text(
        size,
        encoder_attention_mask=torch.ones(size, TEXT, dtype=torch.bool),
        pooled_projections=torch.randn(size, 12),
        image_embeds=torch.randn(size, 3, 8),
        indices_latents=torch.arange(3, 5),
        latents_clean=torch.randn(size, 4, 2, 8, 8),
        indices_latents_clean=torch.arange(2),
        latents_history_2x=torch.randn(size, 4, 2, 8, 8),
        indices_latents_history_2x=torch.arange(2),
        latents_history_4x=torch.randn(size, 4, 4, 8, 8),
        indices_latents_history_4x=torch.arange(4),
    )


# The history's tokens stand before the sample's
ENTRIES.add(
    "HunyuanVideoFramepackTransformer3DModel",
    VIDEO,
    framepack,
    32,
    TWO,
    {
        **HEADS,
        **CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "guidance_embeds": False,
        "text_embed_dim": WIDTH,
        "pooled_projection_dim": 12,
        "rope_axes_dim": (4, 6, 6),
        "has_image_proj": True,
        "image_proj_dim": 8,
        "has_clean_x_embedder": True,
    },
    lambda output, condition: output[0][:, -32:],
    "thousand",
    note="history before the sample, beside the text",
)
ENTRIES.add(
    "MotifVideoTransformer3DModel",
    VIDEO,
    lambda size: text(size, reference=torch.randn(size, 5, 2, 8, 8)),
    32,
    TWO,
    {
        **HEADS,
        "in_channels": 9,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "text_embed_dim": WIDTH,
        "rope_axes_dim": (4, 6, 6),
    },
    part(0),
    run=joined,
    note="the condition's channels behind the sample's",
)
ENTRIES.add(
    "ConsisIDTransformer3DModel",
    (2, 4, 8, 8),
    text,
    32,
    TRUNK,
    {
        **HEADS,
        **CHANNELS,
        "time_embed_dim": 16,
        "text_embed_dim": WIDTH,
        "num_layers": 3,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": TEXT,
    },
    part(0),
    "thousand",
    note="video and text side by side",
)
ENTRIES.add(
    "EasyAnimateTransformer3DModel",
    VIDEO,
    text,
    32,
    TRUNK,
    {
        **HEADS,
        **CHANNELS,
        "patch_size": 2,
        "num_layers": 3,
        "mmdit_layers": 3,
        "time_embed_dim": 16,
        "text_embed_dim": WIDTH,
    },
    part(0),
    "thousand",
    note="video and text side by side",
)

# Kandinsky 6


def kandinsky(size: int) -> Condition:
    return text(size, pooled_projections=torch.randn(size, 12))


ENTRIES.add(
    "Kandinsky6Transformer3DModel",
    (2, 8, 8, 4),
    kandinsky,
    32,
    ("visual_transformer_blocks",),
    {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": WIDTH,
        "in_text_dim2": 12,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 48,
        "num_text_blocks": 2,
        "num_visual_blocks": 3,
        "axes_dims": (4, 6, 6),
        "visual_cond": False,
        "in_audio_dim": 4,
        "out_audio_dim": 4,
    },
    part(0),
    "thousand",
    answers={"blocks": "visual_transformer_blocks"},
    note="video and audio side by side",
)
# Video and audio: both are noised alike


def with_audio(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    """The audio at the video's time."""
    rest = dict(condition)
    clean, noise = rest.pop("audio")
    times = t[:, None, None]
    return model(
        hidden_states=x,
        audio_hidden_states=(1 - times) * clean + times * noise,
        timestep=1000 * t,
        return_dict=False,
        **rest,
    )


def ltx2(size: int) -> Condition:
    return text(
        size,
        audio=(torch.randn(size, 6, 4), torch.randn(size, 6, 4)),
        audio_encoder_hidden_states=torch.randn(size, TEXT, WIDTH),
        num_frames=2,
        height=4,
        width=4,
        audio_num_frames=6,
    )


LTX2 = {
    **HEADS,
    **CHANNELS,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 3,
    "caption_channels": WIDTH,
}
ENTRIES.add(
    "LTX2VideoTransformer3DModel",
    (32, 4),
    ltx2,
    32,
    TRUNK,
    LTX2,
    part(0),
    run=with_audio,
    note="the audio beside it is noised at the same time",
)


def refined(size: int) -> Condition:
    return text(size, video_rotary_emb=(torch.randn(size, 32, 32), torch.randn(size, 32, 32)))


ENTRIES.add(
    "SanaWMLTX2RefinerTransformer3DModel",
    (32, 4),
    refined,
    32,
    TRUNK,
    LTX2,
    run=told("unit"),
)
