"""The contract of adapters: see contract.py."""

from contract import *  # noqa: F403
