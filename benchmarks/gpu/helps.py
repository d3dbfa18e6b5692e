"""A part of `make gpu`: does SRA help? Runs of studies/study.py, as far as the time allows.

    python benchmarks/gpu/helps.py --out found.jsonl --data fashion-mnist

The group "core", seed by seed. Each run that ends is kept, and started anew the part goes on with
those that are missing: `make gpu` again, or `run.py --only helps.py`, which leaves it all the time.
"""

import functools
import itertools
import sys
import tempfile
from pathlib import Path

from found import Figures, attempt, command_line, write

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "studies"), str(ROOT / "examples")]
import records  # noqa: E402
import study  # noqa: E402

SEEDS = (10, 11, 12)


def smallest(size: study.Size) -> study.Size:
    return size._replace(
        lengths={"ablations": study.Length(2, 2)},
        measured_every=2,
        samples=20,
        held_out=20,
        judge_images=50,
        judge_epochs=1,
        probed=50,
        sampling_steps=2,
    )


def one_run(
    file: Path, group: str, arm: str, seed: int, size: study.Size, arguments: study.Arguments
) -> Figures:
    """A run of the study, kept when it has ended."""
    rows = study.train(lambda step, state: None, group, arm, seed, size, arguments)
    records.keep(file, arm, seed, rows)
    last = max(step for step, *_ in rows)
    figures = {metric: value for step, metric, where, value in rows if step == last and not where}
    return {"ok": True} | figures


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, or a folder")
    options = parser.parse_args()
    size = study.SIZES.get(options.data, study.SIZES["folder"])
    group = "core"
    arms = list(study.GROUPS[group])
    seeds = SEEDS
    results = options.out.parent / "study"
    if options.short:  # the group that measures least
        group, arms, seeds = "ablations", ["weight 0.1"], SEEDS[:1]
        size = smallest(size)
        results = Path(tempfile.mkdtemp())
    file = results / f"{Path(options.data).name}-{group}.csv"
    results.mkdir(parents=True, exist_ok=True)
    steps = str(size.lengths[group].steps)
    arguments = ("--data", options.data, *size.arguments.split(), "--steps", steps)
    study.load(arguments)
    study.describe(group, file, size, arguments)
    done = {(record.arm, record.seed) for record in records.read(file)}
    for seed, arm in itertools.product(seeds, arms):
        if (arm, seed) in done:
            write(options.out, f"{arm}, seed {seed}", ok=True, kept=str(file))
            continue
        run = functools.partial(one_run, file, group, arm, seed, size, arguments)
        attempt(options.out, f"{arm}, seed {seed}", run)


if __name__ == "__main__":
    main()
