"""Five steps of one Keras backbone from given weights and draws: `python parity.py fit|functions OUTPUT.npz`.

"fit" trains by SelfAligned on the backend that KERAS_BACKEND names; "functions" by the JAX adapter, on the same backbone
through `stateless_call`.
"""

import itertools
import sys

import keras
import numpy as np
from keras_models import WIDTH, functional

import selfalign

STEPS, BATCH = 5, 8
LOSS = selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=selfalign.schedules.DecayWarmup(0.9))


def start():
    """The backbone with weights from a seed of NumPy's, the projector's weights, and the steps' batches and draws."""
    rng = np.random.default_rng(0)
    backbone = functional()
    for variable in backbone.weights:
        variable.assign((0.3 * rng.normal(size=tuple(variable.shape))).astype("float32"))
    shapes = {"hidden_kernel": (WIDTH, 2 * WIDTH), "hidden_bias": (2 * WIDTH,)}
    shapes |= {"output_kernel": (2 * WIDTH, WIDTH), "output_bias": (WIDTH,)}
    projector = {name: (0.2 * rng.normal(size=shape)).astype("float32") for name, shape in shapes.items()}
    draws = [{"x0": rng.normal(size=(BATCH, 5, 4)), "noise": rng.normal(size=(BATCH, 5, 4)), "t": rng.random(BATCH),
              "u": rng.random(BATCH)} for _ in range(STEPS)]  # fmt: skip
    draws = [{name: value.astype("float32") for name, value in step.items()} for step in draws]
    return backbone, projector, draws, np.arange(BATCH, dtype="int32")


def by_fit():
    from selfalign.adapters import keras as adapter

    backbone, projector, draws, y = start()
    model = adapter.SelfAligned(backbone, LOSS)
    for name, value in projector.items():
        model.projector_weights[name].assign(value)
    uniform = itertools.chain.from_iterable((step["t"], step["u"]) for step in draws)
    normal = (step["noise"] for step in draws)
    keras.random.uniform = lambda *args, **options: keras.ops.convert_to_tensor(next(uniform))
    keras.random.normal = lambda *args, **options: keras.ops.convert_to_tensor(next(normal))
    model.compile(optimizer=keras.optimizers.SGD(0.05, momentum=0.9), run_eagerly=True)
    terms = [model.train_on_batch(step["x0"], y, return_dict=True)["alignment"] for step in draws]
    arrays = [variable.value for variable in (*backbone.weights, *model.ema_backbone().weights)]
    return terms, [keras.ops.convert_to_numpy(x) for x in arrays]


def by_functions():
    import jax
    import optax

    from selfalign.adapters import jax as sra

    backbone, projector, draws, y = start()
    names = ["block_2", "block_4"]
    tapped = keras.Model(backbone.inputs, [backbone.output, *(backbone.get_layer(name).output for name in names)])
    params = [variable.value for variable in backbone.trainable_variables]
    state = [variable.value for variable in backbone.non_trainable_variables]

    def forward(params, *inputs):
        return tapped.stateless_call(params, state, list(inputs))[0]

    optimizer = optax.sgd(0.05, momentum=0.9)
    trained, teacher = (params, projector), sra.init_teacher(params)
    moments, terms = optimizer.init(trained), []

    @jax.jit
    def train(trained, moments, teacher, x0, noise, t, u):
        def objective(trained):
            prediction, tokens, _ = forward(trained[0], LOSS.path.add_noise(x0, noise, t), t, y)
            apply = lambda params, *inputs: forward(params, *inputs)[2]  # noqa: E731
            term = sra.align(LOSS, apply, teacher, *trained, tokens, x0, noise, t, y, u=u)
            return ((prediction - LOSS.path.velocity(x0, noise, t)) ** 2).mean() + term, term

        gradients, term = jax.grad(objective, has_aux=True)(trained)
        updates, moments = optimizer.update(gradients, moments)
        trained = optax.apply_updates(trained, updates)
        return trained, moments, sra.update_teacher(LOSS, teacher, trained[0]), term

    for step in draws:
        trained, moments, teacher, term = train(trained, moments, teacher, *(step[name] for name in ("x0", "noise", "t", "u")))
        terms.append(term)
    return terms, [*trained[0], *teacher.average]


if __name__ == "__main__":
    terms, arrays = {"fit": by_fit, "functions": by_functions}[sys.argv[1]]()
    np.savez(sys.argv[2], *map(np.asarray, arrays), terms=np.asarray(terms))
