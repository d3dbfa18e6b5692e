"""Public models of images by label."""

from __future__ import annotations

from typing import Any

import torch
from entry import Condition, Entry, Repository
from noise import DDPM, REVERSED
from repositories import stand_in
from telling import last
from torch import nn

LABEL = ("y_embedder.embedding_table",)
BLOCKS = ("blocks.0", "blocks.2")
SMALL = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 10}


def labelled(size: int) -> tuple[torch.Tensor, Condition]:
    return torch.randn(size, 4, 8, 8), {"y": torch.randint(0, 10, (size,))}


def build_dit() -> nn.Module:
    from models import DiT

    return DiT(class_dropout_prob=0.5, **SMALL)


DIT = Repository("facebookresearch/DiT", "ed81ce2229091fd4ecc9a223645f95cf379d582b")
SIT = Repository("willisma/SiT", "947f95bd3a510e9af441d38c1e9f72e0eee873c5")


def build_sit() -> nn.Module:
    from models import SiT

    return SiT(class_dropout_prob=0.5, **SMALL)


def build_repa() -> nn.Module:
    from models.sit import SiT

    options = SMALL | {"decoder_hidden_size": 32, "encoder_depth": 2, "z_dims": [24]}
    return SiT(class_dropout_prob=0.5, qk_norm=False, fused_attn=True, **options)


REPA = Repository("sihyun-yu/REPA", "67f714503e3892f993844aab088ffc5791c92613")


def build_sra() -> nn.Module:
    from models.sit import SiT

    return SiT(class_dropout_prob=0.5, decoder_hidden_size=32, qk_norm=False, **SMALL)


def with_depth(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, t, ad=2, **condition)


SRA = Repository("vvvvvjdy/SRA", "1723f85069408f6df7d11db35549575c97bfa5b2", ("SiT-SRA",))


def build_lightning() -> nn.Module:
    stand_in("fairscale")
    from models.lightningdit import LightningDiT

    options = {"use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
    return LightningDiT(in_channels=4, class_dropout_prob=0.5, wo_shift=False, **SMALL, **options)


LIGHTNING = Repository("hustvl/LightningDiT", "2725fed42a14898744433809949834e26957bcdd")


def build_minrf() -> nn.Module:
    from dit import DiT_Llama

    return DiT_Llama(
        in_channels=4, input_size=8, dim=64, n_layers=4, n_heads=2, class_dropout_prob=0
    )


MINRF = Repository("cloneofsimo/minRF", "4fc10e0cc8ba976152c7936a1af9717209f03e18")


def build_tread() -> nn.Module:
    from dit import DiT

    routes = [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}]
    return DiT(enable_routing=True, routes=routes, **SMALL)


def with_dropping(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, t, class_drop_prob=0.5, **condition)


TREAD = Repository("CompVis/tread", "fccf77cc735ae2850162e12e4ed360cbc9a13e68")


def build_mdt() -> nn.Module:
    from masked_diffusion.models import MDTv2

    return MDTv2(class_dropout_prob=0.5, mask_ratio=0.3, decode_layer=2, **SMALL | {"depth": 6})


def masked(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, t, enable_mask=True, **condition)


MDT = Repository("sail-sg/MDT", "7d26c2162c462bd0b90f97f3a1c36cdaaac616ec")


def build_maskdit() -> nn.Module:
    from models.maskdit import DiT

    options = SMALL | {"class_dropout_prob": 0}
    return DiT(use_decoder=True, mae_loss_coef=0.1, pad_cls_token=True, **options)


def half_masked(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, t, mask_ratio=0.5, **condition)["x"]


def unmasked(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, t, **condition)["x"]


def one_hot(size: int) -> tuple[torch.Tensor, Condition]:
    x0, condition = labelled(size)
    return x0, {"y": nn.functional.one_hot(condition["y"], 10).float()}


MASKDIT = Repository("Anima-Lab/MaskDiT", "73cfb96ca9c6d1d78ab567ffeea099f96692a6e4")


def build_uvit() -> nn.Module:
    from libs.uvit import UViT

    return UViT(8, 2, 4, 32, depth=4, num_heads=2, mlp_time_embed=False, num_classes=10)


UVIT = Repository("baofff/U-ViT", "ce551708dc9cde9818d2af7d84dfadfeb7bd9034")


def build_uvit_t2i() -> nn.Module:
    from libs.uvit_t2i import UViT

    return UViT(8, 2, 4, 32, depth=4, num_heads=2, clip_dim=24, num_clip_token=7)


def build_meanflow() -> nn.Module:
    from sit import SiT

    return SiT(class_dropout_prob=0.5, decoder_hidden_size=32, qk_norm=False, **SMALL)


def mean_flow(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    rest = dict(condition)
    r = t * rest.pop("fraction")
    return model(x, r, t, **rest)


MEANFLOW = Repository("zhuyu-cs/MeanFlow", "04d183c02b14973407e3c47215ef4dab2272b576")


def build_ddt() -> nn.Module:
    from src.models.denoiser.decoupled_improved_dit import DDT

    return DDT(num_groups=2, hidden_size=32, num_blocks=5, num_encoder_blocks=3, num_classes=10)


DDT = Repository("MCG-NJU/DDT", "1d1b4d291325939dd98f6b91687af95c98c34d5c")


def build_moe() -> nn.Module:
    stand_in("flash_attn")
    from models import DiT

    return DiT(class_dropout_prob=0.5, num_experts=2, num_experts_per_tok=1, **SMALL)


MOE = Repository("feizc/DiT-MoE", "bd34bbb2945280f0ccc2b1221f7dc8e3d6cce65d")

ENTRIES = [
    Entry(
        "DiT",
        build_dit,
        labelled,
        16,
        BLOCKS,
        noise=DDPM,
        repository=DIT,
        dropped=LABEL,
        note="labels are dropped inside",
    ),
    Entry(
        "SiT",
        build_sit,
        labelled,
        16,
        BLOCKS,
        noise=REVERSED,
        repository=SIT,
        dropped=LABEL,
        note="labels are dropped inside; noise at time 0",
    ),
    Entry(
        "REPA's SiT",
        build_repa,
        labelled,
        16,
        BLOCKS,
        repository=REPA,
        dropped=LABEL,
        note="labels are dropped inside; returns features, too",
    ),
    Entry(
        "SRA's SiT",
        build_sra,
        labelled,
        16,
        BLOCKS,
        run=with_depth,
        repository=SRA,
        dropped=LABEL,
        note="the authors' own, with a head of theirs; labels are dropped inside",
    ),
    Entry(
        "LightningDiT",
        build_lightning,
        labelled,
        16,
        BLOCKS,
        noise=REVERSED,
        repository=LIGHTNING,
        dropped=LABEL,
        note="labels are dropped inside; noise at time 0",
    ),
    Entry(
        "minRF's DiT_Llama",
        build_minrf,
        labelled,
        16,
        ("layers.0", "layers.2"),
        repository=MINRF,
        note="its own label dropping wants CUDA: off",
    ),
    Entry(
        "TREAD's DiT, before the route",
        build_tread,
        labelled,
        16,
        ("blocks.0", "blocks.3"),
        (1, 4),
        run=with_dropping,
        repository=TREAD,
        dropped=LABEL,
    ),
    Entry(
        "TREAD's DiT, inside the route",
        build_tread,
        labelled,
        16,
        ("blocks.1", "blocks.3"),
        (2, 4),
        run=with_dropping,
        repository=TREAD,
        dropped=LABEL,
        refused="the student's block sees half of the tokens, drawn at random",
    ),
    Entry(
        "MDTv2, its forward without mask",
        build_mdt,
        labelled,
        16,
        ("en_inblocks.0", "en_outblocks.0"),
        noise=DDPM,
        repository=MDT,
        dropped=LABEL,
        answers={"blocks": ["en_inblocks", "en_outblocks", "de_blocks"]},
        note="three lists; labels are dropped inside",
    ),
    Entry(
        "MDTv2, its forward with mask",
        build_mdt,
        labelled,
        16,
        ("en_inblocks.0", "en_outblocks.0"),
        run=masked,
        noise=DDPM,
        repository=MDT,
        dropped=LABEL,
        answers={"blocks": ["en_inblocks", "en_outblocks", "de_blocks"]},
        refused="its encoder sees random tokens, others on each side",
    ),
    Entry(
        "MaskDiT, with a mask",
        build_maskdit,
        one_hot,
        16,
        ("blocks.0", "blocks.2"),
        run=half_masked,
        repository=MASKDIT,
        answers={"blocks": "blocks"},
        refused="its encoder sees a random half of the tokens in training",
    ),
    Entry(
        "MaskDiT, without",
        build_maskdit,
        one_hot,
        16,
        ("blocks.0", "blocks.2"),
        pick=last(16),
        run=unmasked,
        repository=MASKDIT,
        answers={"blocks": "blocks"},
        note="a class token before the sample",
    ),
    Entry(
        "U-ViT",
        build_uvit,
        labelled,
        16,
        ("in_blocks.0", "out_blocks.0"),
        pick=last(16),
        noise=DDPM,
        repository=UVIT,
        answers={"blocks": ["in_blocks", "out_blocks"]},
        note="label and time before the sample; skips",
    ),
    Entry(
        "U-ViT with text",
        build_uvit_t2i,
        lambda size: (torch.randn(size, 4, 8, 8), {"context": torch.randn(size, 7, 24)}),
        16,
        ("in_blocks.0", "out_blocks.0"),
        pick=last(16),
        noise=DDPM,
        repository=UVIT,
        answers={"blocks": ["in_blocks", "out_blocks"]},
        note="time and text before the sample; skips",
    ),
    Entry(
        "MeanFlow's SiT",
        build_meanflow,
        lambda size: (
            torch.randn(size, 4, 8, 8),
            {"y": torch.randint(0, 10, (size,)), "fraction": torch.rand(size)},
        ),
        16,
        BLOCKS,
        run=mean_flow,
        repository=MEANFLOW,
        dropped=LABEL,
        note="two times",
    ),
    Entry(
        "DDT",
        build_ddt,
        labelled,
        16,
        BLOCKS,
        noise=REVERSED,
        repository=DDT,
        note="the encoder's features steer a decoder that starts from the sample again",
    ),
    Entry(
        "DiT-MoE",
        build_moe,
        labelled,
        16,
        BLOCKS,
        repository=MOE,
        dropped=LABEL,
        note="experts; labels are dropped inside",
    ),
]
