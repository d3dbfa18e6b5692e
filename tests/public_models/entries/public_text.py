"""Public models of images and videos by text, and of streams side by side."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from entry import Condition, Entry, Repository
from noise import DDPM, LINEAR
from repositories import stand_in, without_init
from telling import TEXT, WIDTH, begin, ids, last, part, part_or
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


def build_flux() -> nn.Module:
    without_init("flux")
    from flux.model import Flux, FluxParams

    return Flux(
        FluxParams(
            in_channels=16,
            out_channels=16,
            vec_in_dim=12,
            context_in_dim=WIDTH,
            hidden_size=32,
            mlp_ratio=2,
            num_heads=2,
            depth=2,
            depth_single_blocks=2,
            axes_dim=[4, 6, 6],
            theta=10000,
            qkv_bias=True,
            guidance_embed=False,
        )
    )


def flux_batch(size: int) -> tuple[torch.Tensor, Condition]:
    return torch.randn(size, 24, 16), {
        "img_ids": ids(4, 6).expand(size, -1, -1),
        "txt": torch.randn(size, TEXT, WIDTH),
        "txt_ids": torch.zeros(size, TEXT, 3),
        "y": torch.randn(size, 12),
    }


def run_flux(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(img=x, timesteps=t, **condition)


FLUX = Repository("black-forest-labs/flux", "802fb4713906133fcbd0d8dc5351620ca4773036", ("src",))


def build_latte() -> nn.Module:
    without_init("models")
    from models.latte import Latte

    return Latte(
        input_size=8,
        hidden_size=32,
        depth=4,
        num_heads=2,
        num_frames=2,
        num_classes=10,
        class_dropout_prob=0.5,
        extras=2,
    )


LATTE = Repository("Vchitect/Latte", "b27c24a17487e3c33ae4e92364521303d0f14845")


def build_pixart() -> nn.Module:
    stand_in("xformers", "mmcv")
    without_init("diffusion")
    without_init("diffusion.model")
    without_init("diffusion.model.nets")
    import mmcv
    import xformers.ops

    class Registry:
        def __init__(self, name: str) -> None:
            self.register_module = lambda *args, **options: lambda kind: kind

    mmcv.Registry = Registry

    def attention(q: Any, k: Any, v: Any, p: float = 0.0, attn_bias: Any = None) -> Any:
        mask = None if attn_bias is None else attn_bias
        q, k, v = (value.transpose(1, 2) for value in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def block_diagonal(queries: list[int], keys: list[int]) -> torch.Tensor:
        return torch.block_diag(
            *(torch.ones(n, m) for n, m in zip(queries, keys, strict=True))
        ).bool()

    xformers.ops.memory_efficient_attention = attention
    masks = SimpleNamespace(from_seqlens=block_diagonal)
    xformers.ops.fmha = SimpleNamespace(BlockDiagonalMask=masks)
    from diffusion.model.nets.PixArt import PixArt

    return PixArt(
        input_size=8,
        hidden_size=32,
        depth=4,
        num_heads=2,
        caption_channels=WIDTH,
        model_max_length=TEXT,
        class_dropout_prob=0,
    )


PIXART = Repository("PixArt-alpha/PixArt-alpha", "cac2fd3b4544cf7620d8fbbf8b19d97ffcb85892")


def build_sd3() -> nn.Module:
    stand_in("transformers")
    from mmditx import MMDiTX

    context = {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}}
    return MMDiTX(
        input_size=8,
        depth=2,
        adm_in_channels=12,
        context_embedder_config=context,
        pos_embed_max_size=8,
        num_patches=64,
        device="cpu",
        dtype=torch.float32,
    )


def run_sd3(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, 1000 * t, **condition)


SD3 = Repository("Stability-AI/sd3.5", "fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a")


def build_hunyuan() -> nn.Module:
    stand_in("flash_attn", "loguru")
    without_init("hyvideo")
    without_init("hyvideo.modules")
    without_init("hyvideo.utils")
    from hyvideo.modules import attenion

    def varlen(q: Any, k: Any, v: Any, starts: Any, *others: Any) -> Any:
        """Attention within sections of one long sequence."""
        ends = starts.tolist()
        parts = []
        for begins, end in itertools.pairwise(ends):
            section = (value[begins:end].transpose(0, 1) for value in (q, k, v))
            parts.append(scaled_dot_product_attention(*section).transpose(0, 1))
        return torch.cat(parts)

    attenion.flash_attn_varlen_func = varlen
    attenion.get_cu_seqlens = None
    from hyvideo.modules import models

    def sections(mask: torch.Tensor, count: int) -> torch.Tensor:
        """Each sample's video and text, then its padding."""
        longest = mask.shape[1]
        bounds = [0]
        for index, own in enumerate(mask.sum(dim=1).tolist()):
            bounds += [index * (count + longest) + count + own, (index + 1) * (count + longest)]
        return torch.tensor(bounds)

    models.get_cu_seqlens = sections
    return models.HYVideoDiffusionTransformer(
        SimpleNamespace(text_states_dim=WIDTH, text_states_dim_2=12),
        in_channels=4,
        hidden_size=32,
        heads_num=2,
        mm_double_blocks_depth=2,
        mm_single_blocks_depth=2,
        rope_dim_list=[4, 6, 6],
    )


def hunyuan_batch(size: int) -> tuple[torch.Tensor, Condition]:
    return torch.randn(size, 4, 2, 8, 8), {
        "text_states": torch.randn(size, TEXT, WIDTH),
        "text_mask": torch.ones(size, TEXT, dtype=torch.long),
        "text_states_2": torch.randn(size, 12),
        "freqs_cos": torch.randn(32, 16),
        "freqs_sin": torch.randn(32, 16),
    }


def run_hunyuan(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, 1000 * t, return_dict=False, **condition)


def build_wan() -> nn.Module:
    stand_in("flash_attn", "flash_attn_interface")
    without_init("wan")
    without_init("wan.modules")
    from wan.modules import model

    def attention(q: Any, k: Any, v: Any, k_lens: Any = None, **others: Any) -> Any:
        """What flash attention gives: nobody attends to keys behind a sample's own."""
        mask = None
        if k_lens is not None:
            mask = (torch.arange(k.shape[1]) < k_lens[:, None])[:, None, None, :]
        q, k, v = (value.transpose(1, 2) for value in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    model.flash_attention = attention
    return model.WanModel(
        text_len=TEXT,
        in_dim=4,
        dim=32,
        ffn_dim=48,
        freq_dim=16,
        text_dim=WIDTH,
        out_dim=4,
        num_heads=2,
        num_layers=4,
    )


def run_wan(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    """Lists of samples and texts; sequences are filled up to 40 tokens."""
    return model(list(x), 1000 * t, list(condition["texts"]), 40)


WAN = Repository("Wan-Video/Wan2.1", "9737cba9c1c3c4d04b33fcad41c111989865d315")
HUNYUAN = Repository("Tencent/HunyuanVideo", "fa14b001c18f37191c938a9ef6baad3b9b472759")
TWO = ("double_blocks.0", "single_blocks.0")

ENTRIES = [
    Entry(
        "Flux",
        build_flux,
        flux_batch,
        24,
        TWO,
        pick=part_or(0, last(24)),
        run=run_flux,
        repository=FLUX,
        answers={"blocks": ["double_blocks", "single_blocks"]},
        note="image and text side by side, then text before image",
    ),
    # Spatial and temporal blocks in turn: the even ones' tokens are of one frame each
    Entry(
        "Latte, two spatial blocks",
        build_latte,
        lambda size: (torch.randn(size, 2, 4, 8, 8), {"y": torch.randint(0, 10, (size,))}),
        32,
        ("blocks.0", "blocks.2"),
        noise=DDPM,
        repository=LATTE,
        dropped=("y_embedder.embedding_table",),
        note="one frame's tokens in each sequence",
    ),
    Entry(
        "Latte, a spatial and a temporal block",
        build_latte,
        lambda size: (torch.randn(size, 2, 4, 8, 8), {"y": torch.randint(0, 10, (size,))}),
        32,
        ("blocks.0", "blocks.1"),
        (1, 2),
        noise=DDPM,
        repository=LATTE,
        dropped=("y_embedder.embedding_table",),
        note="a temporal block's tokens stand in another order: other layers",
    ),
    Entry(
        "PixArt-alpha",
        build_pixart,
        lambda size: (torch.randn(size, 4, 8, 8), {"y": torch.randn(size, 1, TEXT, WIDTH)}),
        16,
        ("blocks.0", "blocks.2"),
        noise=DDPM,
        repository=PIXART,
        note="its own dropping of texts wants CUDA: off",
    ),
    Entry(
        "SD3.5's MMDiTX",
        build_sd3,
        lambda size: (
            torch.randn(size, 4, 8, 8),
            {"y": torch.randn(size, 12), "context": torch.randn(size, TEXT, WIDTH)},
        ),
        16,
        ("joint_blocks.0", "joint_blocks.1"),
        (1, 2),
        part(1),
        run_sd3,
        LINEAR,
        SD3,
        note="text and image side by side",
    ),
    Entry(
        "HunyuanVideo",
        build_hunyuan,
        hunyuan_batch,
        32,
        TWO,
        pick=part_or(0, begin(32)),
        run=run_hunyuan,
        repository=HUNYUAN,
        answers={"blocks": ["double_blocks", "single_blocks"]},
        note="video and text side by side, then video before text",
    ),
    Entry(
        "Wan2.1",
        build_wan,
        lambda size: (torch.randn(size, 4, 2, 8, 8), {"texts": torch.randn(size, TEXT, WIDTH)}),
        32,
        ("blocks.0", "blocks.2"),
        pick=begin(32),
        run=run_wan,
        repository=WAN,
        note="lists in; the sample before padding",
    ),
    Entry(
        "Latte, two temporal blocks",
        build_latte,
        lambda size: (torch.randn(size, 2, 4, 8, 8), {"y": torch.randint(0, 10, (size,))}),
        32,
        ("blocks.1", "blocks.3"),
        (2, 4),
        noise=DDPM,
        repository=LATTE,
        dropped=("y_embedder.embedding_table",),
        note="one place's tokens in each sequence",
    ),
]
