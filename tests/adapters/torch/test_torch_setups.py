"""The set-ups that people train in: each gives the numbers of the plain loop, or skips what they skip."""

import copy
import gc
import importlib.util
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers_models import FAMILIES
from dit_models import DiT, make_batch, seen
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from selfalign import SRALoss
from selfalign.adapters.torch import SelfAlignment


def gradients(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters()]


def assert_close(a, b, rtol=1e-4, atol=1e-6):
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


# -------------------------------------------------------------------------------- steps


def test_accumulated_gradients_are_those_of_the_whole_batch(make_loop, loss):
    x0, noise, t, y = make_batch(8)
    u = torch.rand(8)
    whole, halves = (make_loop(DiT(), loss) for _ in range(2))
    halves.model.load_state_dict(whole.model.state_dict())
    halves.align.projector.load_state_dict(whole.align.projector.state_dict())
    (whole.forward(x0, noise, t, y) + whole.align(x0, noise, t, y, u=u)).backward()
    for part in (slice(4), slice(4, 8)):
        batch = [tensor[part] for tensor in (x0, noise, t, y)]
        ((halves.forward(*batch) + halves.align(*batch, u=u[part])) / 2).backward()
    assert_close(gradients(whole.model, whole.align.projector), gradients(halves.model, halves.align.projector))
    for loop in (whole, halves):
        loop.optimizer.step()
        loop.align.update()
        assert loop.align.step == 1
    assert_close(whole.align.teacher.parameters(), halves.align.teacher.parameters(), atol=1e-4)  # AdamW's first step is a sign


class Checkpointed(DiT):
    def __init__(self, use_reentrant, **options):
        super().__init__(**options)
        self.use_reentrant = use_reentrant

    def forward(self, x, t, y):
        x, c = self.x_embedder(x), self.embed_time(t) + self.embed_label(y)
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=self.use_reentrant)
        return self.final_layer(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the teacher's, under no_grad
def test_both_kinds_of_checkpointing_give_the_same_gradients(make_loop, loss, batch, use_reentrant):
    plain, checkpointed = make_loop(DiT(), loss), make_loop(Checkpointed(use_reentrant), loss)
    checkpointed.model.load_state_dict(plain.model.state_dict())
    checkpointed.align.projector.load_state_dict(plain.align.projector.state_dict())
    u = torch.rand(4)
    for loop in (plain, checkpointed):
        (loop.forward(*batch) + loop.align(*batch, u=u)).backward()
    assert_close(gradients(plain.model, plain.align.projector), gradients(checkpointed.model, checkpointed.align.projector))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's, on its way to a hook
@pytest.mark.parametrize("what", ["model", "blocks", "step"])
def test_compiled_model_blocks_and_whole_step_give_the_same_gradients(make_loop, loss, batch, what):
    torch._dynamo.reset()
    plain, compiled = make_loop(DiT(), loss), make_loop(DiT(), loss)
    compiled.model.load_state_dict(plain.model.state_dict())
    compiled.align.projector.load_state_dict(plain.align.projector.state_dict())
    u = torch.rand(4)

    def step(loop, model):
        x_t, *condition = seen(batch)
        prediction = model(x_t, *condition)
        denoising = nn.functional.mse_loss(prediction, loop.align.path.velocity(*batch[:3]))
        return denoising + loop.align(*batch, u=u)

    run, model = step, compiled.model
    if what == "model":
        model = torch.compile(model, backend="aot_eager")
    elif what == "blocks":
        for block in model.blocks:
            block.compile(backend="aot_eager")
    else:
        run = torch.compile(step, backend="aot_eager")
    for _ in range(2):
        step(plain, plain.model).backward()
        run(compiled, model).backward()
    assert_close(gradients(plain.model, plain.align.projector), gradients(compiled.model, compiled.align.projector))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_full_precision(make_loop, loss, batch, dtype):
    plain, mixed = make_loop(DiT(), loss), make_loop(DiT(), loss)
    mixed.model.load_state_dict(plain.model.state_dict())
    mixed.align.projector.load_state_dict(plain.align.projector.state_dict())
    u = torch.rand(4)
    plain.forward(*batch)
    expected = plain.align(*batch, u=u)
    with torch.autocast("cpu", dtype):
        mixed.forward(*batch)
        term = mixed.align(*batch, u=u)
    assert term.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in mixed.align.teacher.parameters())
    torch.testing.assert_close(term, expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("writes_data", [False, True])
def test_a_step_that_the_scaler_skips_is_no_step_of_the_ema(loss, batch, writes_data):
    """Also with an optimizer that writes where torch does not count."""

    class DataSGD(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data = p.data - group["lr"] * p.grad

    model = DiT()
    align = SelfAlignment(model, loss)
    kind = DataSGD if writes_data else torch.optim.SGD
    optimizer = kind([*model.parameters(), *align.projector.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(sick=False):
        total = model(*seen(batch)).square().mean() + align(*batch)
        scaler.scale(total * (float("inf") if sick else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        align.update()

    step(sick=True)
    assert align.step == 0
    step()
    step()
    before = copy.deepcopy(align.teacher.state_dict())
    step(sick=True)
    assert align.step == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in align.teacher.state_dict().items())
    step()
    assert align.step == 3
    assert any(not torch.equal(before[name], tensor) for name, tensor in align.teacher.state_dict().items())


def test_a_step_of_an_optimizer_that_writes_past_the_counters_is_seen_with_a_projector_at_rest(loss, batch):
    model = DiT()
    align = SelfAlignment(model, loss)
    align.projector.requires_grad_(False)
    for step in range(1, 3):
        (model(*seen(batch)).square().mean() + align(*batch)).backward()
        for p in model.parameters():
            p.data = p.data - 0.1 * p.grad
        align.update()
        assert align.step == step


def test_a_term_on_every_second_step(make_loop, loss, batch):
    loop = make_loop(DiT(), loss)
    for step in range(4):
        total = loop.forward(*batch) + (loop.align(*batch) if step % 2 == 0 else 0)
        total.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.align.update()
    assert loop.align.step == 4


def test_validation_between_two_steps_changes_nothing(loss, batch):
    """Nor does a validation before the first step fix the teacher."""

    def run(validate):
        torch.manual_seed(0)
        model = DiT()
        align = SelfAlignment(model, loss, seed=1)
        optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
        terms = []
        for step in range(3):
            if validate:
                with torch.no_grad():
                    align_term(model, align, batch, u=None)
            if step == 0:
                model.load_state_dict({name: tensor + 0.01 for name, tensor in model.state_dict().items()})
            terms.append(align_term(model, align, batch, u=None))
            terms[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            align.update()
        return torch.stack(terms), align.state_dict()

    (first, state), (second, other) = run(False), run(True)
    assert torch.equal(first, second)
    assert state["terms"] == other["terms"] == 0


# --------------------------------------------------------------------------- frameworks


def plain_steps(model, align, batches, accumulate=1):
    """The loop that the frameworks' results are held against."""
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
    for n, batch in enumerate(batches, 1):
        ((model(*seen(batch)).square().mean() + align(*batch)) / accumulate).backward()
        if n % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            align.update()


@pytest.fixture
def twins(loss):
    """The same model twice, attached with the same draws."""
    torch.manual_seed(0)
    models = [DiT()]
    models.append(copy.deepcopy(models[0]))
    return [(model, SelfAlignment(model, loss, seed=1)) for model in models]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_gives_the_plain_loops_weights(twins, accumulate):
    from accelerate import Accelerator

    batches = [make_batch() for _ in range(4)]
    (plain, expected), (model, align) = twins
    plain_steps(plain, expected, batches, accumulate)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(*seen(batch)).square().mean() + align(*batch))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            align.update()
    assert align.step == expected.step == 4 // accumulate
    assert_close(align.teacher.parameters(), expected.teacher.parameters(), rtol=0, atol=0)
    assert_close(align.projector.parameters(), expected.projector.parameters(), rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore")  # Lightning's advice about loggers, workers and devices
def test_lightning_gives_the_plain_loops_weights(twins, accumulate, tmp_path):
    import lightning

    batches = [make_batch() for _ in range(4)]
    (plain, expected), (model, align) = twins
    plain_steps(plain, expected, batches, accumulate)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.align, self.projector = model, align, align.projector

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, index):
            return self.model(*seen(batch)).square().mean() + self.align(*batch)

        def on_train_batch_end(self, outputs, batch, index):
            if self.trainer.global_step > self.align.step:
                self.align.update()

    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulate, logger=False,
                                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                                default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))
    assert align.step == expected.step == 4 // accumulate
    assert_close(align.teacher.parameters(), expected.teacher.parameters(), rtol=0, atol=0)
    assert_close(align.projector.parameters(), expected.projector.parameters(), rtol=0, atol=0)


def test_teacher_and_projector_follow_a_model_that_moves_after_attaching(loss, batch):
    """As a trainer moves what was built on the CPU; "meta" stands for its device."""
    model = DiT()
    align = SelfAlignment(model, loss)
    align._ema.student = copy.deepcopy(model).to("meta")
    align._ema.start(trains=True)
    assert {p.device.type for p in align.teacher.parameters()} == {"meta"}
    align.projector.to("meta")
    model(*seen(batch))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # on its way back to the model
        align(*batch)


# ----------------------------------------------------------------------------- teachers


def test_lora_student_of_peft_shares_its_base(batch, loss):
    import peft

    model = peft.get_peft_model(DiT(), peft.LoraConfig(target_modules=["qkv", "proj"], r=2))
    align = SelfAlignment(model, loss)
    assert [path.rpartition("blocks.")[2] for path in align.taps] == ["1", "3"]
    students, teachers = dict(model.named_parameters()), dict(align.teacher.named_parameters())
    assert students.keys() == teachers.keys()
    for name, p in students.items():
        assert (teachers[name] is p) == (not p.requires_grad), name
    assert all("lora_" in name for name in align.state_dict()["teacher"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*trained, *align.projector.parameters()], lr=0.5)
    for _ in range(2):
        (model(*seen(batch)).square().mean() + align(*batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        align.update()
    moved = [name for name, p in students.items() if p.requires_grad and not torch.equal(p, teachers[name])]
    assert moved
    students[next(name for name in students if "lora_" not in name)].requires_grad_(True)
    (model(*seen(batch)).square().mean() + align(*batch)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"frozen when SelfAlignment was built must stay frozen.*which trains now.*unfreezing"):
        align.update()


def test_lora_by_peft_and_by_diffusers_own_adapters_on_flux():
    """Wrapped by PEFT, and with layers replaced inside the model: streams and lists are found either way."""
    import peft

    family = FAMILIES["FluxTransformer2DModel"]
    config = peft.LoraConfig(target_modules=["to_q", "to_v"], r=2)
    outer = peft.get_peft_model(family.build(), config)
    inner = family.build()
    inner.requires_grad_(False)
    inner.add_adapter(config)
    for model in (outer, inner):
        align = SelfAlignment(model, SRALoss(student_layer=2, teacher_layer=5))
        x0, condition = family.batch(2)
        noise, t = torch.randn_like(x0), torch.rand(2)
        model(hidden_states=align.path.add_noise(x0, noise, t), timestep=t, return_dict=False, **condition)
        align(x0, noise, t, loss_mask=torch.ones(2, family.tokens)).backward()
        assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)
        assert all("lora_" in name for name in align.state_dict()["teacher"])


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_blocks_wrapped_by_compile_before_attaching():
    torch._dynamo.reset()
    family = FAMILIES["Flux2Transformer2DModel"]
    model = family.build()
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for n in range(len(blocks)):
            blocks[n] = torch.compile(blocks[n], backend="eager")
    align = SelfAlignment(model, SRALoss(student_layer=4, teacher_layer=5))
    x0, condition = family.batch(2)
    noise, t = torch.randn_like(x0), torch.rand(2)
    model(hidden_states=align.path.add_noise(x0, noise, t), timestep=t, return_dict=False, **condition)
    align(x0, noise, t, loss_mask=torch.ones(2, family.tokens)).backward()
    assert model.transformer_blocks[0].attn.to_q.weight.grad.any()


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
    spec = importlib.util.spec_from_file_location("timm_model_ema", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    average = module.ModelEmaV3(model, decay=0.5)
    return average, lambda: average.update(model)


def build_diffusers(model):
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=0.5, min_decay=0.5)
    return average, lambda: average.step(model.parameters())


def build_plain(model):
    average = copy.deepcopy(model)

    def update():
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)

    return average, update


@pytest.mark.parametrize("build", [build_averaged, build_ema_pytorch, build_timm, build_diffusers, build_plain])
def test_an_ema_of_the_users_is_the_teacher(build, loss, batch):
    model = DiT()
    average, update = build(model)
    align = SelfAlignment(model, loss, teacher=average)
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.5)
    for _ in range(3):
        align_term(model, align, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        update()
        align.update()
    align_term(model, align, batch)
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        for p, shadow in zip(frozen.parameters(), averages(average), strict=True):
            p.copy_(shadow)
    assert_close(align.teacher.parameters(), frozen.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(frozen.parameters(), model.parameters(), strict=True))
    assert align.state_dict()["teacher"] == {}


def averages(average):
    if hasattr(average, "shadow_params"):
        return average.shadow_params
    inner = getattr(average, "ema_model", None) or getattr(average, "module", None) or average
    return list(inner.parameters())


HALFWAY = torch.full((4,), 0.5)


def align_term(model, align, batch, u=HALFWAY):
    model(*seen(batch))
    return align(*batch, u=u)


def test_diffusers_ema_is_followed_after_it_was_loaded(loss, batch):
    model = DiT()
    average, _ = build_diffusers(model)
    align = SelfAlignment(model, loss, teacher=average)
    align_term(model, align, batch)
    with torch.no_grad():
        average.load_state_dict({**average.state_dict(), "shadow_params": [p + 1 for p in average.shadow_params]})
    align_term(model, align, batch)
    assert_close(align.teacher.parameters(), average.shadow_params)


def test_a_float32_ema_beside_a_half_precision_model(loss):
    model = DiT()
    average = copy.deepcopy(model)
    batch = make_batch()
    expected = align_term(model, SelfAlignment(model, loss, teacher=average, seed=1), batch)
    half = copy.deepcopy(model).bfloat16()
    x0, noise, t, y = batch
    align = SelfAlignment(half, loss, teacher=average, seed=1)
    half(*seen((x0.bfloat16(), noise.bfloat16(), t, y)))
    term = align(x0.bfloat16(), noise.bfloat16(), t, u=torch.full((4,), 0.5))
    torch.testing.assert_close(term, expected, rtol=0.05, atol=0.02)
    term.backward()


@pytest.mark.parametrize(("dtype", "offload"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_an_ema_written_into_the_teacher_stays(loss, dtype, offload):
    batch = tuple(part.to(dtype) if part.is_floating_point() and part.ndim > 1 else part for part in make_batch())
    model, ema = DiT().to(dtype), DiT().to(dtype)
    align = SelfAlignment(model, loss, offload=offload)
    align.teacher.load_state_dict(ema.state_dict())
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
    align_term(model, align, batch).backward()
    optimizer.step()
    align.update()
    assert_close(align.teacher.parameters(), ema.parameters(), rtol=0, atol=0.01)


def test_what_a_copy_would_share_or_miss_is_refused(loss, batch):
    model = DiT()
    plain = model.blocks[2].forward
    model.blocks[2].forward = lambda *args: plain(*args)
    with pytest.raises(
        ValueError, match=r"functions that hold its weights.*blocks.2.forward, replaced by .*compile a block by"
    ):
        SelfAlignment(model, loss)
    del model.blocks[2].forward
    align = SelfAlignment(model, loss)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*Received: copy, deepcopy or pickle. Build a new one"):
        copy.deepcopy(align)
    model.to(torch.bfloat16)
    x0, noise, t, y = batch
    model(*seen((x0.bfloat16(), noise.bfloat16(), t, y)))
    with pytest.raises(ValueError, match=r"keep the dtype that .*torch.float32 then and torch.bfloat16 now. Convert the model"):
        align(x0.bfloat16(), noise.bfloat16(), t)
    model.float()
    nn.utils.parametrizations.weight_norm(model.blocks[0].proj)
    model(*seen(batch))
    with pytest.raises(
        ValueError, match=r"keep the parameters that .*no 'blocks.0.proj.weight' any more. Build .* after adding"
    ):
        align(*batch)


def test_extra_state_of_modules_is_no_tensor(loss, batch):
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


def test_names_behind_wrappers_are_matched(loss, batch):
    model = DiT()
    average = AveragedModel(torch.compile(model, backend="eager"))
    align = SelfAlignment(model, loss, teacher=average)
    assert align_term(model, align, batch).item() > 0


def test_teachers_that_cannot_be(loss, model):
    with pytest.raises(ValueError, match=r"kept in float32 at least.*Received: '.*' in half precision. Keep it in float32"):
        SelfAlignment(model, loss, teacher=copy.deepcopy(model).bfloat16())
    with pytest.raises(ValueError, match=r"teacher= must have the same tensors as this model. Received: 'blocks.5"):
        SelfAlignment(model, loss, teacher=AveragedModel(DiT(depth=5)))
    with pytest.raises(ValueError, match=r"a path, a module or an EMA around one. Received: int"):
        SelfAlignment(model, loss, teacher=5)
    from diffusers.training_utils import EMAModel

    with pytest.raises(ValueError, match=r"same tensors as this model. Received: \d+ tensors. Build EMAModel"):
        SelfAlignment(model, loss, teacher=EMAModel(DiT(depth=5).parameters()))


def test_a_truncated_teacher_gives_the_same_term_and_is_smaller(loss, batch):
    model = DiT()
    whole = SelfAlignment(model, loss, seed=1)
    expected = align_term(model, whole, batch)
    whole.detach()
    align = SelfAlignment(model, loss, seed=1, truncate=True)
    assert torch.equal(align_term(model, align, batch), expected)
    later = sum(p.numel() for block in model.blocks[4:] for p in block.parameters())
    assert sum(p.numel() for p in align.teacher.parameters()) == sum(p.numel() for p in model.parameters()) - later
    assert not any(name.startswith(("blocks.4", "blocks.5")) for name in align.state_dict()["teacher"])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        for p in align.projector.parameters():
            p.add_(1)
    align.update()
    with pytest.raises(ValueError, match=r"serves alignment only: it was cut after its layer.*without truncate=True"):
        align.teacher(*seen(batch))
    with pytest.raises(ValueError, match=r"truncate= cuts.*Received: no blocks after 'blocks.3'. Leave truncate= out"):
        SelfAlignment(DiT(), loss, student="blocks.1", teacher="blocks.3", truncate=True)
    with pytest.raises(ValueError, match=r"truncate= cuts.*Received: teacher= of yours"):
        SelfAlignment(model := DiT(), loss, teacher=copy.deepcopy(model), truncate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_ema_gives_the_same_numbers(loss, dtype):
    """On one device: that the averages are apart from the teacher, in float32, and that it follows them."""
    batch = tuple(part.to(dtype) if part.is_floating_point() and part.ndim > 1 else part for part in make_batch())
    torch.manual_seed(3)
    models = [DiT().to(dtype)]
    models.append(copy.deepcopy(models[0]))
    here, there = (SelfAlignment(m, loss, seed=1, offload=o) for m, o in zip(models, (False, True), strict=True))
    for model, align in zip(models, (here, there), strict=True):
        optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
        for _ in range(3):
            align_term(model, align, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            align.update()
    assert_close(here.teacher.parameters(), there.teacher.parameters(), rtol=0, atol=0)
    mine, theirs = here.state_dict()["teacher"], there.state_dict()["teacher"]
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    own = {p.data_ptr() for p in there.teacher.parameters()}
    assert not any(tensor.data_ptr() in own for tensor in theirs.values())


# ------------------------------------------------------------------------- leaving none


def count_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_a_hundred_steps_leave_no_hook_no_tensor_and_no_memory(loss, batch):
    model = DiT()
    with torch.no_grad():
        outputs = model(*seen(batch))
    alive = []

    def train(steps):
        align = SelfAlignment(model, loss)
        optimizer = torch.optim.SGD(align.projector.parameters(), lr=0.1)  # the model keeps its weights
        for _ in range(steps):
            align_term(model, align, batch).backward()
            optimizer.step()
            align.projector.zero_grad()
            model.zero_grad()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(align._watch, "sees_step", lambda: True)
                align.update()
            if len(alive) < 2 or align.step == steps:
                gc.collect()
                alive.append(count_tensors())
        align.detach()
        return weakref.ref(align), weakref.ref(align.teacher)

    gc.collect()
    before = count_tensors()
    references = train(100)
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert count_tensors() <= before  # what other tests left may go meanwhile
    assert alive[2] <= alive[1]  # not one tensor more from step to step
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(*seen(batch)), outputs)
