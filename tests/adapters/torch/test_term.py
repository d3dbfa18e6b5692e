"""What one step of SRA computes on a PyTorch model."""

import numpy as np
import oracle
import pytest
import torch
from dit_models import (
    Block,
    DiT,
    PairBlock,
    TupleBlock,
    flops,
    make_batch,
    seen,
    stream,
    take_first_step,
)

import selfalign
from selfalign.adapters.torch import SelfAlignment


def stream_at(model, layer, x, t, y):
    """By hand: the tokens after block `layer` for any input."""
    x, c = model.embed(x, t, y)
    for block in model.blocks[:layer]:
        x = block(x, c)
    return x


def test_term_is_the_papers_formula(loop, batch):
    loop.step(batch)  # teacher and student differ from here on
    x0, noise, t, y = batch
    u = torch.rand(4)
    term = loop.term(batch, u=u)
    t_teacher = (t - 0.2 * u).clamp(min=0)
    a = t_teacher[:, None, None]
    with torch.no_grad():
        target = stream_at(loop.align.teacher, 4, (1 - a) * x0 + a * noise, t_teacher, y)
        student = stream(loop.model, 2, batch)
    params = {n: p.detach().numpy() for n, p in loop.align.projector.named_parameters()}
    projected = oracle.project(params, student.numpy())
    expected = 0.5 * np.mean(oracle.cosine(projected, target.numpy()))
    assert term.dtype == torch.float32
    assert term.shape == ()
    np.testing.assert_allclose(term.item(), expected, rtol=1e-5)


def test_stopped_teacher_gives_the_full_forwards_features(model, loss, batch):
    align = SelfAlignment(model, loss)
    take_first_step(align, batch)
    outputs = []
    handle = align.teacher.blocks[3].register_forward_hook(lambda m, a, out: outputs.append(out))
    model(*seen(batch))
    align(*batch, u=torch.zeros(4))
    align.teacher(*seen(batch))
    handle.remove()
    assert len(outputs) == 2
    assert torch.equal(*outputs)


def test_same_layer_without_gap_or_head_is_exactly_zero(model, headless, batch):
    loss = headless(student_layer=3, teacher_layer=3, allow_same_layer=True, max_gap=0)
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    assert align(*batch).item() == 0.0


# Gradients


def test_no_gradient_to_the_teacher_nor_to_later_blocks(loop, batch):
    loop.term(batch).backward()
    model = loop.model
    assert all(p.grad is None for p in loop.align.teacher.parameters())
    assert all(p.grad is None for block in model.blocks[2:] for p in block.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.blocks[1].mlp.parameters())
    assert all(p.grad is not None for p in loop.align.projector.parameters())


@pytest.mark.parametrize("weight", [0, selfalign.schedules.Stop(0)])
def test_weight_zero_keeps_every_parameter_in_the_graph(model, batch, make_loop, weight):
    loop = make_loop(model, selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=weight))
    term = loop.term(batch)
    term.backward()
    assert term.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in loop.align.projector.parameters())


def test_accumulated_gradients_are_those_of_the_whole_batch(loop):
    batch = make_batch(8)
    u = torch.rand(8)
    halves = loop.twin()
    expected = loop.gradients(batch, u=u)
    for part in (slice(4), slice(4, 8)):
        half = [tensor[part] for tensor in batch]
        ((halves.forward(*half) + halves.align(*half, u=u[part])) / 2).backward()
    for p, gradient in zip(halves.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)
    for each in (loop, halves):
        each.optimizer.step()
        each.align.update()
        assert each.align.step == 1
    pairs = zip(loop.align.teacher.parameters(), halves.align.teacher.parameters(), strict=True)
    for whole, accumulated in pairs:  # AdamW's first step is a sign
        torch.testing.assert_close(whole, accumulated, rtol=1e-4, atol=1e-4)


# What it costs


def test_teachers_compute_is_exactly_the_blocks_up_to_its_layer(model, loss, batch):
    align = SelfAlignment(model, loss)
    prefix = flops(lambda: stream(model, 4, batch))
    take_first_step(align, batch)
    student = flops(lambda: model(*seen(batch)))
    counted = flops(lambda: align(*batch))
    projector = flops(lambda: align.projector(torch.zeros(4, 5, 16)))
    assert counted == prefix + projector
    assert counted - projector < student


def test_teachers_compute_on_diffusers_dit(diffusers_dit):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, path="discrete")
    align = SelfAlignment(diffusers_dit, loss)
    t = torch.randint(0, 1000, (2,))
    y = torch.randint(0, 1000, (2,))
    x0 = torch.randn(2, 4, 8, 8)
    noise = torch.randn_like(x0)
    for _ in range(2):  # its labels fall by chance
        diffusers_dit(loss.path.add_noise(x0, noise, t), t, y)
        align(x0, noise, t, y)
    whole = flops(lambda: diffusers_dit(loss.path.add_noise(x0, noise, t), t, y))
    counted = flops(lambda: align(x0, noise, t, y))
    tokens = torch.zeros(2, 16, 32)
    projector = flops(lambda: align.projector(tokens))
    teacher = align.teacher
    after = 0
    for block in teacher.transformer_blocks[4:]:
        after += flops(lambda block=block: block(tokens, timestep=t, class_labels=y))
    embedding = teacher.transformer_blocks[0].norm1.emb
    after += flops(lambda: embedding(t, y, hidden_dtype=torch.float32))
    after += flops(lambda: teacher.proj_out_1(tokens[:, 0]))
    after += flops(lambda: teacher.proj_out_2(tokens))
    assert counted - projector == whole - after


# Models


@pytest.mark.parametrize(
    ("block", "options"), [(TupleBlock, {}), (PairBlock, {"select": lambda output: output[0]})]
)
def test_blocks_that_return_tuples(batch, loss, make_loop, block, options):
    loop = make_loop(DiT(block=block), loss, **options)
    assert torch.isfinite(loop.step(batch))


def test_a_sequential_is_its_own_block_list(loss):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)))
    align = SelfAlignment(model, loss, call=lambda m, x, t: m(x))
    x0 = torch.randn(4, 5, 4)
    noise = torch.randn(4, 5, 4)
    t = torch.rand(4)
    model(align.path.add_noise(x0, noise, t))
    assert align.taps == ["1", "3"]
    assert align(x0, noise, t).item() > 0


def test_block_class_is_never_asked(loss, batch):
    """Any module that maps tokens to tokens is a block."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)))

        def forward(self, x, t, y):
            return self.stack(x)

    model = Odd()
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    assert align(*batch).item() > 0
    assert isinstance(DiT().blocks[0], Block)


# Settings of one call


def test_mask_and_seed(model, loss, batch):
    align = SelfAlignment(model, loss, seed=3)
    u = torch.rand(4)
    masked = torch.tensor([True, True, False, False])
    values = []
    for mask in (None, masked, ~masked):
        model(*seen(batch))
        values.append(align(*batch, u=u, loss_mask=mask).item())
    np.testing.assert_allclose(values[0], (values[1] + values[2]) / 2, rtol=1e-6)
    align.detach()
    again = SelfAlignment(model, loss, seed=3)
    assert torch.equal(again.projector.hidden_kernel, align.projector.hidden_kernel)


def test_schedules_follow_the_optimizer_steps(model, batch, make_loop):
    stop = selfalign.schedules.Stop(1)
    loop = make_loop(model, selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=stop))
    loop.step(batch)
    assert loop.align.step == 1
    assert loop.term(batch).item() == 0
    assert loop.align.loss.weight_at(0) > 0


def test_gaps_are_new_in_every_call_and_the_same_with_the_same_seed(loss, batch):
    """Seen in the times that the teacher is called with."""

    def run(seed):
        torch.manual_seed(0)
        model = DiT()
        with SelfAlignment(model, loss, seed=seed) as align:
            times = []
            take_first_step(align, batch)
            align.teacher.register_forward_pre_hook(lambda m, args: times.append(args[1]))
            for _ in range(2):
                model(*seen(batch))
                align(*batch)
        return torch.stack(times)

    first = run(1)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


def test_metrics_are_logged_without_gradient(model, loss, batch, make_loop):
    loop = make_loop(model, loss, log_metrics=True)
    loop.step(batch)
    metrics = loop.align.metrics
    norms = {"student_norm", "teacher_norm"}
    assert set(metrics) == {"distance", "cosine", "student_finite", "teacher_finite"} | norms
    assert not any(value.requires_grad for value in metrics.values())
    np.testing.assert_allclose(metrics["distance"], 1 - metrics["cosine"], rtol=1e-5)


def test_nothing_is_measured_unless_asked(loop, batch):
    loop.step(batch)
    assert loop.align.metrics == {}


# Precision


def test_autocast_reaches_the_teacher_also_outside_its_context(model, loss, batch):
    align = SelfAlignment(model, loss)
    dtypes = []
    align.teacher.blocks[0].mlp.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*seen(batch))
    term = align(*batch)
    assert set(dtypes) == {torch.bfloat16}
    assert term.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_full_precision(loop, batch, dtype):
    mixed = loop.twin()
    u = torch.rand(4)
    expected = loop.term(batch, u=u)
    with torch.autocast("cpu", dtype):
        term = mixed.term(batch, u=u)
    assert term.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in mixed.align.teacher.parameters())
    assert term.item() != expected.item()  # it did run in half precision
    torch.testing.assert_close(term, expected, rtol=0.05, atol=0.01)
