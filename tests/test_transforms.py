"""The same numbers inside the frameworks' own machinery: compile, jit, vmap, devices."""

import numpy as np
import pytest
from support import BACKEND, PATHS, array, dtype_of, is_tensor, tensor, tree

import selfalign
from selfalign import SRALoss, distances, paths, schedules

STEP = np.array(700)


def inputs(name):
    """x0, noise, t, u and projector parameters for the path called `name`, as NumPy."""
    rng = np.random.default_rng(0)
    x0, noise, u = rng.normal(size=(4, 3, 6)), rng.normal(size=(4, 3, 6)), rng.random(4)
    t = rng.integers(0, 1000, 4) if name == "discrete" else rng.uniform(0.05, 1, 4)
    shapes = {"hidden_kernel": (6, 12), "hidden_bias": (12,), "output_kernel": (12, 6), "output_bias": (6,)}
    return x0, noise, t, u, {key: 0.3 * rng.normal(size=shape) for key, shape in shapes.items()}


def whole(loss):
    """One call of everything a training step asks of the core."""

    def step(x0, noise, t, u, params, step):
        moved = loss.teacher_time(t, u)
        student, teacher = loss.path.add_noise(x0, noise, t), loss.path.add_noise(x0, noise, moved)
        term = loss(selfalign.project(params, student), teacher, step=step)
        return term, moved, loss.path.velocity(x0, noise, t), loss.metrics(student, teacher)["cosine"]

    return step


def arguments(name):
    x0, noise, t, u, params = inputs(name)
    return tensor(x0), tensor(noise), tensor(t), tensor(u), tree(params), tensor(STEP)


def transformed(function):
    if BACKEND == "torch":
        import torch

        torch.compiler.reset()
        return torch.compile(
            function, fullgraph=True, backend="aot_eager"
        )  # the whole graph is caught; code is not the subject
    import jax

    return jax.jit(function)


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("name", PATHS)
def test_compiled_numbers_equal_eager_ones(name):
    function = whole(SRALoss(student_layer=1, teacher_layer=2, path=PATHS[name][0], weight=schedules.Warmup(1000)))
    eager, compiled = function(*arguments(name)), transformed(function)(*arguments(name))
    for got, wanted in zip(compiled, eager, strict=True):
        assert dtype_of(got) == dtype_of(wanted)
        np.testing.assert_allclose(array(got), array(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.only("torch", "jax")
def test_a_compiled_discrete_path_needs_no_earlier_eager_call():
    path = paths.Discrete(tuple(np.linspace(0.99, 0.01, 1000)))
    loss = SRALoss(student_layer=1, teacher_layer=2, path=path)
    assert np.isfinite(array(transformed(whole(loss))(*arguments("discrete"))[0]))


@pytest.mark.only("torch", "jax")
@pytest.mark.parametrize("distance", distances.NAMES)
def test_every_distance_and_masks_compile(distance):
    loss = SRALoss(student_layer=1, teacher_layer=2, distance=distance)
    x0, noise, *_ = arguments("linear")
    mask = tensor([True, False, True, True])
    compiled = transformed(lambda s, t, m: loss(s, t, mask=m))(x0, noise, mask)
    np.testing.assert_allclose(array(compiled), array(loss(x0, noise, mask=mask)), rtol=1e-5)


@pytest.mark.only("torch", "jax")
def test_the_ema_compiles():
    teacher, student = tree(inputs("linear")[-1]), tree({key: value + 1 for key, value in inputs("linear")[-1].items()})
    compiled = transformed(lambda a, b: selfalign.ema_update(a, b, 0.9))(teacher, student)
    eager = selfalign.ema_update(teacher, student, 0.9)
    for key in eager:
        np.testing.assert_allclose(array(compiled[key]), array(eager[key]), rtol=1e-6)


@pytest.mark.only("torch", "jax")
def test_gradients_pass_through_compiled_code():
    loss = SRALoss(student_layer=1, teacher_layer=2)
    x0, noise, *_ = inputs("linear")
    if BACKEND == "torch":
        found = []
        for function in (loss, transformed(lambda s, t: loss(s, t))):
            student = tensor(x0).requires_grad_()
            function(student, tensor(noise)).backward()
            found.append(array(student.grad))
    else:
        import jax

        found = [array(f(tensor(x0), tensor(noise))) for f in (jax.grad(loss), jax.jit(jax.grad(loss)))]
    assert found[0].any()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-8)


@pytest.mark.only("jax")
@pytest.mark.parametrize("name", PATHS)
def test_vmap_equals_a_loop(name):
    import jax

    loss = SRALoss(student_layer=1, teacher_layer=2, path=PATHS[name][0])
    x0, noise, t, u, params, step = arguments(name)
    stacked = [jax.numpy.stack([x, x[::-1]]) for x in (x0, noise, t, u)]
    together = jax.vmap(whole(loss), in_axes=(0, 0, 0, 0, None, None))(*stacked, params, step)
    for i in range(2):
        for got, wanted in zip(together, whole(loss)(*(x[i] for x in stacked), params, step), strict=True):
            np.testing.assert_allclose(array(got[i]), array(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.only("jax")
def test_the_loss_is_a_static_argument_of_jit():
    import functools

    import jax

    @functools.partial(jax.jit, static_argnums=0)
    def term(loss, student, teacher):
        return loss(student, teacher)

    x0, noise, *_ = arguments("linear")
    for weight in (0.5, 1.0):
        loss = SRALoss(student_layer=1, teacher_layer=2, weight=weight)
        np.testing.assert_allclose(array(term(loss, x0, noise)), array(loss(x0, noise)), rtol=1e-6)


@pytest.mark.only("jax")
def test_traced_times_are_not_looked_at():
    """Checks of values stop where values cannot be seen: no concretization error inside jit."""
    import jax

    loss = SRALoss(student_layer=1, teacher_layer=2)
    assert array(jax.jit(loss.teacher_time)(tensor([2.0]), tensor([0.0]))).tolist() == [2]


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", PATHS)
def test_tensors_stay_on_their_device_whatever_the_default(name):
    import keras

    loss = SRALoss(student_layer=1, teacher_layer=2, path=PATHS[name][0], weight=schedules.Warmup(1000))
    wanted = whole(loss)(*arguments(name))
    given = arguments(name)
    with keras.device("meta"):
        results = whole(loss)(*given)
        teacher = selfalign.ema_update({"w": given[0]}, {"w": given[1]}, 0.5)["w"]
    for got, expected in zip((*results, teacher), (*wanted, 0.5 * given[0] + 0.5 * given[1]), strict=True):
        assert got.device.type == "cpu"
        np.testing.assert_allclose(array(got), array(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.only("torch")
def test_results_are_where_the_tensors_are():
    import torch

    x, t = torch.zeros(4, 3, 6, device="meta"), torch.zeros(4, device="meta")
    loss = SRALoss(student_layer=1, teacher_layer=2)
    results = [loss(x, x), loss.teacher_time(t, t), loss.path.add_noise(x, x, t), loss.metrics(x, x)["cosine"]]
    assert {result.device.type for result in results} == {"meta"}


@pytest.mark.only("torch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_inside_autocast(dtype):
    import torch

    loss = SRALoss(student_layer=1, teacher_layer=2)
    x0, noise, t, u, *_ = arguments("linear")
    plain = loss(x0, noise), loss.path.add_noise(x0, noise, t), loss.teacher_time(t, u)
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        inside = loss(x0, noise), loss.path.add_noise(x0, noise, t), loss.teacher_time(t, u)
    for got, wanted in zip(inside, plain, strict=True):
        assert dtype_of(got) == "float32"
        np.testing.assert_allclose(array(got), array(wanted), rtol=1e-6)


@pytest.mark.only("torch")
def test_tensor_subclasses_are_torch_tensors():
    import torch

    x = torch.nn.Parameter(tensor(np.ones((1, 2, 3))))
    term = SRALoss(student_layer=1, teacher_layer=2)(x, tensor(np.full((1, 2, 3), 2.0)))
    term.backward()
    assert x.grad is not None
    assert is_tensor(term)


def test_numpy_arrays_are_taken_on_every_backend():
    """NumPy is nobody's framework: its arrays become the backend's tensors, and give its numbers."""
    loss = SRALoss(student_layer=1, teacher_layer=2)
    x0, noise, t, u, _ = inputs("linear")
    results = loss(x0, noise), loss.teacher_time(t, u), loss.path.add_noise(x0, noise, t)
    wanted = (
        loss(tensor(x0), tensor(noise)),
        loss.teacher_time(tensor(t), tensor(u)),
        loss.path.add_noise(*map(tensor, (x0, noise, t))),
    )
    for got, expected in zip(results, wanted, strict=True):
        assert is_tensor(got)
        np.testing.assert_allclose(array(got), array(expected), rtol=1e-5, atol=1e-6)
