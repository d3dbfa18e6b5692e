"""The target comes after the student's block: lists of blocks side by side, or in another order."""

import pytest
import torch
from dit_models import Block, DiT, make_batch, seen
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment

KINDS = [selfalign.SRALoss, selfalign.LayerSyncLoss]


class Attributes(DiT):
    """Its trunk is in no list."""

    def __init__(self, depth=6, **options):
        super().__init__(depth=depth, **options)
        for number, block in enumerate(self.blocks, 1):
            setattr(self, f"block{number}", block)
        self.depth = depth
        del self.blocks

    def embed(self, x, t, y):
        x, c = super().embed(x, t, y)
        return x, c[:, None]

    def trunk(self, x, c):
        for number in range(1, self.depth + 1):
            x = getattr(self, f"block{number}")(x, c[:, 0])
        return x


def parallel(count):
    return nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(count))


class Heads(Attributes):
    def __init__(self):
        super().__init__()
        self.heads = parallel(8)

    def forward(self, x, t, y):
        x = self.trunk(*self.embed(x, t, y))
        return self.final_layer(sum(head(x) for head in self.heads))


class Embedders(Attributes):
    def __init__(self):
        super().__init__()
        self.embedders = parallel(8)

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        return self.final_layer(self.trunk(sum(embed(x) for embed in self.embedders), c))


class Experts(DiT):
    """One block of a mixture of experts behind others that are called otherwise."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(16)
            self.experts = parallel(12)

        def forward(self, x, c, router=None):
            x = self.block(x, c)
            return x + sum(expert(x) for expert in self.experts)

    def __init__(self):
        super().__init__()
        self.blocks.append(self.Mixture())


class Reversed(DiT):
    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        for block in reversed(self.blocks):
            x = block(x, c)
        return self.final_layer(x)


class Both(DiT):
    def __init__(self):
        super().__init__()
        self.heads = parallel(8)

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(sum(head(x) for head in self.heads))


WRONG = {
    Heads: r"heads\.3, which does not depend on heads\.1. Pass taps=.* such as (taps=\(.*\))\.$",
    Embedders: r"embedders\.3, which does not depend on .* such as (taps=\(.*\))\.$",
    Experts: r"experts\.3, which does not depend on .* such as (taps=\(.*\))\.$",
    Reversed: r"does not depend on blocks\.1. Pass (taps=\('blocks\.3', 'blocks\.1'\)), in the ord",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", WRONG)
def test_blocks_that_do_not_run_in_a_row_are_refused(model, kind, batch):
    """The message followed literally works."""
    model = model()
    align = SelfAlignment(model, kind(student_layer=2, teacher_layer=4))
    model(*seen(batch))
    with pytest.raises(ValueError, match=WRONG[type(model)]) as error:
        align(*batch)
    align.detach()
    advice = error.match(WRONG[type(model)]) and str(error.value)
    taps = eval(advice[advice.rindex("taps=(") + 5 : advice.rindex(")") + 1])
    align = SelfAlignment(model, kind(student_layer=2, teacher_layer=4), taps=taps)
    model(*seen(batch))
    assert align(*batch).isfinite()


def test_a_list_of_heads_is_refused_with_the_trunk(batch):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
    with pytest.raises(ValueError, match=r'found .* Pass blocks="blocks", several'):
        SelfAlignment(Both(), loss)
    align = SelfAlignment(Both(), loss, blocks="heads")
    align.model(*seen(batch))
    with pytest.raises(ValueError, match=r"does not depend on heads.1. Pass blocks='blocks'\.$"):
        align(*batch)


def test_a_frozen_list_is_no_trunk(batch):
    model = Both()
    model.heads.requires_grad_(False)
    align = SelfAlignment(model, selfalign.SRALoss(student_layer=2, teacher_layer=4))
    assert align.taps == ["blocks.1", "blocks.3"]


class Latents(DiT):
    """A few latents read the sample; blocks run on them."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 3, 16))
        self.read = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        latents = self.latents.expand(len(x), -1, -1)
        latents = latents + self.read(latents, x, x)[0]
        for block in self.blocks:
            latents = block(latents, c)
        return self.final_layer(x + latents.mean(1, keepdim=True))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_aligned_where_they_are_meant(kind):
    batch = make_batch()
    model = Latents()
    loss = kind(student_layer=2, teacher_layer=4)
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    message = r"blocks.1, whose tokens are no places of the sample. If they are meant .*select="
    with pytest.raises(ValueError, match=message):
        align(*batch)
    align.detach()
    align = SelfAlignment(model, loss, select=lambda output: output)
    taken = []
    model.blocks[1].register_forward_hook(lambda m, args, out: taken.append(out))
    model(*seen(batch))
    assert align(*batch).isfinite()
    assert taken[0].shape == (4, 3, 16)
