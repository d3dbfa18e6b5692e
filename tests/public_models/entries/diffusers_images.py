"""Image models of diffusers that tests/diffusers_models.py does not build."""

from __future__ import annotations

from typing import Any

import torch
from diffusers_models import _build
from entry import Condition
from telling import TEXT, WIDTH, Entries, begin, ids, last, part, part_or, text, told
from torch import nn

ENTRIES = Entries()
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
CHANNELS = {"in_channels": 4, "out_channels": 4}
TRUNK = ("transformer_blocks",)
TWO = ("transformer_blocks", "single_transformer_blocks")


def text_and_ids(size: int) -> Condition:
    return text(size, img_ids=ids(4, 6), txt_ids=torch.zeros(TEXT, 3))


def sizes(size: int) -> Condition:
    sides = torch.tensor([[64.0, 96.0]]).repeat(size, 1)
    return text(size, original_size=sides, target_size=sides, crop_coords=torch.zeros(size, 2))


# Two streams

ENTRIES.add(
    "CogView3PlusTransformer2DModel",
    (4, 8, 8),
    sizes,
    16,
    TRUNK,
    {
        **HEADS,
        **CHANNELS,
        "num_layers": 3,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    },
    part(0),
    "thousand",
    note="image and text side by side",
)


def fibo(size: int) -> Condition:
    layers = [torch.randn(size, TEXT, 12) for _ in range(4)]
    return text_and_ids(size) | {"text_encoder_layers": layers}


ENTRIES.add(
    "BriaFiboTransformer2DModel",
    (24, 16),
    fibo,
    24,
    TWO,
    {
        **HEADS,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": WIDTH,
        "text_encoder_dim": 12,
        "axes_dims_rope": [4, 6, 6],
    },
    part_or(1, last(24)),
    "thousand",
    note="two streams, then text before image",
)
ENTRIES.add(
    "LongCatImageTransformer2DModel",
    (24, 16),
    text_and_ids,
    24,
    TWO,
    {
        **HEADS,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "axes_dims_rope": [4, 6, 6],
    },
    part(1),
    note="text and image side by side",
)
ENTRIES.add(
    "OvisImageTransformer2DModel",
    (24, 16),
    text_and_ids,
    24,
    TWO,
    {
        **HEADS,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    },
    part(1),
    note="text and image side by side",
)


def masked(size: int) -> Condition:
    return text(size, encoder_attention_mask=torch.ones(size, TEXT, dtype=torch.bool))


HUNYUAN = {
    **HEADS,
    **CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": WIDTH,
    "rope_axes_dim": (8, 8),
}
ENTRIES.add(
    "HunyuanImageTransformer2DModel",
    (4, 4, 6),
    masked,
    24,
    TWO,
    HUNYUAN,
    part(0),
    "thousand",
    note="image and text side by side",
)


def mean_flow(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    rest = dict(condition)
    r = t * rest.pop("fraction")
    return model(x, 1000 * t, timestep_r=1000 * r, return_dict=False, **rest)


# The step's start is told beside the time: it moves with it
ENTRIES.append(
    ENTRIES[-1]._replace(
        name="HunyuanImageTransformer2DModel, mean flow",
        build=lambda: _build("HunyuanImageTransformer2DModel", HUNYUAN | {"use_meanflow": True}),
        batch=lambda size: (
            torch.randn(size, 4, 4, 6),
            masked(size) | {"fraction": torch.rand(size)},
        ),
        run=mean_flow,
        note="a second time, of the step's start",
    )
)


def glm(size: int) -> Condition:
    sides = torch.tensor([[64.0, 64.0]]).repeat(size, 1)
    return text(
        size,
        prior_token_id=torch.randint(0, 8, (size, 16)),
        prior_token_drop=torch.zeros(size, dtype=torch.bool),
        target_size=sides,
        crop_coords=torch.zeros(size, 2),
    )


ENTRIES.add(
    "GlmImageTransformer2DModel",
    (4, 8, 8),
    glm,
    16,
    TRUNK,
    {
        **HEADS,
        **CHANNELS,
        "num_layers": 3,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": 8,
    },
    part(0),
    "thousand",
    note="image and text side by side",
)


def hidream(size: int) -> Condition:
    return {
        "encoder_hidden_states_t5": torch.randn(size, 5, WIDTH),
        "encoder_hidden_states_llama3": torch.randn(4, size, TEXT, WIDTH),
        "pooled_embeds": torch.randn(size, 12),
    }


ENTRIES.add(
    "HiDreamImageTransformer2DModel",
    (4, 8, 8),
    hidream,
    16,
    ("double_stream_blocks", "single_stream_blocks"),
    {
        **HEADS,
        **CHANNELS,
        "patch_size": 2,
        "num_layers": 2,
        "num_single_layers": 2,
        "caption_channels": [WIDTH, WIDTH],
        "text_emb_dim": 12,
        "axes_dims_rope": (4, 6, 6),
        "max_resolution": (8, 8),
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "llama_layers": [0, 1, 2, 3],
    },
    part_or(0, begin(16)),
    run=told("thousand", "timesteps"),
    note="image and text side by side, then image before text",
)
FLUX3 = {
    **HEADS,
    "in_channels": 16,
    "cond_in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": WIDTH,
    "timestep_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}


def flux3(size: int) -> Condition:
    return text(size, img_ids=nn.functional.pad(ids(4, 6), (0, 1)), txt_ids=torch.zeros(TEXT, 4))


ENTRIES.add(
    "Flux3Transformer2DModel",
    (24, 16),
    flux3,
    24,
    ("mode_blocks.image", "single_transformer_blocks"),
    FLUX3,
    part_or(1, begin(24)),
    answers={"blocks": ["mode_blocks.image", "single_transformer_blocks"]},
    note="lists for image, condition and text, then one of two streams",
)


def flux3_flow(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    rest = dict(condition)
    r = t * rest.pop("fraction")
    return model(x, timestep=t, target_timestep=r, return_dict=False, **rest)


# The step's end is told beside the time: it moves with it
ENTRIES.append(
    ENTRIES[-1]._replace(
        name="Flux3Transformer2DModel, flow map",
        build=lambda: _build("Flux3Transformer2DModel", FLUX3 | {"flow_map": True}),
        batch=lambda size: (
            torch.randn(size, 24, 16),
            flux3(size) | {"fraction": torch.rand(size)},
        ),
        run=flux3_flow,
        given={"blocks": ["mode_blocks.image", "single_transformer_blocks"]},
        note="a second time, of the step's end",
    )
)
JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": WIDTH,
    "num_layers": 3,
    "rope_dim_list": [4, 6, 6],
}
ENTRIES.add(
    "JoyImageEditTransformer3DModel",
    (4, 1, 8, 8),
    text,
    16,
    ("double_blocks",),
    JOY,
    part(0),
    "thousand",
    note="image and text side by side",
)
ENTRIES.add(
    "JoyImageEditPlusTransformer3DModel",
    (16, 4, 1, 2, 2),
    lambda size: text(size, shape_list=[[(1, 4, 4)]] * size),
    16,
    ("double_blocks",),
    JOY,
    part(0),
    "thousand",
    note="a sequence of patches; image and text side by side",
)
ENTRIES.add(
    "NucleusMoEImageTransformer2DModel",
    (24, 16),
    lambda size: text(size, img_shapes=[(1, 4, 6)] * size),
    24,
    TRUNK,
    {
        **HEADS,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 3,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
        "num_experts": 2,
        "moe_intermediate_dim": 16,
        "capacity_factors": [2.0] * 3,
    },
    note="experts; blocks return the image",
)

# Text (time, history) and sample in one sequence


def krea(size: int) -> Condition:
    grid = torch.zeros(TEXT + 16, 3)
    grid[TEXT:, 1:] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return {"encoder_hidden_states": torch.randn(size, TEXT, 2, 12), "position_ids": grid}


ENTRIES.add(
    "Krea2Transformer2DModel",
    (16, 16),
    krea,
    16,
    TRUNK,
    {
        "in_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "timestep_embed_dim": 8,
        "text_hidden_dim": 12,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 2, 2),
    },
    last(16),
    note="text before image, in one sequence",
)


def omnigen(size: int) -> Condition:
    return {
        "input_ids": torch.randint(0, 10, (size, 24)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(size, 41, 41),
        "position_ids": torch.arange(41)[None].repeat(size, 1),
    }


ENTRIES.add(
    "OmniGenTransformer2DModel",
    (4, 8, 8),
    omnigen,
    16,
    ("layers",),
    {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_layers": 3,
        "pad_token_id": 0,
        "vocab_size": 100,
        "in_channels": 4,
        "time_step_dim": 4,
        "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
    },
    last(16),
    "reversed",
    note="text and time before image, in one sequence",
)
# Blocks return [N, B, D], the sample's tokens first
ENTRIES.add(
    "ErnieImageTransformer2DModel",
    (16, 4, 4),
    lambda size: {
        "text_bth": torch.randn(size, 9, 16),
        "text_lens": 9 - torch.arange(size) % 5,
    },
    16,
    ("layers",),
    {
        "hidden_size": 16,
        "num_attention_heads": 1,
        "num_layers": 3,
        "ffn_hidden_size": 16,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": 16,
        "rope_axes_dim": (8, 4, 4),
    },
    lambda output, condition: output[:16].transpose(0, 1),
    "thousand",
    note="[N, B, D], image before text",
)
ENTRIES.add(
    "BriaFibo2Transformer2DModel",
    (4, 8, 8),
    lambda size: {"encoder_hidden_states": torch.randn(size, 2, TEXT, 12)},
    16,
    ("layers",),
    {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 12,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 2,
        "gist_min_text_len": 4,
        "gist_max_text_len": 16,
        "axes_dims": (4, 6, 6),
        "axes_lens": (32, 16, 16),
    },
    last(16),
    note="tokens that stand for the text before image",
)


def ideogram(size: int) -> Condition:
    """Four places of text, then the image's: 3 says text, 2 image."""
    indicator = torch.tensor([3] * 4 + [2] * 16).repeat(size, 1)
    return {
        "encoder_hidden_states": torch.randn(size, 20, 12),
        "position_ids": torch.arange(20)[None, :, None].repeat(size, 1, 3),
        "segment_ids": torch.ones(size, 20, dtype=torch.long),
        "indicator": indicator,
    }


# The sample stands in a sequence with places for the text
ENTRIES.add(
    "Ideogram4Transformer2DModel",
    (20, 8),
    ideogram,
    16,
    ("layers",),
    {
        "in_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": 12,
        "mrope_section": (4, 2, 2),
    },
    last(16),
    note="the sample comes in one sequence with the text's places",
)


def qwen21(size: int) -> Condition:
    """Text, then four slots of the image, each of 4 tokens."""
    slots = torch.tensor([False] * TEXT + [True] * 4).repeat(size, 1)
    return text(size, img_shapes=[[(1, 4, 4)]] * size, img_mask=slots)


ENTRIES.add(
    "QwenImage21Transformer2DModel",
    (16, 16),
    qwen21,
    16,
    TRUNK,
    {
        **HEADS,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "context_in_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    },
    last(16),
    note="text before image, in one sequence",
)


def unbound(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    """Z-Image takes lists, and time 1 is data."""
    images = list(x[:, :, None].unbind(0))
    return model(images, 1 - t, list(condition["text"].unbind(0)), return_dict=False)


ENTRIES.add(
    "ZImageTransformer2DModel",
    (4, 16, 8),
    lambda size: {"text": torch.randn(size, 32, 12)},
    32,
    ("layers",),
    {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 16, 16],
    },
    begin(32),
    run=unbound,
    note="lists in; image before text, padded",
)
ENTRIES.add(
    "LuminaNextDiT2DModel",
    (4, 8, 8),
    lambda size: text(
        size,
        encoder_mask=torch.ones(size, TEXT, dtype=torch.bool),
        image_rotary_emb=torch.polar(torch.ones(4, 4, 8), torch.randn(4, 4, 8)),
        cross_attention_kwargs={},
    ),
    16,
    ("layers",),
    {
        "sample_size": 8,
        "hidden_size": 32,
        "num_layers": 3,
        "num_attention_heads": 2,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "cross_attention_dim": WIDTH,
        "learn_sigma": False,
    },
    unit="reversed",
)
ENTRIES.add(
    "Transformer2DModel",
    (4, 8, 8),
    lambda size: {"class_labels": torch.randint(0, 10, (size,))},
    16,
    TRUNK,
    {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "activation_fn": "gelu-approximate",
    },
    unit="thousand",
    dropped=tuple(
        f"transformer_blocks.{block}.norm1.emb.class_embedder.embedding_table" for block in range(3)
    ),
    note="as a DiT; labels are dropped in each block",
)
ENTRIES.add(
    "PriorTransformer",
    (16,),
    lambda size: (
        text(size, proj_embedding=torch.randn(size, 16))
        | {"encoder_hidden_states": torch.randn(size, TEXT, 16)}
    ),
    1,
    TRUNK,
    {**HEADS, "num_layers": 3, "embedding_dim": 16, "num_embeddings": TEXT},
    lambda output, condition: output[:, -2:-1],
    "thousand",
    note="the sample is one token of eleven",
)
