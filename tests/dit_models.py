"""Small PyTorch transformers in the shapes that users bring, and their batches.

They are attached to as they are.
"""

from __future__ import annotations

import random
import warnings

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import selfalign


class Block(nn.Module):
    """An adaLN block: attention and MLP, modulated by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        modulated = self.norm(x) * (1 + scale) + shift
        q, k, v = self.qkv(modulated).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm(x))


class TupleBlock(Block):
    def forward(self, x, c):
        return super().forward(x, c), None


class PairBlock(Block):
    def forward(self, x, c):
        out = super().forward(x, c)
        return out, out[:, :1]


class LabelEmbedder(nn.Module):
    """Classic DiT's: drops labels itself, in training mode only."""

    def __init__(self, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        self.classes = classes
        self.dropout = dropout

    def forward(self, y: torch.Tensor, train: bool) -> torch.Tensor:
        if train and self.dropout > 0:
            y = torch.where(torch.rand(len(y)) < self.dropout, self.classes, y)
        return self.embedding_table(y)


class DiT(nn.Module):
    """Tokens in [B, N, D_in], time and label; `self.blocks` as in the papers' code."""

    def __init__(
        self,
        depth: int = 6,
        width: int = 16,
        channels: int = 4,
        label_dropout: float = 0.0,
        block: type[nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(channels, width)
        self.t_embedder = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = LabelEmbedder(10, width, label_dropout)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.final_layer = nn.Linear(width, channels)

    def embed_time(self, t: torch.Tensor) -> torch.Tensor:
        waves = torch.stack([torch.cos(t), torch.sin(t)], dim=-1)
        return self.t_embedder(waves.to(self.final_layer.weight.dtype))

    def embed_label(self, y: torch.Tensor) -> torch.Tensor:
        return self.y_embedder(y, self.training)

    def embed(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The first block's inputs: tokens and condition."""
        return self.x_embedder(x), self.embed_time(t) + self.embed_label(y)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, c = self.embed(x, t, y)
        for block in self.blocks:
            x = block(x, c)
            x = x[0] if isinstance(x, tuple) else x
        return self.final_layer(x)


class TimeTableDiT(DiT):
    """Looks time up in an nn.Embedding, as discrete tutorials do, and drops labels inside."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.time_table = nn.Embedding(1001, self.final_layer.in_features)

    def embed_time(self, t):
        return self.time_table((t * 1000).long())


class ShiftedLabelDiT(DiT):
    """The embedding never receives the caller's own tensor.

    0 is the null class, labels count from 1.
    """

    def embed_label(self, y):
        y = y + 1
        if self.training:
            y = torch.where(torch.rand(len(y)) < 0.5, 0, y)
        return self.y_embedder.embedding_table(y)


class MaskedLabelDiT(DiT):
    """Drops by zeroing the embedding: no index tells."""

    def embed_label(self, y):
        kept = (torch.rand(len(y)) > 0.1) if self.training else torch.ones(len(y))
        return self.y_embedder.embedding_table(y) * kept[:, None]


class PythonRandomDiT(DiT):
    """Drops the whole batch's condition with Python's own random numbers."""

    def embed_label(self, y):
        dropped = self.training and random.random() < 0.1
        return self.y_embedder.embedding_table(y) * (0.0 if dropped else 1.0)


class UnknownWidth(DiT):
    """Its blocks' layers do not tell the width of their tokens."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        for block in self.blocks:
            block.norm = nn.Identity()


def build_diffusers_dit() -> nn.Module:
    """diffusers' own DiT with random weights; six blocks of width 32, 16 tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers' own imports
        from diffusers import DiTTransformer2DModel
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def make_batch(size: int = 4, tokens: int = 5, channels: int = 4) -> tuple[torch.Tensor, ...]:
    """x0, noise, t, y for the models above."""
    x0 = torch.randn(size, tokens, channels)
    return x0, torch.randn_like(x0), torch.rand(size), torch.randint(0, 10, (size,))


def seen(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What the student is called with for a batch (x0, noise, t, *condition): the linear path."""
    x0, noise, t, *condition = batch
    return selfalign.paths.Linear().add_noise(x0, noise, t), t, *condition


def stream(model: DiT, layer: int, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """By hand: the tokens after block `layer`, counted from 1, for the student's input."""
    x, c = model.embed(*seen(batch))
    for block in model.blocks[:layer]:
        x = block(x, c)
    return x


def flops(run) -> int:
    """The FLOPs that torch counts while `run` runs."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def take_first_step(align, batch: tuple[torch.Tensor, ...], **options) -> None:
    """A step of the student and its term: the first steps look at more than later ones."""
    align.model(*seen(batch))
    align(*batch, **options)


def hooks_on(model: nn.Module) -> int:
    """How many hooks there are on a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
