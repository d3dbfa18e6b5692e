"""Runs the models."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "entries"), str(HERE.parent)]


def main() -> None:
    import logging
    from trial import find
    import diffusers
    diffusers.utils.logging.set_verbosity_error()
    for module in sys.argv[1].split(","):
        entries = importlib.import_module(f"entries.{module}").ENTRIES
        for entry in entries:
            if len(sys.argv) > 2 and not any(w.lower() in entry.name.lower() for w in sys.argv[2:]):
                continue
            try:
                f = find(entry)
                print(f"{f.name:40s} {f.outcome[:400]} | {f.options} {f.tokens}/{entry.tokens} {f.student:.1e} {f.teacher:.1e} {f.blocks}", flush=True)
                for m in f.messages: print("      MSG", m[:250], "...", m[-300:])
            except Exception as e:
                import traceback
                tb = traceback.extract_tb(e.__traceback__)[-1]
                print(f"{entry.name:40s} HARNESS {type(e).__name__}: {str(e)[:300]} {tb.filename.split('/')[-1]}:{tb.lineno}", flush=True)


main()
