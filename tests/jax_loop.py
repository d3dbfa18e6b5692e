"""The user's training loop in JAX, as pure functions: that of the README, on `forward`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax_models import WIDTH, forward

import selfalign
from selfalign.adapters import jax as sra

ADAM = optax.adam(1e-2)
# SGD where rounding must not grow: Adam makes a full step of the rounding error of a gradient of 0
SGD = optax.sgd(1e-2, momentum=0.9)


@functools.cache
def apply_at(layer):
    """The user's apply function: (params, x, t, y) -> tokens after block `layer`."""
    return lambda params, x, t, y: forward(params, x, t, y)[1][layer - 1]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A state is (trained, moments, teacher); `trained` holds the model and the projector."""

    loss: selfalign.SRALoss
    optimizer: optax.GradientTransformation = ADAM
    aligned: bool = True

    def start(self, params, seed=0):
        """The first state."""
        projector = sra.init_projector(jax.random.key(seed), WIDTH)
        trained = {"model": params, "projector": projector}
        return trained, self.optimizer.init(trained), sra.init_teacher(params)

    def terms(self, trained, teacher, x0, noise, t, y, **options):
        """The denoising loss and the alignment term."""
        loss = self.loss
        params, projector = trained["model"], trained["projector"]
        prediction, features = forward(params, loss.path.add_noise(x0, noise, t), t, y)
        denoising = jnp.mean((prediction - loss.path.velocity(x0, noise, t)) ** 2)
        if not self.aligned:
            return denoising, 0.0
        sides = teacher, params, projector, features[loss.student_layer - 1]
        apply = apply_at(loss.teacher_layer)
        return denoising, sra.align(loss, apply, *sides, x0, noise, t, y, **options)

    def term(self, *arguments, **options):
        return self.terms(*arguments, **options)[1]

    def objective(self, *arguments, **options):
        """What the loop goes down on."""
        denoising, term = self.terms(*arguments, **options)
        return denoising + term

    def gradient(self, *arguments, **options):
        """The objective and its gradient with respect to `trained`."""
        return jax.value_and_grad(self.objective)(*arguments, **options)

    def step(self, state, *batch, **options):
        """The next state, and the objective before the step."""
        trained, moments, teacher = state
        value, gradients = self.gradient(trained, teacher, *batch, **options)
        updates, moments = self.optimizer.update(gradients, moments, trained)
        trained = optax.apply_updates(trained, updates)
        return (trained, moments, sra.update_teacher(self.loss, teacher, trained["model"])), value


# tests that train with the same settings share what is compiled
make_loop = functools.cache(Loop)
jitted = functools.cache(jax.jit)
