"""Bad input to the JAX adapter: the rule, what was received, what to do."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax_models import WIDTH, LinenModel, NnxModel

import selfalign
from selfalign.adapters import jax as sra


def refused(kind, text):
    return pytest.raises(kind, match=re.escape(text))


# align, with one objective

TOKENS = jnp.ones((4, 5, WIDTH))
PARAMS = {"kernel": jnp.ones((4, WIDTH))}


def apply(params, x, t, y):
    return x @ params["kernel"]


@pytest.fixture
def align(loss, batch):
    """`align` on good input, of which a test spoils one part."""

    def call(**bad):
        given = {
            "loss": loss,
            "apply": apply,
            "teacher": sra.init_teacher(PARAMS),
            "params": PARAMS,
            "projector": sra.init_projector(jax.random.key(0), WIDTH),
            "student_tokens": TOKENS,
            "key": jax.random.key(0),
        }
        given |= bad
        names = ("loss", "apply", "teacher", "params", "projector", "student_tokens")
        sides = [given.pop(name) for name in names]
        return sra.align(*sides, *given.pop("batch", batch), **given)

    return call


def test_align_takes_what_is_good(align):
    assert align() > 0


@pytest.mark.parametrize(
    ("bad", "kind", "text"),
    [
        (
            {"key": None},
            ValueError,
            "The gaps need either key= or u=. Received: neither. Pass key=, a new key for each",
        ),
        ({"u": jnp.zeros(4)}, ValueError, "The gaps need either key= or u=. Received: both."),
        (
            {"key": 0},
            TypeError,
            "key must be a JAX key. Received: int 0. Pass jax.random.key(seed).",
        ),
        (
            {"key": jnp.zeros(2)},
            TypeError,
            "key must be a JAX key. Received: ArrayImpl Array([0., 0.]",
        ),
        (
            {"key": None, "u": jnp.zeros(3)},
            ValueError,
            "u must hold one draw per sample, of t's shape. Received: u (3,), t (4,).",
        ),
        (
            {"teacher": {"w": 1}},
            TypeError,
            "teacher must be a Teacher. Received: dict. Build it with init_teacher(params).",
        ),
        (
            {"student_tokens": None},
            TypeError,
            "The student's tokens must be a tensor. Received: NoneType None.",
        ),
        (
            {"student_tokens": jnp.zeros((4, 5, 3))},
            ValueError,
            "Tokens must have the head's width. Received: width 3, head of width 16.",
        ),
        (
            {"student_tokens": jnp.zeros((4, 6, WIDTH))},
            ValueError,
            "Student and target tokens must have the same shape [B, N, D]. "
            "Received: student (4, 6, 16), target (4, 5, 16).",
        ),
        (
            {"student_tokens": jnp.zeros((4, 5, WIDTH), "int32")},
            TypeError,
            "Tokens must be floating point. Received: student tokens of dtype int32.",
        ),
        (
            {"apply": lambda *inputs: (apply(*inputs), apply(*inputs))},
            TypeError,
            "apply must return the teacher's tokens, one array [B, N, D]. Received: a tuple. "
            "Return the tapped block's output",
        ),
        (
            {"apply": lambda *inputs: apply(*inputs)[:, 0]},
            ValueError,
            "Tokens must have the shape [B, N, D]. Received: target tokens of shape (4, 16).",
        ),
        (
            {"projector": {"kernel": jnp.zeros(2)}},
            ValueError,
            "The parameters of the head of 'sra' must be hidden_kernel, hidden_bias, "
            "output_kernel, output_bias. Received: kernel. Take them from init_projector(",
        ),
        (
            {"projector": None},
            ValueError,
            "output_kernel, output_bias. Received: NoneType. Take them from init_projector(",
        ),
        (
            {"target_tokens": TOKENS},
            ValueError,
            "The target of an objective with an EMA teacher is the teacher's tokens. "
            "Received: target_tokens, a ArrayImpl, for 'sra'. Leave target_tokens out",
        ),
        (
            {"loss": "sra"},
            TypeError,
            "An objective must derive from selfalign.Objective. Received: str 'sra'.",
        ),
    ],
)
def test_align_says_what_is_wrong(align, bad, kind, text):
    with refused(kind, text):
        align(**bad)


# Objectives without an EMA teacher

LAYERSYNC = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2)
REPA = selfalign.REPALoss(student_layer=1, width=6, hidden=8)


@pytest.mark.parametrize("target", [None, TOKENS])
def test_where_there_is_no_teacher_term_is_to_be_called(align, batch, target):
    text = (
        "There must be an objective with an EMA teacher. Received: 'layersync'. Leave the teacher "
        "out: call term with target_tokens, and with step= a count of yours."
    )
    teacher = sra.init_teacher(PARAMS)
    with refused(ValueError, text):
        align(loss=LAYERSYNC, projector={}, target_tokens=target)
    with refused(ValueError, text):
        sra.teacher_tokens(LAYERSYNC, apply, teacher, PARAMS, *batch, key=jax.random.key(0))
    with refused(ValueError, text):
        sra.update_teacher(LAYERSYNC, teacher, PARAMS)
    with refused(ValueError, "EMA teacher. Received: 'layersync', 'repa'."):
        sra.update_teacher([LAYERSYNC, REPA], teacher, PARAMS)


def repa_head():
    return sra.init_projector(jax.random.key(0), WIDTH, loss=REPA)


@pytest.mark.parametrize(
    ("loss", "head", "target", "text"),
    [
        (
            REPA,
            repa_head,
            None,
            "The objective 'repa' needs a target. Received: target tokens None.",
        ),
        (
            REPA,
            repa_head,
            TOKENS,
            "the same shape [B, N, D]. Received: student (4, 5, 6), target (4, 5, 16).",
        ),
        (
            REPA,
            dict,
            TOKENS,
            "The parameters of the head of 'repa' must be hidden_kernel, hidden_bias, "
            "hidden_2_kernel, hidden_2_bias, output_kernel, output_bias. Received: none.",
        ),
        (
            LAYERSYNC,
            repa_head,
            TOKENS,
            "The parameters of the head of 'layersync' must be an empty dict. "
            "Received: hidden_2_bias, hidden_2_kernel,",
        ),
        (
            LAYERSYNC,
            dict,
            TOKENS[:, :4],
            "the same shape [B, N, D]. Received: student (4, 5, 16), target (4, 4, 16).",
        ),
    ],
)
def test_term_says_what_is_wrong(loss, head, target, text):
    with refused(ValueError, text):
        sra.term(loss, head(), TOKENS, target)


def test_a_schedule_needs_a_step():
    weight = selfalign.schedules.Stop(3)
    loss = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2, weight=weight)
    with refused(ValueError, "A weight that is a schedule needs the step. Received: step=None."):
        sra.term(loss, {}, TOKENS, TOKENS)
    assert sra.term(loss, {}, TOKENS, TOKENS, step=0) == 0


# Lists of objectives


def both(value):
    return {"sra": value, "layersync": value}


LIST = "For a list of objectives "


@pytest.fixture
def align_list(align, loss):
    """`align` on a good list of two objectives, of which a test spoils one part."""
    losses = [loss, LAYERSYNC]

    def call(**bad):
        given = {
            "loss": losses,
            "apply": lambda *inputs: {"sra": apply(*inputs)},
            "projector": sra.init_projector(jax.random.key(0), WIDTH, loss=losses),
            "student_tokens": both(TOKENS),
            "target_tokens": {"layersync": TOKENS},
        }
        return align(**(given | bad))

    return call


def test_align_takes_a_good_list(align_list):
    assert align_list() > 0


@pytest.mark.parametrize(
    ("bad", "kind", "text"),
    [
        (
            {"student_tokens": TOKENS},
            TypeError,
            LIST + "student_tokens must be a dict with the entries 'sra', 'layersync'. "
            "Received: ArrayImpl. Each objective's name is its kind, or the name= that it was",
        ),
        (
            {"student_tokens": {"sra": TOKENS}},
            ValueError,
            LIST + "student_tokens must be a dict with the entries 'sra', 'layersync'. "
            "Received: the entries 'sra'.",
        ),
        (
            {"projector": {}},
            ValueError,
            LIST + "projector must be a dict with the entries 'sra', 'layersync'. "
            "Received: the entries of none.",
        ),
        (
            {"target_tokens": None},
            ValueError,
            LIST + "target_tokens must be a dict with the entries 'layersync'. "
            "Received: the entries of none.",
        ),
        (
            {"target_tokens": TOKENS},
            TypeError,
            LIST + "target_tokens must be a dict with the entries 'layersync'. "
            "Received: ArrayImpl.",
        ),
        (
            {"target_tokens": both(TOKENS)},
            ValueError,
            "Received: the entries 'sra', 'layersync'.",
        ),
        (
            {"apply": apply},
            TypeError,
            LIST + "what apply returns must be a dict with the entries 'sra'. Received: ",
        ),
        (
            {"apply": lambda *inputs: {"deep": apply(*inputs)}},
            ValueError,
            LIST + "what apply returns must be a dict with the entries 'sra'. "
            "Received: the entries 'deep'.",
        ),
        (
            {"apply": lambda *inputs: {"sra": [apply(*inputs)]}},
            TypeError,
            "apply must return the teacher's tokens, one array [B, N, D]. Received: a list.",
        ),
        ({"loss": []}, ValueError, "There must be an objective. Received: an empty list."),
        (
            {"loss": [LAYERSYNC, LAYERSYNC]},
            ValueError,
            "must have different names. Received: two objectives named 'layersync'.",
        ),
    ],
)
def test_align_says_what_is_wrong_with_a_list(align_list, bad, kind, text):
    with refused(kind, text):
        align_list(**bad)


def test_objectives_that_share_a_teacher_must_agree(loss):
    wide = selfalign.SRALoss(student_layer=1, teacher_layer=2, max_gap=0.4, name="wide")
    text = "share one EMA teacher, and must agree on path, gap and decay. Received: max_gap 0.4"
    with refused(ValueError, text):
        sra.update_teacher([loss, wide], sra.init_teacher(PARAMS), PARAMS)


# Parameters


def test_structures_that_differ_name_the_first_path(loss):
    block = {"w": jnp.zeros(2), "b": jnp.zeros(2)}
    teacher = sra.init_teacher({"blocks": [{"w": jnp.zeros(2)}, block]})
    without = {"blocks": [{"w": jnp.zeros(2)}, {"w": jnp.zeros(2)}]}
    wider = {"blocks": [{"w": jnp.zeros(3)}, block]}
    calls = (
        functools.partial(sra.update_teacher, loss, teacher),
        functools.partial(sra.teacher_params, teacher),
    )
    for student, received in (
        (without, "at 'blocks/1/b': teacher (2,), student missing"),
        (wider, "at 'blocks/0/w': teacher (2,), student (3,)"),
    ):
        rule = "Teacher and student must have the same structure and shapes"
        for call in calls:
            with refused(ValueError, f"{rule}. Received: {received}. Build"):
                call(student)


def test_a_teacher_is_a_teacher(loss):
    with refused(TypeError, "teacher must be a Teacher. Received: list. Build it with init_"):
        sra.update_teacher(loss, [], PARAMS)


def test_parameters_without_floats_are_refused():
    text = "params must hold floating-point arrays. Received: PyTreeDef({'count': *}). Pass the"
    with refused(ValueError, text):
        sra.init_teacher({"count": jnp.zeros(3, "int32")})


# Static settings


def test_traced_values_are_refused_where_a_setting_belongs():
    def settings(**settings):
        return selfalign.SRALoss(student_layer=1, teacher_layer=2, **settings).max_gap

    with refused(TypeError, "width must be an integer. Received: JitTracer"):
        jax.jit(lambda width: sra.init_projector(jax.random.key(0), width))(8)
    with refused(TypeError, "layer must be an integer. Received: JitTracer"):
        jax.jit(lambda layer: sra.split_blocks({"w": jnp.ones((4, 2))}, layer)[0])(2)
    with refused(TypeError, "max_gap must be a number. Received: JitTracer"):
        jax.jit(lambda gap: settings(max_gap=gap))(0.2)
    with refused(ValueError, "number or a function of the step. Received: JitTracer"):
        jax.jit(lambda weight: settings(weight=weight))(0.2)
    with refused(TypeError, "where must be a block's number or a path. Received: JitTracer"):
        jax.jit(lambda where: sra.tap([jnp.ones(2)], where))(1)


@pytest.mark.parametrize("loss", [None, REPA, [REPA]])
def test_a_head_needs_a_key_and_a_width(loss):
    key = jax.random.key(0)
    with refused(TypeError, "key must be a JAX key. Received: int 0."):
        sra.init_projector(0, 8, loss=loss)
    with refused(ValueError, "width must be finite and at least 1. Received: 0. It is the feature"):
        sra.init_projector(key, 0, loss=loss)
    with refused(TypeError, "width must be an integer. Received: None. It is the feature width D"):
        sra.init_projector(key, None, loss=loss)


# Taps


def test_a_missing_tap_lists_what_was_captured(batch):
    x, _, t, y = batch
    model = nnx.view(NnxModel(nnx.Rngs(0)), deterministic=True)
    _, sown = nnx.capture(model, nnx.Intermediate)(x, t, y)
    text = "'blocks/2/__call__', which names 0. Captured: tokens_0/value/0 (4, 5, 16), tokens_1/"
    with refused(ValueError, f"Received: {text}"):
        sra.tap(sown, "blocks/2/__call__")
    model = LinenModel()
    variables = model.init(jax.random.key(0), x, t, y)
    options = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, captured = model.apply(variables, x, t, y, **options)
    text = "'intermediates/block_2', which names 2. Captured: intermediates/Dense_0/__call__/0"
    with refused(ValueError, f"Received: {text}"):
        sra.tap(captured, "intermediates/block_2")


@pytest.mark.parametrize(
    ("captured", "where", "received"),
    [
        ([jnp.ones(2)], 2, "2, which names 0. Captured: 0 (2,)."),
        ([jnp.ones(2)], 0, "0, which names 0. Captured: 0 (2,)."),
        ([jnp.ones(2)], -1, "-1, which names 0. Captured: 0 (2,)."),
        ([(jnp.ones(2), jnp.ones(3))], 1, "1, which names 2. Captured: 0/0 (2,), 0/1 (3,)."),
        ({"0": jnp.ones(2)}, 1, "1, which names 1. Captured: 0 (2,)."),
        ({}, "blocks/0", "'blocks/0', which names 0. Captured: nothing."),
        (
            {"tokens": (jnp.ones(2), jnp.ones(2))},
            "tokens",
            "'tokens', which names 2. Captured: tokens/0 (2,), tokens/1 (2,).",
        ),
    ],
)
def test_a_tap_names_exactly_one_array(captured, where, received):
    rule = "A tap must name one captured array, by its path, or by its number from 1 in a list"
    with refused(ValueError, f"{rule}. Received: {received}"):
        sra.tap(captured, where)


@pytest.mark.parametrize(
    ("stacked", "received"),
    [
        ({"a": jnp.ones((4, 2)), "b": jnp.ones((3, 2))}, "a (4,), b (3,)"),
        ({"a": jnp.ones(())}, "a ()"),
        ({}, "no arrays"),
    ],
)
def test_stacked_blocks_have_one_depth(stacked, received):
    rule = "Stacked blocks must have the depth as the first axis of every array"
    with refused(ValueError, f"{rule}. Received: {received}. Pass"):
        sra.split_blocks(stacked, 2)


def test_stacked_blocks_are_as_many_as_the_layer():
    with refused(ValueError, "layer must be in [1, 1]. Received: 2. It is a block's number,"):
        sra.split_blocks({"a": jnp.ones((1, 2))}, 2)
