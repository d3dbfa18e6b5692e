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
    out = tmp_path_factory.mktemp("dist")
    source = out / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def modules():
    core = {f"selfalign/{path.name}" for path in (ROOT / "selfalign").iterdir() if path.suffix in (".py", ".typed")}
    core |= {f"selfalign/diagnostics/{path.name}" for path in (ROOT / "selfalign" / "diagnostics").glob("*.py")}
    return core | {f"selfalign/adapters/{path.name}" for path in (ROOT / "adapters").glob("*.py")}


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


def test_make_test_runs_every_file_on_the_backends_it_is_for():
    """What the Makefile hands to pytest, collected: a path that is ignored by mistake would be green."""
    makefile = (ROOT / "Makefile").read_text()
    once = re.search(r"^ONCE := (.*)$", makefile, re.M)[1]
    collected = {}
    for backend, arguments in re.findall(r"^test-(\w+):.*\n\tKERAS_BACKEND=\1 \$\(PYTEST\) (.*)$", makefile, re.M):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", *arguments.replace("$(ONCE)", once).split()]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"KERAS_BACKEND": backend}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        collected[backend] = {line.rpartition(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    core = {file for file in files if not file.startswith("tests/adapters/")} - set(once.split())
    for backend, adapters in {"numpy": (), "torch": ("torch", "keras"), "jax": ("jax", "keras")}.items():
        of_adapters = {file for file in files if file.startswith(tuple(f"tests/adapters/{name}/" for name in adapters))}
        missing = (core | of_adapters) - collected[backend]  # but for those whose tests are all marked for another backend
        assert [file for file in missing if "pytest.mark.only(" not in (ROOT / file).read_text()] == [], backend
    assert set.union(*collected.values()) == files
