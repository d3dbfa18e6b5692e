"""Public repositories at their commits, from the web or from a folder of git directories."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import subprocess
import sys
import tarfile
import types
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

from entry import Repository
from torch import nn


def folder(repository: Repository, cache: Path, mirror: Path | None) -> Path:
    """The repository's Python files in a folder of their own.

    Args:
        repository: which one, at which commit.
        cache: where such folders are kept.
        mirror: a folder of git directories, named owner+name, owner/name or name; None: the web.
    """
    target = cache / repository.name.replace("/", "+") / repository.commit
    if not target.exists():
        git = _local(repository, mirror) if mirror else _fetched(repository, cache)
        files = [":(glob)**/*.py"]
        archive = _git(git, "archive", repository.commit, "--", *files)
        target.mkdir(parents=True)
        with tarfile.open(fileobj=BytesIO(archive)) as members:
            members.extractall(target, filter="data")
    return target


def _git(directory: Path, *command: str) -> bytes:
    words = ["git", f"--git-dir={directory}", *command]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout


def _local(repository: Repository, mirror: Path) -> Path:
    """The git directory in the mirror."""
    owner, name = repository.name.split("/")
    for place in (f"{owner}+{name}", f"{owner}/{name}", f"{owner}/{name}.git", name, f"{name}.git"):
        found = [mirror / place / inner for inner in (".git", "repo", "")]
        for directory in found:
            if (directory / "HEAD").exists():
                return directory
    raise SystemExit(f"No git directory of {repository.name} in {mirror}.")


def _fetched(repository: Repository, cache: Path) -> Path:
    """A git directory with that one commit."""
    directory = cache / repository.name.replace("/", "+") / "git"
    if not (directory / "HEAD").exists():
        subprocess.run(["git", "init", "--quiet", "--bare", str(directory)], check=True)
        url = f"https://github.com/{repository.name}"
        _git(directory, "fetch", "--quiet", "--depth", "1", url, repository.commit)
    return directory


# What a model's file imports


def put_on_path(root: Path, repository: Repository) -> None:
    sys.path[:0] = [str(root / inside) for inside in repository.folders]


class StandIn(types.ModuleType):
    """A module of which whatever is asked for is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = type(name, (nn.Module,), {})
        setattr(self, name, found)
        return found


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that a tiny model on a CPU imports and does not need."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == own or name.startswith(f"{own}.") for own in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def stand_in(*packages: str) -> None:
    """From now on these packages are empty."""
    sys.meta_path.insert(0, StandIns(*packages))


def without_init(package: str) -> None:
    """Let modules of a package be imported without what its __init__.py imports.

    That is often training, data sets and models of other kinds.
    """
    relative = Path(*package.split("."))
    paths = [str(Path(place) / relative) for place in sys.path if (Path(place) / relative).is_dir()]
    module = types.ModuleType(package)
    module.__path__ = paths
    module.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
    sys.modules[package] = module
    parent, _, name = package.rpartition(".")
    if parent:
        setattr(sys.modules[parent], name, module)
