"""A part of `make gpu`: a step with SRA in PyTorch at the papers' sizes, as large runs have it.

    python benchmarks/gpu/cost_torch.py --out found.jsonl

The arms of bench.py in bfloat16, compiled, in turns; then the EMA against one pass over memory. The
smallest model comes first: a cut-off keeps what was done.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from found import Figures, attempt, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import torch_arms
from rich.console import Console
from rounds import SIZES, Size, ratio

import selfalign

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCHES = {"B": 128, "XL": 48, "L": 64}  # in the order of their turns
QUIET = Console(quiet=True)


def step(name: str, size: Size, count: int, side: int, options: argparse.Namespace) -> Figures:
    """Each arm's time and memory, against the plain step and each other."""
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
    if DEVICE.type == "cuda":
        for arm in arms:
            figures[f"{arm}, peak GiB"] = found[arm]["peak_bytes"] / 2**30
        figures["peak above plain, GB"] = peak_above_plain(found)
        figures["predicted above plain, GB"] = predicted(model, loss)
    figures["operations, plain"] = found["plain"]["operations"]
    figures["operations, selfalign"] = found["selfalign"]["operations"]
    return {"ok": True} | figures


def peak_above_plain(found: Figures) -> float:
    return (found["selfalign"]["peak_bytes"] - found["plain"]["peak_bytes"]) / 1e9


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
        sizes = {"B": (Size(64, 12, 4), 2)}  # as deep as B: its preset has layers 4 and 8
    for name, (size, count) in sizes.items():
        measured = functools.partial(step, name, size, count, side, options)
        attempt(given.out, f"SiT-{name}/2: a step", measured)
        attempt(given.out, f"SiT-{name}/2: the EMA", functools.partial(ema, size, rounds))


if __name__ == "__main__":
    main()
