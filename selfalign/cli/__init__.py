"""The command line: `selfalign presets`, `selfalign info` and `selfalign check`."""

from .command import main

__all__ = ["main"]
