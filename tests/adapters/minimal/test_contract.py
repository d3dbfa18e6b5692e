"""The contract of adapters, kept by the smallest one: see contract.py."""

from contract import *  # noqa: F403
