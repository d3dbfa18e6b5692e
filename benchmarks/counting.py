"""What a training step in PyTorch needs, counted: FLOPs, operations, memory."""

from typing import Any

import torch
from rounds import Step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch_arms import Batch
from torch_sit import SiT

import selfalign


class Operations(TorchDispatchMode):
    """Counts what is launched: on a GPU, about the number of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def flops(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def operations(step: Step) -> int:
    with Operations() as counter:
        step()
    return counter.count


def kernels(step: Step, device: torch.device) -> int | None:
    """What a GPU runs in a step, copies aside; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_the_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_the_gpu)


def kept_for_backward(step: Step) -> int:
    """Bytes that autograd keeps from a step's forward to its backward, with the parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Bytes on a GPU, of all that lies there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


class EndOfForward(Exception):
    """Ends a forward at a block."""


def least_flops(model: SiT, batch: Batch, loss: selfalign.SRALoss) -> int:
    """FLOPs that SRA needs at least.

    A forward to the teacher's layer, the projector three times (forward and backward), and three
    operations for each parameter of the EMA.
    """
    _, teacher_layer = loss.layers(len(model.blocks))

    def end(block: nn.Module, args: Any, output: Any) -> None:
        raise EndOfForward

    def first_blocks() -> None:
        try:
            model(batch.x0, batch.t, batch.y)
        except EndOfForward:
            return

    handle = model.blocks[teacher_layer - 1].register_forward_hook(end)
    with torch.no_grad():
        teacher = flops(first_blocks)
    handle.remove()
    width = model.head.in_features
    tokens = len(batch.x0) * model.side**2
    projector = 2 * tokens * 4 * width**2
    parameters = sum(p.numel() for p in model.parameters())
    return teacher + 3 * projector + 3 * parameters
