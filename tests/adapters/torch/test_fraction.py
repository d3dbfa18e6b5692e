"""The term on a fraction of each batch: EMATeacher(batch_fraction=)."""

import copy

import pytest
import torch
from dit_models import DiT, TimeTableDiT, flops, make_batch, seen

from selfalign.adapters.torch import EMATeacher, SelfAlignment


def terms_of(model, batch, loss, *options):
    """The term and the gradients of the second block, with each of some options."""
    found = []
    for given in options:
        align = SelfAlignment(copy.deepcopy(model), loss, seed=3, **given.pop("options", {}))
        torch.manual_seed(2)
        align.model(*seen(batch))
        term = align(*batch, **given)
        term.backward()
        found.append((align, term, [p.grad for p in align.model.blocks[1].parameters()]))
    return found


@pytest.mark.parametrize("kind", [DiT, TimeTableDiT])
def test_a_fraction_is_the_term_of_the_first_samples(loss, kind):
    """As if the others were masked, whatever the model drops; for a third of the teacher's cost."""
    batch = make_batch(6)
    mask = torch.tensor([1.0, 1, 0, 0, 0, 0])
    third = {"options": {"teacher": EMATeacher(batch_fraction=1 / 3)}}
    model = kind(label_dropout=0.5)
    whole, part = terms_of(model, batch, loss, {"loss_mask": mask}, third)
    torch.testing.assert_close(whole[1:], part[1:])
    costs = []
    for align, *_ in (whole, part):
        align.model(*seen(batch))
        costs.append(flops(lambda align=align: align(*batch)))
    assert costs[1] == costs[0] / 3


@pytest.mark.parametrize("average", ["module", "AveragedModel"])
def test_with_an_ema_of_the_users(loss, model, average):
    batch = make_batch(4)
    mask = torch.tensor([1.0, 1, 0, 0])
    theirs = copy.deepcopy(model)
    if average == "AveragedModel":
        theirs = torch.optim.swa_utils.AveragedModel(model)
    half = EMATeacher(batch_fraction=0.5, model=theirs)
    whole, part = terms_of(
        model,
        batch,
        loss,
        {"options": {"teacher": theirs}, "loss_mask": mask},
        {"options": {"teacher": half}},
    )
    torch.testing.assert_close(whole[1:], part[1:])
    part[0].update()
    assert part[0].state_dict()["teacher"] == {}


def test_at_least_one_sample_is_aligned(loss, model):
    batch = make_batch(2)
    align = SelfAlignment(model, loss, teacher=EMATeacher(batch_fraction=0.1))
    model(*seen(batch))
    assert align(*batch).item() > 0


def test_a_mask_over_tokens(model, loss):
    batch = make_batch(4)
    mask = torch.ones(4, 5)
    mask[2:] = 0
    half = {"teacher": EMATeacher(batch_fraction=0.5)}
    whole, part = terms_of(
        model, batch, loss, {"loss_mask": mask}, {"options": half, "loss_mask": mask}
    )
    torch.testing.assert_close(whole[1:], part[1:])


def test_a_mask_that_does_not_fit_is_not_cut_until_it_does(model, loss, batch):
    align = SelfAlignment(model, loss, teacher=EMATeacher(batch_fraction=0.5))
    model(*seen(batch))
    with pytest.raises(ValueError, match=r"mask.*Received: .*7"):
        align(*batch, loss_mask=torch.ones(7))


class Centred(DiT):
    """A sample's condition depends on the batch's other samples."""

    def embed_label(self, y):
        embedded = super().embed_label(y)
        return embedded - embedded.mean(dim=0)


def test_samples_that_depend_on_each_other_are_refused(loss, batch):
    model = Centred()
    align = SelfAlignment(model, loss, teacher=EMATeacher(batch_fraction=0.5))
    model(*seen(batch))
    message = (
        r"batch_fraction= needs samples that do not depend on each other. Received: tokens "
        r"\(2, 5, 16\) that differ .* \(2, 5, 16\). .*leave batch_fraction= out"
    )
    with pytest.raises(ValueError, match=message):
        align(*batch)


def test_unless_nothing_is_checked(loss, batch):
    model = Centred()
    half = EMATeacher(batch_fraction=0.5)
    align = SelfAlignment(model, loss, teacher=half, checks="off")
    model(*seen(batch))
    assert align(*batch).item() > 0
