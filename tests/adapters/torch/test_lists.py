"""Several objectives on one model: terms add up, the teacher runs once, each has a name."""

import copy

import pytest
import torch
from dit_models import DiT, UnknownWidth, flops, make_batch, seen, stream, take_first_step

import selfalign
from selfalign.adapters.torch import EMATeacher, SelfAlignment

DECAY = selfalign.schedules.DecayWarmup(0.9)


def sra(student=2, teacher=4, **settings):
    return selfalign.SRALoss(student_layer=student, teacher_layer=teacher, decay=DECAY, **settings)


def two():
    return [sra(), sra(3, 5, name="deep", distance="l2", weight=0.1)]


def three():
    layersync = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=6, projector=True)
    return [sra(), layersync, selfalign.REPALoss(student_layer=2, width=6, hidden=12)]


def targets():
    return {"repa": torch.randn(4, 5, 6)}


def test_the_term_is_the_sum_of_the_objectives_alone(model, batch):
    objectives = three()
    given = targets()
    u = torch.rand(4)
    together = SelfAlignment(copy.deepcopy(model), objectives)
    together.model(*seen(batch))
    term = together(*batch, u=u, target_tokens=given)
    expected = 0.0
    for objective in objectives:
        with SelfAlignment(model, objective) as align:
            head = together.projector[objective.kind]
            align.projector.load_state_dict(head.state_dict())
            model(*seen(batch))
            tokens = given.get(objective.kind)
            expected = expected + align(*batch, u=u, target_tokens=tokens)
    torch.testing.assert_close(term, expected)
    term.backward()
    expected.backward()
    pairs = zip(together.model.parameters(), model.parameters(), strict=True)
    for mine, theirs in pairs:
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_two_objectives_share_one_forward_of_the_teacher(model, batch):
    align = SelfAlignment(model, two())
    take_first_step(align, batch)
    runs = []
    align.teacher.register_forward_pre_hook(lambda m, args: runs.append(1))
    model(*seen(batch))
    counted = flops(lambda: align(*batch))
    heads = flops(lambda: [head(torch.zeros(4, 5, 16)) for head in align.projector.values()])
    assert len(runs) == 1
    assert counted - heads == flops(lambda: stream(model, 5, batch))  # up to the later of two


def test_an_objective_without_teacher_beside_one_computes_nothing_more(model, batch):
    loss = [sra(), selfalign.LayerSyncLoss(student_layer=2, teacher_layer=6)]
    counts = []
    for objectives in (loss, loss[:1]):
        with SelfAlignment(model, objectives) as align:
            take_first_step(align, batch)
            model(*seen(batch))
            counts.append(flops(lambda align=align: align(*batch)))
    assert counts[0] == counts[1]


def test_heads_taps_and_metrics_have_the_objectives_names(model, batch):
    align = SelfAlignment(model, three(), log_metrics=True)
    assert list(align.projector) == ["sra", "layersync", "repa"]
    assert align.taps == {
        "sra": ["blocks.1", "blocks.3"],
        "layersync": ["blocks.0", "blocks.5"],
        "repa": ["blocks.1"],
    }
    assert align.projector["repa"](torch.zeros(1, 2, 16)).shape == (1, 2, 6)
    model(*seen(batch))
    term = align(*batch, target_tokens=targets())
    measured = ("distance", "cosine", "student_norm", "teacher_norm")
    finite = ("student_finite", "teacher_finite")
    names = {f"{kind}/{metric}" for kind in align.projector for metric in (*measured, *finite)}
    assert set(align.metrics) == names
    weighted = {"sra": 0.5, "layersync": 0.2, "repa": 0.5}
    total = sum(weight * align.metrics[f"{kind}/distance"] for kind, weight in weighted.items())
    torch.testing.assert_close(term.detach(), total)


def test_a_list_of_one_is_a_list(model, batch):
    align = SelfAlignment(model, [sra()], log_metrics=True)
    assert list(align.projector) == ["sra"]
    assert align.taps == {"sra": ["blocks.1", "blocks.3"]}
    model(*seen(batch))
    align(*batch)
    assert "sra/distance" in align.metrics


def test_each_head_begins_with_values_of_its_own(model):
    heads = SelfAlignment(model, two(), seed=1).projector
    assert not torch.equal(heads["sra"].hidden_kernel, heads["deep"].hidden_kernel)
    alone = SelfAlignment(DiT(), sra(), seed=1).projector
    assert torch.equal(heads["sra"].hidden_kernel, alone.hidden_kernel)


def test_the_path_is_the_teachers(model):
    loss = [selfalign.LayerSyncLoss(student_layer=1, teacher_layer=6), sra(path="cosine")]
    assert SelfAlignment(model, loss).path == selfalign.paths.Cosine()


@pytest.mark.parametrize("make_loss", [two, three])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make_loop, make_loss):
    def run(loop, steps):
        for step in steps:
            torch.manual_seed(step)
            batch = make_batch()
            given = targets() if make_loss is three else None
            loop.step(batch, target_tokens=given)

    whole = make_loop(DiT(), make_loss())
    run(whole, range(2))
    parts = (whole.model, whole.optimizer, whole.align)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    run(whole, range(2, 4))
    torch.manual_seed(5)
    resumed = make_loop(DiT(), make_loss())
    for part, state in zip((resumed.model, resumed.optimizer, resumed.align), states, strict=True):
        part.load_state_dict(state)
    run(resumed, range(2, 4))
    assert resumed.align.step == 4
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)
    mine, theirs = (loop.align.teacher.parameters() for loop in (resumed, whole))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_the_states_heads_are_named_and_other_settings_are_refused(model):
    state = SelfAlignment(model, two()).state_dict()
    assert {name.partition(".")[0] for name in state["projector"]} == {"sra", "deep"}
    other = SelfAlignment(DiT(), [sra(), sra(3, 5, name="deep", distance="l1", weight=0.1)])
    with pytest.raises(ValueError, match=r"Received: deep/distance 'l2' instead of 'l1'"):
        other.load_state_dict(state)
    alone = SelfAlignment(DiT(), sra())
    with pytest.raises(ValueError, match=r"Received: .*deep/kind 'sra' instead of None"):
        alone.load_state_dict(state)


def test_a_target_is_passed_by_name(model, batch):
    align = SelfAlignment(model, three())
    tokens = torch.randn(4, 5, 6)
    for given in (None, tokens, {"encoder": tokens}, {"repa": tokens, "sra": tokens}):
        model(*seen(batch))
        with pytest.raises(ValueError, match=r"target_tokens=.*a dict by name.*Received: "):
            align(*batch, target_tokens=given)
    model(*seen(batch))
    assert align(*batch, target_tokens={"repa": tokens}).item() > 0


def test_a_part_of_the_batch_sees_the_teacher_and_the_whole_of_it_the_others(model, batch):
    layersync = selfalign.LayerSyncLoss(student_layer=2, teacher_layer=6)
    u = torch.rand(4)
    terms = []
    half = EMATeacher(batch_fraction=0.5)
    for loss, options in (
        ([sra(), layersync], {"teacher": half}),
        (sra(), {"teacher": half}),
        (layersync, {}),
    ):
        with SelfAlignment(model, loss, seed=1, **options) as align:
            model(*seen(batch))
            terms.append(align(*batch, u=u))
    torch.testing.assert_close(terms[0], terms[1] + terms[2])


def test_taps_by_name(model, batch):
    loss = [sra(), selfalign.REPALoss(student_layer=2, width=6, hidden=12)]
    taps = {"sra": ("blocks.0", "blocks.4"), "repa": ("blocks.2",)}
    align = SelfAlignment(model, loss, taps=taps)
    assert align.taps == {name: list(paths) for name, paths in taps.items()}
    model(*seen(batch))
    align(*batch, target_tokens=targets()).backward()
    assert model.blocks[2].proj.weight.grad.any()
    assert model.blocks[3].proj.weight.grad is None


def test_a_truncated_teacher_keeps_the_blocks_up_to_the_last_of_its_layers(model):
    align = SelfAlignment(model, two(), teacher=EMATeacher(truncate=True))
    kept = {name.split(".")[1] for name, _ in align.teacher.named_parameters() if "blocks" in name}
    assert kept == {"0", "1", "2", "3", "4"}


def test_heads_without_a_width_get_their_parameters_at_the_first_forward(batch):
    model = UnknownWidth()
    align = SelfAlignment(model, two())
    optimizer = torch.optim.AdamW([*model.parameters(), *align.projector.parameters()])
    model(*seen(batch))
    align(*batch).backward()
    optimizer.step()
    align.update()
    assert {head.hidden_kernel.shape for head in align.projector.values()} == {(16, 32)}
    assert len(align.state_dict()["projector"]) == 8


def test_nan_is_named_with_its_objective(model, batch):
    align = SelfAlignment(model, three(), checks="finite")
    given = targets()
    given["repa"][0, 0, 0] = float("nan")
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"must be finite. Received: .* tokens of the repa/teach"):
        align(*batch, target_tokens=given)


@pytest.mark.parametrize(
    ("make_loss", "kind", "message"),
    [
        (list, ValueError, r"There must be an objective. Received: an empty list"),
        (lambda: [sra(), sra(1, 3)], ValueError, r"different names. Received: two .* 'sra'"),
        (lambda: [sra(), "sra"], TypeError, r"must derive from selfalign.Objective. Received: str"),
        (lambda: "sra", TypeError, r"must derive from selfalign.Objective. Received: str"),
        (
            lambda: [sra(), sra(name="wide", max_gap=0.4)],
            ValueError,
            r"share one EMA teacher.*Received: max_gap 0.4 of 'wide', and 0.2",
        ),
        (
            lambda: [sra(), sra(name="half")],
            ValueError,
            r"must not be that of a torch module's attribute. Received: 'half'. Pass",
        ),
    ],
)
def test_lists_that_cannot_be(model, make_loss, kind, message):
    with pytest.raises(kind, match=message):
        SelfAlignment(model, make_loss())
    assert not model._forward_pre_hooks
