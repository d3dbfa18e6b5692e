"""What adapters import: objectives by name, one teacher for them all, heads."""

import ast
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import oracle
import pytest
import third_party
from support import array, is_tensor, tensor

import selfalign
from selfalign import LayerSyncLoss, REPALoss, SRALoss, adapting, schedules

ROOT = Path(__file__).parents[1]


def sra(**settings):
    return SRALoss(**({"student_layer": 1, "teacher_layer": 2} | settings))


def layersync(**settings):
    return LayerSyncLoss(student_layer=1, teacher_layer=2, **settings)


def repa(**settings):
    return REPALoss(student_layer=1, width=6, **settings)


# Objectives by name


def test_one_objective_has_its_kind_as_name():
    for loss in (
        sra(),
        layersync(),
        repa(),
        third_party.LogCoshLoss(student_layer=1, teacher_layer=2),
    ):
        assert adapting.named_objectives(loss) == {loss.kind: loss}
        assert adapting.check_objective(loss) is loss


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_keeps_its_order(kind):
    given = kind([repa(), sra(), layersync(name="deep"), layersync()])
    assert list(adapting.named_objectives(given)) == ["repa", "sra", "deep", "layersync"]
    assert tuple(adapting.named_objectives(given).values()) == tuple(given)


def test_a_list_of_one_is_that_one():
    assert adapting.named_objectives([sra()]) == adapting.named_objectives(sra())


# One teacher


def test_objectives_without_an_ema_teacher_have_none():
    assert adapting.shared_teacher(adapting.named_objectives([layersync(), repa()])) is None


def test_the_teacher_of_several_objectives():
    one, other = sra(), sra(name="deep", student_layer=3, teacher_layer=5, distance="l2")
    for order in itertools.permutations([one, layersync(), other]):
        teacher = adapting.shared_teacher(adapting.named_objectives(order))
        assert isinstance(teacher, adapting.EMATeacher)
        assert (teacher.path, teacher.largest_gap) == (one.path, 0.2)
        assert teacher.decay_at(0) == 0.9999


def test_equal_settings_that_are_written_differently_agree():
    losses = [
        sra(path="linear", decay=0.99),
        sra(name="deep", path=selfalign.paths.Linear(), decay=schedules.Constant(0.99)),
    ]
    assert adapting.shared_teacher(adapting.named_objectives(losses)).decay_at(0) == 0.99


@pytest.mark.parametrize(
    "change",
    [{"path": "cosine"}, {"max_gap": 0.3}, {"random_gap": False}, {"decay": 0.99}],
    ids=lambda change: next(iter(change)),
)
def test_objectives_that_disagree_are_refused_by_the_setting(change):
    (setting,) = change
    losses = adapting.named_objectives([sra(), layersync(), sra(name="deep", **change)])
    with pytest.raises(ValueError, match=rf"agree on path.*Received: {setting} .* of 'deep', and "):
        adapting.shared_teacher(losses)


# Heads


@pytest.mark.parametrize(
    ("loss", "layers", "hidden", "target_width"),
    [(sra(), 2, 16, 8), (layersync(projector=True), 2, 16, 8), (repa(hidden=10), 3, 10, 6)],
)
def test_heads_have_the_shapes_of_their_draws(loss, layers, hidden, target_width):
    wanted = oracle.mlp_shapes(layers, 8, hidden, target_width)
    shapes = adapting.head_shapes(loss, 8)
    assert shapes == {name: shape for name, shape in wanted.items() if name.endswith("kernel")}
    rng = np.random.default_rng(0)
    drawn = {name: rng.random(shape) for name, shape in shapes.items()}
    params = adapting.init_head(loss, drawn)
    assert {name: tuple(value.shape) for name, value in params.items()} == wanted
    assert set(params) == set(loss.head.names)
    for name, draw in drawn.items():
        xavier = oracle.xavier_uniform(draw)
        np.testing.assert_allclose(array(params[name]), xavier, rtol=1e-5, atol=1e-6)


def test_numpy_draws_become_tensors_of_the_backend():
    drawn = {n: np.full(s, 0.25, "float32") for n, s in adapting.head_shapes(sra(), 4).items()}
    assert all(is_tensor(value) for value in adapting.init_head(sra(), drawn).values())
    again = adapting.init_head(sra(), {name: tensor(value) for name, value in drawn.items()})
    assert array(again["hidden_kernel"])[0, 0] == pytest.approx(-0.5 * (6 / 12) ** 0.5)


# What is public


def test_everything_named_is_there():
    assert [name for name in adapting.__all__ if not hasattr(adapting, name)] == []


def test_what_an_adapter_is_told_to_import_is_in_the_module():
    """The names in the docstring's table."""
    for name in ("named_objectives", "head_shapes", "init_head", "ema_update", "shared_teacher"):
        assert name in adapting.__all__


def imports_of(file):
    """The modules of selfalign's core that a file imports, and the names it takes from them."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module.partition(".")[0] == "selfalign":
                yield node.module, {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "selfalign":
                    yield alias.name, set()


FILES = sorted((ROOT / "adapters").rglob("*.py"))


def test_there_are_adapters():
    assert {file.parent.name for file in FILES} >= {"torch", "jax", "keras"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_adapters_import_only_this_module_of_the_core(file):
    """And the names it says are for them."""
    for module, names in imports_of(file):
        if module.startswith("selfalign.adapters"):
            continue
        assert module in ("selfalign.adapting", "selfalign"), module
        if module == "selfalign.adapting":
            assert names <= set(adapting.__all__), names - set(adapting.__all__)
        else:
            assert names <= {"adapting"}, names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd(selfalign.Objective):
    """Incomplete in one respect after the other."""

    def compare(self, student, target, mask=None):
        return 0.0


def odd(**attributes):
    return type("Odd", (Odd,), attributes)(student_layer=1)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"source": selfalign.sources.Nothing()},
            r"`kind`, a name such as \"sra\"\. Received: Odd",
        ),
        ({"kind": "odd"}, r"`source`, one of selfalign\.sources\. Received: Odd without it"),
        (
            {"kind": "odd", "source": "teacher"},
            r"`source`, one of selfalign\.sources\. Received: Odd",
        ),
        (
            {"kind": "odd", "source": selfalign.sources.Nothing(), "head": None},
            r"`head`, one of selfalign\.heads\. Received: Odd",
        ),
    ],
)
def test_an_incomplete_objective_is_refused_by_what_it_lacks(attributes, message):
    with pytest.raises(TypeError, match=f"An objective must have {message}.*Define it in"):
        adapting.check_objective(odd(**attributes))


def test_a_complete_one_is_taken():
    complete = odd(kind="odd", source=selfalign.sources.Nothing())
    assert adapting.named_objectives(complete) == {"odd": complete}
