"""Which modules are tapped: block lists, layers, paths; and how wide their tokens are."""

from collections import OrderedDict

import pytest
import torch
from dit_models import Block, DiT, UnknownWidth, make_batch, seen
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment


class TwoLists(DiT):
    def __init__(self):
        super().__init__()
        self.more_blocks = nn.ModuleList(Block(16) for _ in range(3))


def loss_of(student, teacher, **settings):
    return selfalign.SRALoss(student_layer=student, teacher_layer=teacher, **settings)


SRA = loss_of(2, 4)
WRONG = {
    "no block list": (
        lambda: nn.Linear(4, 4),
        SRA,
        {},
        r"exactly one list of alike blocks.*Received: found none.*Pass blocks=",
    ),
    "two block lists": (
        TwoLists,
        SRA,
        {},
        r"found 'blocks' \(6 x Block\), 'more_blocks' \(3 x Block\).*Pass blocks=\"blocks\"",
    ),
    "path that does not exist": (
        DiT,
        SRA,
        {"blocks": "transformer_blocks"},
        r"must lead to a module.*Received: 'transformer_blocks'.*It has: x_embedder.*"
        r"Lists of alike blocks in it: 'blocks'",
    ),
    "path that is no list": (
        DiT,
        SRA,
        {"blocks": "final_layer"},
        r"must name a non-empty nn.ModuleList.*'final_layer', a Linear.*'blocks'",
    ),
    "one tap": (
        DiT,
        SRA,
        {"taps": ("blocks.1",)},
        r"taps= must be paths of .*Received: taps=\('blocks.1',\), blocks=None. Pass taps=\(",
    ),
    "a tap that is a word": (
        DiT,
        SRA,
        {"taps": "blocks.1"},
        r"taps= must be paths of .*Received: taps='blocks.1'",
    ),
    "a tap that is a number": (DiT, SRA, {"taps": 5}, r"taps= must be paths .*Received: taps=5"),
    "numbers as taps": (DiT, SRA, {"taps": (1, 3)}, r"taps= must be .*Received: taps=\(1, 3\)"),
    "two taps where one is wanted": (
        DiT,
        selfalign.REPALoss(student_layer=2, width=6),
        {"taps": ("blocks.1", "blocks.2")},
        r"\(one path where the target is not a layer of the model\). Received: taps=",
    ),
    "taps of other names": (
        DiT,
        [SRA, loss_of(1, 3, name="deep")],
        {"taps": {"sra": ("blocks.1", "blocks.2")}},
        r"taps= must be paths of .*Pass taps=\{\"sra\": \(\"encoder.3\", \"encoder.8\"\), \.\.\.",
    ),
    "taps and blocks": (
        DiT,
        SRA,
        {"taps": ("blocks.1", "blocks.2"), "blocks": "blocks"},
        r"without blocks=.*Received: taps=.*blocks='blocks'.*or leave it out",
    ),
    "tap that breaks off": (
        DiT,
        SRA,
        {"taps": ("blocks.9", "blocks.4")},
        r"must lead to a module.*'blocks.9', but blocks has no '9'.*It has: 0, 1, 2, 3, 4, 5",
    ),
    "layer beyond the depth": (
        DiT,
        loss_of(2, 8),
        {},
        r"teacher_layer must be at most the model's depth.*layer 8 of 6 blocks",
    ),
    "same layer by fractions": (
        DiT,
        loss_of(0.3, 0.35),
        {},
        r"student_layer must come before teacher_layer.*student 2, teacher 2",
    ),
}


@pytest.mark.parametrize(("make", "loss", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_attachment(make, loss, options, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        SelfAlignment(model, loss, **options)
    assert not model._forward_pre_hooks


# Lists


def test_two_lists_in_a_row_are_numbered_through(batch):
    class Double(DiT):
        def __init__(self):
            super().__init__()
            self.double_blocks = self.blocks[:2]
            self.single_blocks = self.blocks[2:]
            self.other = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            del self.blocks

        def forward(self, x, t, y):
            x, c = self.embed(x, t, y)
            for block in [*self.double_blocks, *self.single_blocks]:
                x = block(x, c)
            return self.final_layer(x)

    for options in ({}, {"blocks": ("double_blocks", "single_blocks")}):
        model = Double()
        with SelfAlignment(model, SRA, **options) as align:
            assert align.taps == ["double_blocks.1", "single_blocks.1"]
            model(*seen(batch))
            assert align(*batch).item() > 0


def test_a_block_at_several_places_is_refused():
    model = DiT()
    model.blocks[4] = model.blocks[1]
    message = r"must be modules of their own. Received: one module at several places of 'blocks.0'"
    with pytest.raises(ValueError, match=message):
        SelfAlignment(model, SRA)


def test_a_trunk_of_mixed_blocks_is_a_candidate():
    class Gated(Block):
        pass

    model = DiT()
    model.blocks = nn.ModuleList(kind(16) for kind in (Block, Gated, Block, Gated, Block, Gated))
    with SelfAlignment(model, SRA) as align:
        assert align.taps == ["blocks.1", "blocks.3"]
    model.context_refiner = nn.ModuleList(Block(16) for _ in range(4))
    message = r"found 'blocks' \(6 x Block\), 'context_refiner' \(4 x Block\)"
    with pytest.raises(ValueError, match=message):
        SelfAlignment(model, SRA)


def named_layers():
    names = ("first", "second", "third", "fourth")
    return nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names))


@pytest.mark.parametrize(
    ("options", "taps"),
    [({}, ["first", "third"]), ({"taps": ("second", "fourth")}, ["second", "fourth"])],
)
def test_blocks_that_have_names(options, taps):
    model = named_layers()
    align = SelfAlignment(model, loss_of(1, 3), call=lambda m, x, t: m(x), **options)
    assert align.taps == taps
    x0, noise, t, _ = make_batch()
    model(align.path.add_noise(x0, noise, t))
    assert align(x0, noise, t).item() > 0


# Taps


def test_taps_are_two_modules(model, batch):
    align = SelfAlignment(model, loss_of(1, 2), taps=("blocks.2", "blocks.5"))
    assert align.taps == ["blocks.2", "blocks.5"]
    model(*seen(batch))
    align(*batch).backward()
    assert model.blocks[2].proj.weight.grad.any()
    assert model.blocks[3].proj.weight.grad is None


def test_taps_give_the_same_numbers_as_layers(batch):
    terms = []
    for options in ({}, {"taps": ("blocks.1", "blocks.3")}, {"taps": ["blocks.1", "blocks.3"]}):
        torch.manual_seed(1)
        model = DiT(label_dropout=0.5)
        with SelfAlignment(model, SRA, seed=1, **options) as align:
            model(*seen(batch))
            terms.append(align(*batch))
    assert torch.equal(terms[0], terms[1])
    assert torch.equal(terms[0], terms[2])


def test_taps_of_an_objective_without_a_target_layer(model, batch):
    loss = selfalign.REPALoss(student_layer=2, width=6, hidden=12)
    align = SelfAlignment(model, loss, taps=("blocks.3",))
    assert align.taps == ["blocks.3"]
    model(*seen(batch))
    align(*batch, target_tokens=torch.randn(4, 5, 6)).backward()
    assert model.blocks[3].proj.weight.grad.any()


# Widths


def test_a_width_that_is_given(batch):
    model = UnknownWidth()
    align = SelfAlignment(model, SRA, width=16)
    assert align.projector.hidden_kernel.shape == (16, 32)
    model(*seen(batch))
    assert align(*batch).item() > 0


def test_wrong_width(model, batch):
    align = SelfAlignment(model, SRA, width=8)
    model(*seen(batch))
    message = r"must have the head's width. Received: width 16, head of width 8.*width="
    with pytest.raises(ValueError, match=message):
        align(*batch)


@pytest.mark.parametrize(
    ("width", "kind", "message"),
    [
        (0, ValueError, r"width must be finite and at least 1. Received: 0"),
        (1.5, TypeError, r"width must be an integer. Received: 1.5"),
        ("16", TypeError, r"width must be an integer. Received: '16'"),
    ],
)
def test_widths_that_are_none(model, width, kind, message):
    with pytest.raises(kind, match=message):
        SelfAlignment(model, SRA, width=width)
    assert not model._forward_pre_hooks


# Lists as models have them


class Trunk(torch.nn.Module):
    """Blocks in a container of the caller's, and one list that holds None."""

    def __init__(self, container):
        super().__init__()
        self.blocks = container
        self.skips = torch.nn.ModuleList([torch.nn.Linear(8, 8), None, torch.nn.LayerNorm(8)])

    def train(self, mode=True):
        super().train(mode)  # and gives back nothing

    def forward(self, x, t):
        for block in self.blocks.values() if hasattr(self.blocks, "values") else self.blocks:
            for layer in block if isinstance(block, torch.nn.ModuleList) else [block]:
                x = x + torch.tanh(layer(x)) * (1 + t[:, None, None])
        return x


def layers(count):
    return [torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)) for _ in range(count)]


def align_once(model, **options):
    align = SelfAlignment(model, selfalign.SRALoss(student_layer=2, teacher_layer=4), **options)
    x0, noise, t = torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.rand(3)
    model(align.path.add_noise(x0, noise, t), t)
    align(x0, noise, t).backward()
    return align.taps


def test_a_dict_of_blocks_is_a_list_of_them():
    names = [f"block_{number}" for number in range(5)]
    model = Trunk(torch.nn.ModuleDict(zip(names, layers(5), strict=True)))
    assert align_once(model) == ["blocks.block_1", "blocks.block_3"]


def test_lists_of_lists_are_never_called():
    model = Trunk(torch.nn.ModuleList(torch.nn.ModuleList(layers(2)) for _ in range(5)))
    message = (
        r"must be a module that is called. Received: 'blocks.1', a ModuleList of 2 modules. Pass "
        r"paths of modules that are, such as taps=\('blocks.1.1', 'blocks.3.1'\)."
    )
    with pytest.raises(ValueError, match=message):
        align_once(model)
    assert align_once(model, taps=("blocks.1.1", "blocks.3.1")) == ["blocks.1.1", "blocks.3.1"]
