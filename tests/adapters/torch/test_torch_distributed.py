"""Real processes: a scenario of distributed_loop.py holds their numbers against a run in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dit_models import DiT

from selfalign.adapters.torch import SelfAlignment

LOOP = Path(__file__).resolve().parents[2] / "distributed_loop.py"


def run(scenarios: str, folder: Path, processes: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(LOOP), scenarios, str(folder)], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.stdout.count("ok") == processes, done.stderr[-4000:]


@pytest.mark.parametrize("scenarios", ["ddp,ddp-weight-0,accelerate", "fsdp-compiled,fsdp-meta,fsdp-diffusers,forgotten"])
def test_two_processes_equal_one(scenarios, tmp_path):
    run(scenarios, tmp_path)


def test_sharded_by_fsdp_saved_and_resumed_by_another_number_of_processes(tmp_path):
    run("fsdp", tmp_path)
    run("fsdp-resumed", tmp_path, processes=1)


def test_other_ways_of_sharding_are_refused_with_what_to_use(loss):
    class DeepSpeedEngine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    class FullyShardedDataParallel(DeepSpeedEngine):
        pass

    with pytest.raises(
        ValueError, match=r"weights must be there. Received: DeepSpeedEngine, partitioned by DeepSpeed. Use .*FSDP2"
    ):
        SelfAlignment(DeepSpeedEngine(DiT()), loss)
    partitioned = DiT()
    partitioned.x_embedder.weight.ds_id = 0  # ZeRO-3 marks parameters so
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed. Use PyTorch's FSDP2 \(fully_shard\) instead of ZeRO-3"):
        SelfAlignment(partitioned, loss)
    with pytest.raises(ValueError, match=r"must not be sharded by FSDP1. Received: FullyShardedDataParallel. Use fully_shard"):
        SelfAlignment(FullyShardedDataParallel(DiT()), loss)
