"""Whole modules in evaluation mode: a module's mode travels with its parameters."""

from __future__ import annotations

import sys
from typing import Any

import jax

from selfalign.adapting import Tree

from .trees import is_nnx_module


def in_evaluation(params: Tree) -> Tree:
    """A whole module, made anew from the average, in evaluation mode; other pytrees as they are."""
    if is_nnx_module(params):
        params.eval(train=False, training=False)
        return params
    equinox: Any = sys.modules.get("equinox")
    if equinox is not None and isinstance(params, equinox.Module) and _tells_mode(params):
        return equinox.nn.inference_mode(params)
    return params


def _tells_mode(module: Any) -> bool:
    """Whether it has modes; the arrays of a module that was partitioned are without them."""

    def has_mode(node: object) -> bool:
        return hasattr(node, "inference")

    nodes = filter(has_mode, jax.tree.leaves(module, is_leaf=has_mode))
    modes = [node.inference for node in nodes]
    return bool(modes) and all(isinstance(mode, bool) for mode in modes)
