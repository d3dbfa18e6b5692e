"""Whether the backbone drops conditions inside, which its teacher would not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy
from keras import ops

from selfalign.adapting import Tensor, invalid

_SAMPLES = 16  # in one batch, all of them equal
_BATCHES = 4  # a tenth of the labels is dropped in one of 64 samples, but for one case in 850
_NOTICED = 1e-5  # of the largest number among the tokens


def check_condition(backbone: keras.Model, tokens: Any) -> None:
    """In training, a change of an input is noticed by all of several equal samples, or by none.

    They differ in what the backbone's layers draw for them, and in nothing else; before and after
    the change the draws are the same. So dropout of features does no harm, and of a condition that
    is replaced for some samples it is told that these do not depend on it.

    What this cannot see: a backbone that is not functional, whose inputs have an unknown length, or
    that draws without a `SeedGenerator`.

    Args:
        backbone: functional; nothing of it is changed.
        tokens: the student's, symbolic, a nest of outputs of the backbone's layers.

    Raises:
        ValueError: an input that some samples do not depend on.
    """
    known = all(None not in each.shape[1:] for each in backbone.inputs)
    if not known or not _generators(backbone):
        return
    model = keras.Model(backbone.input, tokens)
    first = [_equal_samples(each, 0) for each in backbone.inputs]
    for batch, state in enumerate(_states(backbone)):
        before = _run(model, state, first, batch)
        for place, each in enumerate(backbone.inputs):
            changed = [*first]
            changed[place] = _equal_samples(each, 1)
            _check_noticed(each.name, before, _run(model, state, changed, batch))


def _generators(backbone: keras.Model) -> list[keras.Variable]:
    """The states of the backbone's seed generators."""
    weights = {id(variable) for variable in backbone.weights}
    return [variable for variable in backbone.variables if id(variable) not in weights]


def _states(backbone: keras.Model) -> Iterator[list[tuple[keras.Variable, Tensor]]]:
    """Values for all variables: other draws each time, and gates that are zero opened."""
    rng = numpy.random.default_rng(0)
    seeds = {id(variable) for variable in _generators(backbone)}
    for batch in range(_BATCHES):
        state = []
        for variable in backbone.variables:
            value = ops.stop_gradient(variable.value)
            if id(variable) in seeds:
                value = value + ops.cast(batch, value.dtype)
            elif variable.trainable and not ops.any(value):
                value = 0.1 * rng.normal(size=variable.shape)
            state.append((variable, ops.convert_to_tensor(value, variable.dtype)))
        yield state


def _equal_samples(each: keras.KerasTensor, version: int) -> Tensor:
    """A batch of one input, whose samples are equal."""
    shape = tuple(each.shape[1:])
    if "int" in each.dtype or each.dtype == "bool":
        sample = numpy.full(shape, version)
    else:
        sample = numpy.random.default_rng(version).uniform(0.1, 0.9, size=shape)
    return ops.convert_to_tensor(numpy.stack([sample] * _SAMPLES), each.dtype)


def _run(model: keras.Model, state: Any, inputs: list[Tensor], seed: int) -> list[Tensor]:
    with _streams_kept(seed), keras.StatelessScope(state):
        outputs = model(keras.tree.pack_sequence_as(model.input, inputs), training=True)
    return keras.tree.flatten(outputs)


@contextlib.contextmanager
def _streams_kept(seed: int) -> Iterator[None]:
    """Leave PyTorch's random streams as they were: Keras's dropout draws from them there."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(seed)
        yield


def _check_noticed(name: str, before: list[Tensor], after: list[Tensor]) -> None:
    for old, new in zip(before, after, strict=True):
        old, new = (numpy.asarray(ops.convert_to_numpy(ops.cast(x, "float32"))) for x in (old, new))
        change = abs(new - old).reshape(_SAMPLES, -1).max(axis=1)
        noticed = change > _NOTICED * abs(old).max()
        if noticed.any() and not noticed.all():
            raise invalid(
                "A condition must not be dropped inside the backbone: its teacher, in evaluation "
                "mode, would see another one",
                f"the input {name!r}, on which {int((~noticed).sum())} of {_SAMPLES} equal samples "
                "do not depend in training mode",
                "Switch that off and pass label_dropout= and null_label=, which fall alike on both "
                'sides; or pass checks="off" if it is meant.',
            )
