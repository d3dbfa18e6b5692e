"""One process of a distributed run: `python distributed_loop.py FOLDER RANK PROCESSES`.

Each scenario holds the numbers of all processes together against a run in one process, on whole
batches. It fails where they differ.
"""

import copy
import datetime
import gc
import itertools
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers_models import FAMILIES
from dit_models import DiT, UnknownWidth, make_batch, seen
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import selfalign
from selfalign.adapters.torch import SelfAlignment

LAYERS = {"student_layer": 1, "teacher_layer": 3}
LOSS = selfalign.SRALoss(**LAYERS, decay=0.9)
LAYERSYNC = selfalign.LayerSyncLoss(**LAYERS, projector=True)


# The user's loop


def batch_of(step: int, rank: int | None = None):
    """The global batch of a step with draws for the gaps, or this process's half."""
    torch.manual_seed(100 + step)
    whole = (*make_batch(8), torch.rand(8))
    return whole if rank is None else tuple(part[4 * rank : 4 * rank + 4] for part in whole)


def train(align, steps, rank=None, forward=None, optimizer=None, every=1):
    """Steps of the user's loop; the term in every so many of them."""
    model = align.model
    forward = model if forward is None else forward
    if optimizer is None:
        parameters = [*model.parameters(), *align.projector.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in steps:
        *batch, u = batch_of(step, rank)
        total = forward(*seen(batch)).square().mean()
        if step % every == 0:
            total = total + align(*batch, u=u)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        align.update()


def alone(loss=LOSS, kind=DiT):
    """The same run in one process; from the weights of rank 0."""
    torch.manual_seed(0)
    return SelfAlignment(kind(depth=4), loss, seed=7)


# What is compared


def full(tensors) -> list[torch.Tensor]:
    return [t.full_tensor() if hasattr(t, "full_tensor") else t.detach() for t in tensors]


def close(a, b, atol=1e-5):
    for mine, theirs in zip(full(a), full(b), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=atol)


def gathered(tensor) -> list[torch.Tensor]:
    found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, tensor.contiguous())
    return found


def same_everywhere(tensors):
    for tensor in full(tensors):
        assert all(torch.equal(tensor, other) for other in gathered(tensor))


def same_run(align, expected, everywhere=True):
    """Model, teacher and heads are those of the run in one process."""
    parts = [(align.model, expected.model), (align.projector, expected.projector)]
    if align.teacher is not None:
        parts.append((align.teacher, expected.teacher))
    for mine, theirs in parts:
        close(mine.parameters(), theirs.parameters())
        if everywhere:
            same_everywhere(mine.parameters())


def gaps_of(align, rank, forward):
    """The gaps of one call without draws of the caller's."""
    times = []
    teacher = align.teacher
    handle = teacher.register_forward_pre_hook(lambda module, args: times.append(args[1]))
    x0, noise, t, y, _ = batch_of(0, rank)
    t = 0.5 + t / 2  # far from the data's end
    forward(*seen((x0, noise, t, y)))
    align(x0, noise, t)
    handle.remove()
    return t - times[-1]  # the first steps look at more before


# DDP


def ddp(rank, folder, loss=LOSS, kind=DiT):
    torch.manual_seed(rank)  # other weights on every process, until DDP makes them one
    align = SelfAlignment(kind(depth=4), loss, seed=7 + rank)
    wrapped = DistributedDataParallel(align.model, find_unused_parameters=False)
    expected = alone(loss, kind)
    if align.teacher is not None:
        *batch, u = batch_of(0, rank)
        wrapped(*seen(batch))
        align(*batch, u=u)
        same_everywhere(align.teacher.parameters())  # at step 0
        close(align.teacher.parameters(), expected.model.parameters(), atol=0)
        assert not torch.equal(*gathered(gaps_of(align, rank, wrapped)))  # gaps of their own
    train(align, range(3), rank, wrapped)
    train(expected, range(3))
    same_run(align, expected)


def ddp_weight_0(rank, folder):
    ddp(rank, folder, selfalign.SRALoss(**LAYERS, decay=0.9, weight=0.0))


def ddp_layersync(rank, folder):
    ddp(rank, folder, LAYERSYNC)


def ddp_list(rank, folder):
    ddp(rank, folder, [LOSS, LAYERSYNC])


def ddp_width_at_the_first_forward(rank, folder):
    """The head gets its parameters late, and has the mean of all gradients all the same."""
    ddp(rank, folder, kind=UnknownWidth)


def ddp_resumed(rank, folder):
    """Also with a head that gets its parameters from the state."""
    expected = alone(kind=UnknownWidth)
    train(expected, range(4))
    first = alone(kind=UnknownWidth)
    train(first, range(2))
    state = copy.deepcopy({"model": first.model.state_dict(), "align": first.state_dict()})
    align = SelfAlignment(UnknownWidth(depth=4), LOSS, seed=rank)
    align.model.load_state_dict(state["model"])
    align.load_state_dict(state["align"])
    wrapped = DistributedDataParallel(align.model, find_unused_parameters=False)
    assert not torch.equal(*gathered(gaps_of(align, rank, wrapped)))
    train(align, range(2, 4), rank, wrapped)
    same_run(align, expected)


def accelerate(rank, folder):
    from accelerate import Accelerator

    torch.manual_seed(rank)
    align = SelfAlignment(DiT(depth=4), LOSS, seed=7)
    parameters = [*align.model.parameters(), *align.projector.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    wrapped, optimizer = Accelerator(cpu=True).prepare(align.model, optimizer)
    train(align, range(3), rank, wrapped, optimizer)
    expected = alone()
    train(expected, range(3))
    same_run(align, expected)


# FSDP2


def shard(model):
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def sharded(loss=LOSS, **options):
    torch.manual_seed(0)
    model = DiT(depth=4)
    align = SelfAlignment(model, loss, seed=7, **options)
    shard(model)
    if align.teacher is not None:
        shard(align.teacher)
    return align


def fsdp(rank, folder):
    align = sharded()
    train(align, range(2), rank)
    # given back after each forward
    assert all(hasattr(p, "to_local") for p in align.teacher.parameters())
    state = {"model": align.model.state_dict(), "align": align.state_dict()}
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    train(align, range(2, 4), rank)
    expected = alone()
    train(expected, range(4))
    same_run(align, expected)
    with torch.no_grad():
        *batch, _ = batch_of(0)
        mine = align.teacher(*seen(batch))
        torch.testing.assert_close(mine, expected.teacher(*seen(batch)), rtol=1e-4, atol=1e-5)


def fsdp_resumed(rank, folder):
    """In another number of processes than those that wrote the checkpoint."""
    torch.manual_seed(9)
    align = SelfAlignment(DiT(depth=4), LOSS, seed=8)
    state = {"model": align.model.state_dict(), "align": align.state_dict()}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    align.model.load_state_dict(state["model"])
    align.load_state_dict(state["align"])
    assert align.step == 2
    train(align, range(2, 4))
    expected = alone()
    train(expected, range(4))
    same_run(align, expected, everywhere=False)


def fsdp_memory(rank, folder):
    """Sharding frees the model's own weights, and a step without term is no surprise."""
    torch.manual_seed(0)
    model = DiT(depth=4)
    align = SelfAlignment(model, LOSS, seed=7)
    whole = [weakref.ref(p) for p in (*model.parameters(), *align.teacher.parameters())]
    shard(model)
    shard(align.teacher)
    gc.collect()
    assert not any(reference() is not None for reference in whole)
    train(align, range(4), rank, every=2)
    assert align.step == 4
    expected = alone()
    train(expected, range(4), every=2)
    same_run(align, expected)


def fsdp_layersync(rank, folder):
    align = sharded(LAYERSYNC)
    train(align, range(3), rank)
    expected = alone(LAYERSYNC)
    train(expected, range(3))
    same_run(align, expected)


def fsdp_meta(rank, folder):
    """Weights that come after sharding."""
    with torch.device("meta"):
        model = DiT(depth=4)
    align = SelfAlignment(model, LOSS, seed=7)
    for part in (model, align.teacher):
        shard(part)
        part.to_empty(device="cpu")
    expected = alone()
    weights = expected.model.state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    train(align, range(3), rank)
    train(expected, range(3))
    same_run(align, expected)


def fsdp_compiled(rank, folder):
    align = sharded(compile={"backend": "eager"})
    train(align, range(3), rank, torch.compile(align.model, backend="eager"))
    expected = alone()
    train(expected, range(3))
    same_run(align, expected)


def fsdp_diffusers(rank, folder):
    """DiT drops labels inside, and its blocks call into each other: sharded as a whole.

    Flux2's tokens stand behind text.
    """
    lists = {
        "DiTTransformer2DModel": [],
        "Flux2Transformer2DModel": ["transformer_blocks", "single_transformer_blocks"],
    }
    for name, paths in lists.items():
        torch.manual_seed(0)
        family = FAMILIES[name]
        model = family.build()
        x0, condition = family.batch(4)
        noise = torch.randn_like(x0)
        t = torch.rand(4)
        u = torch.rand(4)
        loss = selfalign.SRALoss(student_layer=1, teacher_layer=max(2, family.depth - 1))
        twin = copy.deepcopy(model)
        align = SelfAlignment(model, loss, seed=7)
        expected = SelfAlignment(twin, loss, seed=7)
        for part in (model, align.teacher):
            for block in itertools.chain(*(getattr(part, path) for path in paths)):
                fully_shard(block)
            fully_shard(part)
        optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
        inputs = {"hidden_states": loss.path.add_noise(x0, noise, t), "timestep": t, **condition}
        for step in range(2):
            torch.manual_seed(step)
            prediction = model(**inputs, return_dict=False)[0]
            term = align(x0, noise, t, u=u)
            if step == 0:
                torch.manual_seed(step)  # the same dropped labels
                twin(**inputs, return_dict=False)
                torch.testing.assert_close(term, expected(x0, noise, t, u=u), rtol=1e-4, atol=1e-5)
            (prediction.square().mean() + term).backward()
            optimizer.step()
            align.update()
            assert all(hasattr(p, "to_local") for p in align.teacher.parameters())
        same_everywhere(align.teacher.parameters())
    text = {name: condition[name][:, 1:] for name in ("encoder_hidden_states", "txt_ids")}
    model(**inputs | text, return_dict=False)
    message = r"sharded model must keep the shapes of its first step.*Pad text to one length, or pa"
    with pytest.raises(ValueError, match=message):
        align(x0, noise, t, u=u)


def not_sharded(rank, folder):
    """A teacher that was not sharded, and a model that was sharded too early."""
    torch.manual_seed(0)
    model = DiT(depth=4)
    align = SelfAlignment(model, LOSS)
    shard(model)
    *batch, u = batch_of(0, rank)
    model(*seen(batch))
    rule = r"must be sharded as the model is.*Apply fully_shard to align.teacher in the same way"
    with pytest.raises(ValueError, match=rule):
        align(*batch, u=u)
    early = DiT(depth=4)
    shard(early)
    rule = r"built before the model is sharded. Received: FSDPDiT after fully_shard. Build it"
    with pytest.raises(ValueError, match=rule):
        SelfAlignment(early, LOSS)


TOGETHER = [
    ddp,
    ddp_weight_0,
    ddp_layersync,
    ddp_list,
    ddp_width_at_the_first_forward,
    ddp_resumed,
    accelerate,
    fsdp,
    fsdp_memory,
    fsdp_layersync,
    fsdp_meta,
    fsdp_compiled,
    fsdp_diffusers,
    not_sharded,
]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "(update|align)..")  # selfalign's own
    FOLDER, RANK, PROCESSES = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{FOLDER}/store",
        rank=RANK,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        for scenario in TOGETHER:
            scenario(RANK, FOLDER)
            print(scenario.__name__, flush=True)
    finally:
        distributed.destroy_process_group()
    if RANK == 0:
        fsdp_resumed(RANK, FOLDER)
        print(fsdp_resumed.__name__, flush=True)
