"""A teacher back from a checkpoint: in any form, with the settings that it was trained by."""

import re

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax_models import EquinoxModel, NnxModel, make_params

import selfalign
from selfalign.adapters import jax as sra


def through_orbax(state, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "checkpoint")


def through_flax(state, folder):
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))


def as_it_is(state, folder):
    return state


def bare(state, folder):
    return sra.Teacher(state["average"], state["step"])


NEST = {"blocks": [jnp.ones(3), (jnp.ones((2, 2), "bfloat16"), jnp.zeros(()))], "count": 7}


def lists():
    return jax.tree.map(jnp.asarray, NEST)


def nnx_module():
    return NnxModel(nnx.Rngs(0))


def equinox_arrays():
    return eqx.filter(EquinoxModel(jax.random.key(0)), eqx.is_inexact_array)


def with_state(state, average):
    """What a whole module is saved as."""
    return {**state, "average": nnx.to_pure_dict(nnx.state(average))}


FORMS = [
    (lists, through_orbax),
    (lists, through_flax),
    (lists, as_it_is),
    (lists, bare),
    (equinox_arrays, through_orbax),
    (nnx_module, through_orbax),
]


@pytest.mark.parametrize(("make", "through"), FORMS)
def test_a_teacher_comes_back_without_a_target(loss, tmp_path, make, through):
    params = make()
    teacher = sra.init_teacher(params)._replace(step=jnp.int32(7))
    teacher = sra.update_teacher(loss, teacher, jax.tree.map(ahead, params))
    state = sra.teacher_state(loss, teacher)
    if make is nnx_module:
        state = with_state(state, teacher.average)
    found = sra.restore_teacher(loss, params, through(state, tmp_path))
    assert jax.tree.structure(found) == jax.tree.structure(teacher)
    assert found.step == 8
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(teacher), strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine == theirs).all()


def ahead(leaf):
    return leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def test_a_target_of_other_settings_has_the_same_shapes(loss):
    teacher = sra.init_teacher({"w": jnp.ones(3)})
    other = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7, name="another")
    shapes = [
        jax.eval_shape(lambda x=each: sra.teacher_state(x, teacher)) for each in (loss, other)
    ]
    assert shapes[0] == shapes[1]


def test_frozen_leaves_come_back_as_the_students(loss, tmp_path):
    params = {"base": jnp.ones((4, 4), "bfloat16"), "lora": jnp.ones(4), "gate": jnp.ones(())}
    trained = {"base": False, "lora": True, "gate": False}
    state = sra.teacher_state(loss, sra.init_teacher(params, trained))
    found = sra.restore_teacher(loss, params, through_orbax(state, tmp_path))
    assert sra.teacher_params(found, params)["base"] is params["base"]
    assert sra.teacher_params(found, params)["gate"] is params["gate"]


# What does not fit

TEACHER = sra.init_teacher({"w": jnp.ones(3)})
FINE = {"average": TEACHER.average, "step": TEACHER.step}


@pytest.mark.parametrize(
    ("state", "kind", "text"),
    [
        ({"average": 1}, TypeError, "entries average and step. Received: ['average']. Pass what"),
        (None, TypeError, "state must have the entries average and step. Received: NoneType."),
        (
            {**FINE, "average": {"v": jnp.ones(3)}},
            ValueError,
            "The saved average must have the arrays of params. Received: at 'w': nothing instead "
            "of (3,). Restore with the model",
        ),
        (
            {**FINE, "average": {"w": jnp.ones(4)}},
            ValueError,
            "Received: at 'w': (4,) instead of (3,).",
        ),
        (
            {**FINE, "average": {"w": jnp.full(3, jnp.nan)}},
            ValueError,
            "The saved average must be finite. Received: NaN or infinity at 'w'. Take an earlier",
        ),
        (
            {**FINE, "settings": b"no JSON"},
            ValueError,
            "settings must be JSON as bytes. Received: b'no JSON'. Pass what was saved",
        ),
    ],
)
def test_what_is_no_such_state_is_refused(loss, state, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        sra.restore_teacher(loss, {"w": jnp.ones(3)}, state)


def test_other_settings_are_refused_or_said_to_be_meant(loss):
    params = {"w": jnp.ones(3)}
    state = sra.teacher_state(loss, TEACHER)

    def restored(changed=(), **settings):
        other = selfalign.SRALoss(**({"student_layer": 1, "teacher_layer": 2} | settings))
        return sra.restore_teacher(other, params, state, changed=changed)

    text = (
        "The teacher must come from the same settings. Received: sra/decay 0.9999 instead of 0.5. "
        "If the change is meant, pass changed=('decay',)."
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        restored(decay=0.5)
    assert restored("decay", decay=0.5).step == 0
    assert restored(("weight", "max_gap"), weight=0.1, max_gap=0.3).step == 0
    text = "sra/teacher_layer 2 instead of 3. Build the loss with the settings that were saved"
    with pytest.raises(ValueError, match=re.escape(text)):
        restored(teacher_layer=3)
    text = "changed= takes names of settings that may differ: weight, decay, max_gap, random_gap."
    with pytest.raises(ValueError, match=re.escape(text)):
        restored("teacher_layer", teacher_layer=3)


def test_a_restored_dict_is_not_advised_away(loss):
    text = (
        "Received: dict. What was restored becomes one by restore_teacher(loss, params, restored)."
    )
    with pytest.raises(TypeError, match=re.escape(text)):
        sra.update_teacher(loss, FINE, {"w": jnp.ones(3)})


def test_it_lies_where_the_parameters_lie(loss):
    mesh = jax.make_mesh((2,), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    params = {"w": jax.device_put(jnp.asarray(make_params(depth=1)["final_layer.weight"]), split)}
    state = {"average": {"w": np.ones(params["w"].shape, "float32")}, "step": 3}
    assert sra.restore_teacher(loss, params, state).average["w"].sharding == split
