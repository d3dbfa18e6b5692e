"""A part of `make gpu`: does SRA help? Runs of studies/study.py, as far as the time allows.

    python benchmarks/gpu/helps.py --out found.jsonl --data fashion-mnist

The group "core", seed by seed. Each run that ends is kept, and started anew the part goes on with
those that are missing: `make gpu` again, or `run.py --only helps.py`, which leaves it all the time.
"""

import functools
import sys
from pathlib import Path

from found import Figures, attempt, command_line

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "studies"), str(ROOT / "examples")]
import records
import study

GROUP = "core"
SEEDS = (10, 11, 12)


def smallest(size: study.Size) -> study.Size:
    return size._replace(
        lengths={GROUP: study.Length(2, 2)},
        measured_every=2,
        samples=20,
        held_out=20,
        judge_images=50,
        judge_epochs=1,
        probed=50,
        sampling_steps=2,
    )


def one_run(
    file: Path, arm: str, seed: int, size: study.Size, arguments: tuple[str, ...]
) -> Figures:
    """A run of the study, kept when it has ended."""
    rows = study.train(lambda step, state: None, GROUP, arm, seed, size, arguments)
    records.keep(file, arm, seed, rows)
    last = max(step for step, *_ in rows)
    figures = {metric: value for step, metric, where, value in rows if step == last and not where}
    return {"ok": True} | figures


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, or a folder")
    options = parser.parse_args()
    size = study.SIZES.get(options.data, study.SIZES["folder"])
    results = options.out.parent / ("rehearsal" if options.short else "study")
    seeds = SEEDS
    arms = list(study.GROUPS[GROUP])
    if options.short:
        size = smallest(size)
        seeds, arms = (SEEDS[0],), ["default"]
    file = results / f"{Path(options.data).name}-{GROUP}.csv"
    results.mkdir(parents=True, exist_ok=True)
    steps = str(size.lengths[GROUP].steps)
    arguments = ("--data", options.data, *size.arguments.split(), "--steps", steps)
    study.load(arguments)
    study.describe(GROUP, file, size, arguments)
    done = set() if options.short else {(arm, seed) for arm, seed, *_ in records.read(file)}
    for seed in seeds:
        for arm in arms:
            if (arm, seed) in done:
                continue
            run = functools.partial(one_run, file, arm, seed, size, arguments)
            attempt(options.out, f"{arm}, seed {seed}", run)


if __name__ == "__main__":
    main()
