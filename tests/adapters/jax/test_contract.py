"""The contract of adapters, kept by the one for JAX: see contract.py."""

from contract import *  # noqa: F403
