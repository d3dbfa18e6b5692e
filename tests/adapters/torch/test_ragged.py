"""Text of another length in each sample, before the sample's tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment
from selfalign.adapters.torch.arguments import Arguments
from selfalign.adapters.torch.ragged import arrangement

BATCH, TEXT, TOKENS, WIDTH = 3, 4, 5, 8


def mask(lengths):
    return torch.arange(TEXT) < lengths[:, None]


def additive(lengths):
    hidden = torch.where(mask(lengths), 0.0, float("-inf"))
    return hidden[:, None, None]


# how a call says lengths, and how the model reads them
FORMS = {
    "lengths": (lambda n: n, lambda given: given),
    "lengths and a token more": (lambda n: n + 1, lambda given: given - 1),
    "cumulative": (lambda n: torch.cat([n[:1] * 0, n.cumsum(0)]), torch.diff),
    "mask of text": (mask, lambda given: given.sum(1)),
    "mask of text in floats": (lambda n: mask(n).float(), lambda given: given.sum(1).long()),
    "key_padding_mask": (lambda n: ~mask(n), lambda given: (~given).sum(1)),
    "additive mask": (additive, lambda given: (given[:, 0, 0] == 0).sum(1)),
    "ids": (lambda n: mask(n) * 7, lambda given: (given != 0).sum(1)),
}


class Block(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, tokens):
        return tokens + super().forward(tokens)


class Ragged(nn.Module):
    """Text, then the sample at once, then padding. `lengths` reads what the call says."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths = lengths
        self.text = nn.Parameter(torch.randn(TEXT, WIDTH))
        self.embed = nn.Linear(4, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, t, said=None):
        self.at = torch.full((len(x),), TEXT) if said is None else self.lengths(said)
        rows = [
            torch.cat([self.text[:length], tokens, self.text[length:]])
            for length, tokens in zip(self.at.tolist(), self.embed(x), strict=True)
        ]
        tokens = torch.stack(rows) + self.time(t[:, None])[:, None]
        for block in self.blocks:
            tokens = block(tokens)
            if block is self.blocks[0]:
                self.first = tokens
        return tokens.mean(1)


def tokens_of(model):
    """The sample's tokens at the first block."""
    pairs = zip(model.first, model.at.tolist(), strict=True)
    return torch.stack([row[start : start + TOKENS] for row, start in pairs])


def attached(lengths):
    def distance(projected, target):
        return (projected - target).square().mean(-1)

    model = Ragged(lengths)
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=3, distance=distance)
    align = SelfAlignment(model, loss)
    align.projector.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    seen = []
    return model, align, seen


def step(model, align, *said):
    x0, noise, t = torch.randn(BATCH, TOKENS, 4), torch.randn(BATCH, TOKENS, 4), torch.rand(BATCH)
    model(align.path.add_noise(x0, noise, t), t, *said)
    align(x0, noise, t).backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [[TEXT] * BATCH, [2, 4, 3]])
def test_tokens_follow_the_text_however_its_length_is_said(form, first):
    """Also where all texts of the first batch are as long."""
    say, read = FORMS[form]
    model, align, seen = attached(read)
    for lengths in (first, [4, 2, 3], [1, 3, 2], [2, 2, 2]):
        step(model, align, say(torch.tensor(lengths)))
        torch.testing.assert_close(seen[-1], tokens_of(model))


def test_a_mask_that_comes_later_is_looked_at():
    model, align, seen = attached(lambda given: given.sum(1))
    for said in ((), (mask(torch.tensor([2, 4, 1])),), (), (mask(torch.tensor([4, 4, 3])),)):
        step(model, align, *said)
        torch.testing.assert_close(seen[-1], tokens_of(model))


def test_lengths_in_a_list_are_refused_once_they_differ():
    model, align, _ = attached(torch.tensor)
    step(model, align, [TEXT] * BATCH)
    with pytest.raises(ValueError, match=r"at other places from sample to sample\. Pass select="):
        step(model, align, [4, 2, 3])


def test_what_moves_tokens_in_another_way_is_refused():
    """Twice as far as it says: select= must tell, and the first batch shows it."""
    model, align, _ = attached(lambda given: 2 * given.sum(1) - TEXT)
    with pytest.raises(ValueError, match=r"at other places from sample to sample\. Pass select="):
        step(model, align, mask(torch.tensor([TEXT] * BATCH)))


@given(st.integers(1, 5), st.integers(1, 4))
def test_an_arrangement_does_not_depend_on_the_number_of_samples(batch, length):
    def call(samples):
        return Arguments((torch.zeros(samples, length, 2), torch.zeros(samples)), {"size": [3, 4]})

    known = arrangement(call(batch), batch)
    assert known == arrangement(call(batch + 1), batch + 1)
    assert known != arrangement(Arguments((torch.zeros(batch, length, 2),)), batch)
