"""What every adapter promises: one suite of tests, which runs on a fixture for each framework.

An adapter's folder holds fixture.py with a class `Fixture`, and test_contract.py with this line:

    from contract import *  # noqa: F403

The model is that of reference.py, in the framework's own words. Everything goes in and comes out
as NumPy arrays:

    class Fixture:
        name = "torch"
        lacks = {}              what the framework cannot offer, by the name of a test: the reason
        old_options = {}        options of the first edition, by name: (a value, what to write now)

        def attach(self, loss, weights, projector=None, **options) -> Run
            # weights: those of the model, by name; projector: those of the head, by name; of a
            # list a dict of them by objective; None: the adapter's own initial ones

    class Run:
        def step(self, batch) -> float      # forward, denoising + term, backward, SGD, update
        def gradients(self, batch) -> dict  # of the term alone, by parameter name; a head's are
                                            # "projector.<name>", "projector.<objective>.<name>"
        def weights(self) -> dict
        def projector(self) -> dict         # as it is passed to attach
        def teacher(self) -> dict | None    # the average's weights; None without an EMA teacher
        def metrics(self) -> dict           # of the last step
        def save(self) -> object            # all that a resumed run needs, the model's included
        def load(self, state) -> None

A batch is a dict of x0, noise, t, y, u, and where needed target_tokens and loss_mask. The user's
loop goes down by SGD with reference.LEARNING_RATE, on the path reference.noise_path(loss).
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
import oracle
import pytest
import reference
from reference import BATCH, TOKENS, WIDTH, Objective, mlp

import selfalign
from selfalign import adapting, schedules

STEPS = 5


# The cases: objectives as a user writes them, and as the oracle knows them


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: selfalign's objective or list of them, the oracle's, and a mask."""

    loss: Callable
    objectives: tuple
    mask: Callable = lambda: None


def comparing(distance="cosine", normalise="none"):
    return functools.partial(oracle.term, distance=distance, normalise=normalise)


def warmed_up(step):
    """DecayWarmup(0.9)."""
    return min(0.9, (1 + step) / (10 + step))


def sra(**settings):
    decay = schedules.DecayWarmup(0.9)
    return selfalign.SRALoss(student_layer=2, teacher_layer=3, decay=decay, **settings)


SRA = Objective("sra", "teacher", target_layer=3, decay=warmed_up, **mlp(2))
LAYERSYNC = Objective("layersync", "later", target_layer=4, weight=lambda step: 0.2)
REPA = Objective("repa", "given", **mlp(3, hidden=12, target_width=6))
LOG_COSH = Objective(
    "log_cosh",
    "later",
    target_layer=4,
    head=lambda params, tokens: tokens @ params["down"] @ params["up"],
    head_shapes={"down": (WIDTH, 2), "up": (2, WIDTH)},
    compare=lambda s, t, mask: oracle.masked_mean(np.log(np.cosh(s - t)).mean(-1), mask),
)


def layersync(**settings):
    return selfalign.LayerSyncLoss(student_layer=2, teacher_layer=4, **settings)


def repa(**settings):
    return selfalign.REPALoss(student_layer=2, width=6, hidden=12, **settings)


def log_cosh():
    import third_party  # it imports Keras, whose backend is not chosen yet when this file is read

    return third_party.LogCoshLoss(student_layer=2, teacher_layer=4)


def sample_mask():
    return np.arange(BATCH) % 3 != 0


def token_mask():
    return np.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % 4 != 0


CASES = {
    "sra": Case(sra, (SRA,)),
    "sra, the paper's": Case(
        lambda: sra(path="cosine", distance="smooth_l1", weight=0.2 * schedules.Stop(3)),
        (
            dataclasses.replace(
                SRA,
                path=oracle.cosine_path(1),
                compare=comparing("smooth_l1"),
                weight=lambda step: 0.2 * (step < 3),
            ),
        ),
    ),
    "sra, noise at 0": Case(
        lambda: sra(path=selfalign.paths.Linear(noise_at=0), distance="l2", max_gap=0.3),
        (dataclasses.replace(SRA, path=oracle.linear(0), compare=comparing("l2"), max_gap=0.3),),
    ),
    "sra, discrete": Case(
        lambda: sra(path="discrete", distance="token_axis_cosine"),
        (dataclasses.replace(SRA, path=oracle.ddpm(), compare=comparing("token_axis_cosine")),),
    ),
    "sra, edm": Case(
        lambda: sra(path="edm", distance="l1"),
        (dataclasses.replace(SRA, path=oracle.edm(), compare=comparing("l1")),),
    ),
    "sra, standardised": Case(
        lambda: sra(normalise="standardise"),
        (dataclasses.replace(SRA, compare=comparing(normalise="standardise")),),
    ),
    "sra, token mask": Case(sra, (SRA,), token_mask),
    "layersync": Case(layersync, (LAYERSYNC,)),
    "layersync, projected": Case(
        lambda: layersync(projector=True), (dataclasses.replace(LAYERSYNC, **mlp(2)),)
    ),
    "layersync, centred, sample mask": Case(
        lambda: layersync(normalise="centre"),
        (dataclasses.replace(LAYERSYNC, compare=comparing(normalise="centre")),),
        sample_mask,
    ),
    "repa": Case(repa, (REPA,)),
    "repa, sample mask": Case(repa, (REPA,), sample_mask),
    "log cosh, a third party's": Case(log_cosh, (LOG_COSH,)),
    "a list": Case(lambda: [sra(), layersync(name="deep")], (SRA, LAYERSYNC)),
    "a list with a target": Case(
        lambda: [repa(), layersync(projector=True)],
        (REPA, dataclasses.replace(LAYERSYNC, **mlp(2))),
        token_mask,
    ),
}
CASES["a list"] = dataclasses.replace(
    CASES["a list"], objectives=(SRA, dataclasses.replace(LAYERSYNC, name="deep"))
)
ALL = pytest.mark.parametrize("case", CASES)


def batches(name, count=STEPS):
    case = CASES[name]
    return [
        reference.make_batch(case.objectives, seed=10 + n, mask=case.mask()) for n in range(count)
    ]


def attached(adapter, name, **options):
    """The adapter's run of a case, from the reference's first weights."""
    case = CASES[name]
    projector = reference.make_projector(case.objectives)
    return adapter.attach(case.loss(), reference.make_weights(), projector, **options)


@functools.lru_cache(None)
def reference_run(name):
    """Five steps of the reference, done once: terms, weights, projector, teacher, metrics."""
    case = CASES[name]
    projector = reference.make_projector(case.objectives)
    run = reference.Run(case.objectives, reference.make_weights(), projector)
    gradients = run.gradients(batches(name)[0])
    terms = []
    metrics = []
    for batch in batches(name):
        terms.append(run.step(batch))
        metrics.append(run.metrics())
    return terms, gradients, run.weights(), run.projector(), run.teacher(), metrics


@functools.lru_cache(None)
def first_gradients(adapter, name):
    """Of the term of the first batch, by the adapter: what two tests look at, worked out once."""
    return attached(adapter, name).gradients(batches(name)[0])


def close(found, wanted, rtol=2e-4, what=""):
    """Relative to the largest number of the array: single ones may nearly cancel."""
    wanted = np.asarray(wanted)
    found = np.asarray(found, "float64")
    assert found.shape == wanted.shape, what
    scale = max(float(np.abs(wanted).max(initial=0.0)), 1e-3)
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * scale, err_msg=what)


def all_close(found, wanted, rtol=2e-4):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        if isinstance(value, dict):
            all_close(found[name], value, rtol)
        else:
            close(found[name], value, rtol, name)


def offered(adapter, what):
    """Whether the adapter offers this. What it lacks has a reason that says something."""
    if what not in adapter.lacks:
        return True
    assert len(adapter.lacks[what].split()) > 4, f"{what} is lacking without a reason"
    return False


# The numbers


@ALL
def test_the_term_equals_the_oracle(adapter, case):
    wanted = reference_run(case)[0][0]
    close(attached(adapter, case).step(batches(case)[0]), wanted, 1e-4)


@ALL
def test_gradients_equal_finite_differences_of_the_oracle(adapter, case):
    """With the target held constant: none arrives at a teacher, a later layer, or later blocks."""
    if offered(adapter, "gradients"):
        found = first_gradients(adapter, case)
        all_close(found, reference_run(case)[1], 1e-3)


@ALL
def test_no_gradient_reaches_what_comes_after_the_students_layer(adapter, case):
    if offered(adapter, "gradients"):
        found = first_gradients(adapter, case)
        later = ("block_3", "block_4", "out_")
        assert not any(value.any() for name, value in found.items() if name.startswith(later))
        assert all(found[f"block_{n}_kernel"].any() for n in (1, 2))


@ALL
def test_five_steps_equal_the_reference(adapter, case):
    terms, _, weights, projector, teacher, metrics = reference_run(case)
    run = attached(adapter, case)
    for n, batch in enumerate(batches(case)):
        close(run.step(batch), terms[n], 1e-3, f"term of step {n}")
        all_close({name: run.metrics()[name] for name in metrics[n]}, metrics[n], 1e-3)
    all_close(run.weights(), weights, 1e-3)
    all_close(run.projector(), projector, 1e-3)
    if teacher is None:
        assert run.teacher() is None
    else:
        all_close(run.teacher(), teacher, 1e-3)


def test_the_runs_move():
    """Equal because both stand still would be no equality."""
    for name in CASES:
        _, gradients, weights, *_ = reference_run(name)
        first = reference.make_weights()
        assert np.abs(weights["block_2_kernel"] - first["block_2_kernel"]).max() > 1e-3, name
        assert gradients["block_2_kernel"].any(), name


# The average


def test_the_teacher_begins_as_the_model(adapter):
    weights = reference.make_weights()
    teacher = attached(adapter, "sra").teacher()
    assert set(teacher) == set(weights)
    for name, value in weights.items():
        assert np.array_equal(teacher[name], value), name


@pytest.mark.parametrize("case", ["layersync", "repa", "log cosh, a third party's"])
def test_without_an_ema_teacher_there_is_no_average(adapter, case):
    assert attached(adapter, case).teacher() is None


# Weights of the term


@pytest.mark.parametrize("make", [sra, layersync, repa])
def test_weight_0_keeps_every_gradient_defined(adapter, make):
    if not offered(adapter, "gradients"):
        return
    loss = make(weight=0)
    objective = {"sra": SRA, "layersync": LAYERSYNC, "repa": REPA}[loss.kind]
    weights = reference.make_weights()
    projector = reference.make_projector([objective])
    run = adapter.attach(loss, weights, projector)
    found = run.gradients(reference.make_batch([objective]))
    assert set(found) == set(weights) | {f"projector.{name}" for name in projector}
    assert not any(value.any() for value in found.values())
    assert run.step(reference.make_batch([objective])) == 0


# Saving


@pytest.mark.parametrize("case", ["sra", "sra, discrete", "layersync", "repa", "a list"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(adapter, case):
    run = attached(adapter, case)
    for batch in batches(case)[:2]:
        run.step(batch)
    state = run.save()
    terms = [run.step(batch) for batch in batches(case)[2:]]
    other = adapter.attach(CASES[case].loss(), reference.make_weights(seed=5))
    other.load(state)
    assert [other.step(batch) for batch in batches(case)[2:]] == terms
    same(other.weights(), run.weights())
    same(other.projector(), run.projector())
    same(other.teacher() or {}, run.teacher() or {})


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        if isinstance(value, dict):
            same(found[name], value)
        else:
            assert np.array_equal(found[name], value), name


# Heads


@pytest.mark.parametrize("case", CASES)
def test_the_adapters_own_heads(adapter, case):
    """Of the shapes that the objective says; kernels are drawn, biases begin at 0."""
    objectives = CASES[case].objectives
    found = adapter.attach(CASES[case].loss(), reference.make_weights()).projector()
    by_name = found if len(objectives) > 1 else {objectives[0].name: found}
    assert set(by_name) == {objective.name for objective in objectives}
    for objective in objectives:
        head = by_name[objective.name]
        assert {n: tuple(v.shape) for n, v in head.items()} == objective.head_shapes
        for name, value in head.items():
            assert np.isfinite(value).all()
            assert value.any() == (not name.endswith("bias")), name


# What is logged

MEASURED = {
    "distance",
    "cosine",
    "student_norm",
    "teacher_norm",
    "student_finite",
    "teacher_finite",
}


def test_metrics_of_one_objective(adapter):
    run = attached(adapter, "sra")
    run.step(batches("sra")[0])
    found = run.metrics()
    assert set(found) >= MEASURED
    assert -1 <= found["cosine"] <= 1
    assert found["student_finite"]
    assert found["teacher_finite"]


def test_metrics_of_a_list_carry_the_objectives_names(adapter):
    run = attached(adapter, "a list")
    run.step(batches("a list")[0])
    wanted = {f"{name}/{metric}" for name in ("sra", "deep") for metric in MEASURED}
    assert set(run.metrics()) >= wanted
    assert not set(run.metrics()) & MEASURED


# What is refused


class NoObjective:
    """Has what an objective has, and does not derive from it."""

    kind = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithoutCompare(selfalign.Objective):
    kind = "incomplete"
    source = selfalign.sources.Nothing()


def attach(loss):
    return lambda adapter: adapter.attach(loss(), reference.make_weights())


def step(name, change):
    """A step of a case with a batch that is changed."""

    def call(adapter):
        batch = batches(name)[0]
        attached(adapter, name).step({**batch, **change(batch)})

    return call


def cut(batch):
    return {"target_tokens": batch["target_tokens"][:, :, :5]}


def shortened(batch):
    return {"target_tokens": batch["target_tokens"][:, :4]}


def unwanted(batch):
    return {"target_tokens": np.ones((BATCH, TOKENS, WIDTH), "float32")}


def none(batch):
    return {"target_tokens": None}


def by_wrong_name(batch):
    return {"target_tokens": {"encoder": batch["target_tokens"]["repa"]}}


def of_one(batch):
    return {"target_tokens": batch["target_tokens"]["repa"]}


def long_mask(batch):
    return {"loss_mask": np.ones(BATCH + 1, "float32")}


# what is done: (the call, the exception, what the message says)
REFUSALS = {
    "no target for REPA": (step("repa", none), ValueError, r"target.*Received: .*[Nn]one"),
    "a target for SRA": (step("sra", unwanted), ValueError, r"target.*Received: "),
    "a target for LayerSync": (step("layersync", unwanted), ValueError, r"target.*Received: "),
    "a target of another width": (step("repa", cut), ValueError, r"shape.*Received: .*5\b"),
    "a target of other tokens": (step("repa", shortened), ValueError, r"Received: .*\b4\b"),
    "one target for a list": (
        step("a list with a target", of_one),
        (TypeError, ValueError),
        r"target_tokens.*Received: ",
    ),
    "a target of another name": (
        step("a list with a target", by_wrong_name),
        ValueError,
        r"target.*Received: .*(encoder|[Nn]one|repa)",
    ),
    "no target for a list": (
        step("a list with a target", none),
        ValueError,
        r"target.*Received: ",
    ),
    "a mask of another batch": (step("sra", long_mask), ValueError, r"mask.*Received: .*7"),
    "two objectives of one name": (
        attach(lambda: [layersync(), layersync(weight=0.1)]),
        ValueError,
        r"different names.*Received: two objectives named 'layersync'.*name=",
    ),
    "an empty list": (attach(list), ValueError, r"must be an objective.*Received: an empty list"),
    "no objective": (
        attach(NoObjective),
        TypeError,
        r"derive from selfalign\.Objective.*Received: NoObjective",
    ),
    "an objective without compare": (
        attach(lambda: WithoutCompare(student_layer=2)),
        TypeError,
        r"must have `compare`.*Received: WithoutCompare without it",
    ),
    "two teachers that disagree": (
        attach(lambda: [sra(), sra(name="wide", max_gap=0.4)]),
        ValueError,
        r"share one EMA teacher.*Received: max_gap",
    ),
    "a layer beyond the depth": (
        attach(lambda: selfalign.LayerSyncLoss(student_layer=2, teacher_layer=9)),
        ValueError,
        r"teacher_layer must be at most the model's depth.*Received: layer 9 of 4",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_bad_input_is_refused(adapter, what):
    call, kind, message = REFUSALS[what]
    if offered(adapter, what):
        with pytest.raises(kind, match=f"(?s){message}") as caught:
            call(adapter)
        assert re.search(r"Received: .+\. .+", str(caught.value), re.S)


def test_a_mask_with_a_negative_weight_is_refused(adapter):
    """Inside jit, where nobody can look at them, the term is NaN."""
    mask = sample_mask().astype("float32")
    mask[0] = -1
    run = attached(adapter, "sra")
    batch = {**batches("sra")[0], "loss_mask": mask}
    if offered(adapter, "values of masks"):
        message = r"finite weights of at least 0\. Received: values from .*\. Pass 0 where"
        with pytest.raises(ValueError, match=message):
            run.step(batch)
    else:
        assert np.isnan(run.step(batch))


def test_an_option_of_the_first_edition_says_the_new_one(adapter):
    if offered(adapter, "old options"):
        assert adapter.old_options
        for option, (value, new) in adapter.old_options.items():
            with pytest.raises((TypeError, ValueError), match=f"(?s){option}.*Received: .*{new}"):
                adapter.attach(sra(), reference.make_weights(), **{option: value})


def test_a_refused_batch_changes_nothing(adapter):
    run = attached(adapter, "repa")
    first = run.weights()
    with pytest.raises(ValueError, match="target"):
        run.step({**batches("repa")[0], "target_tokens": None})
    same(run.weights(), first)
    close(run.step(batches("repa")[0]), reference_run("repa")[0][0], 1e-4)


# The fixture itself


def test_the_fixture_is_whole(adapter):
    run = attached(adapter, "sra")
    for method in ("step", "gradients", "weights", "projector", "teacher", "metrics", "save"):
        assert callable(getattr(run, method)), method
    all_close(run.weights(), reference.make_weights(), 1e-7)
    assert adapting.named_objectives(CASES["sra"].loss()).keys() == {"sra"}


def test_what_is_lacking_has_a_reason(adapter):
    known = {"gradients", "old options", "values of masks", *REFUSALS}
    assert set(adapter.lacks) <= known
    for what in adapter.lacks:
        assert not offered(adapter, what)
