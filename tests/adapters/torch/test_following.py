"""An EMA of the user's as the teacher: read, and never written to."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from dit_models import DiT, make_batch, seen
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from selfalign.adapters.torch import EMATeacher, SelfAlignment

HALFWAY = torch.full((4,), 0.5)


def take_term(align, batch):
    align.model(*seen(batch))
    return align(*batch, u=HALFWAY)


def build_averaged(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return average, lambda: average.update_parameters(model)


def build_ema_pytorch(model):
    import ema_pytorch

    average = ema_pytorch.EMA(model, beta=0.5, update_after_step=0, update_every=1)
    return average, average.update


def build_timm(model):
    """timm cannot be imported without torchvision; its EMA's own file needs neither."""
    file = Path(sys.prefix) / "apart" / "timm" / "utils" / "model_ema.py"
    specification = importlib.util.spec_from_file_location("timm_model_ema", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    average = module.ModelEmaV3(model, decay=0.5)
    return average, lambda: average.update(model)


def build_diffusers(model):
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    return average, lambda: average.step(model.parameters())


def build_plain(model):
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update():
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)

    return average, update


BUILDERS = [build_averaged, build_ema_pytorch, build_timm, build_diffusers, build_plain]


def values_of(average):
    """The averages inside an EMA."""
    if hasattr(average, "shadow_params"):
        return average.shadow_params
    inner = getattr(average, "ema_model", None) or getattr(average, "module", None) or average
    return list(inner.parameters())


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_ema_of_the_users_is_the_teacher(build, wrapped, loss, batch):
    """As it is, or as the model of EMATeacher."""
    model = DiT(depth=4)
    average, update = build(model)
    align = SelfAlignment(model, loss, teacher=EMATeacher(model=average) if wrapped else average)
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.5)
    for _ in range(3):
        take_term(align, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        update()
        align.update()
    before = [value.clone() for value in values_of(average)]
    term = take_term(align, batch)
    pairs = zip(align.teacher.parameters(), values_of(average), before, strict=True)
    for mine, theirs, earlier in pairs:
        assert torch.equal(mine, theirs)
        assert torch.equal(theirs, earlier)
    students = list(model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(students, before, strict=True))
    with torch.no_grad():  # the term is that of these weights
        for p in align.teacher.parameters():
            p.add_(0.5)
    assert not torch.equal(take_term(align, batch), term)
    assert align.state_dict()["teacher"] == {}
    assert align.step == 3


def test_it_is_left_alone_with_its_buffers_and_modes(model, loss, batch, make_loop):
    average = AveragedModel(model, avg_fn=lambda a, p, n: 0.5 * a + 0.5 * p)
    average.module.blocks[1].eval()
    modes = [module.training for module in average.modules()]
    loop = make_loop(model, loss, teacher=average)
    assert loop.align.teacher is average.module
    before = copy.deepcopy(average.state_dict())
    loop.step(batch)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert [module.training for module in average.modules()] == modes


def test_diffusers_ema_is_followed_after_it_was_loaded(model, loss, batch):
    average, _ = build_diffusers(model)
    align = SelfAlignment(model, loss, teacher=average)
    take_term(align, batch)
    with torch.no_grad():
        shadow = [p + 1 for p in average.shadow_params]
    average.load_state_dict({**average.state_dict(), "shadow_params": shadow})
    take_term(align, batch)
    for mine, theirs in zip(align.teacher.parameters(), average.shadow_params, strict=True):
        assert torch.equal(mine, theirs)


def test_a_float32_ema_beside_a_half_precision_model(model, loss):
    average = copy.deepcopy(model)
    x0, noise, t, y = make_batch()
    whole = SelfAlignment(copy.deepcopy(model), loss, teacher=average, seed=1)
    expected = take_term(whole, (x0, noise, t, y))
    half = copy.deepcopy(model).bfloat16()
    align = SelfAlignment(half, loss, teacher=average, seed=1)
    half(*seen((x0.bfloat16(), noise.bfloat16(), t, y)))
    term = align(x0.bfloat16(), noise.bfloat16(), t, u=HALFWAY)
    torch.testing.assert_close(term, expected, rtol=0.05, atol=0.02)
    term.backward()


def test_names_behind_wrappers_are_matched(model, loss, batch):
    average = AveragedModel(torch.compile(model, backend="eager"))
    align = SelfAlignment(model, loss, teacher=average)
    assert take_term(align, batch).item() > 0


# One that never moves


def run(align, steps, update=lambda step: None, lr=0.1):
    optimizer = torch.optim.SGD([*align.model.parameters(), *align.projector.parameters()], lr=lr)
    batch = make_batch()
    for step in range(steps):
        take_term(align, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        update(step)
        align.update()


@pytest.mark.parametrize("build", BUILDERS)
def test_an_ema_that_is_never_updated_is_warned_about_once(build, loss):
    align = SelfAlignment(DiT(depth=4), loss, teacher=build(DiT(depth=4))[0])
    run(align, 19)
    with pytest.warns(
        UserWarning, match=r"kept up to date. Received: an EMA that is what it was 20"
    ):
        run(align, 1)
    run(align, 21)


def build_late(model):
    """Updated in every tenth step, and not averaged before the hundredth."""
    import ema_pytorch

    average = ema_pytorch.EMA(model, beta=0.5, update_after_step=100, update_every=50)
    return average, average.update


def build_late_diffusers(model):
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), update_after_step=100)
    return average, lambda: average.step(model.parameters())


def build_unseen(model):
    """By hand, past the counters of writes, and seldom."""
    average = copy.deepcopy(model)
    calls = []

    def update():
        calls.append(1)
        if len(calls) % 15 == 0:
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.data = mine.data.lerp(theirs.data, 1e-4)

    return average, update


@pytest.mark.parametrize("build", [*BUILDERS, build_late, build_late_diffusers, build_unseen])
def test_one_that_is_updated_in_its_own_way_is_not(build, loss):
    model = DiT(depth=4)
    average, update = build(model)
    run(SelfAlignment(model, loss, teacher=average), 25, lambda step: update())


def test_nor_one_beside_a_model_that_stands_still(loss):
    model = DiT(depth=4)
    run(SelfAlignment(model, loss, teacher=copy.deepcopy(model)), 25, lr=0.0)


# What is refused


def test_emas_that_cannot_be(model, loss):
    from diffusers.training_utils import EMAModel

    wrong = (
        (copy.deepcopy(model).bfloat16(), r"float32 at least.*Received: '.*' in half precision"),
        (AveragedModel(DiT(depth=5)), r"must have the same tensors .* Received: 'blocks.5"),
        (DiT(depth=8), r"teacher= must have the same tensors as this model. Received: 'blocks.6"),
        (5, r"must be an EMATeacher, a module, or an EMA around one. Received: int 5. Pass"),
        (
            EMAModel(DiT(depth=5).parameters()),
            r"same tensors as this model. Received: \d+ tensors. Build EMAModel",
        ),
        ("blocks.3", r"EMATeacher or an EMA of yours. Received: teacher='blocks.3'. Pass .*taps="),
        ("path", r"EMATeacher or an EMA of yours. Received: teacher='path'"),
    )
    for teacher, message in wrong:
        with pytest.raises(ValueError, match=message):
            SelfAlignment(model, loss, teacher=teacher)
        assert not model._forward_pre_hooks


def test_the_model_itself_is_no_teacher(model, loss):
    """Bare, or in a wrapper that shares its weights."""
    message = (
        r"must be another model than the student. Received: teacher=model. For .*"
        r"LayerSyncLoss, with projector=True .* SRALoss\(decay=0\)"
    )
    wrapped = torch.nn.DataParallel(model)
    compiled = torch.compile(model, backend="eager")
    for teacher in (model, wrapped, compiled, EMATeacher(model=model)):
        with pytest.raises(ValueError, match=message):
            SelfAlignment(model, loss, teacher=teacher)
