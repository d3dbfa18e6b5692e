"""Accelerate and Lightning give the numbers of the plain loop."""

import copy

import pytest
import torch
from accelerate import Accelerator
from dit_models import DiT, make_batch, seen

from selfalign.adapters.torch import SelfAlignment


def make_optimizer(model, align):
    return torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)


@pytest.fixture(params=[1, 2])
def plain(request, loss):
    """A loop's start and end: the model, the batches, micro-batches per step, and the result."""
    accumulate = request.param
    model = DiT(depth=4)
    batches = [make_batch() for _ in range(4)]
    trained = copy.deepcopy(model)
    align = SelfAlignment(trained, loss, seed=1)
    optimizer = make_optimizer(trained, align)
    for n, batch in enumerate(batches, 1):
        total = trained(*seen(batch)).square().mean() + align(*batch)
        (total / accumulate).backward()
        if n % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            align.update()
    return model, batches, accumulate, align


def check_equal(align, expected):
    assert align.step == expected.step > 0
    for name in ("model", "teacher", "projector"):
        mine = getattr(align, name).parameters()
        theirs = getattr(expected, name).parameters()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), name


def test_accelerate_gives_the_plain_loops_weights(plain, loss):
    model, batches, accumulate, expected = plain
    align = SelfAlignment(model, loss, seed=1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, align))
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(*seen(batch)).square().mean() + align(*batch))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            align.update()
    check_equal(align, expected)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about loggers, workers and devices
def test_lightning_gives_the_plain_loops_weights(plain, loss, tmp_path):
    import lightning

    model, batches, accumulate, expected = plain
    align = SelfAlignment(model, loss, seed=1)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
            self.align = align
            self.projector = align.projector

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, index):
            return self.model(*seen(batch)).square().mean() + self.align(*batch)

        def on_train_batch_end(self, outputs, batch, index):
            if self.trainer.global_step > self.align.step:
                self.align.update()

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))
    check_equal(align, expected)
