"""All that wants a GPU, in one command (`make gpu`): is it right there, and what does it cost?

    python benchmarks/gpu/run.py            at most eight minutes on one GPU, without a network
    python benchmarks/gpu/run.py --short    a rehearsal on whatever there is, in about a minute

Every part is a process of its own, with a time limit of its own. What it finds is written at once,
so a part that is cut off keeps what it did. Results: one JSON file, and, of a run on a GPU, a
section of docs/benchmarks.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from found import Figures, read

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu -->\n", "<!-- end of gpu -->\n"


class Part(NamedTuple):
    """A script of this folder."""

    title: str
    seconds: int  # its limit
    arguments: tuple[str, ...]  # the script first
    environment: dict[str, str] = {}  # noqa: RUF012


def contract(adapter: str, backend: str, seconds: int) -> Part:
    # TensorFloat-32 is not the arithmetic that the reference is compared with
    environment = {"KERAS_BACKEND": backend, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    title = f"Contract: {adapter}" + (f" on {backend}" if adapter == "keras" else "")
    return Part(title, seconds, ("contract.py", "--adapter", adapter), environment)


TORCH = {"KERAS_BACKEND": "torch"}
JAX = {"KERAS_BACKEND": "jax"}
PARTS = (
    Part("PyTorch: ways of training", 100, ("right_torch.py",), TORCH),
    Part("PyTorch: cost", 130, ("cost_torch.py",), TORCH),
    contract("torch", "torch", 40),
    contract("jax", "jax", 60),
    Part("JAX: cost", 60, ("cost_jax.py",), JAX),
    contract("keras", "torch", 40),
    contract("keras", "jax", 50),
)


def gpu() -> str | None:
    """The GPU's name and driver; None where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return found.stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def run(part: Part, out: Path, short: bool) -> Figures:
    """Run a part to its end or its limit; its lines, and how it ended."""
    script, *others = part.arguments
    command = [sys.executable, str(FOLDER / script), *others, "--out", str(out)]
    environment = os.environ | part.environment
    if short:  # to compile well takes longer than what is compiled
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        environment["OMP_NUM_THREADS"] = "1"
    start = time.monotonic()
    log = out.with_suffix(".log")
    with log.open("w") as said:
        try:
            done = subprocess.run(
                command + ["--short"] * short,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=part.seconds,
            )
            ended = "to its end" if done.returncode == 0 else f"with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {part.seconds} s"
    checks = read(out)
    found: Figures = {"ended": ended, "seconds": round(time.monotonic() - start), "checks": checks}
    if ended != "to its end":
        found["log"] = log.read_text()[-2000:]
    return found


def is_right(found: Figures) -> bool:
    """A part that found nothing is not right."""
    whole = found["ended"] == "to its end" and bool(found["checks"])
    return whole and all(check["ok"] for check in found["checks"])


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


def write_page(result: Figures) -> None:
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}{page(result)}{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a rehearsal with the smallest sizes")
    parser.add_argument("--out", type=Path, default=Path("runs") / "gpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    name = gpu()
    result: Figures = {
        "hardware": name or f"no GPU: {platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "short": options.short,
        "parts": {},
    }
    files = [options.out / f"part_{index}.jsonl" for index in range(len(PARTS))]
    for file in files:
        file.unlink(missing_ok=True)
    # one at a time on a GPU, where they would take each other's memory and time
    with ThreadPoolExecutor(2 if options.short else 1) as pool:
        ended = pool.map(run, PARTS, files, [options.short] * len(PARTS))
        for part, found in zip(PARTS, ended, strict=True):
            result["parts"][part.title] = found
            (options.out / "gpu.json").write_text(json.dumps(result, indent=1))
            print("\n".join(lines_of(part.title, found)), flush=True)
    if name and not options.short:
        write_page(result)
    wrong = [title for title, found in result["parts"].items() if not is_right(found)]
    if wrong:
        print(f"Not right: {', '.join(wrong)}. Logs are in {options.out}.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
