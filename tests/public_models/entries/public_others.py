"""Public models of sound, motion, actions, points and voxels, and of other forms."""

from __future__ import annotations

import os
from typing import Any

import torch
from entry import Condition, Entry, Repository
from noise import DDPM, EDM, REVERSED
from repositories import stand_in, without_init
from telling import TEXT, WIDTH, last, part
from torch import nn


def build_mdm(dropping: float = 0.5) -> nn.Module:
    stand_in("clip", "smplx")
    without_init("model")
    stand_in("model.rotation2xyz", "model.BERT")
    import model.rotation2xyz as rotations

    class Rotation2xyz:
        """Of a body model, whose files are not public; it plays no part in the forward."""

        def __init__(self, **options: Any) -> None:
            self.smpl_model = nn.Identity()

    rotations.Rotation2xyz = Rotation2xyz
    from model.mdm import MDM

    return MDM(
        "mdm",
        5,
        3,
        4,
        True,
        "rot6d",
        True,
        True,
        latent_dim=32,
        ff_size=48,
        num_layers=4,
        num_heads=2,
        data_rep="hml_vec",
        cond_mode="action",
        cond_mask_prob=dropping,
    )


MDM = Repository("GuyTevet/motion-diffusion-model", "d4fd88c86d9210b85323783a73acb9b794d73e44")


def motion_batch(size: int) -> tuple[torch.Tensor, Condition]:
    actions = torch.randint(0, 4, (size, 1))
    return torch.randn(size, 5, 3, 12), {
        "y": {"action": actions, "mask": torch.ones(size, 1, 1, 1)}
    }


def run_mdm(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, t, **condition)


def build_policy(time_as_cond: bool) -> nn.Module:
    without_init("diffusion_policy")
    from diffusion_policy.model.diffusion.transformer_for_diffusion import TransformerForDiffusion

    cond = 6 if time_as_cond else 0
    return TransformerForDiffusion(
        5, 5, 8, 2, cond, n_layer=4, n_head=2, n_emb=32, time_as_cond=time_as_cond
    )


POLICY = Repository("real-stanford/diffusion_policy", "5ba07ac6661db573af695b419a7947ecb704690f")


def build_rdt() -> nn.Module:
    without_init("models")
    from models.rdt.model import RDT

    return RDT(
        output_dim=6,
        horizon=8,
        hidden_size=32,
        depth=4,
        num_heads=2,
        max_lang_cond_len=TEXT,
        img_cond_len=5,
        dtype=torch.float32,
    )


def rdt_batch(size: int) -> tuple[torch.Tensor, Condition]:
    return torch.randn(size, 8, 32), {
        "state": torch.randn(size, 1, 32),
        "freq": torch.rand(size),
        "lang_c": torch.randn(size, TEXT, 32),
        "img_c": torch.randn(size, 5, 32),
    }


def run_rdt(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    """The robot's state stands before its noised actions."""
    rest = dict(condition)
    joined = torch.cat([rest.pop("state"), x], dim=1)
    return model(joined, rest.pop("freq"), t, **rest)


RDT = Repository("thu-ml/RoboticsDiffusionTransformer", "deb71d82278780d83253a28d9b904085559be400")


def build_points() -> nn.Module:
    stand_in("clip")
    from point_e.models.transformer import PointDiffusionTransformer

    return PointDiffusionTransformer(
        device=torch.device("cpu"),
        dtype=torch.float32,
        n_ctx=20,
        width=32,
        layers=4,
        heads=2,
        time_token_cond=True,
    )


POINTS = Repository("openai/point-e", "fc8a607c08a3ea804cc82bf1ef8628f88a3a5d2f")


def build_trellis() -> nn.Module:
    os.environ["ATTN_BACKEND"] = "sdpa"
    without_init("trellis")
    without_init("trellis.models")
    without_init("trellis.modules")
    from trellis.models.sparse_structure_flow import SparseStructureFlowModel

    return SparseStructureFlowModel(4, 4, 32, WIDTH, 4, 4, num_heads=2, patch_size=2)


def in_thousands(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, 1000 * t, **condition)


TRELLIS = Repository("microsoft/TRELLIS", "6b0d64751ad54d9c32d7b05fec482eb29178f56f")


def build_audio() -> nn.Module:
    without_init("mmaudio")
    without_init("mmaudio.model")
    without_init("mmaudio.ext")
    from mmaudio.model.networks import MMAudio

    return MMAudio(
        latent_dim=4,
        clip_dim=10,
        sync_dim=12,
        text_dim=WIDTH,
        hidden_dim=32,
        depth=4,
        fused_depth=2,
        num_heads=2,
        latent_seq_len=20,
        clip_seq_len=6,
        sync_seq_len=16,
        text_seq_len=TEXT,
    )


def audio_batch(size: int) -> tuple[torch.Tensor, Condition]:
    return torch.randn(size, 20, 4), {
        "clip_f": torch.randn(size, 6, 10),
        "sync_f": torch.randn(size, 16, 12),
        "text_f": torch.randn(size, TEXT, WIDTH),
    }


def run_audio(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, t=t, **condition)


MMAUDIO = Repository("hkchengrex/MMAudio", "974010a026c731054592d8f777218bd9d85a6c24")


def build_stable_audio() -> nn.Module:
    without_init("stable_audio_tools")
    without_init("stable_audio_tools.models")
    from stable_audio_tools.models.dit import DiffusionTransformer

    return DiffusionTransformer(
        io_channels=4,
        embed_dim=64,
        cond_token_dim=WIDTH,
        global_cond_dim=12,
        depth=4,
        num_heads=2,
        diffusion_objective="rectified_flow",
    )


def stable_batch(size: int) -> tuple[torch.Tensor, Condition]:
    return torch.randn(size, 4, 20), {
        "cross_attn_cond": torch.randn(size, TEXT, WIDTH),
        "global_embed": torch.randn(size, 12),
    }


STABLE = Repository("Stability-AI/stable-audio-tools", "50049e379e2fe8e35bffc99e57f23ade1c3471b7")


def prepare_speech() -> None:
    stand_in("torchaudio", "librosa", "flash_attn", "rjieba", "jieba", "pypinyin")
    without_init("f5_tts")
    without_init("f5_tts.model")


def build_f5() -> nn.Module:
    prepare_speech()
    from f5_tts.model.backbones.dit import DiT

    return DiT(dim=32, depth=4, heads=2, dim_head=16, mel_dim=8, text_num_embeds=20)


def build_f5_mmdit() -> nn.Module:
    prepare_speech()
    from f5_tts.model.backbones.mmdit import MMDiT

    return MMDiT(dim=32, depth=4, heads=2, dim_head=16, mel_dim=8, text_num_embeds=20)


def build_e2() -> nn.Module:
    prepare_speech()
    from f5_tts.model.backbones.unett import UNetT

    return UNetT(dim=32, depth=4, heads=2, dim_head=16, mel_dim=8, text_num_embeds=20)


def speech_batch(size: int) -> tuple[torch.Tensor, Condition]:
    return torch.randn(size, 20, 8), {
        "cond": torch.randn(size, 20, 8),
        "text": torch.randint(0, 20, (size, TEXT)),
    }


def run_speech(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x=x, time=t, drop_audio_cond=False, drop_text=False, **condition)


F5 = Repository("SWivid/F5-TTS", "2ae2c9bd9b64dab2cb069c4b97e5e7673c521e01", ("src",))


def build_edm2() -> nn.Module:
    from training.networks_edm2 import Precond

    return Precond(
        8,
        4,
        10,
        use_fp16=False,
        model_channels=32,
        channel_mult=[1],
        num_blocks=2,
        attn_resolutions=[8],
        channels_per_head=16,
    )


def grid(output: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Features [B, D, H, W]."""
    return output.flatten(2).transpose(1, 2)


def run_edm2(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, t.reshape(-1, 1, 1, 1), **condition)


EDM2 = Repository("NVlabs/edm2", "4bf8162f601bcc09472ce8a32dd0cbe8889dc8fc")
EDM2_TAPS = ("unet.dec.8x8_in0", "unet.dec.8x8_block0")


def build_k() -> nn.Module:
    os.environ["K_DIFFUSION_USE_COMPILE"] = "0"
    stand_in("dctorch", "k_diffusion.sampling", "k_diffusion.utils")
    without_init("k_diffusion")
    without_init("k_diffusion.models")
    from k_diffusion.models.image_transformer_v1 import ImageTransformerDenoiserModelV1

    return ImageTransformerDenoiserModelV1(4, 64, 96, 4, 4, (2, 2), num_classes=10)


K = Repository("crowsonkb/k-diffusion", "4601bf085320592473f681a62808ed873d17fad5")


def build_lucid_fit() -> nn.Module:
    without_init("rectified_flow_pytorch")
    from rectified_flow_pytorch.fit import FiT

    return FiT(dim=32, patch_size=2, channels=4, depth=3, heads=2, dim_head=16)


def run_lucid(model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> Any:
    return model(x, times=t)


LUCID = Repository("lucidrains/rectified-flow-pytorch", "26fbed9429771539726664f288e064fd93ca065f")


def build_lucid_uvit() -> nn.Module:
    without_init("denoising_diffusion_pytorch")
    from denoising_diffusion_pytorch.simple_diffusion import UViT

    return UViT(32, dim_mults=(1,), channels=4, vit_depth=3, attn_heads=2, attn_dim_head=16)


LUCID_DDPM = Repository(
    "lucidrains/denoising-diffusion-pytorch", "faed4db28e724735323fa91c70aa9b28a6e1cbac"
)


def nothing(size: int) -> tuple[torch.Tensor, Condition]:
    return torch.randn(size, 4, 8, 8), {}


def cuboid(size: int) -> tuple[torch.Tensor, Condition]:
    return torch.randn(size, 4, 4, 4, 4), {"cond": torch.randn(size, TEXT, WIDTH)}


def one_hot(size: int) -> tuple[torch.Tensor, Condition]:
    labels = nn.functional.one_hot(torch.randint(0, 10, (size,)), 10)
    return torch.randn(size, 4, 8, 8), {"class_labels": labels.float()}


ENTRIES = [
    # Blocks return [N, B, D]: the action's and time's token, then the frames
    Entry(
        "MDM",
        build_mdm,
        motion_batch,
        12,
        ("seqTransEncoder.layers.0", "seqTransEncoder.layers.2"),
        pick=lambda output, condition: output[1:].transpose(0, 1),
        run=run_mdm,
        noise=DDPM,
        repository=MDM,
        answers={"without dropping": lambda: build_mdm(0.0)},
        note="[N, B, D], the condition before the frames",
    ),
    Entry(
        "Diffusion policy, time as a token",
        lambda: build_policy(False),
        lambda size: (torch.randn(size, 8, 5), {}),
        8,
        ("encoder.layers.0", "encoder.layers.2"),
        pick=last(8),
        noise=DDPM,
        repository=POLICY,
        note="the time before the actions",
    ),
    Entry(
        "Diffusion policy, time in the memory",
        lambda: build_policy(True),
        lambda size: (torch.randn(size, 8, 5), {"cond": torch.randn(size, 2, 6)}),
        8,
        ("decoder.layers.0", "decoder.layers.2"),
        noise=DDPM,
        repository=POLICY,
        answers={"blocks": "decoder.layers"},
        note="nn.TransformerDecoder",
    ),
    Entry(
        "RDT",
        build_rdt,
        rdt_batch,
        8,
        ("blocks.0", "blocks.2"),
        pick=last(8),
        run=run_rdt,
        noise=DDPM,
        repository=RDT,
        note="time, frequency and state before the actions; the state stands in the call",
    ),
    Entry(
        "Point-E",
        build_points,
        lambda size: (torch.randn(size, 3, 20), {}),
        20,
        ("backbone.resblocks.0", "backbone.resblocks.2"),
        pick=last(20),
        noise=DDPM,
        repository=POINTS,
        note="the time before the points; [B, C, N] in",
    ),
    Entry(
        "TRELLIS's structure flow",
        build_trellis,
        cuboid,
        8,
        ("blocks.0", "blocks.2"),
        run=in_thousands,
        repository=TRELLIS,
        note="voxels",
    ),
    # Three streams, of sound, pictures and text; then the sound alone
    Entry(
        "MMAudio",
        build_audio,
        audio_batch,
        20,
        ("joint_blocks.0", "fused_blocks.0"),
        pick=lambda output, condition: output[0] if isinstance(output, tuple) else output,
        run=run_audio,
        noise=REVERSED,
        repository=MMAUDIO,
        answers={"blocks": ["joint_blocks", "fused_blocks"]},
        note="three streams, then the sound alone",
    ),
    Entry(
        "Stable Audio's DiT",
        build_stable_audio,
        stable_batch,
        20,
        ("transformer.layers.0", "transformer.layers.2"),
        pick=last(20),
        repository=STABLE,
        note="time and length before the sample; checkpointed by itself",
    ),
    Entry(
        "F5-TTS",
        build_f5,
        speech_batch,
        20,
        ("transformer_blocks.0", "transformer_blocks.2"),
        run=run_speech,
        noise=REVERSED,
        repository=F5,
        note="the sound to go on from has the sample's shape",
    ),
    Entry(
        "F5-TTS's MMDiT",
        build_f5_mmdit,
        speech_batch,
        20,
        ("transformer_blocks.0", "transformer_blocks.2"),
        pick=part(1),
        run=run_speech,
        noise=REVERSED,
        repository=F5,
        note="text and sound side by side",
    ),
    # Lists of lists: what runs are their modules; a token for the time stands in front
    Entry(
        "E2-TTS's UNetT",
        build_e2,
        speech_batch,
        20,
        ("layers.0.4", "layers.2.4"),
        pick=last(20),
        run=run_speech,
        noise=REVERSED,
        repository=F5,
        answers={"taps": ("layers.0.4", "layers.2.4")},
        note="lists of lists; the time before the sample",
    ),
    Entry(
        "EDM2",
        build_edm2,
        one_hot,
        64,
        EDM2_TAPS,
        pick=grid,
        run=run_edm2,
        noise=EDM,
        repository=EDM2,
        answers={"taps": EDM2_TAPS},
        note="convolutions in nn.ModuleDicts; weights normalised in the forward",
    ),
    # Blocks return [B, H, W, D]
    Entry(
        "k-diffusion's image transformer",
        build_k,
        lambda size: (
            torch.randn(size, 4, 8, 8),
            {"class_cond": torch.randint(0, 10, (size,))},
        ),
        16,
        ("blocks.0", "blocks.2"),
        pick=lambda output, condition: output.flatten(1, -2),
        noise=EDM,
        repository=K,
        answers={"blocks": "blocks"},
        note="[B, H, W, D]",
    ),
    Entry(
        "lucidrains' FiT",
        build_lucid_fit,
        nothing,
        16,
        ("transformer.layers.1.1", "transformer.layers.5.1"),
        run=run_lucid,
        noise=REVERSED,
        repository=LUCID,
        answers={"taps": ("transformer.layers.1.1", "transformer.layers.5.1")},
        note="lists of lists, of x-transformers",
    ),
    Entry(
        "lucidrains' U-ViT",
        build_lucid_uvit,
        nothing,
        16,
        ("vit.layers.0.1", "vit.layers.2.1"),
        repository=LUCID_DDPM,
        answers={"taps": ("vit.layers.0.1", "vit.layers.2.1")},
        note="lists of lists, within convolutions",
    ),
]
