"""Attaches to models nobody here has written, and compares all tokens with a forward by hand."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "entries"), str(HERE.parent)]

FILES = sorted(path.stem for path in (HERE / "entries").glob("*_*.py"))


def main() -> None:
    options = parse()
    from repositories import folder, put_on_path, stand_in

    entries = chosen(options)
    if options.repository:
        repository = entries[0].repository
        stand_in("torchvision", "timm.data")  # the second asks for more of the first
        put_on_path(folder(repository, options.cache, options.mirror), repository)
    own = [e for e in entries if options.repository or e.repository is None]
    for entry in own:
        tell(entry)
    if not options.repository:
        for name in dict.fromkeys(e.repository.name for e in entries if e.repository):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--repository", name])


def parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of names: only these models")
    parser.add_argument("--mirror", type=Path, help="a folder of git directories, not the web")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/selfalign-models")
    parser.add_argument("--packages", type=Path, help="a folder of packages that models import")
    parser.add_argument("--files", default=",".join(FILES))
    parser.add_argument("--repository", help="only this one: repositories share module names")
    options = parser.parse_args()
    if options.packages:
        sys.path.insert(len(sys.path), str(options.packages))
    return options


def chosen(options: Any) -> list[Any]:
    entries = []
    for file in options.files.split(","):
        entries += importlib.import_module(file).ENTRIES
    words = [word.lower() for word in options.words]
    named = [e for e in entries if not words or any(word in e.name.lower() for word in words)]
    if options.repository:
        named = [e for e in named if e.repository and e.repository.name == options.repository]
    return named


def tell(entry: Any) -> None:
    import diffusers
    from trial import find

    diffusers.utils.logging.set_verbosity_error()
    try:
        f = find(entry)
    except Exception as e:
        tb = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{tb.filename.split('/')[-1]}:{tb.lineno}"
        print(f"{entry.name:40s} HARNESS {type(e).__name__}: {str(e)[:300]} {where}", flush=True)
        return
    print(
        f"{f.name:40s} {f.outcome[:400]} | {f.options} {f.tokens}/{entry.tokens} "
        f"{f.student:.1e} {f.teacher:.1e} {f.blocks}",
        flush=True,
    )
    for m in f.messages:
        print("      MSG", m[:250], "...", m[-300:])


main()
