"""Whole modules in evaluation mode: a module's mode travels with its parameters."""

from __future__ import annotations

import sys
from typing import Any

from selfalign.adapting import Tree

from .trees import is_nnx_module


def in_evaluation(params: Tree) -> Tree:
    """A whole module, made anew from the average, in evaluation mode; other pytrees as they are."""
    if is_nnx_module(params):
        params.eval(train=False, training=False)
        return params
    equinox: Any = sys.modules.get("equinox")
    if equinox is not None and isinstance(params, equinox.Module):
        return equinox.nn.inference_mode(params)
    return params
