"""A part of `make gpu`: what a step with SRA costs in JAX at the papers' sizes, in bfloat16.

    python benchmarks/gpu/cost_jax.py --out found.jsonl

The arms of bench_jax_sit.py, in turns.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from found import Figures, attempt, judge, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_jax_sit
from bench_jax_sit import Setting
from rounds import SIZES, Size, measure, ratio

import selfalign

BATCHES = {"B": 128, "XL": 48}


def setting_of(name: str) -> Setting:
    loss = selfalign.SRALoss.preset(f"SiT-{name}/2")
    return Setting(SIZES[name], loss, BATCHES[name], "bfloat16")


def smallest() -> Setting:
    """For a rehearsal: XLA takes its time for each block."""
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
    return Setting(Size(16, 2, 2), loss, 1, "float32", side=4)


def step(make_setting: Callable[[], Setting], arms: list[str], rounds: int) -> Figures:
    """Each arm's time against the plain step, and against what the method needs at least."""
    setting = make_setting()
    steps = {}
    flops = {}
    for arm in arms:
        steps[arm], flops[arm] = bench_jax_sit.compiled_step(setting, bench_jax_sit.ARMS[arm])
    seconds = measure(steps, rounds, warm_up=2)
    floor = 1 + bench_jax_sit.least_flops(setting) / flops["plain"]
    against_plain = {f"{a} / plain": ratio(seconds[a], seconds["plain"]).median for a in arms[1:]}
    return {
        "ok": True,
        "batch": len(setting.batch.t),
        "floor / plain": floor,
        **against_plain,
        "selfalign / floor": against_plain["selfalign / plain"] / floor,
        "plain, ms": 1e3 * min(seconds["plain"]),
    }


def main() -> None:
    options = parse(__doc__)
    on_a_gpu = jax.default_backend() == "gpu"
    makers = {name: functools.partial(setting_of, name) for name in BATCHES}
    arms = list(bench_jax_sit.ARMS)
    rounds = 7
    if options.short:
        makers, arms, rounds = {"smallest": smallest}, ["plain", "selfalign"], 3
    for name, make_setting in makers.items():
        measured = functools.partial(step, make_setting, arms, rounds)
        found = attempt(options.out, f"SiT-{name}/2: a step", measured)
        aim = f"SiT-{name}/2: step / floor"
        judge(options.out, aim, found.get("selfalign / floor"), 1.05, on_a_gpu)


if __name__ == "__main__":
    main()
