"""Several processes: one head on all of them, shards, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from selfalign.adapting import invalid


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def world() -> tuple[int, int]:
    """(this process's rank, number of processes)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def any_process(found: bool, device: torch.device) -> bool:
    """Whether any process found something: one verdict for all of them."""
    if world()[1] == 1:
        return found
    flag = torch.tensor(float(found), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DDP's wrappers.

    Raises:
        ValueError: the model is wrapped by something that a second model beside it cannot live
            with.
    """
    check_whole(model)
    kinds = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in kinds:
        raise invalid(
            "The model must not be sharded by FSDP1",
            "FullyShardedDataParallel",
            "Use fully_shard (FSDP2): it leaves the model its modules and names.",
        )
    if is_sharded(model):
        raise invalid(
            "SelfAlignment must be built before the model is sharded",
            f"{type(model).__name__} after fully_shard",
            "Build it first, then apply fully_shard to the model and to align.teacher alike.",
        )
    inner = _inside(model)
    while inner is not None:
        model = inner
        inner = _inside(model)
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None of a model that is no wrapper."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return model.module
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def check_whole(model: nn.Module) -> None:
    """Refuse weights that DeepSpeed has taken away: nothing can be copied or averaged then."""
    partitioned = any(hasattr(p, "ds_id") for p in model.parameters())
    if partitioned or type(model).__name__ == "DeepSpeedEngine":
        raise invalid(
            "The model's weights must be there",
            f"{type(model).__name__}, partitioned by DeepSpeed",
            "Use PyTorch's FSDP2 (fully_shard) instead of ZeRO-3; with ZeRO-1 and 2 attach before "
            "deepspeed.initialize.",
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard was applied to the model or to a part of it."""
    return any(hasattr(module, "set_reshard_after_forward") for module in model.modules())


def release(module: Any) -> None:
    """Give back what a forward that ended early, or that waits, has gathered (FSDP2)."""
    for part in module.modules():
        if not hasattr(part, "reshard"):
            continue
        if not any(p.requires_grad for p in part.parameters()):
            # without it, a forward in between keeps what it has gathered
            part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Meanwhile, a model has its shards only; what waits for its backward is gathered again."""
    if not is_sharded(model):
        yield
        return
    release(model)
    try:
        yield
    finally:
        unshard = getattr(model, "unshard", None)
        if callable(unshard):
            unshard()


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Give all processes the parameters of the first; what is sharded is left alone."""
    if world()[1] > 1:
        for p in module.parameters():
            if local(p) is p:
                distributed.broadcast(p, src=0)


def average_gradients(module: nn.Module) -> None:
    """From now on, average each gradient over all processes as soon as it is there.

    The module stands beside the model, where DDP does not see it. Doing it twice changes nothing,
    nor does doing it for each micro-batch: the mean over processes of a sum is the sum of the
    means.
    """

    def average(p: torch.Tensor) -> None:
        count = world()[1]
        if count > 1 and p.grad is not None and local(p) is p:
            distributed.all_reduce(p.grad)
            p.grad /= count

    for p in module.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average)
