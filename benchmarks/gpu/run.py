"""All that wants a GPU, in one command (`make gpu`): is it right there? Its cost? Does it help?

    python benchmarks/gpu/run.py            at most eight minutes on one GPU, without a network
    python benchmarks/gpu/run.py --short    a rehearsal on whatever there is, in half a minute
    python benchmarks/gpu/run.py --only helps.py --data fashion-mnist    the study, all the time

Every part is a process of its own, with a time limit of its own; the last, the study, has what the
others leave. What a part finds is written at once, so one that is cut off keeps what it did.
Results: one JSON file, and, of a run on a GPU, a section of docs/benchmarks.md.
"""

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from found import Figures, read

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu -->\n", "<!-- end of gpu -->\n"


ALL = 480  # seconds that the parts have together


class Part(NamedTuple):
    """A script of this folder."""

    title: str
    seconds: int  # its limit
    arguments: tuple[str, ...]  # the script first
    environment: dict[str, str] = {}  # noqa: RUF012


# TensorFloat-32 is not the arithmetic that the reference is compared with
TORCH = {"KERAS_BACKEND": "torch"}
JAX = {"KERAS_BACKEND": "jax"}
EXACT_JAX = JAX | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
PARTS = (
    Part("PyTorch: ways of training", 100, ("right_torch.py",), TORCH),
    Part("PyTorch: cost", 140, ("cost_torch.py",), TORCH),
    Part("Contract: torch", 50, ("contract.py", "--adapters", "torch", "keras"), TORCH),
    Part("Contract: jax", 70, ("contract.py", "--adapters", "jax", "keras"), EXACT_JAX),
    Part("JAX: cost", 60, ("cost_jax.py",), JAX),
    Part("The study", ALL, ("helps.py",), TORCH),  # what the others leave
)


def gpu() -> str | None:
    """The GPU's name and driver; None where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return found.stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


# Of a rehearsal. To compile well takes longer than what is compiled; and see tests/processes.
SHORT = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(ROOT / "tests" / "processes"), os.environ.get("PYTHONPATH")])
    ),
}


def run(part: Part, out: Path, short: bool, deadline: float = math.inf) -> Figures:
    """Run a part to its end or its limit; its lines, and how it ended."""
    script, *others = part.arguments
    command = [sys.executable, str(FOLDER / script), *others, "--out", str(out)]
    environment = os.environ | part.environment | (SHORT if short else {})
    start = time.monotonic()
    limit = ALL if short else part.seconds  # a rehearsal is not about time
    seconds = max(0, min(limit, deadline - start))
    log = out.with_suffix(".log")
    with log.open("w") as said:
        try:
            done = subprocess.run(
                command + ["--short"] * short,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            )
            ended = "to its end" if done.returncode == 0 else f"with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {seconds:.0f} s"
    checks = read(out)
    found: Figures = {"ended": ended, "seconds": round(time.monotonic() - start), "checks": checks}
    found["open"] = part.seconds == ALL
    if ended != "to its end":
        found["log"] = log.read_text()[-2000:]
    return found


def is_right(found: Figures) -> bool:
    """A part that found nothing is not right. The study lasts as long as the time does."""
    whole = found["ended"] == "to its end" or (found["open"] and "cut off" in found["ended"])
    return whole and bool(found["checks"]) and all(check["ok"] for check in found["checks"])


# --------------------------------------------------------------------------------------------------
# What is written


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def lines_of(title: str, found: Figures) -> list[str]:
    """Markdown: the verdict, the checks that failed, the figures."""
    checks = found["checks"]
    right = sum(check["ok"] for check in checks)
    lines = [f"### {title}", ""]
    lines += [f"{right} of {len(checks)} checks right; ran {found['ended']}, {found['seconds']} s."]
    lines += [""]
    if title.startswith("Contract"):
        checks = [check for check in checks if not check["ok"]]
    for check in checks:
        hidden = ("name", "ok", "error", "where", "seconds")
        figures = [f"{k} {shown(v)}" for k, v in check.items() if k not in hidden]
        verdict = "right" if check["ok"] else f"**wrong**: {check.get('error', '')[:200]}"
        lines.append(f"- {check['name']}: {'; '.join([verdict, *figures])}")
    return [*lines, ""] if checks else lines


def page(result: Figures) -> str:
    """The section of docs/benchmarks.md."""
    lines = [f"`make gpu`, {result['date']}: {result['hardware']}.", ""]
    for title, found in result["parts"].items():
        lines += lines_of(title, found)
    return "\n".join(lines)


def write_page(result: Figures, file: Path = PAGE) -> None:
    """Write the section between its two marks; elsewhere the page stays as it is."""
    head, begin, rest = file.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(
            f"The page must have the marks of the section. Received: {file} without "
            f"{BEGIN.strip()} or {END.strip()}. Put them where the section belongs."
        )
    file.write_text(f"{head}{BEGIN}{page(result)}{END}{tail}")


def run_all(parts: Sequence[Part], out: Path, short: bool) -> Iterator[tuple[str, Figures]]:
    """One at a time on a GPU, where they would take each other's memory and time."""
    deadline = time.monotonic() + ALL
    files = [
        out / f"{part.title.lower().replace(': ', '_').replace(' ', '_')}.jsonl" for part in parts
    ]
    for file in files:
        file.unlink(missing_ok=True)
    with ThreadPoolExecutor(2 if short else 1) as pool:
        work = functools.partial(run, short=short, deadline=deadline)
        for part, found in zip(parts, pool.map(work, parts, files), strict=True):
            yield part.title, found


def chosen(script: str | None, data: str) -> list[Part]:
    """All parts, or those of one script; the study on other data."""
    *others, study = PARTS
    study = study._replace(arguments=(*study.arguments, "--data", data))
    if script is None:
        return [*others, study]
    alone = [part._replace(seconds=ALL) for part in (*others, study)]
    return [part for part in alone if part.arguments[0] == script]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a rehearsal with the smallest sizes")
    parser.add_argument("--out", type=Path, default=Path("runs") / "gpu")
    scripts = sorted({part.arguments[0] for part in PARTS})
    parser.add_argument("--only", choices=scripts, help="one script's parts, with all the time")
    parser.add_argument("--data", default="digits", help="of the study: see studies/study.py")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    name = gpu()
    result: Figures = {
        "hardware": name or f"no GPU: {platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "short": options.short,
        "parts": {},
    }
    for title, found in run_all(chosen(options.only, options.data), options.out, options.short):
        result["parts"][title] = found
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1))
        print("\n".join(lines_of(title, found)), flush=True)
    if name and not options.short and options.only is None:
        write_page(result)
    wrong = [title for title, found in result["parts"].items() if not is_right(found)]
    if wrong:
        print(f"Not right: {', '.join(wrong)}. Logs are in {options.out}.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
