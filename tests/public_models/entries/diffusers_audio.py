"""Audio models of diffusers, and what is neither image nor video."""

from __future__ import annotations

from typing import Any

import torch
from entry import Condition
from telling import TEXT, WIDTH, Entries, last, text
from torch import nn

ENTRIES = Entries()
TRUNK = ("transformer_blocks",)


def twice_told(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    """The reference time r equals t."""
    return model(hidden_states=x, timestep=t, timestep_r=t, return_dict=False, **condition)


ENTRIES.add(
    "AceStepTransformer1DModel",
    (32, 4),
    lambda size: {
        "encoder_hidden_states": torch.randn(size, TEXT, 32),
        "context_latents": torch.randn(size, 32, 8),
    },
    16,
    ("layers",),
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "in_channels": 12,
        "audio_acoustic_hidden_dim": 4,
        "sliding_window": 8,
    },
    run=twice_told,
    note="two times, which are equal",
)
ENTRIES.add(
    "LongCatAudioDiTTransformer",
    (20, 4),
    lambda size: text(size, encoder_attention_mask=torch.ones(size, TEXT, dtype=torch.bool)),
    20,
    ("blocks",),
    {
        "dit_dim": 32,
        "dit_depth": 3,
        "dit_heads": 2,
        "dit_text_dim": WIDTH,
        "latent_dim": 4,
    },
)
# One token for the time stands before the sample's
ENTRIES.add(
    "MiniMaxMusic3Transformer1DModel",
    (8, 24),
    lambda size: {"encoder_hidden_states": torch.randn(size, 24, 16)},
    24,
    TRUNK,
    {
        "in_channels": 8,
        "condition_dim": 16,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "ff_inner_dim": 32,
        "rotary_dim": 4,
        "fourier_embedding_dim": 8,
    },
    last(24),
    note="the time before the sample, in one sequence",
)
# Memory tokens stand before the sample's
ENTRIES.add(
    "StableAudio3DiTModel",
    (4, 20),
    lambda size: text(size, global_hidden_states=torch.randn(size, 12)),
    20,
    TRUNK,
    {
        "io_channels": 4,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "cond_token_dim": WIDTH,
        "global_cond_dim": 12,
        "local_add_cond_dim": 4,
        "timestep_features_dim": 16,
        "num_memory_tokens": 5,
    },
    last(20),
    note="memory tokens before the sample",
)


def film(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    notes = condition["notes"]
    return model([(notes, torch.ones(notes.shape[:2]))], x, t)


# Features are dropped in training, in the student's only
ENTRIES.add(
    "T5FilmDecoder",
    (12, 8),
    lambda size: {"notes": torch.randn(size, TEXT, 32)},
    12,
    ("decoders",),
    {
        "input_dims": 8,
        "targets_length": 12,
        "d_model": 32,
        "num_layers": 3,
        "num_heads": 2,
        "d_kv": 16,
        "d_ff": 48,
    },
    lambda output, condition: output[0],
    run=film,
    note="features are dropped in the student alone",
)


# Text, video and audio in one sequence, structured alike for the whole batch, at one time


def music_video(size: int) -> Condition:
    tags = torch.tensor([1] * 5 + [0] * 16 + [2] * 6)
    return {
        "audio_hidden_states": torch.randn(size, 6, 4),
        "encoder_hidden_states": torch.randn(size, 5, WIDTH),
        "timestep_indices": torch.zeros(27, dtype=torch.long),
        "token_tags": tags,
        "position_ids": torch.arange(27)[:, None].expand(-1, 3),
        "text_indices": torch.arange(5),
        "video_indices": torch.arange(5, 21),
        "audio_indices": torch.arange(21, 27),
    }


ENTRIES.add(
    "MiniMaxH3Transformer3DModel",
    (16, 4),
    music_video,
    16,
    TRUNK,
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 32,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "ffn_dim": 48,
        "in_channels": 1,
        "audio_in_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "time_embed_hidden_dim": 32,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    },
    lambda output, condition: output[:, 5:21],
    size=1,
    note="text, video and audio in one sequence",
)

# A packed sequence without a batch's axis: text, then video


def packed(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    places = torch.arange(5, 21)
    return model(
        input_ids=condition["words"],
        text_indexes=torch.arange(5),
        position_ids=torch.arange(21).expand(3, -1),
        und_len=5,
        sequence_length=21,
        vision_tokens=[x],
        vision_token_shapes=[(1, 4, 4)],
        vision_sequence_indexes=places,
        vision_mse_loss_indexes=places,
        vision_timesteps=1000 * t.expand(16),
        vision_noisy_frame_indexes=[torch.arange(1)],
        return_dict=False,
    )[0]


ENTRIES.add(
    "Cosmos3OmniTransformer",
    (4, 1, 8, 8),
    lambda size: {"words": torch.randint(0, 20, (5,))},
    16,
    ("layers",),
    {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "latent_channel": 4,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "patch_latent_dim": 16,
        "rope_axes_dim": (4, 2, 2),
        "vocab_size": 20,
    },
    lambda output, condition: output[1][None],
    run=packed,
    size=1,
    note="text and video packed, without a batch's axis",
)

# A protein: places of atoms and latents are noised, each at a time of its own


def protein(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    rest = dict(condition)
    mask = rest.pop("mask")
    return model(x[..., :3], x[..., 3:], 1 - t, 1 - t, mask, conditioning=rest, return_dict=False)


ENTRIES.add(
    "RFD4ProteinaTransformer",
    (12, 7),
    lambda size: {
        "mask": torch.ones(size, 12, dtype=torch.bool),
        "is_in_context_conditioning": torch.zeros(size, 12),
        "supports_local_latent": torch.ones(size, 12),
    },
    12,
    ("transformer_layers",),
    {
        "nlayers": 3,
        "token_dim": 32,
        "nheads": 2,
        "dim_cond": 16,
        "pair_repr_dim": 16,
        "latent_dim": 4,
        "t_emb_dim": 16,
        "xt_pair_dist_dim": 6,
        "feats_seq": ("xt_bb_ca", "xt_local_latents"),
        "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
        "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        "feats_pair_cond": ("time_emb_bb_ca", "time_emb_local_latents"),
        "tri_mult_c": 8,
    },
    run=protein,
    note="places and latents, two samples in the call",
)
