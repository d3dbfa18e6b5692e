"""Other objectives than SRA: LayerSync, REPA, one without a target, and lists of them."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import selfalign
from selfalign import schedules
from selfalign.adapters import jax as sra

WIDTH, ENCODER = 8, 6
SRA = selfalign.SRALoss(student_layer=1, teacher_layer=2)
LAYERSYNC = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3)
REPA = selfalign.REPALoss(student_layer=1, width=ENCODER, hidden=10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(selfalign.Objective):
    """The mean square of the student's tokens: no target."""

    kind: ClassVar[str] = "small"
    source: ClassVar = selfalign.sources.Nothing()

    def compare(self, student, target, mask=None):
        return jnp.mean(jnp.square(student))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Careless(selfalign.LayerSyncLoss):
    """Does not stop the gradient of its target."""

    kind: ClassVar[str] = "careless"

    def compare(self, student, target, mask=None):
        return jnp.mean(jnp.square(student - target))


SMALL = Small(student_layer=1, weight=0.1)


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes]


@pytest.fixture
def tokens():
    """Tokens of an early layer, of a later one, and of an encoder."""
    return arrays((4, 5, WIDTH), (4, 5, WIDTH), (4, 5, ENCODER))


@pytest.fixture
def heads():
    return sra.init_projector(jax.random.key(0), WIDTH, loss=[SRA, LAYERSYNC, REPA, SMALL])


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), tree)


# Heads


@pytest.mark.parametrize("loss", [None, SRA])
def test_sras_head_is_the_projector_as_the_core_draws_it(loss):
    projector = sra.init_projector(jax.random.key(3), 16, loss=loss)
    bound = np.sqrt(6 / (3 * 16))
    for name, shape in {"hidden_kernel": (16, 32), "output_kernel": (32, 16)}.items():
        assert projector[name].shape == shape
        assert projector[name].dtype == "float32"
        assert np.abs(projector[name]).max() <= bound
        np.testing.assert_allclose(np.std(projector[name]), bound / np.sqrt(3), rtol=0.1)
    assert not projector["hidden_bias"].any()
    assert not projector["output_bias"].any()
    default = sra.init_projector(jax.random.key(3), 16)
    for name, value in default.items():
        np.testing.assert_array_equal(projector[name], value)


def test_heads_are_as_the_objectives_say():
    key = jax.random.key(0)
    assert sra.init_projector(key, WIDTH, loss=LAYERSYNC) == {}
    repa = sra.init_projector(key, WIDTH, "bfloat16", loss=REPA)
    assert {name: value.shape for name, value in repa.items()} == {
        "hidden_kernel": (WIDTH, 10),
        "hidden_bias": (10,),
        "hidden_2_kernel": (10, 10),
        "hidden_2_bias": (10,),
        "output_kernel": (10, ENCODER),
        "output_bias": (ENCODER,),
    }
    assert {value.dtype.name for value in repa.values()} == {"bfloat16"}


def test_heads_of_a_list_are_by_name_and_differ():
    deep = selfalign.REPALoss(student_layer=2, width=ENCODER, hidden=10, name="deep")
    heads = sra.init_projector(jax.random.key(0), WIDTH, loss=[REPA, LAYERSYNC, deep])
    assert list(heads) == ["repa", "layersync", "deep"]
    assert heads["layersync"] == {}
    for name in ("hidden_kernel", "hidden_2_kernel", "output_kernel"):
        assert (heads["repa"][name] != heads["deep"][name]).all()


# One objective without a teacher


def expected(name, heads, tokens):
    """The weighted term by the oracle."""
    early, later, encoder = wide(tokens)
    if name == "layersync":
        return oracle.loss("cosine", 0.2, early, later)
    if name == "repa":
        return oracle.loss("cosine", 0.5, oracle.mlp(3, wide(heads["repa"]), early), encoder)
    if name == "small":
        return 0.1 * (early**2).mean()
    return oracle.loss("cosine", 0.5, oracle.project(wide(heads["sra"]), early), later)


def targets(tokens):
    _, later, encoder = tokens
    return {"sra": later, "layersync": later, "repa": encoder, "small": None}


@pytest.mark.parametrize("loss", [LAYERSYNC, REPA, SMALL], ids=lambda loss: loss.kind)
def test_the_term_is_the_formula(loss, heads, tokens):
    name = loss.kind
    term = jax.jit(lambda *sides: sra.term(loss, *sides))
    found = term(heads[name], tokens[0], targets(tokens)[name])
    assert found.dtype == "float32"
    assert found.shape == ()
    np.testing.assert_allclose(found, expected(name, heads, tokens), rtol=1e-5)


@pytest.mark.parametrize("loss", [LAYERSYNC, REPA, Careless(student_layer=1, teacher_layer=2)])
def test_no_gradient_reaches_the_target(loss, tokens):
    """Also where the objective itself does not stop it."""
    head = sra.init_projector(jax.random.key(0), WIDTH, loss=loss)
    target = tokens[2] if loss is REPA else tokens[1]

    def term(head, student, target):
        return sra.term(loss, head, student, target)

    of_head, of_student, of_target = jax.jit(jax.grad(term, argnums=(0, 1, 2)))(
        head, tokens[0], target
    )
    assert not of_target.any()
    assert of_student.any()
    assert all(leaf.any() for leaf in jax.tree.leaves(of_head))


def test_masks_leave_out_samples(heads, tokens):
    mask = jnp.array([True, False, True, False])
    found = sra.term(REPA, heads["repa"], tokens[0], tokens[2], mask=mask)
    first = [leaf[::2] for leaf in tokens]
    np.testing.assert_allclose(found, expected("repa", heads, first), rtol=1e-5)


def test_weights_follow_a_count_of_ones_own(tokens):
    """Where there is no teacher, the loop counts: `step` is an argument."""
    weight = 0.2 * schedules.Stop(2)
    loss = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3, weight=weight)
    term = jax.jit(lambda step: sra.term(loss, {}, tokens[0], tokens[1], step=step))
    found = [float(term(step)) for step in range(4)]
    plain = float(expected("layersync", {}, tokens))
    np.testing.assert_allclose(found, [plain, plain, 0, 0], rtol=1e-5)
    assert term._cache_size() == 1


def test_numpy_tokens_are_taken(tokens):
    """An encoder's tokens often come from a file or another framework."""
    found = sra.term(LAYERSYNC, {}, *[np.asarray(leaf) for leaf in tokens[:2]])
    np.testing.assert_allclose(found, expected("layersync", {}, tokens), rtol=1e-5)


# Lists

ALL = [SRA, LAYERSYNC, REPA, SMALL]
NAMES = ("sra", "layersync", "repa", "small")


def test_terms_of_a_list_add_up(heads, tokens):
    given = {name: value for name, value in targets(tokens).items() if value is not None}
    term = jax.jit(lambda *sides: sra.term(ALL, *sides))
    found = term(heads, dict.fromkeys(NAMES, tokens[0]), given)
    wanted = sum(expected(name, heads, tokens) for name in NAMES)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_metrics_of_a_list_are_by_name(heads, tokens):
    given = {name: value for name, value in targets(tokens).items() if value is not None}
    found = sra.metrics(ALL, heads, dict.fromkeys(NAMES, tokens[0]), given)
    for objective in ALL:
        name = objective.kind
        alone = sra.metrics(objective, heads[name], tokens[0], targets(tokens)[name])
        for metric, value in alone.items():
            np.testing.assert_allclose(found[f"{name}/{metric}"], value, rtol=1e-6)
    assert {name.partition("/")[0] for name in found} == set(NAMES)
    assert "small/cosine" not in found
    distance = expected("repa", heads, tokens) / 0.5
    np.testing.assert_allclose(found["repa/distance"], distance, rtol=1e-5)


def test_a_list_of_one_is_a_list(heads, tokens):
    """Entries by name, also for a single objective in a list: nothing is guessed."""
    found = sra.term([LAYERSYNC], {"layersync": {}}, *[{"layersync": x} for x in tokens[:2]])
    np.testing.assert_allclose(found, expected("layersync", heads, tokens), rtol=1e-6)


# Several objectives on one teacher


def model(params, x, t):
    """Features after each of three blocks."""
    features = []
    for kernel in params:
        x = x + jnp.tanh(x @ kernel + t[:, None, None])
        features.append(x)
    return features


def test_objectives_share_one_teacher_and_its_forward(heads, tokens):
    deep = selfalign.SRALoss(student_layer=2, teacher_layer=3, weight=0.3, name="deep")
    losses = [SRA, deep, LAYERSYNC, SMALL]
    params = arrays(*[(WIDTH, WIDTH)] * 3, seed=1)
    teacher = sra.init_teacher(arrays(*[(WIDTH, WIDTH)] * 3, seed=2))
    teacher = teacher._replace(step=jnp.int32(7))
    x0, noise = arrays(*[(4, 5, WIDTH)] * 2, seed=3)
    t = jnp.linspace(0.2, 0.9, 4)
    key = jax.random.key(0)
    calls = []

    def apply(params, x, t):
        calls.append(t)
        features = model(params, x, t)
        return {"sra": features[1], "deep": features[2]}

    features = model(params, SRA.path.add_noise(x0, noise, t), t)
    students = {"sra": features[0], "deep": features[1]}
    others = {"layersync": features[0], "small": features[0]}
    projector = {**heads, "deep": heads["sra"]}
    del projector["repa"]
    sides = teacher, params, projector, students | others
    given = {"layersync": features[2]}
    found = sra.align(losses, apply, *sides, x0, noise, t, key=key, target_tokens=given)
    assert len(calls) == 1

    wanted = sra.term(LAYERSYNC, {}, features[0], features[2])
    wanted += sra.term(SMALL, {}, features[0], None)
    for loss, layer in ((SRA, 2), (deep, 3)):
        tap = lambda params, x, t, n=layer: model(params, x, t)[n - 1]  # noqa: E731
        student = students[loss.name or loss.kind]
        sides = teacher, params, heads["sra"], student
        wanted += sra.align(loss, tap, *sides, x0, noise, t, key=key)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_average_of_a_list_is_that_of_its_teacher():
    params = {"w": jnp.zeros(3)}
    decay = schedules.DecayWarmup(0.9)
    averaged = selfalign.SRALoss(student_layer=1, teacher_layer=2, decay=decay)
    teacher = sra.init_teacher(params)
    alone = sra.update_teacher(averaged, teacher, {"w": jnp.ones(3)})
    listed = sra.update_teacher([LAYERSYNC, averaged], teacher, {"w": jnp.ones(3)})
    np.testing.assert_array_equal(listed.average["w"], alone.average["w"])
    assert listed.step == alone.step == 1
