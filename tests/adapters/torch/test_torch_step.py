"""What one step of SRA computes on a PyTorch model, and what it leaves alone."""

import copy
import pickle

import numpy as np
import oracle
import pytest
import torch
from dit_models import Block, DiT, PairBlock, TupleBlock, flops, seen
from torch.utils.checkpoint import checkpoint

import selfalign
from selfalign.adapters.torch import SelfAlignment


def features(model, layer, x, t, y):
    """By hand: the residual stream after block `layer`, counted from 1."""
    x, c = model.x_embedder(x), model.embed_time(t) + model.embed_label(y)
    for block in model.blocks[:layer]:
        x = block(x, c)
    return x


def test_term_is_the_papers_formula(model, loss, batch, make_loop):
    loop = make_loop(model, loss)
    loop.step(batch)  # teacher and student differ from here on
    x0, noise, t, y = batch
    u = torch.rand(4)
    loop.forward(*batch)
    term = loop.align(*batch, u=u)
    t_teacher = (t - 0.2 * u).clamp(min=0)
    a = t_teacher[:, None, None]
    with torch.no_grad():
        target = features(loop.align.teacher, 4, (1 - a) * x0 + a * noise, t_teacher, y)
        a = t[:, None, None]
        student = features(model, 2, (1 - a) * x0 + a * noise, t, y)
        params = {name: value.numpy() for name, value in loop.align.projector.named_parameters()}
    expected = 0.5 * np.mean(oracle.cosine(oracle.project(params, student.numpy()), target.numpy()))
    assert term.dtype == torch.float32
    assert term.shape == ()
    np.testing.assert_allclose(term.item(), expected, rtol=1e-5)


def test_teacher_is_an_exact_copy_in_eval_mode_without_gradient(model, loss):
    align = SelfAlignment(model, loss)
    for mine, theirs in zip(align.teacher.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    assert not align.teacher.training
    assert not any(p.requires_grad for p in align.teacher.parameters())


def test_stopped_teacher_gives_the_full_forwards_features(model, loss, batch):
    align = SelfAlignment(model, loss)
    outputs = []
    handle = align.teacher.blocks[3].register_forward_hook(lambda m, a, out: outputs.append(out))
    model(*seen(batch))
    align(*batch, u=torch.zeros(4))
    align.teacher(align.path.add_noise(*batch[:3]), *batch[2:])
    handle.remove()
    assert len(outputs) == 2
    assert torch.equal(*outputs)


def test_no_gradient_to_the_teacher_nor_to_later_blocks(loop, batch):
    loop.forward(*batch)
    loop.align(*batch).backward()
    assert all(p.grad is None for p in loop.align.teacher.parameters())
    assert all(p.grad is None for block in loop.model.blocks[2:] for p in block.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loop.model.blocks[1].mlp.parameters())
    assert all(p.grad is not None for p in loop.align.projector.parameters())


def test_same_layer_without_gap_or_projector_is_exactly_zero(model, batch):
    loss = selfalign.SRALoss(student_layer=3, teacher_layer=3, allow_same_layer=True, max_gap=0)
    align = SelfAlignment(model, loss)
    align.projector = torch.nn.Identity()
    model(align.path.add_noise(*batch[:3]), *batch[2:])
    assert align(*batch).item() == 0.0


@pytest.mark.parametrize("weight", [0, selfalign.schedules.Stop(0)])
def test_weight_zero_keeps_every_parameter_in_the_graph(model, batch, make_loop, weight):
    loop = make_loop(model, selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=weight))
    loop.forward(*batch)
    term = loop.align(*batch)
    term.backward()
    assert term.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in loop.align.projector.parameters())


def test_schedules_follow_the_optimizer_steps(model, batch, make_loop):
    loop = make_loop(model, selfalign.SRALoss(student_layer=2, teacher_layer=4, weight=selfalign.schedules.Stop(1)))
    terms = []
    for _ in range(2):
        denoising, alignment = loop.forward(*batch), loop.align(*batch)
        (denoising + alignment).backward()
        loop.optimizer.step()
        loop.align.update()
        terms.append(alignment.item())
    assert terms[0] > 0
    assert terms[1] == 0


def prefix_flops(model, layer, batch):
    return flops(lambda: features(model, layer, batch[0], *batch[2:]))


def test_teachers_compute_is_exactly_the_blocks_up_to_its_layer(model, loss, batch):
    align = SelfAlignment(model, loss)
    for _ in range(2):  # the first term as well: nothing is tried out on a model that draws nothing
        student = flops(lambda: model(align.path.add_noise(*batch[:3]), *batch[2:]))
        counted = flops(lambda: align(*batch))
        projector = flops(lambda: align.projector(torch.zeros(4, 5, 16)))
        assert counted == prefix_flops(model, 4, batch) + projector
        assert counted - projector < student
        align._watch.stepped()


def test_teachers_compute_on_diffusers_dit(diffusers_dit):
    loss = selfalign.SRALoss(student_layer=2, teacher_layer=4, path="discrete")
    align = SelfAlignment(diffusers_dit, loss)
    x0, t, y = torch.randn(2, 4, 8, 8), torch.randint(0, 1000, (2,)), torch.randint(0, 1000, (2,))
    noise = torch.randn_like(x0)
    whole = flops(lambda: diffusers_dit(loss.path.add_noise(x0, noise, t), t, y))
    counted = flops(lambda: align(x0, noise, t, y))
    projector = flops(lambda: align.projector(torch.zeros(2, 16, 32)))
    blocks = [flops(lambda block=block: block(torch.zeros(2, 16, 32), timestep=t, class_labels=y))
              for block in align.teacher.transformer_blocks]  # fmt: skip
    head = flops(lambda: (align.teacher.proj_out_1(torch.zeros(2, 32)), align.teacher.proj_out_2(torch.zeros(2, 16, 32))))
    head += flops(lambda: align.teacher.transformer_blocks[0].norm1.emb(t, y, hidden_dtype=torch.float32))
    assert counted - projector == whole - sum(blocks[4:]) - head


@pytest.mark.parametrize(("block", "options"), [(TupleBlock, {}), (PairBlock, {"select": lambda output: output[0]})])
def test_blocks_that_return_tuples(batch, make_loop, block, options):
    loop = make_loop(DiT(block=block), selfalign.SRALoss(student_layer=2, teacher_layer=4), **options)
    assert torch.isfinite(loop.step(batch))


def test_any_call_signature(loss, batch):
    class Keyword(DiT):
        def forward(self, *, hidden, timestep, label):
            return super().forward(hidden, timestep / 1000, label)

    model = Keyword()
    align = SelfAlignment(model, loss, call=lambda m, x, t, label: m(hidden=x, timestep=1000 * t, label=label))
    x0, noise, t, y = batch
    model(hidden=align.path.add_noise(x0, noise, t), timestep=1000 * t, label=y)
    assert 0 < align(x0, noise, t, label=y).item() < 1


def test_attaching_and_detaching_leaves_no_trace(model, loss, batch):
    names, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    output, stream = model(*seen(batch)), torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with SelfAlignment(model, loss) as align:
        assert torch.equal(torch.get_rng_state(), stream)
        assert list(model.state_dict()) == names
        assert torch.equal(model(*seen(batch)), output)
        align(*batch)
        assert torch.equal(torch.get_rng_state(), stream)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert list(model.state_dict()) == names
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
    assert torch.equal(model(*seen(batch)), output)


def test_copies_and_pickles_of_an_attached_model_are_free_of_it(model, loss, batch):
    align = SelfAlignment(model, loss)
    pickled = pickle.loads(pickle.dumps(model))
    output = model(*seen(batch))
    for other in (copy.deepcopy(model), pickled):
        assert torch.equal(other(*seen(batch)), output)
        with SelfAlignment(other, loss) as second:  # it counts as not attached
            other(*seen(batch))
            assert second(*batch).item() > 0
    assert align(*batch).item() > 0  # the first one has seen its own model's forward only


def test_gradient_accumulation_takes_one_term_per_forward(loop, batch):
    for _ in range(3):
        (loop.forward(*batch) + loop.align(*batch)).backward()
    loop.optimizer.step()
    loop.align.update()
    assert loop.align.step == 1


def test_sampling_between_steps_is_nobodys_business(loop, batch):
    with torch.no_grad():
        loop.model(*seen(batch))
    loop.step(batch)
    with torch.no_grad():
        loop.model(*seen(batch))
        loop.align.teacher(*seen(batch))
    loop.step(batch)
    assert loop.align.step == 2


def test_validation_under_no_grad_gives_the_term(loop, batch):
    with torch.no_grad():
        loop.forward(*batch)
        term = loop.align(*batch)
    assert not term.requires_grad
    assert 0 < term.item() < 1


class Checkpointed(DiT):
    """Checkpoints `span` blocks at a time."""

    def __init__(self, reentrant, span=1):
        super().__init__()
        self.reentrant, self.span = reentrant, span

    def run(self, first, x, c):
        for block in self.blocks[first : first + self.span]:
            x = block(x, c)
        return x

    def forward(self, x, t, y):
        x, c = self.x_embedder(x), self.embed_time(t) + self.embed_label(y)
        for first in range(0, len(self.blocks), self.span):
            x = checkpoint(self.run, first, x, c, use_reentrant=self.reentrant)
        return self.final_layer(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own, of the teacher under no_grad
@pytest.mark.parametrize(("reentrant", "span"), [(False, 1), (False, 3), (True, 1)])
def test_checkpointed_student_gets_the_same_gradients(loss, batch, make_loop, reentrant, span):
    plain = make_loop(DiT(), loss, seed=1)
    checkpointed = make_loop(Checkpointed(reentrant, span), loss, seed=1)
    checkpointed.model.load_state_dict(plain.model.state_dict())
    checkpointed.align.teacher.load_state_dict(plain.model.state_dict())
    for loop in (plain, checkpointed):
        (loop.forward(*batch) + loop.align(*batch)).backward()
    for a, b in zip(plain.parameters, checkpointed.parameters, strict=True):
        np.testing.assert_allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    checkpointed.optimizer.step()
    checkpointed.align.update()
    checkpointed.step(batch)
    assert checkpointed.align.step == 2


def test_recomputation_in_backward_is_not_a_forward(loss, batch, make_loop):
    loop = make_loop(Checkpointed(reentrant=False, span=3), loss)
    (loop.forward(*batch) + loop.align(*batch)).backward()
    with pytest.raises(ValueError, match=r"forward must run before align\(\)"):
        loop.align(*batch)


def test_reentrant_checkpointing_is_an_error_not_silence(loss, batch):
    model = Checkpointed(reentrant=True, span=3)  # the tapped block lies inside a checkpoint, not at its end
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"must carry a gradient. Received: features of blocks.1 without.*use_reentrant=False"):
        align(*batch)


def test_autocast_reaches_the_teacher_also_outside_its_context(model, loss, batch):
    align, dtypes = SelfAlignment(model, loss), []
    align.teacher.blocks[0].mlp.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*seen(batch))
    term = align(*batch)
    assert dtypes == [torch.bfloat16]
    assert term.dtype == torch.float32


def test_half_precision_student_has_a_float32_average(loss, batch, make_loop):
    loop = make_loop(DiT().to(torch.bfloat16), loss, lr=1e-3)
    assert {p.dtype for p in loop.align.projector.parameters()} == {torch.bfloat16}
    halves = [x.to(torch.bfloat16) if i < 2 else x for i, x in enumerate(batch)]
    term = loop.step(halves)
    assert torch.isfinite(term)
    average = loop.align.state_dict()["teacher"]["final_layer.weight"]
    before = average.clone()
    loop.step(halves)
    moved = (average - before).abs()
    assert average.dtype == torch.float32
    assert 0 < moved.max() < 1e-6  # below the resolution of bfloat16 at these weights: in bfloat16 it would stand still
    assert loop.align.teacher.final_layer.weight.dtype == torch.bfloat16


def test_update_equals_the_cores_ema(model, batch, make_loop):
    decay = selfalign.schedules.DecayWarmup(0.99)
    loop = make_loop(model, selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=decay))
    loop.step(batch)
    teacher = {name: p.clone() for name, p in loop.align.teacher.named_parameters()}
    loop.step(batch)
    expected = selfalign.ema_update(teacher, {n: p.detach() for n, p in model.named_parameters()}, decay(1))
    for name, parameter in loop.align.teacher.named_parameters():
        np.testing.assert_allclose(parameter, expected[name], rtol=1e-6, atol=1e-8)


def test_loss_uses_the_teacher_before_this_steps_update_and_buffers_follow(loss, batch, make_loop):
    model = DiT()
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    loop = make_loop(model, loss)
    model.count += 3
    loop.step(batch)
    assert loop.align.teacher.count == 3


def test_users_own_ema_is_used_and_left_alone(model, loss, batch, make_loop):
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, p, n: 0.5 * a + 0.5 * p)
    loop = make_loop(model, loss, teacher=average)
    assert loop.align.teacher is average.module
    before = copy.deepcopy(average.state_dict())
    loop.step(batch)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert loop.align.state_dict()["teacher"] == {}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's own, on its way to a hook
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_compiled_model_has_no_graph_break_and_the_same_numbers(loss, batch, make_loop, wrapped_first):
    eager, model = make_loop(DiT(label_dropout=0.0), loss, seed=1), DiT()
    model.load_state_dict(eager.model.state_dict())
    if wrapped_first:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        loop = make_loop(compiled, loss, seed=1)
    else:
        loop = make_loop(model, loss, seed=1)
        loop.model = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        np.testing.assert_allclose(loop.step(batch), eager.step(batch), rtol=1e-5)


def test_metrics_are_logged_without_gradient(model, loss, batch, make_loop):
    loop = make_loop(model, loss, log_metrics=True)
    loop.step(batch)
    assert set(loop.align.metrics) == {"distance", "cosine", "student_norm", "teacher_norm", "student_finite", "teacher_finite"}
    assert not any(value.requires_grad for value in loop.align.metrics.values())
    np.testing.assert_allclose(loop.align.metrics["distance"], 1 - loop.align.metrics["cosine"], rtol=1e-5)


def test_mask_and_seed(model, loss, batch):
    align = SelfAlignment(model, loss, seed=3)
    u, masked = torch.rand(4), torch.tensor([True, True, False, False])
    values = []
    for mask in (None, masked, ~masked):
        model(*seen(batch))
        values.append(align(*batch, u=u, loss_mask=mask).item())
    np.testing.assert_allclose(values[0], (values[1] + values[2]) / 2, rtol=1e-6)
    align.detach()
    again = SelfAlignment(model, loss, seed=3)
    assert torch.equal(again.projector.hidden_kernel, align.projector.hidden_kernel)


def test_a_sequential_is_its_own_block_list():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)))
    align = SelfAlignment(model, selfalign.SRALoss(student_layer=2, teacher_layer=4), call=lambda m, x, t: m(x))
    x0, noise, t = torch.randn(4, 5, 4), torch.randn(4, 5, 4), torch.rand(4)
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
