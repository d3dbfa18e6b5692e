"""The same numbers inside the frameworks' own machinery: compile, jit, vmap, devices."""

import numpy as np
import oracle
import pytest
import support
import third_party
from support import BACKEND, array, dtype_of, is_tensor, tensor, tree

import selfalign
from selfalign import LayerSyncLoss, REPALoss, SRALoss, adapting, distances, paths, schedules
from selfalign.time_gap import gap_range

STEP = np.array(700)
# few steps: torch.compile traces the table of a discrete path number by number
SHORT = paths.Discrete(tuple(np.linspace(0.99, 0.01, 50)))
PATHS = {name: SHORT if name == "discrete" else path for name, (path, _) in support.PATHS.items()}
COMPILED = pytest.mark.only("torch", "jax")


def make(**settings):
    return SRALoss(student_layer=1, teacher_layer=2, **settings)


def inputs(name):
    """x0, noise, t, u and projector parameters for the path called `name`, as NumPy."""
    rng = np.random.default_rng(0)
    x0, noise, u = rng.normal(size=(4, 3, 6)), rng.normal(size=(4, 3, 6)), rng.random(4)
    t = rng.integers(0, 50, 4) if name == "discrete" else rng.uniform(0.05, 1, 4)
    shapes = oracle.mlp_shapes(2, 6, 12, 6)
    return x0, noise, t, u, {key: 0.3 * rng.normal(size=shape) for key, shape in shapes.items()}


def whole(loss):
    """One call of everything that a training step asks of the core."""
    largest = gap_range(loss.path, loss.max_gap)

    def step(x0, noise, t, u, params, step):
        student = loss.path.add_noise(x0, noise, t)
        teacher, moved = loss.path.add_less_noise(x0, noise, t, u, largest)
        distance, metrics = loss.evaluate(params, student, teacher, logged=True)
        return (
            loss.weigh(distance, step),
            moved,
            loss.teacher_time(t, u),
            loss.path.velocity(x0, noise, t),
            loss.path.draw_times(u),
            metrics["cosine"],
        )

    return step


def arguments(name):
    x0, noise, t, u, params = inputs(name)
    return tensor(x0), tensor(noise), tensor(t), tensor(u), tree(params), tensor(STEP)


def transformed(function):
    if BACKEND == "torch":
        import torch

        torch.compiler.reset()
        # the whole graph is caught; the code made of it is not the subject
        return torch.compile(function, fullgraph=True, backend="aot_eager")
    import jax

    return jax.jit(function)


# Compiled


@COMPILED
@pytest.mark.parametrize("name", PATHS)
def test_compiled_numbers_equal_eager_ones(name):
    function = whole(make(path=PATHS[name], weight=schedules.Warmup(1000)))
    eager, compiled = function(*arguments(name)), transformed(function)(*arguments(name))
    for got, wanted in zip(compiled, eager, strict=True):
        assert dtype_of(got) == dtype_of(wanted)
        np.testing.assert_allclose(array(got), array(wanted), rtol=1e-5, atol=1e-6)


@COMPILED
def test_a_compiled_discrete_path_needs_no_earlier_eager_call():
    path = paths.Discrete(tuple(np.linspace(0.98, 0.02, 50)))
    paths.Linear().snr(tensor([0.5]))  # Keras is there
    term = transformed(whole(make(path=path)))(*arguments("discrete"))[0]
    assert np.isfinite(array(term))


@COMPILED
@pytest.mark.parametrize("distance", distances.DISTANCES)
def test_every_distance_and_masks_compile(distance):
    loss = make(distance=distance)
    x0, noise, *_ = arguments("linear")
    mask = tensor([True, False, True, True])
    compiled = transformed(lambda s, t, m: loss(s, t, mask=m))(x0, noise, mask)
    np.testing.assert_allclose(array(compiled), array(loss(x0, noise, mask=mask)), rtol=1e-5)


OBJECTIVES = {
    "standardised": lambda: make(normalise="standardise"),
    "centred": lambda: make(normalise="centre"),
    "layersync": lambda: LayerSyncLoss(student_layer=1, teacher_layer=2),
    "repa": lambda: REPALoss(student_layer=1, width=5, hidden=4),
    "a third party's": lambda: third_party.LogCoshLoss(student_layer=1, teacher_layer=2),
}


@COMPILED
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_compiles_with_its_head_and_a_mask(name):
    loss = OBJECTIVES[name]()
    rng = np.random.default_rng(0)
    shapes = adapting.head_shapes(loss, 6)
    params = adapting.init_head(loss, {n: tensor(rng.random(s)) for n, s in shapes.items()})
    student = tensor(rng.normal(size=(4, 3, 6)))
    target = tensor(rng.normal(size=(4, 3, loss.source.target_width(6))))
    mask = tensor(rng.random((4, 3)) > 0.4)

    def term(params, student, target, mask):
        return loss.evaluate(params, student, target, mask)[0]

    eager = term(params, student, target, mask)
    compiled = transformed(term)(params, student, target, mask)
    np.testing.assert_allclose(array(compiled), array(eager), rtol=1e-5)


@COMPILED
def test_the_ema_compiles():
    teacher = tree(inputs("linear")[-1])
    student = tree({key: value + 1 for key, value in inputs("linear")[-1].items()})
    compiled = transformed(lambda a, b: selfalign.ema_update(a, b, 0.9))(teacher, student)
    eager = selfalign.ema_update(teacher, student, 0.9)
    for key in eager:
        np.testing.assert_allclose(array(compiled[key]), array(eager[key]), rtol=1e-6)


@COMPILED
def test_gradients_pass_through_compiled_code():
    loss = make()
    x0, noise, *_ = inputs("linear")
    plain, compiled = found_gradients(loss, tensor(x0), tensor(noise))
    assert plain.any()
    np.testing.assert_allclose(compiled, plain, rtol=1e-5, atol=1e-8)


def found_gradients(loss, student, target):
    """Of the student's tokens, eager and compiled."""
    if BACKEND == "jax":
        import jax

        return [array(f(student, target)) for f in (jax.grad(loss), jax.jit(jax.grad(loss)))]
    found = []
    for function in (loss, transformed(lambda s, t: loss(s, t))):
        leaf = student.clone().requires_grad_()
        function(leaf, target).backward()
        found.append(array(leaf.grad))
    return found


# JAX


@pytest.mark.only("jax")
@pytest.mark.parametrize("name", PATHS)
def test_vmap_equals_a_loop(name):
    import jax

    function = whole(make(path=PATHS[name]))
    x0, noise, t, u, params, step = arguments(name)
    stacked = [jax.numpy.stack([x, x[::-1]]) for x in (x0, noise, t, u)]
    together = jax.vmap(function, in_axes=(0, 0, 0, 0, None, None))(*stacked, params, step)
    for i in range(2):
        alone = function(*(x[i] for x in stacked), params, step)
        for got, wanted in zip(together, alone, strict=True):
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
        loss = make(weight=weight)
        np.testing.assert_allclose(array(term(loss, x0, noise)), array(loss(x0, noise)), rtol=1e-6)


@pytest.mark.only("jax")
def test_traced_times_are_not_looked_at():
    """Checks of values stop where values cannot be seen: no concretization error inside jit."""
    import jax

    moved = jax.jit(make().teacher_time)(tensor([2.0]), tensor([0.0]))
    assert array(moved).tolist() == [2]


# PyTorch


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", PATHS)
def test_tensors_stay_on_their_device_whatever_the_default(name):
    import keras

    function = whole(make(path=PATHS[name], weight=schedules.Warmup(1000)))
    wanted = function(*arguments(name))
    given = arguments(name)
    with keras.device("meta"):
        results = function(*given)
        average = selfalign.ema_update({"w": given[0]}, {"w": given[1]}, 0.5)["w"]
    wanted_average = 0.5 * given[0] + 0.5 * given[1]
    for got, expected in zip((*results, average), (*wanted, wanted_average), strict=True):
        assert got.device.type == "cpu"
        np.testing.assert_allclose(array(got), array(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.only("torch")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_results_are_where_the_tensors_are(name):
    import torch

    loss = OBJECTIVES[name]()
    x = torch.zeros(4, 3, 6, device="meta")
    target = torch.zeros(4, 3, loss.source.target_width(6), device="meta")
    shapes = adapting.head_shapes(loss, 6)
    params = adapting.init_head(loss, {n: x.new_zeros(s) for n, s in shapes.items()})
    distance, metrics = loss.evaluate(params, x, target, logged=True)
    results = [*params.values(), distance, loss.weigh(distance), *metrics.values()]
    assert {result.device.type for result in results} == {"meta"}


@pytest.mark.only("torch")
def test_times_are_where_the_tensors_are():
    import torch

    x, t = torch.zeros(4, 3, 6, device="meta"), torch.zeros(4, device="meta")
    path = paths.Linear()
    results = [make()(x, x), make().teacher_time(t, t), path.add_noise(x, x, t)]
    results += path.add_less_noise(x, x, t, t, 0.2)
    assert {result.device.type for result in results} == {"meta"}


@pytest.mark.only("torch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_inside_autocast(dtype):
    import torch

    x0, noise, t, u, *_ = arguments("linear")

    def results():
        loss = make()
        normalised = make(normalise="standardise")
        terms = loss(x0, noise), normalised(x0, noise)
        return *terms, loss.path.add_noise(x0, noise, t), loss.teacher_time(t, u)

    plain = results()
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        inside = results()
    for got, wanted in zip(inside, plain, strict=True):
        assert dtype_of(got) == "float32"
        np.testing.assert_allclose(array(got), array(wanted), rtol=1e-6)


@pytest.mark.only("torch")
def test_tensor_subclasses_are_torch_tensors():
    import torch

    x = torch.nn.Parameter(tensor(np.ones((1, 2, 3))))
    term = make()(x, tensor(np.full((1, 2, 3), 2.0)))
    term.backward()
    assert x.grad is not None
    assert is_tensor(term)


# NumPy


def test_numpy_arrays_are_taken_on_every_backend():
    """NumPy belongs to no framework: its arrays become the backend's tensors."""
    loss = make()
    x0, noise, t, u, params = inputs("linear")
    function = whole(loss)
    results = function(x0, noise, t, u, tree(params), 700)
    wanted = function(*arguments("linear")[:5], 700)
    for got, expected in zip(results, wanted, strict=True):
        assert is_tensor(got)
        np.testing.assert_allclose(array(got), array(expected), rtol=1e-5, atol=1e-6)
