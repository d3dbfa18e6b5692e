"""A part of `make gpu`: a step with SRA in PyTorch at the papers' sizes, as large runs have it.

    python benchmarks/gpu/cost_torch.py --out found.jsonl

The arms of bench.py in bfloat16, compiled, in turns; then the EMA against one pass over memory, and
peak memory. The smallest model comes first: a cut-off keeps what was done.
"""

import argparse
import copy
import functools
import gc
import sys
from pathlib import Path

import torch
from found import Figures, attempt, judge, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import counting
import torch_arms
from rich.console import Console
from rounds import SIZES, Size, ratio

import selfalign

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCHES = {"B": 128, "XL": 48, "L": 64}  # in the order of their turns
MANY = 250  # tensors: from about so many on their number, not their size, is what the loop costs
QUIET = Console(quiet=True)


def step(name: str, size: Size, count: int, side: int, options: argparse.Namespace) -> Figures:
    """Each arm's time, against the plain step and each other, and what it launches."""
    model = torch_arms.make_model(size, side, DEVICE)
    batch = torch_arms.make_batch(count, side, DEVICE)
    loss = selfalign.SRALoss.preset(f"SiT-{name}/2")
    arms = dict(torch_arms.ARMS)
    if options.short or not torch_arms.encoder_is_installed():
        del arms["REPA-style"]
    found = bench.compare(model, batch, loss, arms, options)
    floor = found["floor"]["ratio"]
    seconds = {arm: found[arm]["seconds"] for arm in arms}
    figures: Figures = {"batch": count, "floor / plain": floor}
    for arm in list(arms)[1:]:
        figures[f"{arm} / plain"] = found[arm]["ratio"]
    figures["selfalign / floor"] = found["selfalign"]["ratio"] / floor
    figures["selfalign / the authors' way"] = ratio(
        seconds["selfalign"], seconds["authors' way"]
    ).median
    figures["plain, ms"] = 1e3 * min(seconds["plain"])
    for arm in arms:
        figures[f"{arm}, operations"] = found[arm]["operations"]
        if DEVICE.type == "cuda":
            figures[f"{arm}, kernels"] = found[arm]["kernels"]
    return {"ok": True} | figures


def memory(name: str, size: Size, count: int, side: int, options: argparse.Namespace) -> Figures:
    """Peak memory of a step, of an arm alone on the GPU, and what docs/cost.md predicts of it."""
    model = torch_arms.make_model(size, side, torch.device("cpu"))
    batch = torch_arms.make_batch(count, side, DEVICE)
    loss = selfalign.SRALoss.preset(f"SiT-{name}/2")
    figures: Figures = {"ok": True, "predicted above plain, GB": predicted(model, loss)}
    for arm in ("plain", "selfalign", "authors' way"):
        torch._dynamo.reset()
        run = torch_arms.ARMS[arm](copy.deepcopy(model).to(DEVICE), batch, loss, options)
        for _ in range(3):
            run()
        peak = counting.peak_memory(run, DEVICE)
        del run
        gc.collect()
        if peak is not None:
            figures[f"{arm}, GB"] = peak / 1e9
    if DEVICE.type == "cuda":
        expected = figures["plain, GB"] + figures["predicted above plain, GB"]
        figures["off the prediction"] = abs(figures["selfalign, GB"] / expected - 1)
    return figures


def predicted(model: torch.nn.Module, loss: selfalign.SRALoss) -> float:
    """Of docs/cost.md: the teacher in float32, and the projector with gradient and moments."""
    width = model.head.in_features
    parameters = sum(p.numel() for p in model.parameters())
    return (4 * parameters + 16 * (4 * width**2 + 3 * width)) / 1e9


def ema(size: Size, rounds: int) -> Figures:
    """align.update() against one pass, and against the loop of two calls a tensor."""
    model = torch_arms.make_model(size, 16, DEVICE)
    seconds = bench.time_ema(model, rounds, QUIET)
    update = seconds["selfalign"]
    return {
        "ok": True,
        "tensors": len(list(model.parameters())),
        "update / one pass": ratio(update, seconds["one pass"]).median,
        "update / tensor by tensor": ratio(update, seconds["tensor by tensor"]).median,
    }


def main() -> None:
    given = parse(__doc__)
    rounds, side = (3, 4) if given.short else (7, 16)  # side: tokens along one
    options = argparse.Namespace(
        bf16=True, compile=not given.short, rounds=rounds, short=given.short
    )
    torch.set_float32_matmul_precision("high")
    sizes = {name: (SIZES[name], count) for name, count in BATCHES.items()}
    if given.short:
        sizes = {"B": (Size(32, 12, 2), 1)}  # as deep as B: its preset has layers 4 and 8
    for name, (size, count) in sizes.items():
        model = f"SiT-{name}/2"
        arguments = name, size, count, side, options
        aim = functools.partial(judge, given.out, on_a_gpu=DEVICE.type == "cuda")
        found = attempt(given.out, f"{model}: a step", functools.partial(step, *arguments))
        aim(f"{model}: step / floor", found.get("selfalign / floor"), 1.10)
        aim(f"{model}: step / the authors' way", found.get("selfalign / the authors' way"), 0.80)
        found = attempt(given.out, f"{model}: the EMA", functools.partial(ema, size, rounds))
        aim(f"{model}: EMA / one pass", found.get("update / one pass"), 1.15)
        if found.get("tensors", 0) >= MANY or given.short:
            aim(f"{model}: EMA / tensor by tensor", found.get("update / tensor by tensor"), 0.50)
        found = attempt(given.out, f"{model}: memory", functools.partial(memory, *arguments))
        aim(f"{model}: memory against docs/cost.md", found.get("off the prediction"), 0.05)


if __name__ == "__main__":
    main()
