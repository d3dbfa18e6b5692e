"""Which forward of the model is the student's, and what attaching leaves on the model."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from dit_models import DiT, hooks_on, make_batch, seen
from torch.utils.checkpoint import checkpoint

import selfalign
from selfalign.adapters.torch import SelfAlignment
from selfalign.adapters.torch.arguments import Arguments
from selfalign.adapters.torch.last_forward import check_last

LAYERSYNC = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4)
SRA = selfalign.SRALoss(student_layer=2, teacher_layer=4)


# One forward, one term


def test_align_before_forward_twice_and_after_two_forwards(loop, batch):
    message = r"forward must run before align\(\).*no output of blocks.1"
    with pytest.raises(ValueError, match=message):
        loop.align(*batch)
    loop.term(batch)
    with pytest.raises(ValueError, match=r"must run before align\(\).*since the last align"):
        loop.align(*batch)
    loop.forward(*batch)
    loop.forward(*batch)
    assert loop.align(*batch).item() > 0  # the last is this sample's
    assert loop.term(batch).item() > 0  # an error does not stay


class Failing(DiT):
    """Runs out of memory, in its last layer, when it is told to."""

    fails = False

    def forward(self, x, t, y):
        out = super().forward(x, t, y)
        if self.fails:
            raise torch.OutOfMemoryError("no memory")
        return out


def skip_forward(loop, batch):
    loop.forward(*batch)


def skip_term(loop, batch):
    loop.term(batch)


def skip_in_forward(loop, batch):
    loop.model.fails = True
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        loop.forward(*batch)
    loop.model.fails = False


def skip_in_backward(loop, batch):
    total = loop.forward(*batch) + loop.align(*batch)
    total.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        total.backward()


def accumulate_without_term(loop, batch):
    for _ in range(3):
        loop.forward(*make_batch()).backward()
    loop.optimizer.zero_grad()


def retry_after_sampling(loop, batch):
    loop.forward(*batch)
    with torch.no_grad():
        loop.forward(*make_batch(2))


SKIPS = [
    skip_forward,
    skip_term,
    skip_in_forward,
    skip_in_backward,
    accumulate_without_term,
    retry_after_sampling,
]


@pytest.mark.parametrize("loss", [SRA, LAYERSYNC], ids=["sra", "layersync"])
@pytest.mark.parametrize("skip", SKIPS)
def test_a_batch_that_is_skipped_changes_nothing(skip, loss, batch, make_loop):
    loop = make_loop(Failing(), loss)
    loop.step(batch)
    twin = loop.twin()
    twin.align.load_state_dict(loop.align.state_dict())
    skip(loop, make_batch())
    loop.optimizer.zero_grad()
    u = torch.rand(4)
    assert torch.equal(loop.term(batch, u=u), twin.term(batch, u=u))
    (loop.term(batch) + loop.forward(*batch)).backward()
    loop.optimizer.step()
    loop.align.update()
    assert loop.align.step == 2


@pytest.mark.parametrize("loss", [SRA, LAYERSYNC], ids=["sra", "layersync"])
def test_of_several_forwards_only_the_samples_own_is_aligned(loss, batch, make_loop):
    """The sample decides, also in half precision and scaled; a skipped pass holds no graph."""
    loop = make_loop(DiT(), loss)
    other = make_batch()
    loop.forward(*batch)
    first = weakref.ref(loop.align._recorder.passes[True])
    loop.forward(*other)
    assert first() is None
    message = (
        r"last forward must be that of the sample.*Received: 2 forwards with gradient .*no "
        r"(path.add_noise|mixture of x0).*right after the forward.*paused.*forget"
    )
    with pytest.raises(ValueError, match=message):
        loop.align(*batch)
    for _ in range(2):
        loop.forward(*other)
    assert loop.align(*other).item() > 0
    x_t, t, y = seen(batch)
    for sample in (x_t.bfloat16().float(), 0.5 * x_t):
        call = Arguments((sample, t, y))
        check_last(call, 2, [loss], *batch[:3])
    for sample in (x_t[:2], x_t + 0.1 * torch.randn_like(x_t), torch.zeros_like(x_t)):
        with pytest.raises(ValueError, match=r"last forward must be that of the sample"):
            check_last(Arguments((sample, t, y)), 2, [loss], *batch[:3])


class Ordered(DiT):
    """Runs its blocks in any order."""

    order = (0, 1, 2, 3)

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        for index in self.order:
            x = self.blocks[index](x, c)
        return self.final_layer(x)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1, 1, 3), r"once per align\(\).*blocks.1 ran 2 times in the model's last forward"),
        ((0, 3), r"forward must run before align\(\). Received: no output of blocks.1"),
    ],
)
def test_a_block_that_runs_twice_or_never(loss, batch, order, message):
    model = Ordered()
    model.order = order
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    with pytest.raises(ValueError, match=message):
        align(*batch)


def test_a_teachers_block_that_never_runs(loss, batch):
    model = Ordered()
    align = SelfAlignment(model, loss)
    model.order = align.teacher.order = (0, 1)
    model(*seen(batch))
    message = r"teacher's forward must reach its tapped block. Received: blocks.3 never ran"
    with pytest.raises(ValueError, match=message):
        align(*batch)


def test_frozen_student(model, loss, batch):
    align = SelfAlignment(model, loss)
    model.requires_grad_(False)
    model(*seen(batch))
    message = r"must carry a gradient. Received: features of blocks.1 without one"
    with pytest.raises(ValueError, match=message):
        align(*batch)


def test_gradient_accumulation_takes_one_term_per_forward(loop, batch):
    for _ in range(3):
        (loop.forward(*batch) + loop.align(*batch)).backward()
    loop.optimizer.step()
    loop.align.update()
    assert loop.align.step == 1


# Forwards that are not the student's


def test_forwards_without_gradient_between_steps_change_nothing(loop, batch):
    twin = loop.twin(seed=torch.initial_seed())
    for each in (loop, twin):
        for _ in range(2):
            if each is loop:
                with torch.no_grad():
                    loop.model(*seen(batch))
                    loop.align.teacher(*seen(batch))
            each.step(batch)
    for mine, theirs in zip(loop.parameters, twin.parameters, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("loss", [SRA, LAYERSYNC], ids=["sra", "layersync"])
def test_nor_between_the_students_forward_and_its_term(batch, make_loop, loss):
    """Sampling, with the model and with other inputs; a validation with its own term."""
    loop = make_loop(DiT(), loss)
    expected = loop.twin().term(batch, u=torch.zeros(4))
    loop.forward(*batch)
    other = make_batch(2)
    with torch.no_grad():
        loop.model(*seen(other))
        loop.model(*seen(other))
    with torch.inference_mode():
        loop.model(*seen(other))
    assert torch.equal(loop.align(*batch, u=torch.zeros(4)), expected)
    loop.forward(*batch)
    with torch.no_grad():
        loop.forward(*other)
        validated = loop.align(*other)
    assert not validated.requires_grad
    assert torch.equal(loop.align(*batch, u=torch.zeros(4)), expected)


def test_validation_under_no_grad_gives_the_term(loop, batch):
    with torch.no_grad():
        term = loop.term(batch)
    assert not term.requires_grad
    assert 0 < term.item() < 1


def test_validation_between_two_steps_changes_nothing(loss, batch):
    """Nor does a validation before the first step fix the teacher."""

    def run(validate):
        torch.manual_seed(0)
        model = DiT(depth=4)
        align = SelfAlignment(model, selfalign.SRALoss(student_layer=1, teacher_layer=3), seed=1)
        optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
        terms = []
        for step in range(3):
            if validate:
                with torch.no_grad():
                    model(*seen(batch))
                    align(*batch)
            if step == 0:
                state = model.state_dict()
                model.load_state_dict({name: tensor + 0.01 for name, tensor in state.items()})
            model(*seen(batch))
            terms.append(align(*batch))
            terms[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            align.update()
        return torch.stack(terms), align.state_dict()

    first, state = run(validate=False)
    second, other = run(validate=True)
    assert torch.equal(first, second)
    assert state["terms"] == other["terms"] == 0


def test_paused_forwards_are_not_the_students(loop, batch):
    """With gradient, as guidance needs it; nested, and after an error."""
    loop.forward(*batch)
    with loop.align.paused():
        loop.model(*seen(make_batch(2)))
        with loop.align.paused():
            pass
        loop.model(*seen(batch)).sum().backward()
    expected = loop.align(*batch, u=torch.zeros(4))
    with pytest.raises(RuntimeError, match="sampling failed"), loop.align.paused():
        raise RuntimeError("sampling failed")
    loop.forward(*batch)
    assert torch.equal(loop.align(*batch, u=torch.zeros(4)), expected)
    with loop.align.paused():
        loop.model(*seen(batch))
    with pytest.raises(ValueError, match=r"forward must run before align\(\)"):
        loop.align(*batch)


def test_forget_drops_a_forward_whose_batch_is_skipped(loop, batch):
    loop.forward(*batch)
    loop.align.forget()
    with pytest.raises(ValueError, match=r"forward must run before align\(\)"):
        loop.align(*batch)
    loop.forward(*batch)
    loop.align.forget()
    assert torch.isfinite(loop.step(batch))


def test_forget_after_a_forward_that_failed(batch, make_loop):
    """As for want of memory, in the middle of the model."""

    loop = make_loop(Failing(), SRA)
    loop.model.fails = True
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        loop.forward(*batch)
    loop.align.forget()
    loop.model.fails = False
    assert torch.isfinite(loop.step(batch))


def test_update_forgets_a_forward_without_term(loop, batch):
    for step in range(4):
        total = loop.forward(*batch)
        if step % 2 == 0:
            total = total + loop.align(*batch)
        total.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.align.update()
    assert loop.align.step == 4


# Checkpointing


class Checkpointed(DiT):
    """Checkpoints `span` blocks at a time."""

    def __init__(self, reentrant, span=1, **options):
        super().__init__(**options)
        self.reentrant = reentrant
        self.span = span

    def run(self, first, x, c):
        for block in self.blocks[first : first + self.span]:
            x = block(x, c)
        return x

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        for first in range(0, len(self.blocks), self.span):
            x = checkpoint(self.run, first, x, c, use_reentrant=self.reentrant)
        return self.final_layer(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the teacher's
@pytest.mark.parametrize("loss", [SRA, LAYERSYNC], ids=["sra", "layersync"])
@pytest.mark.parametrize(("reentrant", "span"), [(False, 1), (False, 3), (True, 1)])
def test_a_checkpointed_student_gets_the_same_gradients(batch, make_loop, loss, reentrant, span):
    plain = make_loop(DiT(), loss)
    checkpointed = make_loop(Checkpointed(reentrant, span), loss)
    checkpointed.model.load_state_dict(plain.model.state_dict())
    checkpointed.align.projector.load_state_dict(plain.align.projector.state_dict())
    u = torch.rand(4)
    expected = plain.gradients(batch, u=u)
    for mine, theirs in zip(checkpointed.gradients(batch, u=u), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
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
    """The tapped block lies inside a checkpoint, not at its end."""
    model = Checkpointed(reentrant=True, span=3)
    align = SelfAlignment(model, loss)
    model(*seen(batch))
    message = r"must carry a gradient. Received: features of blocks.1 without.*use_reentrant=False"
    with pytest.raises(ValueError, match=message):
        align(*batch)


# Attaching and detaching


def test_attaching_and_detaching_leaves_no_trace(model, loss, batch):
    names = list(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    output = model(*seen(batch))
    stream = torch.get_rng_state()
    with SelfAlignment(model, loss) as align:
        assert hooks_on(model) > 0
        assert torch.equal(torch.get_rng_state(), stream)
        assert list(model.state_dict()) == names
        assert torch.equal(model(*seen(batch)), output)
        align(*batch)
        assert torch.equal(torch.get_rng_state(), stream)
    assert hooks_on(model) == hooks_on(align.teacher) == 0
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


def test_second_attachment(model, loss):
    message = r"attached once.*a second SelfAlignment on DiT.*detach"
    with SelfAlignment(model, loss), pytest.raises(ValueError, match=message):
        SelfAlignment(model, loss)
    assert SelfAlignment(model, loss).step == 0


def test_after_detach(loop, batch):
    loop.align.detach()
    loop.forward(*batch)
    for call in (lambda: loop.align(*batch), loop.align.update):
        message = r"attached to its model. Received: a call after detach\(\)"
        with pytest.raises(ValueError, match=message):
            call()
    assert loop.align.teacher(*seen(batch)).shape == (4, 5, 4)


def test_an_alignment_cannot_be_copied(loop):
    message = r"cannot be copied or pickled.*Received: copy, deepcopy or pickle. Build a new one"
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=message):
            copied(loop.align)


def count_tensors():
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.fixture
def nothing_old():
    """What was there before is not looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("loss", [SRA, LAYERSYNC], ids=["sra", "layersync"])
def test_a_hundred_steps_leave_no_hook_no_tensor_and_no_memory(nothing_old, loss):
    torch.manual_seed(0)
    model = DiT(depth=4)
    batch = make_batch()
    with torch.no_grad():
        outputs = model(*seen(batch))
    alive = []

    def train(steps):
        align = SelfAlignment(model, loss)
        for step in range(steps):
            model(*seen(batch))
            align(*batch).backward()
            with torch.no_grad():
                for p in (*model.parameters(), *align.projector.parameters()):
                    p.add_(0.0)  # an optimizer's step that leaves the weights
                    p.grad = None
            align.update()
            if step in (1, steps - 1):
                alive.append(count_tensors())
        assert align.step == steps
        align.detach()
        teacher = [] if align.teacher is None else [weakref.ref(align.teacher)]
        return [weakref.ref(align), *teacher]

    before = count_tensors()
    references = train(100)
    assert count_tensors() <= before
    assert [reference() for reference in references] == [None] * len(references)
    assert alive[1] <= alive[0]  # not one tensor more from step to step
    assert hooks_on(model) == 0
    with torch.no_grad():
        assert torch.equal(model(*seen(batch)), outputs)
