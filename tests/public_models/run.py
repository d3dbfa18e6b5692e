"""Attaches to models nobody here has written, and compares all tokens with a forward by hand.

The classes of diffusers, and with --public models of public repositories, which are fetched at
their commits. `--write` keeps the results in results.json and writes the tables of docs/models.md.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import table
from entry import Entry
from repositories import folder, put_on_path, stand_in

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "entries"), str(HERE.parent)]
OWN = ("diffusers_families", "diffusers_images", "diffusers_videos", "diffusers_audio")
PUBLIC = ("public_labels", "public_text", "public_others")


def main() -> None:
    """What the command line asks for."""
    options = parse()
    if options.repository:
        run_repository(options)
        return
    rows = []
    for entry in chosen(options, OWN):
        rows.append(tried(entry))
        if options.write:
            table.keep(rows[-1])
    if options.public:
        named = chosen(options, PUBLIC)
        for name in dict.fromkeys(entry.repository.name for entry in named):
            # repositories share names of modules: each has a process
            command = [sys.executable, __file__, *sys.argv[1:], "--repository", name]
            subprocess.run(command, check=True)
    if options.write:
        table.keep_only({entry.name for entry in entries_of((*OWN, *PUBLIC))})
        table.write()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="parts of names: only these models")
    parser.add_argument("--public", action="store_true", help="public repositories, too")
    parser.add_argument("--write", action="store_true", help="results.json and docs/models.md")
    parser.add_argument("--mirror", type=Path, help="a folder of git directories, not the web")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/selfalign-models")
    parser.add_argument("--packages", type=Path, default=Path(sys.prefix) / "public")
    parser.add_argument("--size", type=int, help="of the batch, instead of the entries' own")
    parser.add_argument("--repository", help="only this one's models")
    return parser.parse_args()


def chosen(options: argparse.Namespace, files: tuple[str, ...]) -> list[Entry]:
    """The entries of these files, as far as their names are asked for."""
    entries = entries_of(files)
    if options.size:
        entries = [entry._replace(size=options.size) for entry in entries]
    words = [word.lower() for word in options.words]
    return [e for e in entries if not words or any(word in e.name.lower() for word in words)]


def entries_of(files: tuple[str, ...]) -> list[Entry]:
    return [entry for file in files for entry in importlib.import_module(file).ENTRIES]


def run_repository(options: argparse.Namespace) -> None:
    """The models of one repository, in this process."""
    named = chosen(options, PUBLIC)
    entries = [e for e in named if e.repository and e.repository.name == options.repository]
    repository: Any = entries[0].repository
    sys.path.append(str(options.packages))
    stand_in("torchvision", "timm.data")  # timm wants it whole, and these models a layer of timm
    put_on_path(folder(repository, options.cache, options.mirror), repository)
    for entry in entries:
        row = tried(entry)
        if options.write:
            table.keep(row)


def tried(entry: Entry) -> dict[str, Any]:
    """One model's row."""
    import diffusers
    from trial import find

    diffusers.utils.logging.set_verbosity_error()
    found = find(entry)
    row = table.row_of(entry, found)
    print(f"{entry.name}: {found.outcome} {found.options or ''}", flush=True)
    if found.outcome != "at once":
        for message in found.messages:
            print(f"    {message}", flush=True)
    return row


if __name__ == "__main__":
    main()
