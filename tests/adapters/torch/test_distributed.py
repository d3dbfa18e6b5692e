"""Real processes, whose numbers are those of one: see distributed_loop.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dit_models import DiT

from selfalign.adapters.torch import SelfAlignment

LOOP = Path(__file__).resolve().parents[2] / "distributed_loop.py"
SCENARIOS = [
    "ddp",
    "ddp_weight_0",
    "ddp_layersync",
    "ddp_list",
    "ddp_width_at_the_first_forward",
    "ddp_resumed",
    "accelerate",
    "fsdp",
    "fsdp_memory",
    "fsdp_layersync",
    "fsdp_meta",
    "fsdp_compiled",
    "fsdp_diffusers",
    "not_sharded",
]


def test_two_processes_equal_one(tmp_path):
    """All scenarios in one pair of processes: to start them is what takes the time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}
    processes = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        process = subprocess.Popen(
            [sys.executable, str(LOOP), str(tmp_path), str(rank), "2"],
            env=environment | ranks,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    ends = [process.communicate(timeout=280) for process in processes]
    errors = "\n".join(error[-4000:] for _, error in ends)
    alone = ["fsdp_resumed"]  # by one process, what two have saved
    assert ends[0][0].split() == SCENARIOS + alone, errors
    assert ends[1][0].split() == SCENARIOS, errors
    assert [process.returncode for process in processes] == [0, 0], errors


class DeepSpeedEngine(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


class FullyShardedDataParallel(DeepSpeedEngine):
    """Stands for FSDP1."""


def partitioned():
    model = DiT()
    model.x_embedder.weight.ds_id = 0  # ZeRO-3 marks parameters so
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: DeepSpeedEngine(DiT()),
            r"weights must be there. Received: DeepSpeedEngine, partitioned by DeepSpeed. Use .*FS",
        ),
        (
            partitioned,
            r"partitioned by DeepSpeed. Use PyTorch's FSDP2 \(fully_shard\) instead of ZeRO-3",
        ),
        (
            lambda: FullyShardedDataParallel(DiT()),
            r"must not be sharded by FSDP1. Received: FullyShardedDataParallel. Use fully_shard",
        ),
    ],
    ids=["DeepSpeed", "ZeRO-3", "FSDP1"],
)
def test_other_ways_of_sharding_are_refused_with_what_to_use(loss, build, message):
    with pytest.raises(ValueError, match=message):
        SelfAlignment(build(), loss)
