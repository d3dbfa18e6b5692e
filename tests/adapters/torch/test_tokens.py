"""The tokens [B, N, D] in what a tapped block returned: tuples, grids, text beside the sample."""

import pytest
import torch
from diffusers_models import FAMILIES
from dit_models import DiT, PairBlock, seen
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment

SRA = selfalign.SRALoss(student_layer=2, teacher_layer=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"must be the sample's. Received: blocks.1: tuple of \(shape \(4, 5, 16\), shape "
            r"\(4, 1, 16\)\); 2 parts of it depend on the sample. Pass select=, .* such as "
            r"select=lambda output: output\[0\].",
        ),
        (
            {"select": lambda output: output},
            r"must give tokens \[B, N, D\], or features .* Received: blocks.1: tuple of",
        ),
        (
            {"select": lambda output: output[0].flatten(1)},
            r"must give tokens \[B, N, D\], or features .* Received: blocks.1: shape \(4, 80\)",
        ),
    ],
    ids=["two streams", "a tuple", "two axes"],
)
def test_outputs_that_are_not_tokens(batch, options, message):
    model = DiT(depth=4, block=PairBlock)
    align = SelfAlignment(model, SRA, **options)
    model(*seen(batch))
    with pytest.raises(ValueError, match=message):
        align(*batch)


# Grids


class Video(nn.Module):
    """Features [B, D, T, H, W]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x, t):
        for layer in self.layers:
            x = x + layer(x) * t.view(-1, 1, 1, 1, 1)
        return x


class ChannelsLast(nn.Module):
    """Features [B, H, W, 6]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, t):
        for layer in self.layers:
            x = x + layer(x)
        return x


def grid(*shape):
    return torch.randn(2, *shape), torch.randn(2, *shape), torch.rand(2)


def test_features_in_space_and_time():
    x0, noise, t = grid(4, 3, 5, 5)
    align = SelfAlignment(Video(), SRA, width=4)
    align.model(align.path.add_noise(x0, noise, t), t)
    align(x0, noise, t, loss_mask=torch.ones(2, 75)).backward()
    assert align.model.layers[0].weight.grad.any()
    assert align.model.layers[2].weight.grad is None


@pytest.mark.parametrize("recorded", [False, True])
def test_features_with_the_width_last(recorded):
    x0, noise, t = grid(4, 4, 6)
    align = SelfAlignment(ChannelsLast(), SRA)
    if recorded:
        with align.recording():
            align.model(x0, t)
    align.model(align.path.add_noise(x0, noise, t), t)
    align(x0, noise, t, loss_mask=torch.ones(2, 16)).backward()
    assert align.projector.hidden_kernel.shape == (6, 12)


def test_features_with_two_axes_of_the_width():
    x0, noise, t = grid(6, 6, 6)
    align = SelfAlignment(ChannelsLast(), SRA)
    align.model(align.path.add_noise(x0, noise, t), t)
    message = r"Received: layers.1: shape \(2, 6, 6, 6\); no axis of it is the features' alone"
    with pytest.raises(ValueError, match=message):
        align(x0, noise, t)


def unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def test_features_on_a_grid_of_a_unet_of_diffusers():
    model = unet()
    x0, noise, _ = grid(3, 8, 8)
    t = torch.randint(0, 1000, (2,))
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, path="discrete")
    taps = ("down_blocks.0.resnets.1", "up_blocks.1.resnets.0")
    align = SelfAlignment(model, loss, taps=taps)
    with align.recording():
        model(x0, t)
    assert next(iter(align.projector.parameters())).shape[0] == 16
    model(align.path.add_noise(x0, noise, t), t)
    align(x0, noise, t).backward()
    assert model.conv_in.weight.grad.any()
    align.detach()
    align = SelfAlignment(model, loss, taps=("down_blocks.0", "mid_block"), width=16)
    model(align.path.add_noise(x0, noise, t), t)
    message = (
        r"must be the sample's. Received: down_blocks.0: tuple of .*; 4 parts of it depend on the "
        r"sample. Pass select="
    )
    with pytest.raises(ValueError, match=message):
        align(x0, noise, t)


# Text beside the sample


def call_lumina(model, path, x0, noise, t, condition):
    x_t = path.add_noise(x0, noise, t)
    model(hidden_states=x_t, timestep=1 - t, return_dict=False, **condition)


def test_ragged_text_in_front_of_lumina2s_tokens(spied):
    """Each sample's tokens follow its own text at once, and padding comes last."""
    family = FAMILIES["Lumina2Transformer2DModel"]
    model = family.build()
    x0, condition = family.batch(2)
    condition["encoder_attention_mask"][1, 4:] = False
    loss, pairs = spied(1, 2)
    align = SelfAlignment(model, loss)
    outputs = []
    model.layers[0].register_forward_hook(lambda m, args, out: outputs.append(out))
    noise = torch.randn_like(x0)
    t = torch.rand(2)
    call_lumina(model, align.path, x0, noise, t, condition)
    align(x0, noise, t)
    ((student, target),) = pairs
    assert torch.equal(student[0], outputs[0][0, 7:23])
    assert torch.equal(student[1], outputs[0][1, 4:20])
    assert target.shape == student.shape


def test_ragged_text_after_a_batch_of_equally_long_ones(spied):
    """That the mask tells where the tokens begin is found out before it differs."""
    family = FAMILIES["Lumina2Transformer2DModel"]
    model = family.build()
    x0, condition = family.batch(2)
    loss, pairs = spied(1, 2)
    align = SelfAlignment(model, loss)
    outputs = []
    model.layers[0].register_forward_hook(lambda m, args, out: outputs.append(out))
    noise = torch.randn_like(x0)
    t = torch.rand(2)
    for length in (7, 4):
        condition["encoder_attention_mask"][1, length:] = False
        outputs.clear()
        call_lumina(model, align.path, x0, noise, t, condition)
        align(x0, noise, t)
        student, _ = pairs[-1]
        assert torch.equal(student[0], outputs[0][0, 7:23])
        assert torch.equal(student[1], outputs[0][1, length : length + 16])


def test_a_block_before_text_joins_and_one_after():
    """Lumina2's refiner has blocks of the trunk's class, before text joins."""
    family = FAMILIES["Lumina2Transformer2DModel"]
    model = family.build()
    x0, condition = family.batch(2)
    align = SelfAlignment(model, SRA, taps=("noise_refiner.0", "layers.1"))
    noise = torch.randn_like(x0)
    t = torch.rand(2)
    call_lumina(model, align.path, x0, noise, t, condition)
    align(x0, noise, t, loss_mask=torch.ones(2, 16)).backward()


def test_padding_in_pytorchs_own_encoder_layers():
    """Whose way of inference would drop padded tokens from the teacher's features."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 4)

        def forward(self, x, t, padding):
            return self.encoder(x + t[:, None, None], src_key_padding_mask=padding)

    x0 = torch.randn(4, 5, 16)
    noise = torch.randn(4, 5, 16)
    t = torch.rand(4)
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    align = SelfAlignment(Encoder(), SRA)
    align.model(align.path.add_noise(x0, noise, t), t, padding)
    assert torch.isfinite(align(x0, noise, t, loss_mask=~padding))
    assert torch.backends.mha.get_fastpath_enabled()


# What the model does to its features later


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_writing_in_place_after_the_tapped_block_changes_nothing(batch, headless, compiled):
    class InPlace(DiT):
        def forward(self, x, t, y):
            x, c = self.embed(x, t, y)
            for block in self.blocks:
                x = block(x, c)
                x += 0.5
            return self.final_layer(x)

    loss = headless(student_layer=2, teacher_layer=2, allow_same_layer=True, max_gap=0.1)
    model = InPlace(depth=3)
    align = SelfAlignment(model, loss)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    run(*seen(batch))
    # the same input, layer and weights
    assert align(*batch, u=torch.zeros(4)).item() < 1e-6
