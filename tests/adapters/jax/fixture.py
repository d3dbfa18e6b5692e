"""The JAX adapter under the contract of adapters (tests/adapters/contract.py).

The loop is a user's: one forward that returns all features, the adapter's functions, SGD.
"""

import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import reference

from selfalign import adapting
from selfalign.adapters import jax as sra


class Fixture:
    name = "jax"
    lacks: ClassVar = {
        "a target for LayerSync": "The user's forward gives the later layer's tokens, and the user "
        "passes them as target_tokens.",
        "values of masks": "The step is jitted: nobody can look at a mask that is traced.",
        "old options": "The functions of the first edition have kept their options.",
    }

    def attach(self, loss, weights, projector=None):
        return Run(loss, weights, projector)


class Loop:
    """Pure functions of (trained, teacher, step, batch), for one objective or a list of them."""

    def __init__(self, loss):
        self.loss = list(loss) if isinstance(loss, tuple) else loss
        self.objectives = adapting.named_objectives(self.loss)
        self.layers = {n: o.layers(reference.DEPTH) for n, o in self.objectives.items()}
        self.path = reference.noise_path(self.loss)
        self.gradients = jax.jit(self._gradients)
        self.update = jax.jit(self._update)

    def start(self, weights, projector=None):
        """What is trained, and the teacher where there is one."""
        if projector is None:
            projector = sra.init_projector(jax.random.key(0), reference.WIDTH, loss=self.loss)
        trained = as_jax({"model": weights, "projector": projector})
        averaged = adapting.shared_teacher(self.objectives) is not None
        return trained, sra.init_teacher(trained["model"]) if averaged else None

    def _by_name(self, found):
        """A dict for a list; for one objective the thing itself."""
        return found if isinstance(self.loss, list) else next(iter(found.values()))

    def _features(self, place, features, source=adapting.Source):
        """The tokens after the first or second layer of the objectives with such a source."""
        names = [n for n, o in self.objectives.items() if isinstance(o.source, source)]
        return {name: features[self.layers[name][place] - 1] for name in names}

    def _apply(self, params, x, t, y):
        """The teacher's tokens."""
        _, features = reference.forward(params, x, t, y, jnp)
        return self._by_name(self._features(1, features, adapting.EMATeacher))

    def _given(self, features, given):
        """What is passed as target_tokens: the batch's, and later layers' of the same forward."""
        later = self._features(1, features, adapting.LaterLayer)
        if not isinstance(self.loss, list):
            return next(iter(later.values()), given)
        if given is None or isinstance(given, Mapping):
            return {**(given or {}), **later}
        return given

    def _terms(self, trained, teacher, step, batch):
        """The denoising loss, the term, and what to log."""
        params, projector = trained["model"], trained["projector"]
        x0, noise, t, y = inputs = [batch[part] for part in ("x0", "noise", "t", "y")]
        x = self.path.add_noise(x0, noise, t)
        prediction, features = reference.forward(params, x, t, y, jnp)
        denoising = jnp.mean((prediction - self.path.velocity(x0, noise, t)) ** 2)
        student = self._by_name(self._features(0, features))
        target = self._given(features, batch.get("target_tokens"))
        mask = batch.get("loss_mask")
        if teacher is None:
            term = sra.term(self.loss, projector, student, target, step=step, mask=mask)
        else:
            sides = teacher, params, projector, student
            options = {"u": batch["u"], "loss_mask": mask, "target_tokens": target}
            term = sra.align(self.loss, self._apply, *sides, *inputs, **options)
            sides = teacher, params
            taught = sra.teacher_tokens(self.loss, self._apply, *sides, *inputs, u=batch["u"])
            target = taught | target if isinstance(self.loss, list) else taught
        return denoising, term, sra.metrics(self.loss, projector, student, target)

    def _gradients(self, trained, teacher, step, batch, denoise):
        """Of the loss, or of the term alone where `denoise` is 0; the term and its metrics."""

        def objective(trained):
            denoising, term, metrics = self._terms(trained, teacher, step, batch)
            return denoise * denoising + term, (term, metrics)

        return jax.grad(objective, has_aux=True)(trained)

    def _update(self, trained, teacher, gradients):
        """What is trained and the teacher, after the step."""
        rate = reference.LEARNING_RATE
        trained = jax.tree.map(lambda p, g: p - rate * g, trained, gradients)
        if teacher is not None:
            teacher = sra.update_teacher(self.loss, teacher, trained["model"])
        return trained, teacher


# equal objectives share what is compiled
make_loop = functools.cache(Loop)


class Run:
    def __init__(self, loss, weights, projector):
        adapting.named_objectives(loss)  # before the cache hashes it
        self.loop = make_loop(tuple(loss) if isinstance(loss, list) else loss)
        self.trained, self.average = self.loop.start(weights, projector)
        self.done = jnp.int32(0)
        self.logged = {}

    def step(self, batch):
        found, (term, self.logged) = self._found(batch, denoise=1.0)
        self.trained, self.average = self.loop.update(self.trained, self.average, found)
        self.done += 1
        return float(term)

    def gradients(self, batch):
        found, _ = self._found(batch, denoise=0.0)
        heads = found["projector"] if isinstance(self.loop.loss, list) else {"": found["projector"]}
        return as_numpy(found["model"]) | reference.flat_heads(as_numpy(heads))

    def _found(self, batch, denoise):
        """Gradients, and the term with its metrics: one program for both."""
        state = self.trained, self.average, self.done
        return self.loop.gradients(*state, as_jax(batch), jnp.float32(denoise))

    def weights(self):
        return as_numpy(self.trained["model"])

    def projector(self):
        return as_numpy(self.trained["projector"])

    def teacher(self):
        return None if self.average is None else as_numpy(self.average.average)

    def metrics(self):
        return {name: value.item() for name, value in self.logged.items()}

    def save(self):
        return as_numpy((self.trained, self.average, self.done))

    def load(self, state):
        self.trained, self.average, self.done = as_jax(state)


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def as_numpy(tree):
    return jax.tree.map(np.array, tree)
