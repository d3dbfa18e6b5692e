"""A part of `make gpu`: the contract of adapters (tests/adapters/contract.py) on the GPU.

    KERAS_BACKEND=jax python benchmarks/gpu/contract.py --out found.jsonl --adapters jax keras

Terms, gradients, averages and five steps are compared with the NumPy reference, whose numbers are
the CPU's in float64. In a rehearsal one case runs for each adapter.
"""

import sys
from pathlib import Path

import pytest
from found import command_line, write

ROOT = Path(__file__).resolve().parents[2]


class Outcomes:
    """Writes down each test as it ends."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            file, _, test = report.nodeid.partition("::")
            name = f"{Path(file).parent.name}: {test}"
            reason = {"error": report.longreprtext[-600:]} if report.failed else {}
            write(self.out, name, ok=report.passed, seconds=round(report.duration, 2), **reason)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--adapters", choices=["torch", "jax", "keras"], nargs="+", required=True)
    options = parser.parse_args()
    folders = [ROOT / "tests" / "adapters" / adapter for adapter in options.adapters]
    suites = [str(folder / "test_contract.py") for folder in folders]
    chosen = ["-k", "term_equals and layersync and centred"] if options.short else []
    arguments = ["-q", "-p", "no:xdist", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    # versions may be others there than those that the suite is green on, and warn of other things
    arguments += ["-o", "filterwarnings=default", *chosen, *suites]
    sys.exit(pytest.main(arguments, plugins=[Outcomes(options.out)]))


if __name__ == "__main__":
    main()
