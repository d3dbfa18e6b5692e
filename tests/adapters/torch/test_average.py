"""The EMA that SelfAlignment keeps, and how: EMATeacher(dtype=, offload=, truncate=)."""

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch
from diffusers_models import FAMILIES
from dit_models import DiT, make_batch, seen
from torch import nn

import selfalign
from selfalign import SRALoss, schedules
from selfalign.adapters.torch import EMATeacher, SelfAlignment

QUICK = SRALoss(student_layer=2, teacher_layer=4, decay=0.9)


def of_dtype(batch, dtype):
    """The batch with its samples in a dtype."""
    x0, noise, *others = batch
    return x0.to(dtype), noise.to(dtype), *others


def train(align, steps=3, size=4, dtype=torch.float32, lr=0.1):
    """Some steps; their terms."""
    optimizer = torch.optim.SGD([*align.model.parameters(), *align.projector.parameters()], lr=lr)
    terms = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = of_dtype(make_batch(size), dtype)
        prediction = align.model(*seen(batch))
        terms.append(align(*batch))
        (prediction.float().square().mean() + terms[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        align.update()
    return torch.stack(terms).detach()


def equal(mine, theirs):
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_teacher_is_an_exact_copy_in_eval_mode_without_gradient(model, loss):
    teacher = SelfAlignment(model, loss).teacher
    states = zip(teacher.state_dict().values(), model.state_dict().values(), strict=True)
    for mine, theirs in states:
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_update_equals_the_cores_ema(model, batch, make_loop):
    decay = schedules.DecayWarmup(0.99)
    loop = make_loop(model, SRALoss(student_layer=2, teacher_layer=4, decay=decay))
    loop.step(batch)
    teacher = {name: p.clone() for name, p in loop.align.teacher.named_parameters()}
    loop.step(batch)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = selfalign.ema_update(teacher, weights, decay(1))
    for name, parameter in loop.align.teacher.named_parameters():
        np.testing.assert_allclose(parameter, expected[name], rtol=1e-6, atol=1e-8)


def test_the_average_moves_in_every_third_step_only(make_loop, batch):
    every = schedules.Every(3, 0.5)
    loop = make_loop(DiT(depth=4), SRALoss(student_layer=1, teacher_layer=3, decay=every))
    average = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    for step in range(1, 7):
        loop.step(batch)
        if step % 3 == 0:
            for name, p in loop.model.named_parameters():
                average[name] = average[name].lerp(p.detach(), 1 - 0.5**3)
        for name, p in loop.align.teacher.named_parameters():
            torch.testing.assert_close(p, average[name])
    assert loop.align.step == 6


def test_buffers_follow(loss, batch, make_loop):
    model = DiT()
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    loop = make_loop(model, loss)
    model.count += 3
    loop.step(batch)
    assert loop.align.teacher.count == 3


@pytest.mark.parametrize("part", ["teacher", "projector"])
def test_what_stands_beside_it_follows_a_model_that_moves_after_attaching(model, loss, batch, part):
    """As a trainer moves what was built on the CPU; "meta" stands for the place it was built in."""
    align = SelfAlignment(model, loss)
    getattr(align, part).to("meta")
    model(*seen(batch))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        align(*batch)  # on its way to the model's device


@pytest.mark.parametrize(
    ("dtype", "offload"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_an_ema_written_into_the_teacher_stays(loss, dtype, offload):
    batch = of_dtype(make_batch(), dtype)
    model = DiT().to(dtype)
    ema = DiT().to(dtype)
    align = SelfAlignment(model, loss, teacher=EMATeacher(offload=offload))
    align.teacher.load_state_dict(ema.state_dict())
    train(align, steps=1, dtype=dtype)
    for mine, theirs in zip(align.teacher.parameters(), ema.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.01)
    assert batch[0].dtype == dtype


# Half precision


def test_half_precision_student_has_a_float32_average(loss):
    """Its steps are below the resolution of bfloat16: in bfloat16 it would stand still."""
    align = SelfAlignment(DiT().to(torch.bfloat16), loss)
    assert {p.dtype for p in align.projector.parameters()} == {torch.bfloat16}
    assert torch.isfinite(train(align, steps=1, dtype=torch.bfloat16)).all()
    average = align.state_dict()["teacher"]["final_layer.weight"]
    before = average.clone()
    train(align, steps=1, dtype=torch.bfloat16, lr=1e-3)
    average = align.state_dict()["teacher"]["final_layer.weight"]
    moved = (average - before).abs()
    assert average.dtype == torch.float32
    assert 0 < moved.max() < 2e-5
    assert align.teacher.final_layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offload", [False, True])
def test_a_half_precision_teacher_has_float32_averages(dtype, offload):
    model = DiT(label_dropout=0.5)
    options = EMATeacher(dtype=dtype, offload=offload)
    wide = SelfAlignment(copy.deepcopy(model), QUICK, seed=3)
    narrow = SelfAlignment(model, QUICK, seed=3, teacher=options)
    expected = train(wide, lr=0.01)
    terms = train(narrow, lr=0.01)
    torch.testing.assert_close(terms, expected, rtol=0, atol=0.01)
    assert not torch.equal(terms, expected)  # it did run in half precision
    averages = narrow.state_dict()["teacher"]
    for name, average in wide.state_dict()["teacher"].items():
        parameter = narrow.teacher.get_parameter(name)
        torch.testing.assert_close(averages[name], average, rtol=1e-2, atol=2e-3)
        assert averages[name].dtype == torch.float32
        assert parameter.dtype == dtype
        assert torch.equal(parameter, averages[name].to(dtype))
    copied = SelfAlignment(DiT(), QUICK, teacher=options)
    copied.load_state_dict(narrow.state_dict())
    assert equal(copied.teacher.parameters(), narrow.teacher.parameters())


# Place in memory, and blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_ema_gives_the_same_numbers(loss, dtype):
    """On one device: that the averages are apart from the teacher, and that it follows them."""
    first = DiT().to(dtype)
    second = copy.deepcopy(first)
    here = SelfAlignment(first, loss, seed=1)
    there = SelfAlignment(second, loss, seed=1, teacher=EMATeacher(offload=True))
    assert torch.equal(train(here, dtype=dtype), train(there, dtype=dtype))
    assert equal(here.teacher.parameters(), there.teacher.parameters())
    mine = here.state_dict()["teacher"]
    theirs = there.state_dict()["teacher"]
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {average.dtype for average in theirs.values()} == {torch.float32}
    own = {p.data_ptr() for p in there.teacher.parameters()}
    assert not any(tensor.data_ptr() in own for tensor in theirs.values())


def test_a_truncated_teacher_gives_the_same_terms_and_is_smaller(loss, batch):
    model = DiT()
    expected = train(SelfAlignment(copy.deepcopy(model), loss, seed=1))
    align = SelfAlignment(model, loss, seed=1, teacher=EMATeacher(truncate=True))
    later = sum(p.numel() for block in model.blocks[4:] for p in block.parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in align.teacher.parameters()) == whole - later
    names = align.state_dict()["teacher"]
    assert not any(name.startswith(("blocks.4", "blocks.5")) for name in names)
    assert torch.equal(train(align), expected)
    message = r"serves alignment only: it was cut after its layer.*without truncate=True"
    with pytest.raises(ValueError, match=message):
        align.teacher(*seen(batch))


@pytest.mark.parametrize(
    "options", [{"loss": SRALoss(student_layer=2, teacher_layer=6)}, {"taps": True}]
)
def test_nothing_to_cut(options):
    loss = options.get("loss", QUICK)
    taps = ("blocks.1", "blocks.3") if "taps" in options else None
    message = r"truncate= cuts.*Received: no blocks that are known to run after it. Leave"
    with pytest.raises(ValueError, match=message):
        SelfAlignment(DiT(), loss, taps=taps, teacher=EMATeacher(truncate=True))


# EMATeacher itself


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"dtype": torch.float32},
            ValueError,
            r"dtype must be torch.bfloat16 or .* Received: torch.float32. Leave it out",
        ),
        ({"dtype": "bf16"}, ValueError, r"dtype must be torch.bfloat16 .* Received: bf16"),
        ({"batch_fraction": 0}, ValueError, r"batch_fraction must be in \[1e-12, 1\]. Received: 0"),
        ({"batch_fraction": 1.5}, ValueError, r"batch_fraction must be in .* Received: 1.5"),
        ({"batch_fraction": -1}, ValueError, r"batch_fraction must be in .* Received: -1"),
        ({"batch_fraction": "0.5"}, TypeError, r"batch_fraction must be a number. Received: '0.5'"),
        ({"truncate": 1}, TypeError, r"truncate must be True or False. Received: 1. Pass"),
        ({"offload": "cpu"}, TypeError, r"offload must be True or False. Received: 'cpu'"),
        *[
            (
                {"model": nn.Identity(), **option},
                ValueError,
                r"are for a teacher that SelfAlignment keeps. Received: EMATeacher\(.*Leave them",
            )
            for option in ({"dtype": torch.bfloat16}, {"offload": True}, {"truncate": True})
        ],
    ],
)
def test_settings_that_cannot_be(options, kind, message):
    with pytest.raises(kind, match=message):
        EMATeacher(**options)


def test_settings_are_frozen_and_by_name():
    teacher = EMATeacher(truncate=True)
    with pytest.raises(dataclasses.FrozenInstanceError, match="truncate"):
        teacher.truncate = False
    with pytest.raises(TypeError, match="positional"):
        EMATeacher(torch.bfloat16)


@pytest.mark.parametrize("given", [EMATeacher(), EMATeacher(batch_fraction=0.5), DiT()])
def test_a_teacher_for_objectives_that_have_none(model, given):
    message = (
        r"teacher= is for objectives with an EMA teacher. Received: a \w+, and no such objective"
    )
    loss = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4)
    with pytest.raises(ValueError, match=message):
        SelfAlignment(model, loss, teacher=given)


# What is frozen


def test_lora_student_of_peft_has_its_base_in_common_with_the_teacher(batch, loss):
    model = peft.get_peft_model(DiT(), peft.LoraConfig(target_modules=["qkv", "proj"], r=2))
    align = SelfAlignment(model, loss)
    assert [path.rpartition("blocks.")[2] for path in align.taps] == ["1", "3"]
    students = dict(model.named_parameters())
    teachers = dict(align.teacher.named_parameters())
    assert students.keys() == teachers.keys()
    for name, p in students.items():
        assert (teachers[name] is p) == (not p.requires_grad), name
    assert all("lora_" in name for name in align.state_dict()["teacher"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*trained, *align.projector.parameters()], lr=0.5)

    def step():
        (model(*seen(batch)).square().mean() + align(*batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
        align.update()
    moved = [n for n, p in students.items() if not torch.equal(p, teachers[n])]
    assert moved
    assert all(students[name].requires_grad for name in moved)
    students[next(name for name in students if "lora_" not in name)].requires_grad_(True)
    step()
    message = r"frozen when SelfAlignment was built must stay frozen.*which trains now.*unfreezing"
    with pytest.raises(ValueError, match=message):
        align.update()


@pytest.mark.parametrize("wrapped", [True, False])
def test_lora_by_peft_and_by_diffusers_own_adapters_on_flux(wrapped):
    """Wrapped by PEFT, and with layers replaced inside the model: all is found either way."""
    family = FAMILIES["FluxTransformer2DModel"]
    config = peft.LoraConfig(target_modules=["to_q", "to_v"], r=2)
    model = family.build()
    if wrapped:
        model = peft.get_peft_model(model, config)
    else:
        model.requires_grad_(False)
        model.add_adapter(config)
    align = SelfAlignment(model, SRALoss(student_layer=2, teacher_layer=3))
    x0, condition = family.batch(2)
    noise = torch.randn_like(x0)
    t = torch.rand(2)
    x_t = align.path.add_noise(x0, noise, t)
    model(hidden_states=x_t, timestep=t, return_dict=False, **condition)
    align(x0, noise, t, loss_mask=torch.ones(2, family.tokens)).backward()
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert any(p.grad is not None and p.grad.any() for p in adapters)
    assert all("lora_" in name for name in align.state_dict()["teacher"])


# Models that change after attaching


def test_a_compiled_function_that_holds_the_models_weights_is_refused(model, loss):
    model.blocks[2].forward = torch.compile(model.blocks[2].forward, backend="eager")
    message = r"functions that hold its weights.*blocks.2.forward, replaced by .*compile a block by"
    with pytest.raises(ValueError, match=message):
        SelfAlignment(model, loss)


def test_another_dtype_than_at_first(model, loss, batch):
    align = SelfAlignment(model, loss)
    x0, noise, t, y = of_dtype(batch, torch.bfloat16)
    model.to(torch.bfloat16)(*seen((x0, noise, t, y)))
    message = r"keep the dtype that .*torch.float32 then and torch.bfloat16 now. Convert the model"
    with pytest.raises(ValueError, match=message):
        align(x0, noise, t)


def test_parameters_that_are_gone(model, loss, batch):
    align = SelfAlignment(model, loss)
    nn.utils.parametrizations.weight_norm(model.blocks[0].proj)
    model(*seen(batch))
    message = (
        r"keep the parameters that .*no 'blocks.0.proj.weight' any more. Build .* after adding"
    )
    with pytest.raises(ValueError, match=message):
        align(*batch)


def test_weights_that_are_replaced_are_followed(loop, batch):
    """A module put in another's place: the average moves toward the new weights."""
    loop.step(batch)
    loop.model.final_layer = nn.Linear(16, 4)
    loop.optimizer.add_param_group({"params": list(loop.model.final_layer.parameters())})
    before = loop.align.teacher.final_layer.weight.clone()
    loop.step(batch)
    expected = before.lerp(loop.model.final_layer.weight.detach(), 1e-4)
    torch.testing.assert_close(loop.align.teacher.final_layer.weight, expected)


def test_extra_state_of_modules_is_no_tensor(loss):
    class Extra(DiT):
        def get_extra_state(self):
            return {"scale": 1.0}

        def set_extra_state(self, state):
            pass

    model = Extra()
    align = SelfAlignment(model, loss)
    align.load_state_dict(align.state_dict())
    align.detach()
    assert SelfAlignment(model, loss, teacher=copy.deepcopy(model)).step == 0
