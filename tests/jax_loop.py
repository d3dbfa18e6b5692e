"""The user's loop in JAX, as pure functions."""

import types

import jax
import jax.numpy as jnp
import optax
from jax_models import WIDTH, forward

from selfalign.adapters import jax as sra


def apply_at(layer):
    """The user's apply function: (params, x, t, y) -> tokens after block `layer`."""
    return lambda params, x, t, y: forward(params, x, t, y)[1][layer - 1]


def make_loop(loss, lr=1e-2, sra_on=True, optimizer=None):
    """The user's loop of the README as pure functions: `start` gives the state, `objective` the loss, `step` the next state."""
    optimizer = optimizer or optax.adamw(lr, weight_decay=0.0)
    student_layer, teacher_layer = loss.layers(6)

    def start(params, seed=0):
        trained = {"model": params, "projector": sra.init_projector(jax.random.key(seed), WIDTH)}
        return trained, optimizer.init(trained), sra.init_teacher(params)

    def objective(trained, teacher, x0, noise, t, y, **draws):
        prediction, features = forward(trained["model"], loss.path.add_noise(x0, noise, t), t, y)
        denoising = jnp.mean((prediction - loss.path.velocity(x0, noise, t)) ** 2)
        if not sra_on:
            return denoising
        return denoising + sra.align(loss, apply_at(teacher_layer), teacher, trained["model"], trained["projector"],
                                     features[student_layer - 1], x0, noise, t, y, **draws)  # fmt: skip

    def step(state, *batch, **draws):
        trained, moments, teacher = state
        value, gradients = jax.value_and_grad(objective)(trained, teacher, *batch, **draws)
        updates, moments = optimizer.update(gradients, moments, trained)
        trained = optax.apply_updates(trained, updates)
        return (trained, moments, sra.update_teacher(loss, teacher, trained["model"])), value

    return types.SimpleNamespace(start=start, objective=objective, step=step, loss=loss)
