"""Five training steps of one model in one framework: `python parity.py torch|jax INPUTS OUTPUTS`, each in its own process.

Both start from the weights in INPUTS (.npz), see the same batches and draws, and write terms, gradients, EMA and weights.
"""

import sys

import numpy as np

import selfalign

STEPS = 5
OPTIONS = {
    "cosine": {"path": "linear", "distance": "cosine"},
    "paper": {"path": "cosine", "distance": "smooth_l1", "weight": 0.2},
    "reversed": {"path": selfalign.paths.Linear(noise_at=0), "distance": "l2", "max_gap": 0.3},
}
# SGD, not Adam: that one turns the rounding error of a gradient that is 0 (the bias of an attention's keys) into a full step


def loss_of(name):
    return selfalign.SRALoss(student_layer=2, teacher_layer=4, decay=selfalign.schedules.DecayWarmup(0.9), **OPTIONS[name])


def in_torch(name, given):
    import torch
    from dit_models import DiT

    from selfalign.adapters.torch import SelfAlignment

    model = DiT()
    model.load_state_dict({k.removeprefix("model."): torch.tensor(v) for k, v in given.items() if k.startswith("model.")})
    align = SelfAlignment(model, loss_of(name))
    with torch.no_grad():
        for key, value in align.projector.named_parameters():
            value.copy_(torch.tensor(given[f"projector.{key}"]))
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=1e-2, momentum=0.9)
    result = {}
    for step in range(STEPS):
        x0, noise, t, y, u = (torch.tensor(given[f"{part}.{step}"]) for part in ("x0", "noise", "t", "y", "u"))
        prediction = model(align.path.add_noise(x0, noise, t), t, y)
        term = align(x0, noise, t, y, u=u)
        if step == 0:  # gradients of the term alone, before anything has moved
            named = {f"model.{k}": p for k, p in model.named_parameters()}
            named |= {f"projector.{k}": p for k, p in align.projector.named_parameters()}
            gradients = torch.autograd.grad(term, [*named.values()], retain_graph=True, allow_unused=True)
            result |= {f"gradient.{k}": 0 * p.detach().numpy() if g is None else g.numpy()
                       for (k, p), g in zip(named.items(), gradients, strict=True)}  # fmt: skip
        (torch.nn.functional.mse_loss(prediction, align.path.velocity(x0, noise, t)) + term).backward()
        optimizer.step()
        optimizer.zero_grad()
        align.update()
        result[f"term.{step}"] = term.detach().numpy()
        result |= {f"teacher.{step}.{k}": v.numpy().copy() for k, v in align.teacher.state_dict().items()}
    return result | {f"model.{k}": v.detach().numpy() for k, v in model.state_dict().items()}


def in_jax(name, given):
    import jax
    import jax.numpy as jnp
    import optax
    from jax_models import forward

    from selfalign.adapters import jax as sra

    loss, optimizer = loss_of(name), optax.sgd(1e-2, momentum=0.9)
    trained = {part: {k.removeprefix(f"{part}."): jnp.asarray(v) for k, v in given.items() if k.startswith(f"{part}.")}
               for part in ("model", "projector")}  # fmt: skip
    moments, teacher = optimizer.init(trained), sra.init_teacher(trained["model"])

    def term(trained, features, teacher, *batch, u):
        apply = lambda params, *inputs: forward(params, *inputs)[1][3]  # noqa: E731
        return sra.align(loss, apply, teacher, trained["model"], trained["projector"], features[1], *batch, u=u)

    @jax.jit
    def term_gradient(trained, teacher, x0, noise, t, y, u):
        features = lambda trained: forward(trained["model"], loss.path.add_noise(x0, noise, t), t, y)[1]  # noqa: E731
        return jax.grad(lambda trained: term(trained, features(trained), teacher, x0, noise, t, y, u=u))(trained)

    @jax.jit
    def training_step(trained, moments, teacher, x0, noise, t, y, u):
        def objective(trained):
            prediction, features = forward(trained["model"], loss.path.add_noise(x0, noise, t), t, y)
            alignment = term(trained, features, teacher, x0, noise, t, y, u=u)
            return jnp.mean((prediction - loss.path.velocity(x0, noise, t)) ** 2) + alignment, alignment

        gradients, alignment = jax.grad(objective, has_aux=True)(trained)
        updates, moments = optimizer.update(gradients, moments, trained)
        trained = optax.apply_updates(trained, updates)
        return trained, moments, sra.update_teacher(loss, teacher, trained["model"]), alignment

    result = {}
    for step in range(STEPS):
        batch = [jnp.asarray(given[f"{part}.{step}"]) for part in ("x0", "noise", "t", "y", "u")]
        if step == 0:
            gradients = term_gradient(trained, teacher, *batch)
            result |= {f"gradient.{part}.{k}": g for part, tree in gradients.items() for k, g in tree.items()}
        trained, moments, teacher, result[f"term.{step}"] = training_step(trained, moments, teacher, *batch)
        result |= {f"teacher.{step}.{k}": v for k, v in teacher.average.items()}
    return result | {f"model.{k}": v for k, v in trained["model"].items()}


def main():
    framework, inputs, outputs = sys.argv[1:]
    given = dict(np.load(inputs))
    run = {"torch": in_torch, "jax": in_jax}[framework]
    results = {f"{name}/{key}": np.asarray(value) for name in OPTIONS for key, value in run(name, given).items()}
    np.savez(outputs, **results)


if __name__ == "__main__":
    main()
