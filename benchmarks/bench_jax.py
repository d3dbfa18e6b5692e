"""What SRA costs the JAX examples, each with and without it, side by side in one run: `python benchmarks/bench_jax.py`.

Time per step as ratios of medians taken in turns; peak memory, where the device counts it, in a process for each arm. The plain
arm keeps its EMA, too: without SRA it would be there to be sampled from.
"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import jax
from rich.console import Console
from rounds import Step, measure, show

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import common

EXAMPLES = ("jax_nnx_sit", "jax_linen_dit", "jax_equinox_sit")


def make_step(example: str, sra: bool, options: argparse.Namespace) -> Step:
    """One training step of an example, waited for."""
    module = importlib.import_module(example)
    sizes = ("width", "depth", "patch", "batch_size", "data", "image_size")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in sizes]
    arguments += [f"--heads={max(1, options.width // 64)}", *["--no-sra"] * (not sra)]
    settings = common.parse(common.command_line(None, "bench"), arguments)
    run = module.Run(common.load_data(settings), settings)
    return lambda: jax.block_until_ready(run.training_step())


def peak_bytes(example: str, sra: bool) -> int | None:
    """The peak of the device's memory in a process that runs this arm alone; None where the device does not count (CPU)."""
    arguments = [sys.executable, __file__, *sys.argv[1:], "--peak", example, str(int(sra))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return int(done.stdout) if done.stdout.strip() else None


def print_peak(example: str, sra: bool, options: argparse.Namespace) -> None:
    step = make_step(example, sra, options)
    for _ in range(3):
        step()
    statistics = jax.devices()[0].memory_stats()
    print(statistics["peak_bytes_in_use"] if statistics else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    parser.add_argument("--examples", nargs="+", default=EXAMPLES, choices=EXAMPLES)
    parser.add_argument("--data", default="digits", help="as in the examples")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--patch", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak[0], options.peak[1] == "1", options)
        return
    console, device = Console(), jax.devices()[0]
    console.print(f"jax {jax.__version__}, {device.device_kind}, width {options.width}, depth {options.depth}, "
                  f"batch {options.batch_size}, float32; layers 0.25 -> 0.7 of the depth")  # fmt: skip
    for example in options.examples:
        arms = {
            f"{example}, without SRA": make_step(example, False, options),
            f"{example}, with SRA": make_step(example, True, options),
        }
        seconds = measure(arms, options.rounds)
        show(console, "A training step", seconds, dict.fromkeys(arms, next(iter(arms))))
        if device.platform != "cpu":
            plain, aligned = (peak_bytes(example, sra) for sra in (False, True))
            if plain and aligned:
                console.print(
                    f"peak memory: {plain / 2**20:.0f} MiB without, {aligned / 2**20:.0f} MiB with, x {aligned / plain:.3f}"
                )


if __name__ == "__main__":
    main()
