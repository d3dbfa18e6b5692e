"""The wheel and the source archive hold what the tree holds."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the wheel and the source archive of the tree as it is."""
    out = tmp_path_factory.mktemp("dist")
    source = out / "source"
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():  # a file that is removed may still be in the index
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def modules():
    """The files of the package, by their places in the wheel."""
    core = [path for path in (ROOT / "selfalign").rglob("*") if path.suffix in (".py", ".typed")]
    found = {str(path.relative_to(ROOT)) for path in core}
    for path in (ROOT / "adapters").rglob("*.py"):
        found.add(f"selfalign/{path.relative_to(ROOT)}")
    return found


def test_every_folder_of_the_package_is_found():
    folders = {str(Path(name).parent) for name in modules()}
    wanted = {"selfalign", *(f"selfalign/{name}" for name in ("cli", "diagnostics", "objectives"))}
    assert wanted <= folders
    assert {f"selfalign/adapters/{name}" for name in ("torch", "jax", "keras")} <= folders


def test_wheel_holds_exactly_the_package(dist):
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    assert {name for name in names if ".dist-info/" not in name} == modules()


def test_source_archive_holds_the_package(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.replace("selfalign/adapters/", "adapters/") for path in modules()} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_one_version():
    text = (ROOT / "pyproject.toml").read_text()
    import selfalign

    assert re.search(r'^version = "(.+)"$', text, re.M)[1] == selfalign.__version__
    assert f"## {selfalign.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {selfalign.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_adapters_refuse_their_bare_name():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import adapters"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "must be imported by their full name. Received: import of 'adapters'" in done.stderr


# What `make test` runs

MAKEFILE = (ROOT / "Makefile").read_text()
ONCE = re.search(r"^ONCE := (.*)$", MAKEFILE, re.M)[1]
RUNS = re.findall(r"^test-(\w+):.*\n\tKERAS_BACKEND=\1 \$\(PYTEST\) (.*)$", MAKEFILE, re.M)
ADAPTERS = {"numpy": (), "torch": ("minimal", "torch", "keras"), "jax": ("jax", "keras")}


LISTING = """
import sys, pytest
class Empty(pytest.Module):
    def collect(self):
        return []
class Files:
    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makemodule(self, module_path, parent):
        print(module_path.relative_to(sys.argv[1]))
        return Empty.from_parent(parent, path=module_path)
sys.exit(pytest.main(["--collect-only", "-qq", *sys.argv[2:]], plugins=[Files()]))
"""


def collected(backend, arguments):
    """The test files that pytest comes to with the arguments of a target; none is imported."""
    given = arguments.replace("$(ONCE)", ONCE).split()
    command = [sys.executable, "-c", LISTING, str(ROOT), *given]
    environment = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    return set(re.findall(r"^tests/.*\btest_\w+\.py$", done.stdout, re.M))


@pytest.mark.heavy
def test_make_test_runs_every_file_on_the_backends_it_is_for():
    """A path that is ignored by mistake would be green."""
    found = {backend: collected(backend, arguments) for backend, arguments in RUNS}
    assert set(found) == set(ADAPTERS)
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    core = {file for file in files if not file.startswith("tests/adapters/")}
    for backend, adapters in ADAPTERS.items():
        once = set() if backend == "torch" else set(ONCE.split())
        folders = tuple(f"tests/adapters/{name}/" for name in adapters)
        adapters_files = {file for file in files if folders and file.startswith(folders)}
        assert found[backend] == (core - once) | adapters_files, backend


def test_every_path_in_the_makefile_exists():
    named = re.findall(r"(?:tests|examples|studies|benchmarks|docs)/[\w/]+\.py", MAKEFILE)
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []
