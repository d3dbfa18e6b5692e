"""One process of a distributed run: `torchrun distributed_loop.py SCENARIOS FOLDER`. Fails where numbers differ."""

import copy
import functools
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers_models import FAMILIES
from dit_models import DiT, make_batch, seen
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import selfalign
from selfalign.adapters.torch import SelfAlignment

LOSS = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=0.9)


def batch_of(step: int, rank: int | None = None):
    """The global batch of a step with draws for the gaps, or this process's half."""
    torch.manual_seed(100 + step)
    whole = (*make_batch(8), torch.rand(8))
    return whole if rank is None else tuple(part[4 * rank : 4 * rank + 4] for part in whole)


def train(model, align, steps, rank=None, forward=None, optimizer=None):
    optimizer = optimizer or torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
    for step in steps:
        *batch, u = batch_of(step, rank)
        prediction = (model if forward is None else forward)(*seen(batch))
        (prediction.square().mean() + align(*batch, u=u)).backward()
        optimizer.step()
        optimizer.zero_grad()
        align.update()


def full(tensors) -> list[torch.Tensor]:
    return [t.full_tensor() if hasattr(t, "full_tensor") else t.detach() for t in tensors]


def close(a, b, atol=1e-5):
    for mine, theirs in zip(full(a), full(b), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=atol)


def same_everywhere(tensors):
    for tensor in full(tensors):
        others = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(others, tensor.contiguous())
        assert all(torch.equal(tensor, other) for other in others)


def single(weight=0.5):
    """The same run in one process, on whole batches; from the weights of rank 0."""
    torch.manual_seed(0)
    model = DiT()
    align = SelfAlignment(model, selfalign.SRALoss(**{**LOSS.settings(), "weight": weight}), seed=7)
    return model, align


def ddp(rank, folder, weight=0.5):
    torch.manual_seed(rank)  # other weights on every process, until DDP makes them one
    model = DiT()
    align = SelfAlignment(model, selfalign.SRALoss(**{**LOSS.settings(), "weight": weight}), seed=7 + rank)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    plain, expected = single(weight)
    *batch, u = batch_of(0, rank)
    wrapped(*seen(batch))
    align(*batch, u=u)
    same_everywhere(align.teacher.parameters())  # at step 0
    close(align.teacher.parameters(), plain.parameters(), atol=0)
    wrapped(*seen(batch))
    draws = []
    original = type(LOSS).teacher_time
    type(LOSS).teacher_time = lambda self, t, u: draws.append(u) or original(self, t, u)
    align(*batch)
    type(LOSS).teacher_time = original
    gathered = [torch.empty(4) for _ in range(2)]
    distributed.all_gather(gathered, draws[0])
    assert not torch.equal(*gathered)  # gaps of their own
    align._terms = 0
    train(model, align, range(3), rank, wrapped)
    train(plain, expected, range(3))
    for mine, theirs in ((model, plain), (align.teacher, expected.teacher), (align.projector, expected.projector)):
        same_everywhere(mine.parameters())
        close(mine.parameters(), theirs.parameters())


def accelerate(rank, folder):
    from accelerate import Accelerator

    torch.manual_seed(rank)
    model = DiT()
    align = SelfAlignment(model, LOSS, seed=7)
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
    wrapped, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    train(model, align, range(3), rank, wrapped, optimizer)
    plain, expected = single()
    train(plain, expected, range(3))
    for mine, theirs in ((model, plain), (align.teacher, expected.teacher), (align.projector, expected.projector)):
        same_everywhere(mine.parameters())
        close(mine.parameters(), theirs.parameters())


def shard(model):
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def sharded(**options):
    torch.manual_seed(0)
    model = DiT()
    align = SelfAlignment(model, LOSS, seed=7, **options)
    shard(model)
    shard(align.teacher)
    return model, align


def fsdp(rank, folder):
    model, align = sharded()
    train(model, align, range(2), rank)
    assert all(hasattr(p, "to_local") for p in align.teacher.parameters())  # given back after each forward
    state = {"model": model.state_dict(), "align": align.state_dict()}
    dcp.save(state, checkpoint_id=folder)
    train(model, align, range(2, 4), rank)
    plain, expected = single()
    train(plain, expected, range(4))
    close(model.parameters(), plain.parameters())
    close(align.teacher.parameters(), expected.teacher.parameters())
    close(align.projector.parameters(), expected.projector.parameters())
    with torch.no_grad():
        *batch, _ = batch_of(0)
        torch.testing.assert_close(align.teacher(*seen(batch)), expected.teacher(*seen(batch)), rtol=1e-4, atol=1e-5)
    same_everywhere(align.projector.parameters())


def fsdp_meta(rank, folder):
    """Weights that come after sharding."""
    with torch.device("meta"):
        model = DiT()
    align = SelfAlignment(model, LOSS, seed=7)
    for part in (model, align.teacher):
        shard(part)
        part.to_empty(device="cpu")
    plain, expected = single()
    set_model_state_dict(model, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    train(model, align, range(3), rank)
    train(plain, expected, range(3))
    close(align.teacher.parameters(), expected.teacher.parameters())
    close(align.projector.parameters(), expected.projector.parameters())


def fsdp_diffusers(rank, folder):
    """DiT drops labels inside, and its blocks call into each other: sharded as a whole. Flux2's tokens stand behind text."""
    for name, lists in {"DiTTransformer2DModel": [], "Flux2Transformer2DModel": ["", "single_"]}.items():
        torch.manual_seed(0)
        family = FAMILIES[name]
        model, (x0, condition) = family.build(), family.batch(4)
        loss = selfalign.SRALoss(student_layer=2, teacher_layer=5)
        twin = copy.deepcopy(model)
        align, expected = SelfAlignment(model, loss, seed=7), SelfAlignment(twin, loss, seed=7)
        for part in (model, align.teacher):
            for which in lists:
                for block in getattr(part, f"{which}transformer_blocks"):
                    fully_shard(block)
            fully_shard(part)
        noise, t, u = torch.randn_like(x0), torch.rand(4), torch.rand(4)
        optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
        for step in range(2):
            inputs = {"hidden_states": loss.path.add_noise(x0, noise, t), "timestep": t, "return_dict": False, **condition}
            torch.manual_seed(step)  # the same dropped labels
            prediction = model(**inputs)[0]
            term = align(x0, noise, t, u=u)
            if step == 0:
                torch.manual_seed(step)
                twin(**inputs)
                torch.testing.assert_close(term, expected(x0, noise, t, u=u), rtol=1e-4, atol=1e-5)
            (prediction.square().mean() + term).backward()
            optimizer.step()
            align.update()
            assert all(hasattr(p, "to_local") for p in align.teacher.parameters())
        same_everywhere(align.teacher.parameters())


def fsdp_compiled(rank, folder):
    model, align = sharded(compile={"backend": "aot_eager"})
    train(model, align, range(3), rank, torch.compile(model, backend="aot_eager"))
    plain, expected = single()
    train(plain, expected, range(3))
    close(align.teacher.parameters(), expected.teacher.parameters())


def fsdp_resumed(rank, folder):
    """In another number of processes than those that wrote the folder: one."""
    torch.manual_seed(9)
    model = DiT()
    align = SelfAlignment(model, LOSS, seed=8)
    if distributed.get_world_size() > 1:
        shard(model), shard(align.teacher)
    state = {"model": model.state_dict(), "align": align.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    align.load_state_dict(state["align"])
    assert align.step == 2
    train(model, align, range(2, 4))
    plain, expected = single()
    train(plain, expected, range(4))
    close(model.parameters(), plain.parameters())
    close(align.teacher.parameters(), expected.teacher.parameters())


def forgotten(rank, folder):
    """A teacher that was not sharded."""
    torch.manual_seed(0)
    model = DiT()
    align = SelfAlignment(model, LOSS)
    shard(model)
    *batch, u = batch_of(0, rank)
    model(*seen(batch))
    with pytest.raises(
        ValueError, match=r"must be sharded as the model is.*Apply fully_shard to align.teacher in the same way"
    ):
        align(*batch, u=u)
    sharded_first = DiT()
    shard(sharded_first)
    with pytest.raises(ValueError, match=r"built before the model is sharded. Received: FSDPDiT after fully_shard. Build it"):
        SelfAlignment(sharded_first, LOSS)


SCENARIOS = {
    "ddp": ddp,
    "ddp-weight-0": functools.partial(ddp, weight=0.0),
    "accelerate": accelerate,
    "fsdp": fsdp,
    "fsdp-compiled": fsdp_compiled,
    "fsdp-diffusers": fsdp_diffusers,
    "fsdp-meta": fsdp_meta,
    "fsdp-resumed": fsdp_resumed,
    "forgotten": forgotten,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo")
    try:
        for name in sys.argv[1].split(","):
            SCENARIOS[name](distributed.get_rank(), Path(sys.argv[2]))
        print("ok")
    finally:
        distributed.destroy_process_group()
