"""What align() is given must be what the student was called with."""

import pytest
import torch
from dit_models import DiT, seen

import selfalign
from selfalign.adapters.torch import SelfAlignment


class Prompted(DiT):
    """Time in thousandths, and a prompt that it does not look at."""

    def forward(self, x, timestep, y, prompt=None):
        return super().forward(x, timestep / 1000, y)


def test_a_condition_given_to_align_must_be_the_students_in_every_step(model, loss, batch):
    x0, noise, t, y = batch
    align = SelfAlignment(model, loss)
    message = (
        r"called as the student was. Received: the condition\[0\]: shape \(4,\) .* label dropout"
    )
    for given in ({"y": y}, {}):
        model(*seen(batch))
        align(x0, noise, t, *([] if given else [y]), **given)
        model(*seen(batch))
        with pytest.raises(ValueError, match=message):
            align(x0, noise, t, (y + 1) % 10)


def test_a_sample_that_the_loop_scales_is_refused(model, loss, batch):
    """As EDM's preconditioning does: the teacher would see another scale."""
    align = SelfAlignment(model, loss)
    x_t, t, y = seen(batch)
    model(x_t * torch.rand(4, 1, 1), t, y)
    message = r"itself. Received: argument 0, a multiple of it. Attach to the model that scales it"
    with pytest.raises(ValueError, match=message):
        align(*batch)


@pytest.mark.filterwarnings("ignore:align.. must be given the sample")
def test_no_sample_at_all_is_no_multiple(model, loss, batch):
    align = SelfAlignment(model, loss)
    x_t, t, y = seen(batch)
    model(torch.zeros_like(x_t), t, y)
    assert align(*batch).item() > 0


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_path_that_runs_the_other_way_is_refused(model, batch, scale):
    """The public SiT code has its data at time 1: nothing but the sample tells."""
    loss = selfalign.SRALoss.preset("SiT-B/2", student_layer=2, teacher_layer=4)
    align = SelfAlignment(model, loss)
    x0, noise, t, y = batch
    other = selfalign.paths.Linear(noise_at=0)
    model(scale * other.add_noise(x0, noise, t), t, y)
    message = (
        r"must run in the model's direction of time. Received: argument 0, which is the sample at "
        r"t on Linear\(noise_at=0.0\). Pass the loss path=selfalign.paths.Linear\(noise_at=0.0\)."
    )
    with pytest.raises(ValueError, match=message):
        align(*batch)


def test_another_sample_is_warned_of_once(model, loss, batch):
    align = SelfAlignment(model, loss)
    x_t, t, y = seen(batch)
    model(x_t.flip(0), t, y)
    message = (
        r"the sample that the model saw. Received: argument 0 shape .* not path.add_noise.* "
        r"direction of time"
    )
    with pytest.warns(UserWarning, match=message):
        align(*batch)
    model(x_t.flip(0), t, y)
    assert align(*batch).item() > 0


def test_a_function_that_tells_another_time(loss, batch):
    x_t, t, y = seen(batch)
    model = Prompted()
    align = SelfAlignment(model, loss, call=lambda m, x, t, y: m(x, t, y))
    model(x_t, 1000 * t, y)
    message = (
        r"as the student was. Received: timestep: shape \(4,\) \[.*for the teacher at the student"
    )
    with pytest.raises(ValueError, match=message):
        align(*batch)


def test_a_function_that_leaves_an_argument_out(loss, batch):
    x_t, t, y = seen(batch)
    model = Prompted()
    call = lambda m, x, t, y: m(x, 1000 * t, y)  # noqa: E731
    with SelfAlignment(model, loss, call=call) as align:
        model(x_t, 1000 * t, y, {"text": [torch.ones(4)]})
        message = r"Received: prompt\['text'\]\[0\]: shape \(4,\) .* for the student, nothing"
        with pytest.raises(ValueError, match=message):
            align(*batch)
        model(x_t, 1000 * t, y)
        assert align(*batch).item() > 0
    with SelfAlignment(model, loss, call=call, checks="off") as align:
        model(x_t, 1000 * t, y, torch.ones(4))
        assert align(*batch).item() > 0


def test_another_batch_than_the_students(loop, batch):
    loop.forward(*batch)
    message = r"the x0, noise and t of align\(\). Received: no arguments like x_t"
    with pytest.raises(ValueError, match=message):
        loop.align(*(part[:2] for part in batch))
    loop.step(batch)
    loop.forward(*batch)
    message = r"argument 0: shape \(4, 5, 4\) .* for the student, shape \(2, 5, 4\)"
    with pytest.raises(ValueError, match=message):
        loop.align(*(part[:2] for part in batch))


def test_another_batch_where_nothing_is_compared(model, loss, batch):
    align = SelfAlignment(model, loss, checks="off")
    model(*seen(batch))
    align(*batch)
    model(*seen(batch))
    message = (
        r"student's batch. Received: x0 of shape \(2, 5, 4\), after a model's call with \(4, 5, 4\)"
    )
    with pytest.raises(ValueError, match=message):
        align(*(part[:2] for part in batch))


@pytest.mark.parametrize(
    ("t", "kind", "message"),
    [
        (
            torch.tensor([0.1, 0.2, 0.3, 1.5]),
            ValueError,
            r"t must lie in \[0, 1\]. Received: values from 0.1 to 1.5",
        ),
        (0.5, ValueError, r"one time per sample, shape \[B\] = \(4,\). Received: shape \(\)"),
        (
            torch.rand(3),
            ValueError,
            r"one time per sample, shape \[B\] = \(4,\). Received: shape \(3,\)",
        ),
        (
            torch.rand(4, 1),
            ValueError,
            r"one time per sample, shape \[B\] = \(4,\). Received: shape \(4, 1\)",
        ),
        (
            torch.tensor([1, 2, 3, 4]),
            TypeError,
            r"takes floating-point times. Received: t of dtype int64",
        ),
    ],
)
def test_wrong_times(loop, batch, t, kind, message):
    loop.forward(*batch)
    with pytest.raises(kind, match=message):
        loop.align(batch[0], batch[1], t, batch[3])


def test_a_mask_that_does_not_fit(loop, batch):
    loop.forward(*batch)
    with pytest.raises(ValueError, match=r"mask.*Received: .*7"):
        loop.align(*batch, loss_mask=torch.ones(7))
