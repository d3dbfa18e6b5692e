"""A part of `make gpu`: what a step with SRA costs in JAX at the papers' sizes, in bfloat16.

    python benchmarks/gpu/cost_jax.py --out found.jsonl

The arms of bench_jax_sit.py, in turns.
"""

import functools
import sys
from pathlib import Path

from found import Figures, attempt, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench_jax_sit
from rounds import SIZES, Size, measure, ratio

BATCHES = {"B": 128, "XL": 48}


def step(name: str, count: int, rounds: int) -> Figures:
    """Each arm's time against the plain step, and against what the method needs at least."""
    setting = bench_jax_sit.Setting(name, count, "bfloat16")
    steps = {}
    flops = {}
    for arm, term in bench_jax_sit.ARMS.items():
        steps[arm], flops[arm] = bench_jax_sit.compiled_step(setting, term)
    seconds = measure(steps, rounds, warm_up=2)
    floor = 1 + bench_jax_sit.least_flops(setting) / flops["plain"]
    aligned = ratio(seconds["selfalign"], seconds["plain"]).median
    return {
        "ok": True,
        "batch": count,
        "floor / plain": floor,
        "selfalign / plain": aligned,
        "by hand / plain": ratio(seconds["by hand"], seconds["plain"]).median,
        "selfalign / floor": aligned / floor,
        "plain, ms": 1e3 * min(seconds["plain"]),
    }


def main() -> None:
    options = parse(__doc__)
    batches = BATCHES
    if options.short:
        SIZES["B"] = Size(32, 12, 2)
        batches = {"B": 1}
    for name, count in batches.items():
        measured = functools.partial(step, name, count, 3 if options.short else 7)
        attempt(options.out, f"SiT-{name}/2: a step", measured)


if __name__ == "__main__":
    main()
