"""What is aligned is the sample's, on models that keep other tokens beside it or other orders."""

import collections
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment
from selfalign.adapters.torch.reading import Changes, Undecided, find_reading

WIDTH = 16
SRA = selfalign.SRALoss(student_layer=2, teacher_layer=4)
SIZES = (3, 5, 4)  # of a batch of samples


class Block(nn.Module):
    """Attention mixes all tokens, so that after it everything depends on the sample."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        x = self.norm(tokens)
        tokens = tokens + self.attention(x, x, x, need_weights=False)[0]
        return tokens + torch.tanh(self.layer(self.norm(tokens)))


class Model(nn.Module):
    """Its blocks run on what `embed` gives: tokens [B, M, D]."""

    def __init__(self, block=Block):
        super().__init__()
        self.embed_x = nn.Linear(4, WIDTH)
        self.embed_t = nn.Linear(1, WIDTH)
        self.extra = nn.Parameter(torch.randn(2, WIDTH))
        self.blocks = nn.ModuleList(block() for _ in range(5))

    def time(self, t):
        return self.embed_t(t[:, None])[:, None]

    def beside(self, x):
        return self.extra.expand(len(x), -1, -1)

    def embed(self, x, t):
        return self.embed_x(x) + self.time(t)

    def forward(self, x, t):
        tokens = self.embed(x, t)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def aligned(self, x, t):
        """By hand: the sample's tokens after the second block."""
        return self.blocks[1](self.blocks[0](self.embed(x, t)))


class Registers(Model):
    def embed(self, x, t):
        return torch.cat([super().embed(x, t), self.beside(x)], 1)

    def aligned(self, x, t):
        return super().aligned(x, t)[:, :5]


class TimeToken(Model):
    def embed(self, x, t):
        return torch.cat([self.time(t), self.embed_x(x)], 1)

    def aligned(self, x, t):
        return super().aligned(x, t)[:, 1:]


class InTheMiddle(Model):
    def embed(self, x, t):
        tokens = super().embed(x, t)
        return torch.cat([tokens[:, :2], self.beside(x), tokens[:, 2:]], 1)

    def aligned(self, x, t):
        return super().aligned(x, t)[:, [0, 1, 4, 5, 6]]


class Padding(Model):
    def embed(self, x, t):
        return torch.cat([super().embed(x, t), torch.zeros(len(x), 3, WIDTH)], 1)

    def aligned(self, x, t):
        return super().aligned(x, t)[:, :5]


class History(Model):
    """As many tokens of the past as the sample has, in the same embedding."""

    def __init__(self):
        super().__init__()
        self.register_buffer("past", torch.randn(1, 5, 4))

    def embed(self, x, t):
        past = self.embed_x(self.past).expand(len(x), -1, -1)
        return torch.cat([past, super().embed(x, t)], 1)

    def aligned(self, x, t):
        return super().aligned(x, t)[:, 5:]


class Aux(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, tokens):
        tokens = self.block(tokens)
        return tokens, tokens.mean()


class WithAux(Model):
    def __init__(self):
        super().__init__(Aux)

    def forward(self, x, t):
        tokens = self.embed(x, t)
        for block in self.blocks:
            tokens, _ = block(tokens)
        return tokens

    def aligned(self, x, t):
        return self.blocks[1](self.blocks[0](self.embed(x, t))[0])[0]


class SequenceFirst(Model):
    """torch's own default: [N, B, D]."""

    def __init__(self):
        super().__init__()
        layers = (nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0) for _ in range(5))
        self.blocks = nn.ModuleList(layers)

    def embed(self, x, t):
        return super().embed(x, t).transpose(0, 1)

    def aligned(self, x, t):
        return super().aligned(x, t).transpose(0, 1)


class Convolution(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm = nn.GroupNorm(1, WIDTH)
        self.layer = kind(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.layer(self.norm(x)))


class ChannelsFirst(Model):
    """[B, D, L], where L may be D."""

    def __init__(self):
        super().__init__(lambda: Convolution(nn.Conv1d))

    def embed(self, x, t):
        return super().embed(x, t).transpose(1, 2)

    def aligned(self, x, t):
        return super().aligned(x, t).transpose(1, 2)


class Interleaved(Model):
    """Another token after each of the sample's."""

    def embed(self, x, t):
        tokens = super().embed(x, t)
        return torch.stack([tokens, self.extra[0].expand_as(tokens)], 2).flatten(1, 2)

    def aligned(self, x, t):
        return super().aligned(x, t)[:, ::2]


class Backwards(Model):
    def embed(self, x, t):
        return super().embed(x, t).flip(1)


class Padded(Model):
    """Samples of 5, 3 and 4 positions: what comes after them is left out at once."""

    def embed(self, x, t):
        kept = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
        return self.embed_x(x * kept[..., None]) + self.time(t)


class ZeroEmbedder(TimeToken):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.embed_x.weight)


class Skips(TimeToken):
    """As U-ViT: the second half sees the first; a list of projections stands beside the blocks."""

    def __init__(self):
        super().__init__()
        self.skips = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, x, t):
        tokens = self.embed(x, t)
        first = tokens = self.blocks[0](tokens)
        second = tokens = self.blocks[1](tokens)
        tokens = self.blocks[2](tokens)
        tokens = self.blocks[3](self.skips[0](torch.cat([tokens, second], -1)))
        return self.blocks[4](self.skips[1](torch.cat([tokens, first], -1)))


class Window(nn.Module):
    """Mixes within windows of 2 x 2, which are shifted in every second block."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, shift):
        batch, height, width, _ = x.shape
        windows = (
            torch.roll(x, (-shift, -shift), (1, 2)).unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
        )
        tokens = self.block(windows.transpose(2, 3).reshape(-1, 4, WIDTH))
        tokens = tokens.view(batch, height // 2, width // 2, 2, 2, WIDTH).transpose(2, 3)
        return torch.roll(tokens.reshape(x.shape), (shift, shift), (1, 2))


class Windows(Model):
    def __init__(self):
        super().__init__(Window)

    def run(self, x, t, blocks):
        tokens = self.embed_x(x) + self.time(t)[:, None]
        for number, block in enumerate(blocks):
            tokens = block(tokens, number % 2)
        return tokens

    def forward(self, x, t):
        return self.run(x, t, self.blocks)

    def aligned(self, x, t):
        return self.run(x, t, self.blocks[:2]).flatten(1, 2)


class Pair(collections.namedtuple("Pair", "first second")):
    """Text and picture, or picture and text."""


@dataclasses.dataclass(frozen=True)
class Parts:
    image: torch.Tensor
    text: torch.Tensor


class Guarded(collections.OrderedDict):
    """As the outputs of diffusers and transformers: one that refuses update()."""

    def update(self, *args, **kwargs):
        raise RuntimeError("no update")


def read_parts(parts, text_first):
    """Picture and text."""
    if isinstance(parts, Parts):
        return parts.image, parts.text
    if isinstance(parts, dict):
        return parts["image"], parts["text"]
    return reversed(parts) if text_first else parts


class Joint(nn.Module):
    """Text and picture of equal length, in either order, in one of many kinds of nest."""

    def __init__(self, text_first, kind):
        super().__init__()
        self.block = Block()
        self.text_first = text_first
        self.kind = kind

    def forward(self, image, text):
        tokens = self.block(torch.cat([image, text], 1))
        parts = tokens[:, : image.shape[1]], tokens[:, image.shape[1] :]
        if self.kind in (dict, Guarded):
            return self.kind(zip(("image", "text"), parts, strict=True))
        if self.kind in (Parts, Pair):
            return self.kind(*(reversed(parts) if self.text_first else parts))
        return self.kind(reversed(parts) if self.text_first else parts)


class TwoStreams(Model):
    def __init__(self, text_first, kind):
        super().__init__(lambda: Joint(text_first, kind))
        self.text_first = text_first
        self.register_buffer("text", torch.randn(1, 5, WIDTH))

    def streams(self, x, t, blocks):
        image, text = self.embed(x, t), self.text.expand(len(x), -1, -1)
        for block in blocks:
            image, text = read_parts(block(image, text), self.text_first)
        return image

    def forward(self, x, t):
        return self.streams(x, t, self.blocks)

    def aligned(self, x, t):
        return self.streams(x, t, self.blocks[:2])


CASES = {
    "registers": (Registers, SIZES),
    "a time token": (TimeToken, SIZES),
    "others in the middle": (InTheMiddle, SIZES),
    "padding": (Padding, SIZES),
    "history": (History, SIZES),
    "something beside": (WithAux, SIZES),
    "sequence first": (SequenceFirst, SIZES),
    "sequence first, N = B": (SequenceFirst, (5, 5, 4)),
    "sequence first, B = 1": (SequenceFirst, (1, 5, 4)),
    "channels first": (ChannelsFirst, (3, 10, 4)),
    "channels first, L = D": (ChannelsFirst, (3, WIDTH, 4)),
    "every second token": (Interleaved, SIZES),
    "backwards": (Backwards, SIZES),
    "padded samples": (Padded, SIZES),
    "an embedder that begins at zero": (ZeroEmbedder, SIZES),
    "skips": (Skips, SIZES),
    "shifted windows": (Windows, (3, 4, 4, 4)),
    "N = D = B": (Model, (WIDTH, WIDTH, 4)),
    "N = B": (TimeToken, (5, 5, 4)),
    "B = 1": (TimeToken, (1, 5, 4)),
} | {
    f"two streams, {'text first, ' * first}{kind.__name__}": (
        lambda first=first, kind=kind: TwoStreams(first, kind),
        SIZES,
    )
    for first, kind in (
        *((False, tuple), (True, tuple), (True, list), (True, Pair)),
        *((False, dict), (False, Guarded), (False, Parts)),
    )
}


def run(model, align, sizes, steps=2):
    """The sample's tokens by hand, and those that the head received, in the last step."""
    received = []
    align.projector.register_forward_hook(lambda m, args, out: received.append(args[0].detach()))
    for _ in range(steps):
        x0 = torch.randn(sizes)
        noise = torch.randn(sizes)
        t = torch.rand(len(x0))
        x_t = selfalign.paths.Linear().add_noise(x0, noise, t)
        model(x_t, t)
        align(x0, noise, t).backward()
    with torch.no_grad():
        return model.aligned(x_t, t), received[-1]


@pytest.mark.parametrize("case", CASES)
def test_the_samples_tokens_alone_are_aligned(case):
    make, sizes = CASES[case]
    model = make()
    expected, received = run(model, SelfAlignment(model, SRA), sizes)
    torch.testing.assert_close(received, expected)


def test_so_they_are_without_a_teacher():
    model = InTheMiddle()
    loss = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4, projector=True)
    expected, received = run(model, SelfAlignment(model, loss), SIZES)
    torch.testing.assert_close(received, expected)


def test_another_number_of_tokens_is_found_anew():
    model = Registers()
    align = SelfAlignment(model, SRA)
    for size in (5, 7, 5):
        x0, noise, t = torch.randn(3, size, 4), torch.randn(3, size, 4), torch.rand(3)
        model(align.path.add_noise(x0, noise, t), t)
        align(x0, noise, t, loss_mask=torch.ones(3, size)).backward()


def test_select_must_take_the_samples_tokens_only():
    model = TimeToken()
    align = SelfAlignment(model, SRA, select=lambda output: output)
    message = (
        r"select= must take the sample's tokens only. Received: blocks.1: 6 tokens, of which 5 "
        r"depend on the sample. Leave select= out: .* keep these: \[:, 1:6\]"
    )
    with pytest.raises(ValueError, match=message):
        run(model, align, SIZES)
    align.detach()
    align = SelfAlignment(model, SRA, select=lambda output: output[:, 1:6])
    expected, received = run(model, align, SIZES)
    torch.testing.assert_close(received, expected)


class SpaceTime(Model):
    """Blocks over positions and over frames in turn: [(B F), S, D] and [(B S), F, D]."""

    def forward(self, x, t):
        tokens = self.embed_x(x) + self.time(t)[:, None]
        for number, block in enumerate(self.blocks):
            if number % 2:
                tokens = tokens.transpose(1, 2)
            shape = tokens.shape
            tokens = block(tokens.reshape(-1, *shape[2:])).reshape(shape)
            if number % 2:
                tokens = tokens.transpose(1, 2)
        return tokens


@pytest.mark.parametrize("frames", [3, 4])
def test_blocks_over_space_and_over_time_are_not_mixed(frames):
    sizes = (2, frames, 4, 4)
    x0, noise, t = torch.randn(sizes), torch.randn(sizes), torch.rand(2)
    model = SpaceTime()

    def term(loss, **options):
        with SelfAlignment(model, loss, **options) as align:
            model(align.path.add_noise(x0, noise, t), t)
            return align(x0, noise, t, loss_mask=torch.ones(2, 4 * frames)).item()

    message = (
        r"in one order. Received: token \d+ of blocks.0, which is token \d+ of blocks.3. Tap two "
        r"blocks alike, such as taps=\('blocks.0', 'blocks.(2|4)'\), in place of"
    )
    mixed = selfalign.SRALoss(student_layer=1, teacher_layer=4)
    with pytest.raises(ValueError, match=message) as caught:
        term(mixed)
    advised = str(caught.value).split("taps=")[1].split(", in place")[0]
    assert term(mixed, taps=eval(advised)) > 0
    assert term(SRA) > 0  # two blocks over time


class Refined(Model):
    """A refiner of the text, of blocks like the trunk's."""

    def __init__(self):
        super().__init__()
        self.refiner = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("text", torch.randn(1, 3, WIDTH))

    def embed(self, x, t):
        text = self.text.expand(len(x), -1, -1)
        for block in self.refiner:
            text = block(text)
        return torch.cat([text, super().embed(x, t)], 1)

    def aligned(self, x, t):
        return super().aligned(x, t)[:, 3:]


def test_a_list_that_the_sample_does_not_run_through_is_refused():
    model = Refined()
    align = SelfAlignment(
        model, selfalign.SRALoss(student_layer=1, teacher_layer=2), blocks="refiner"
    )
    message = (
        r"must be the sample's. Received: refiner.0, whose tokens do not depend on the sample. "
        r"Pass blocks='blocks'."
    )
    with pytest.raises(ValueError, match=message):
        run(model, align, SIZES)
    align.detach()
    expected, received = run(model, SelfAlignment(model, SRA, blocks="blocks"), SIZES)
    torch.testing.assert_close(received, expected)


class RefinedInOneList(Model):
    """The first two blocks of the trunk's own list refine the text."""

    def forward(self, x, t):
        text = self.beside(x)
        for block in self.blocks[:2]:
            text = block(text)
        tokens = torch.cat([text, self.embed(x, t)], 1)
        for block in self.blocks[2:]:
            tokens = block(tokens)
        return tokens

    def aligned(self, x, t):
        text = self.blocks[1](self.blocks[0](self.beside(x)))
        tokens = torch.cat([text, self.embed(x, t)], 1)
        return self.blocks[2](tokens)[:, 2:]


def test_a_refiner_in_the_trunks_own_list_is_refused():
    model = RefinedInOneList()
    align = SelfAlignment(model, SRA)
    message = r"Received: blocks.1, whose tokens .* such as taps=\('blocks.2', 'blocks.4'\)."
    with pytest.raises(ValueError, match=message):
        run(model, align, SIZES)
    align.detach()
    align = SelfAlignment(model, SRA, taps=("blocks.2", "blocks.4"))
    expected, received = run(model, align, SIZES)
    torch.testing.assert_close(received, expected)


class PaddedAmidText(Padded):
    def embed(self, x, t):
        return torch.cat([self.beside(x), super().embed(x, t)[:, :4]], 1)


def test_padded_samples_beside_text_are_the_users_to_select():
    model = PaddedAmidText()
    align = SelfAlignment(model, SRA)
    message = r"its tokens at other places from sample to sample. Pass select="
    with pytest.raises(ValueError, match=message):
        run(model, align, SIZES)
    align.detach()
    align = SelfAlignment(model, SRA, select=lambda output: output[:, 2:])
    expected, received = run(model, align, SIZES)
    torch.testing.assert_close(received, expected[:, 2:])


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, tokens):
        tokens = self.block(tokens)
        return Parts(tokens, tokens.softmax(-1)[..., :5])


class BesideAMap(Model):
    def __init__(self):
        super().__init__(TwoParts)

    def run(self, x, t, blocks):
        tokens = self.embed(x, t)
        for block in blocks:
            tokens = block(tokens).image
        return tokens

    def forward(self, x, t):
        return self.run(x, t, self.blocks)

    def aligned(self, x, t):
        return self.run(x, t, self.blocks[:2])


def test_the_advice_names_fields_of_a_dataclass():
    model = BesideAMap()
    align = SelfAlignment(model, SRA)
    message = (
        r"blocks.1: Parts of \('image': shape \(3, 5, 16\), 'text': shape \(3, 5, 5\)\); 2 parts "
        r"of it depend on the sample. Pass select=, .* select=lambda output: output.image."
    )
    with pytest.raises(ValueError, match=message):
        run(model, align, SIZES)
    align.detach()
    align = SelfAlignment(model, SRA, select=lambda output: output.image)
    expected, received = run(model, align, SIZES)
    torch.testing.assert_close(received, expected)


class Stacked(nn.Module):
    """Two streams in one tensor [2, B, M, D]; tokens of time stand before the sample's."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, streams):
        return torch.stack([self.block(streams[0]), self.block(streams[1])])


class TwoStacked(Model):
    def __init__(self):
        super().__init__(Stacked)

    def run(self, x, t, blocks):
        tokens = torch.cat([self.time(t), self.embed_x(x)], 1)
        streams = torch.stack([tokens, tokens.flip(1)])
        for block in blocks:
            streams = block(streams)
        return streams

    def forward(self, x, t):
        return self.run(x, t, self.blocks)[0, :, 1:]

    def aligned(self, x, t):
        return self.run(x, t, self.blocks[:2])[0, :, 1:]


def test_the_advice_was_tried_out():
    """Followed literally, it takes the sample's tokens."""
    model = TwoStacked()
    align = SelfAlignment(model, SRA)
    with pytest.raises(ValueError, match="such as select=lambda") as error:
        run(model, align, SIZES)
    align.detach()
    advice = str(error.value).rstrip(".").split("such as select=")[1]
    assert advice == "lambda output: output[0][:, 1:6]"
    align = SelfAlignment(model, SRA, select=eval(advice))
    expected, received = run(model, align, SIZES)
    torch.testing.assert_close(received, expected)


class Cached(Model):
    """Keeps something of all samples for its next forward."""

    cache = 0.0

    def embed(self, x, t):
        tokens = super().embed(x, t) + self.cache
        self.cache = tokens.detach().mean()
        return tokens


def test_a_model_that_goes_on_from_its_last_forward_is_refused():
    model = Cached()
    message = r"must give the same for the same input. Received: blocks.1, which .* a cache of"
    with pytest.raises(ValueError, match=message):
        run(model, SelfAlignment(model, SRA), SIZES)


class InPlace(TwoStreams):
    """Writes into what a block has returned."""

    def streams(self, x, t, blocks):
        image, text = self.embed(x, t), self.text.expand(len(x), -1, -1)
        for number, block in enumerate(blocks):
            image, text = read_parts(block(image, text), False)
            if number < len(blocks) - 1:
                image += 1
        return image


@pytest.mark.parametrize("kind", [tuple, dict, Parts, Pair])
def test_what_is_written_into_a_nest_later_is_not_aligned(kind):
    model = InPlace(False, kind)
    expected, received = run(model, SelfAlignment(model, SRA), SIZES)
    torch.testing.assert_close(received, expected)


class NoList(Refined):
    """Its trunk's blocks are attributes."""

    def __init__(self):
        super().__init__()
        for number, block in enumerate(self.blocks):
            setattr(self, f"block{number}", block)
        del self.blocks

    def forward(self, x, t):
        tokens = self.embed(x, t)
        for number in range(5):
            tokens = getattr(self, f"block{number}")(tokens)
        return tokens

    def aligned(self, x, t):
        return self.block1(self.block0(self.embed(x, t)))[:, 3:]


def test_where_the_trunk_is_in_no_list_its_modules_are_named():
    model = NoList()
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
    align = SelfAlignment(model, loss)
    message = r"Received: refiner.0, .* such as taps=\('block1', 'block3'\)."
    with pytest.raises(ValueError, match=message):
        run(model, align, SIZES)
    align.detach()
    align = SelfAlignment(model, loss, taps=("block1", "block3"))
    expected, received = run(model, align, SIZES)
    torch.testing.assert_close(received, expected)


class Packed(Model):
    """Samples of one sequence, without an axis of their own."""

    def forward(self, x, t):
        tokens = self.embed(x, t).flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


def test_tokens_without_a_batch_are_refused():
    model = Packed()
    align = SelfAlignment(model, SRA)
    message = (
        r"Received: blocks.1: shape \(15, 16\); no part of it is \[B, N, D\]. Pass select=, .* "
        r"\[B, N, D\]: reshape them there, and cut other tokens off\."
    )
    with pytest.raises(ValueError, match=message):
        run(model, align, SIZES)


class Growing(Model):
    """Blocks on text and picture apart, then blocks on both in one sequence."""

    def __init__(self):
        super().__init__(lambda: Joint(False, tuple))
        self.single = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, t, text):
        image = self.embed(x, t)
        for block in self.blocks:
            image, text = block(image, text)
        tokens = torch.cat([text, image], 1)
        for block in self.single:
            tokens = block(tokens)
        return tokens[:, text.shape[1] :]


def test_text_and_sample_may_change_their_lengths():
    """Also where the whole sequence stays as long."""
    model = Growing()
    align = SelfAlignment(model, SRA, blocks="single")
    for size, text in ((5, 3), (5, 4), (4, 4), (5, 3)):
        x0, noise, t = torch.randn(2, size, 4), torch.randn(2, size, 4), torch.rand(2)
        model(align.path.add_noise(x0, noise, t), t, torch.randn(2, text, WIDTH))
        align(x0, noise, t, loss_mask=torch.ones(2, size)).backward()


# How tokens lie in a tensor, told by what changes

AXES = st.sampled_from(["b n d", "n b d", "b d n"])


@given(AXES, st.integers(2, 4), st.lists(st.booleans(), min_size=3, max_size=7), st.integers(5, 9))
def test_tokens_are_found_in_any_order_of_axes(axes, batch, mine, width):
    places = torch.tensor(mine)
    places[0] = True  # the sample has one token at least
    tokens = torch.rand(batch, len(mine), width) + 1
    order = [axes.split().index(name) for name in "bnd"]

    def arranged(change):
        return (tokens * change[..., None]).permute(*(order.index(axis) for axis in range(3)))

    first = torch.zeros(batch, len(mine))
    first[0] = places
    spot = torch.zeros(batch, len(mine))
    spot[:, 0] = 1.0
    changes = Changes(arranged(first), arranged(places.expand(batch, -1)), [arranged(spot)])
    reading = find_reading(changes, batch, [width])
    whole = arranged(torch.ones(batch, len(mine)))
    torch.testing.assert_close(reading(whole), tokens[:, places])


@given(
    st.permutations(["b", "h", "w", "d"]).filter(lambda order: "b" in order[:2]),
    *(st.integers(2, 4), st.integers(2, 4), st.integers(2, 4)),
)
def test_tokens_are_found_in_grids_of_any_order_of_axes(order, batch, height, width):
    tokens = torch.rand(batch, height, width, 7) + 1
    axes = [["b", "h", "w", "d"].index(axis) for axis in order]

    def arranged(change):
        return (tokens * change[..., None]).permute(axes)

    first = torch.zeros(batch, height, width)
    first[0] = 1.0
    spot = torch.zeros(batch, height, width)
    spot[:, 1, 0] = 1.0
    whole = arranged(torch.ones(batch, height, width))
    reading = find_reading(Changes(arranged(first), whole, [arranged(spot)]), batch, [7])
    expected = tokens if order.index("h") < order.index("w") else tokens.transpose(1, 2)
    torch.testing.assert_close(reading(whole), expected.flatten(1, 2))


@given(st.integers(2, 3), st.integers(2, 4), st.integers(1, 4), st.integers(0, 2))
def test_frames_in_the_batchs_axis_belong_to_their_samples(batch, frames, size, more):
    """[(B F), S, D], where each frame has other tokens behind its own."""
    tokens = torch.rand(batch, frames, size + more, 7) + 1

    def arranged(change):
        mine = torch.arange(size + more) < size
        return (tokens * change[..., None, None] * mine[:, None]).flatten(0, 1)

    first = torch.zeros(batch, frames)
    first[0] = 1.0
    spot = torch.zeros(batch, frames)
    spot[:, 0] = 1.0
    spotted = arranged(spot)
    spotted[:, 1:] = 0.0  # one number of the sample shows at one token
    changes = Changes(arranged(first), arranged(torch.ones(batch, frames)), [spotted])
    reading = find_reading(changes, batch, [7])
    expected = tokens[:, :, :size].flatten(1, 2)
    torch.testing.assert_close(reading(tokens.flatten(0, 1)), expected)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.booleans())
def test_of_padded_samples_all_tokens_are_taken(lengths, chosen):
    """Where each token is some sample's, or where the user took them."""
    longest = max(lengths) + chosen
    mine = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tokens = torch.rand(len(lengths), longest, 7) + 1
    spot = torch.zeros_like(tokens)
    spot[:, 0] = 1.0
    first = torch.zeros_like(tokens)
    first[0] = tokens[0] * mine[0, :, None]
    changes = Changes(first, tokens * mine[..., None], [spot])
    reading = find_reading(changes, len(lengths), [7], chosen=chosen)
    alike = len(set(lengths)) == 1
    torch.testing.assert_close(reading(tokens), tokens[:, : lengths[0] if alike else longest])


def test_what_changes_everywhere_tells_nothing():
    everywhere = torch.ones(3, 5, 5)
    with pytest.raises(Undecided, match="no axis of it is the samples'"):
        find_reading(Changes(everywhere, everywhere, [everywhere]), 3, [5])
