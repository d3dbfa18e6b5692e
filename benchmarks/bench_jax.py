"""What SRA costs the JAX examples, each with and without it, side by side in one run.

    python benchmarks/bench_jax.py

Time per step as ratios of medians taken in turns; peak memory, where the device counts it, in a
process for each arm. The plain arm keeps its EMA, too: without SRA it would be there to be sampled
from.
"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import jax
from rich.console import Console
from rounds import Step, measure, show_against

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import common

EXAMPLES = ("jax_nnx_sit", "jax_linen_dit", "jax_equinox_sit")
SIZES = ("width", "depth", "patch", "batch_size", "data", "image_size")  # options of the examples


def make_step(example: str, sra: bool, options: argparse.Namespace) -> Step:
    """One training step of an example, waited for."""
    module = importlib.import_module(example)
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in SIZES]
    arguments.append(f"--heads={max(1, options.width // 64)}")
    arguments.append(f"--steps={10**9}")  # it ends when all rounds have been run
    if not sra:
        arguments.append("--no-sra")
    settings = common.parse(common.command_line(None, "bench"), arguments)
    run = module.Run(common.load_data(settings), settings)
    training = module.train(run)
    return lambda: jax.block_until_ready(next(training))


def peak_bytes(example: str, sra: bool) -> int | None:
    """The device's peak memory in a process that runs this arm alone; None on a CPU."""
    arguments = [sys.executable, __file__, *sys.argv[1:], "--peak", example, str(int(sra))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return int(done.stdout) if done.stdout.strip() else None


def print_peak(example: str, sra: bool, options: argparse.Namespace) -> None:
    step = make_step(example, sra, options)
    for _ in range(3):
        step()
    statistics = jax.devices()[0].memory_stats()
    print(statistics["peak_bytes_in_use"] if statistics else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    add = parser.add_argument
    add("--examples", nargs="+", default=EXAMPLES, choices=EXAMPLES)
    add("--data", default="digits", help="as in the examples")
    add("--image-size", type=int, default=32)
    add("--width", type=int, default=192)
    add("--depth", type=int, default=12)
    add("--patch", type=int, default=1)
    add("--batch-size", type=int, default=16)
    add("--rounds", type=int, default=20)
    add("--peak", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.peak:
        example, sra = options.peak
        print_peak(example, sra == "1", options)
        return
    console = Console()
    device = jax.devices()[0]
    console.print(
        f"jax {jax.__version__}, {device.device_kind}, width {options.width}, "
        f"depth {options.depth}, batch {options.batch_size}, float32; "
        "layers 0.25 -> 0.7 of the depth"
    )
    for example in options.examples:
        without = f"{example}, without SRA"
        arms = {
            without: make_step(example, False, options),
            f"{example}, with SRA": make_step(example, True, options),
        }
        seconds = measure(arms, options.rounds)
        show_against(console, "A training step", seconds, without)
        if device.platform != "cpu":
            show_peaks(console, example)


def show_peaks(console: Console, example: str) -> None:
    plain = peak_bytes(example, sra=False)
    aligned = peak_bytes(example, sra=True)
    if plain and aligned:
        console.print(
            f"peak memory: {plain / 2**20:.0f} MiB without, {aligned / 2**20:.0f} MiB with, "
            f"x {aligned / plain:.3f}"
        )


if __name__ == "__main__":
    main()
