"""Objectives other than SRA on PyTorch models, against forwards made by hand."""

import pytest
import torch
from dit_models import DiT, flops, hooks_on, make_batch, seen, stream, take_first_step
from third_party import LogCoshLoss

import selfalign
from selfalign.adapters.torch import SelfAlignment

LAYERSYNC = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4)
REPA = selfalign.REPALoss(student_layer=2, width=6, hidden=12)


def apply_mlp(head, tokens):
    """By hand: linear layers with SiLU between them."""
    names = [name.removesuffix("_kernel") for name, _ in head.named_parameters()]
    layers = [name for name in names if not name.endswith("bias")]
    for n, layer in enumerate(layers):
        if n:
            tokens = torch.nn.functional.silu(tokens)
        kernel = head.get_parameter(f"{layer}_kernel")
        tokens = tokens @ kernel + head.get_parameter(f"{layer}_bias")
    return tokens


def cosine_term(student, target):
    return 1 - torch.nn.functional.cosine_similarity(student, target.detach(), dim=-1).mean()


def check_against(term, expected, model, head):
    """The same value, and the same gradients for every parameter."""
    torch.testing.assert_close(term, expected)
    parameters = [*model.parameters(), *head.parameters()]
    found = torch.autograd.grad(term, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert any(gradient is not None for gradient in wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


# LayerSync


def test_layersync_aligns_with_a_later_layer_of_the_same_forward(model, batch):
    align = SelfAlignment(model, LAYERSYNC)
    model(*seen(batch))
    term = align(*batch)
    expected = 0.2 * cosine_term(stream(model, 2, batch), stream(model, 4, batch))
    check_against(term, expected, model, align.projector)
    assert term.dtype == torch.float32


def test_layersync_with_sras_head(model, batch):
    loss = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4, projector=True)
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    term = align(*batch)
    student = apply_mlp(align.projector, stream(model, 2, batch))
    expected = 0.2 * cosine_term(student, stream(model, 4, batch))
    check_against(term, expected, model, align.projector)


def test_its_gradient_reaches_no_later_block(model, batch):
    align = SelfAlignment(model, LAYERSYNC)
    model(*seen(batch))
    align(*batch).backward()
    assert all(p.grad is None for block in model.blocks[2:] for p in block.parameters())
    assert all(p.grad.any() for p in model.blocks[1].mlp.parameters())


def test_it_has_no_teacher_no_head_and_computes_nothing_more(model, batch):
    align = SelfAlignment(model, LAYERSYNC)
    take_first_step(align, batch)
    alone = flops(lambda: model(*seen(batch)))
    assert alone > 0
    assert flops(lambda: align(*batch)) == 0
    assert align.teacher is None
    assert list(align.projector.parameters()) == []
    tokens = torch.randn(4, 5, 16)
    assert torch.equal(align.projector(tokens), tokens)
    assert align.state_dict()["teacher"] == align.state_dict()["projector"] == {}


def test_the_head_is_all_that_it_computes_with_one(model, batch):
    loss = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4, projector=True)
    align = SelfAlignment(model, loss)
    take_first_step(align, batch)
    model(*seen(batch))
    tokens = batch[0].shape[0] * batch[0].shape[1]
    assert flops(lambda: align(*batch)) == 2 * tokens * 4 * 16**2


def test_update_counts_steps_and_nothing_else(batch, make_loop):
    loop = make_loop(DiT(), LAYERSYNC)
    for step in range(1, 4):
        loop.step(batch)
        assert loop.align.step == step


def test_a_schedule_follows_the_counted_steps(batch, make_loop):
    stop = selfalign.schedules.Stop(2)
    loop = make_loop(DiT(), selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4, weight=stop))
    for _ in range(2):
        assert loop.term(batch).item() > 0
        loop.align.forget()
        loop.step(batch)
    assert loop.term(batch).item() == 0


def test_the_later_layer_must_run_once(batch):
    class Ordered(DiT):
        def forward(self, x, t, y):
            x, c = self.embed(x, t, y)
            for index in self.order:
                x = self.blocks[index](x, c)
            return self.final_layer(x)

    model = Ordered()
    align = SelfAlignment(model, LAYERSYNC)
    model.order = (0, 1, 2)
    model(*seen(batch))
    missing = r"layer must run in the student's forward. Received: no output of blocks.3"
    with pytest.raises(ValueError, match=missing):
        align(*batch)
    model.order = (0, 1, 2, 3, 3)
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"run once per align\(\).*blocks.3 ran 2 times in the"):
        align(*batch)


def test_a_half_precision_model_keeps_the_term_in_float32(batch):
    model = DiT().bfloat16()
    align = SelfAlignment(model, LAYERSYNC)
    x_t, t, y = seen(batch)
    model(x_t.bfloat16(), t, y)
    term = align(*batch)
    assert term.dtype == torch.float32
    assert 0 < term.item() < 0.4


# REPA


def test_repa_aligns_with_the_callers_tokens(model, batch):
    align = SelfAlignment(model, REPA)
    tokens = torch.randn(4, 5, 6)
    model(*seen(batch))
    term = align(*batch, target_tokens=tokens)
    student = apply_mlp(align.projector, stream(model, 2, batch))
    assert student.shape == (4, 5, 6)
    check_against(term, 0.5 * cosine_term(student, tokens), model, align.projector)


def test_no_gradient_reaches_the_callers_tokens(model, batch):
    align = SelfAlignment(model, REPA)
    tokens = torch.randn(4, 5, 6, requires_grad=True)
    model(*seen(batch))
    align(*batch, target_tokens=tokens).backward()
    assert tokens.grad is None


def test_repa_has_no_teacher_and_no_second_forward(model, batch):
    align = SelfAlignment(model, REPA)
    tokens = torch.randn(4, 5, 6)
    take_first_step(align, batch, target_tokens=tokens)
    model(*seen(batch))
    counted = flops(lambda: align(*batch, target_tokens=tokens))
    assert counted == 2 * 20 * (16 * 12 + 12 * 12 + 12 * 6)
    assert align.teacher is None
    assert align.taps == ["blocks.1"]
    assert align.state_dict()["teacher"] == {}


def test_repa_of_half_precision_tokens(model, batch):
    """An encoder under autocast gives such."""
    align = SelfAlignment(model, REPA)
    tokens = torch.randn(4, 5, 6)
    terms = []
    for target in (tokens, tokens.bfloat16()):
        model(*seen(batch))
        terms.append(align(*batch, target_tokens=target))
    torch.testing.assert_close(*terms, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("tokens", "kind", "message"),
    [
        (None, ValueError, r"target_tokens= must be the targets.*Received: none, for the objectiv"),
        (torch.zeros(4, 5, 7), ValueError, r"shape.*Received: .*\(4, 5, 7\)"),
        (torch.zeros(4, 4, 6), ValueError, r"shape.*Received: .*\(4, 4, 6\)"),
        (torch.zeros(2, 5, 6), ValueError, r"shape.*Received: .*\(2, 5, 6\)"),
        (torch.zeros(4, 5, 6, dtype=torch.long), TypeError, r"floating point.*Received: .*int64"),
        ({"repa": torch.zeros(4, 5, 6)}, TypeError, r"must be a tensor. Received: dict"),
        ([1, 2], TypeError, r"must be a tensor. Received: list"),
    ],
)
def test_tokens_that_do_not_fit(model, batch, tokens, kind, message):
    align = SelfAlignment(model, REPA)
    model(*seen(batch))
    with pytest.raises(kind, match=message):
        align(*batch, target_tokens=tokens)


@pytest.mark.parametrize("loss", [LAYERSYNC, selfalign.SRALoss(student_layer=2, teacher_layer=4)])
def test_tokens_that_nobody_takes(model, batch, loss):
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"target_tokens=.*for objectives that take none"):
        align(*batch, target_tokens=torch.zeros(4, 5, 16))


# All of them


def test_a_third_partys_objective_is_served_as_it_is(model, batch):
    loss = LogCoshLoss(student_layer=2, teacher_layer=4)
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    term = align(*batch)
    head = align.projector
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "down": (16, 2),
        "up": (2, 16),
    }
    student = stream(model, 2, batch) @ head.get_parameter("down") @ head.get_parameter("up")
    difference = student - stream(model, 4, batch).detach()
    check_against(term, 0.5 * torch.log(torch.cosh(difference)).mean(), model, head)


@pytest.mark.parametrize("loss", [LAYERSYNC, REPA], ids=["layersync", "repa"])
def test_attaching_and_detaching_leaves_no_trace(model, batch, loss):
    keys = list(model.state_dict())
    with torch.no_grad():
        output = model(*seen(batch))
    before = torch.get_rng_state()
    tokens = torch.randn(4, 5, 6) if loss is REPA else None
    torch.set_rng_state(before)
    with SelfAlignment(model, loss) as align:
        assert torch.equal(model(*seen(batch)), output)
        align(*batch, target_tokens=tokens)
        assert list(model.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), before)
    assert hooks_on(model) == 0


def test_an_objective_without_noise_has_no_path(model):
    with pytest.raises(ValueError, match=r"add noise have a path. Received: the path of LayerSync"):
        _ = SelfAlignment(model, LAYERSYNC).path


@pytest.mark.parametrize("loss", [LAYERSYNC, REPA], ids=["layersync", "repa"])
def test_a_compiled_model_gives_the_same_term(batch, loss):
    torch._dynamo.reset()
    model = DiT(depth=4)
    tokens = torch.randn(4, 5, 6) if loss is REPA else None
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    expected = align(*batch, target_tokens=tokens)
    torch.compile(model, backend="eager", fullgraph=True)(*seen(batch))
    torch.testing.assert_close(align(*batch, target_tokens=tokens), expected)


def test_masks_over_samples_and_tokens(model, batch):
    align = SelfAlignment(model, LAYERSYNC)
    terms = []
    for mask in (torch.tensor([1.0, 0, 1, 0]), torch.tensor([1.0, 0, 1, 0])[:, None].expand(4, 5)):
        model(*seen(batch))
        terms.append(align(*batch, loss_mask=mask))
    torch.testing.assert_close(*terms)
    part = [tensor[::2] for tensor in batch]
    model(*seen(part))
    torch.testing.assert_close(align(*part), terms[0])


def test_metrics(model):
    batch = make_batch()
    align = SelfAlignment(model, LAYERSYNC, log_metrics=True)
    model(*seen(batch))
    term = align(*batch)
    torch.testing.assert_close(align.metrics["distance"] * 0.2, term.detach())
    assert align.metrics["teacher_finite"]
