"""The teacher is called as the student was: sample and time are found in the student's call."""

import pytest
import torch
from dit_models import DiT, seen

import selfalign
from selfalign.adapters.torch import SelfAlignment

LAYERS = {"student_layer": 2, "teacher_layer": 4}
HALF = torch.full((4,), 0.5)
STEPS = torch.tensor([3, 500, 999, 0])
SIGMAS = torch.tensor([0.01, 1.0, 30.0, 2.0])
UNITS = {
    "as it is": lambda t: t,
    "thousandths": lambda t: 1000 * t,
    "reversed": lambda t: 1 - t,
    "reversed thousandths": lambda t: 1000 - 1000 * t,
}


class Called(DiT):
    """Any way of being called; keeps what it was called with."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def forward(
        self, hidden_states, timestep=None, class_labels=None, prompt=None, return_dict=True
    ):
        self.calls.append((hidden_states, timestep, class_labels, prompt, return_dict))
        unit = timestep.float().flatten() / 1000
        return super().forward(hidden_states.float(), unit, class_labels)


def attached(path="linear", **options):
    return SelfAlignment(Called(), selfalign.SRALoss(**LAYERS, path=path), **options)


# Ways in which one call is written: (module, x, time, y, prompt) -> nothing
WAYS = {
    "position": lambda m, x, time, y, prompt: m(x, time, y, prompt, False),
    "name": lambda m, x, time, y, prompt: m(
        hidden_states=x, timestep=time, class_labels=y, prompt=prompt, return_dict=False
    ),
    "another order": lambda m, x, time, y, prompt: m(
        x, class_labels=y, return_dict=False, prompt=prompt, timestep=time
    ),
    "column": lambda m, x, time, y, prompt: m(x, time[:, None], y, prompt, False),
    "whole numbers": lambda m, x, time, y, prompt: m(x, time.long(), y, prompt, False),
    "half precision": lambda m, x, time, y, prompt: m(x.bfloat16(), time, y, prompt, False),
}
CASES = [
    (unit, way)
    for unit in UNITS
    for way in WAYS
    if way != "whole numbers" or unit.endswith("thousandths")
]


@pytest.mark.parametrize(("unit", "way"), CASES)
def test_the_students_call_is_repeated(unit, way, batch):
    torch.manual_seed(3)
    align = attached()
    tell = UNITS[unit]
    x0, noise, t, y = batch
    u = torch.rand(4)
    prompt = torch.randn(4, 3, 7)
    WAYS[way](align.model, align.path.add_noise(x0, noise, t), tell(t), y, prompt)
    align(x0, noise, t, u=u)
    t_teacher = align.loss.teacher_time(t, u)
    expected = tell(t_teacher)
    if way == "column":
        expected = expected[:, None]
    if way == "whole numbers":
        expected = expected.long()
    x, time, labels, text, as_dict = align.teacher.calls[-1]
    noised = align.path.add_noise(x0, noise, t_teacher)
    torch.testing.assert_close(x.float(), noised, rtol=0.02, atol=0.02)
    torch.testing.assert_close(time, expected)
    assert x.dtype == (torch.bfloat16 if way == "half precision" else torch.float32)
    assert labels is y
    assert text is prompt
    assert as_dict is False


@pytest.mark.parametrize(
    ("path", "t", "tell"),
    [
        ("discrete", STEPS, lambda t: t),
        ("discrete", STEPS, lambda t: t.float()),
        ("discrete", STEPS, lambda t: t / 1000),
        ("edm", SIGMAS, lambda t: t),
        ("edm", SIGMAS, lambda t: t.log() / 4),
        ("cosine", torch.tensor([0.1, 0.4, 0.6, 0.9]), lambda t: 1000 * t),
    ],
)
def test_other_paths(path, t, tell, batch):
    align = attached(path)
    x0, noise, _, y = batch
    u = torch.rand(4)
    align.model(align.path.add_noise(x0, noise, t), tell(t), y)
    align(x0, noise, t, u=u)
    expected = tell(align.loss.teacher_time(t, u))
    torch.testing.assert_close(align.teacher.calls[-1][1], expected)


def test_a_label_that_equals_the_time_is_no_time(batch):
    align = attached("discrete")
    x0, noise, _, _ = batch
    t = torch.tensor([5, 3, 7, 1])
    align.model(align.path.add_noise(x0, noise, t), t, t.clone())
    align(x0, noise, t, u=torch.full((4,), 0.9))
    _, time, labels, *_ = align.teacher.calls[-1]
    assert torch.equal(labels, t)
    assert (time < t).all()


def test_a_call_in_another_style_from_step_to_step(batch):
    align = attached()
    x_t, t, y = seen(batch)
    for call in (
        lambda m: m(x_t, t, y),
        lambda m: m(hidden_states=x_t, class_labels=y, timestep=t),
        lambda m: m(x_t, t, y),
    ):
        call(align.model)
        align(*batch)
        assert align.teacher.calls[-1][2] is y


def test_unchecked_calls_are_repeated_all_the_same(batch):
    align = attached(checks="off")
    x_t, t, y = seen(batch)
    align.model(x_t, 1000 * t, y)
    align(*batch[:3], u=torch.zeros(4))
    assert torch.equal(align.teacher.calls[-1][1], 1000 * t)
    assert align.teacher.calls[-1][2] is y


def test_two_arguments_that_may_be_the_time_are_refused(loss, batch):
    class Interval(DiT):
        def forward(self, x, t, t_end, y):
            return super().forward(x, t + t_end, y)

    align = SelfAlignment(Interval(), loss)
    x_t, t, y = seen(batch)
    align.model(x_t, t, t.clone(), y)
    with pytest.raises(ValueError, match=r"Received: 2 arguments like t \(as it is"):
        align(*batch[:3])


@pytest.mark.parametrize(("first", "tell"), [(0.0, UNITS["thousandths"]), (0.5, UNITS["reversed"])])
def test_a_first_batch_whose_times_tell_nothing(batch, first, tell):
    align = attached()
    x0, noise, t, y = batch
    for times in (torch.full((4,), first), t):
        align.model(align.path.add_noise(x0, noise, times), tell(times), y)
        align(x0, noise, times, u=HALF)
    expected = tell(align.loss.teacher_time(t, HALF))
    torch.testing.assert_close(align.teacher.calls[-1][1], expected)


def test_whole_numbers_may_be_rounded(batch):
    align = attached()
    x_t, t, y = seen(batch)
    align.model(x_t, (1000 * t).round().long(), y)
    u = torch.rand(4)
    align(*batch[:3], u=u)
    expected = (1000 * align.loss.teacher_time(t, u)).round().long()
    assert torch.equal(align.teacher.calls[-1][1], expected)


def test_another_time_than_the_students(loss, batch):
    align = SelfAlignment(DiT(), loss)
    x_t, t, y = seen(batch)
    align.model(x_t, t / 7, y)
    message = (
        r"the x0, noise and t of align\(\). Received: no arguments like t \(as it is, in thousandt"
    )
    with pytest.raises(ValueError, match=message):
        align(*batch)


# A function of the user's


def test_a_sample_inside_a_list_needs_a_function(loss, batch):
    class Listed(DiT):
        def forward(self, x, t, y):
            return super().forward(torch.stack(x), t, y)

    x_t, t, y = seen(batch)
    model = Listed()
    with SelfAlignment(model, loss) as align:
        model(list(x_t), t, y)
        message = r"no arguments like x_t.*scales them otherwise, pass call="
        with pytest.raises(ValueError, match=message):
            align(*batch[:3])
    with SelfAlignment(model, loss, call=lambda m, x, t, y: m(list(x), t, y)) as align:
        model(list(x_t), t, y)
        assert align(*batch).item() > 0


def test_any_call_signature(loss, batch):
    class Keyword(DiT):
        def forward(self, *, hidden, timestep, label):
            return super().forward(hidden, timestep / 1000, label)

    model = Keyword()
    call = lambda m, x, t, label: m(hidden=x, timestep=1000 * t, label=label)  # noqa: E731
    align = SelfAlignment(model, loss, call=call)
    x0, noise, t, y = batch
    model(hidden=align.path.add_noise(x0, noise, t), timestep=1000 * t, label=y)
    assert 0 < align(x0, noise, t, label=y).item() < 1


class TwoSamples(DiT):
    """Sound beside pictures, both with noise, and a prediction for each."""

    def forward(self, x, t, y, sound):
        return super().forward(x, t, y), sound * 2


def test_a_second_sample_is_refused_unless_it_is_a_condition(loss, batch):
    align = SelfAlignment(TwoSamples(), loss)
    sound = torch.randn(4, 3, 6)
    align.model(*seen(batch), sound)
    message = (
        r"Each sample that the model is given .* Received: argument 'sound', shape \(4, 3, 6\) .*, "
        r"for which it predicts something, too. Pass call=, .* hand it to align\(\) as well."
    )
    with pytest.raises(ValueError, match=message):
        align(*batch)
    align.model(*seen(batch), sound)
    assert align(*batch, sound).item() > 0


class OneOutput(DiT):
    """Its only output has the shape of a second picture, that of a condition."""

    def forward(self, x, t, y, control):
        return super().forward(x + control.mean(-1, keepdim=True), t, y)[..., :3]


def test_an_only_output_is_the_samples(loss, batch):
    model = OneOutput()
    align = SelfAlignment(model, loss)
    model(*seen(batch), torch.randn(4, 5, 3))
    assert align(*batch).isfinite()


class OneTime(DiT):
    def forward(self, x, t, y):
        return super().forward(x, torch.as_tensor(t, dtype=x.dtype).expand(len(x)), y)


@pytest.mark.parametrize("tell", [lambda t: t[0], lambda t: t[:1], lambda t: float(t[0])])
def test_one_time_for_a_batch_is_refused(loss, batch, tell):
    model = OneTime()
    align = SelfAlignment(model, loss)
    x0, noise, t, y = batch
    t = t[:1].expand(len(t))
    x = align.path.add_noise(x0, noise, t)
    model(x, tell(t), y)
    message = (
        r"must be told a time for each sample. Received: argument 't', .* for 4 samples. Repeat "
        r"it where you call the model: t.expand\(len\(x\)\)."
    )
    with pytest.raises(ValueError, match=message):
        align(x0, noise, t, y)
    model(x, t, y)
    assert align(x0, noise, t, y).isfinite()


def test_one_time_without_axes_is_enough_for_one_sample(loss, batch):
    model = OneTime()
    align = SelfAlignment(model, loss)
    x0, noise, t, y = (part[:1] for part in batch)
    model(align.path.add_noise(x0, noise, t), t[0], y)
    assert align(x0, noise, t, y).isfinite()


class Interval(DiT):
    """MeanFlow's model is told two times."""

    def forward(self, x, t, r, y):
        return super().forward(x, t - r, y)


@pytest.mark.parametrize("share", [0.5, 0.0, 1.0])
def test_a_second_time_is_refused_unless_it_is_a_condition(loss, batch, share):
    align = SelfAlignment(Interval(), loss)
    x_t, t, y = seen(batch)
    r = share * t
    align.model(x_t, t, r, y)
    message = r"(Each time that the model is told|Received: 2 arguments like t)"
    with pytest.raises(ValueError, match=message):
        align(*batch[:3])
    if share < 1:
        align.model(x_t, t, r, y)
        assert align(*batch[:3], r).item() > 0

    def call(model, x, t, y, r):
        return model(x, t, torch.minimum(r, t), y)

    align.detach()
    align = SelfAlignment(align.model, loss, call=call)
    align.model(x_t, t, r, y)
    assert align(*batch, r).item() > 0


class Ends(DiT):
    """Told an interval of time beside its end."""

    def forward(self, x, t, y, ends):
        return super().forward(x, t, y)


def test_an_interval_that_holds_the_time_is_refused(loss, batch):
    x_t, t, y = seen(batch)
    align = SelfAlignment(Ends(), loss)
    align.model(x_t, t, y, torch.stack([t / 2, t], 1))
    message = r"the teacher's own. Received: argument 'ends', shape \(4, 2\) .* Pass call="
    with pytest.raises(ValueError, match=message):
        align(*batch[:3])
    align.model(x_t, t, y, torch.tensor([[64.0, 64.0, 0.0, 0.0]] * 4))  # sizes are a condition
    assert align(*batch[:3]).item() > 0
    align.detach()

    def call(model, x, t, y):
        return model(x, t, y, torch.stack([t / 2, t], 1))

    align = SelfAlignment(align.model, loss, call=call)
    align.model(x_t, t, y, torch.stack([t / 2, t], 1))
    assert align(*batch).item() > 0


class PerToken(DiT):
    """Told a time for each token."""

    def forward(self, x, t, y, keep=None):
        return super().forward(x, t[:, 0], y)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 0, 2]])
@pytest.mark.parametrize("keep", [None, torch.ones(4, dtype=torch.bool), torch.ones(4)])
def test_what_fits_by_a_cast_is_no_time(loss, batch, labels, keep):
    align = SelfAlignment(PerToken(), loss)
    x_t, t, _ = seen(batch)
    u = torch.rand(4)
    align.model(x_t, t[:, None].expand(4, 5), torch.tensor(labels), keep)
    times = []
    align.teacher.register_forward_pre_hook(lambda m, args: times.append(args[1]))
    align(*batch[:3], u=u)
    expected = align.loss.teacher_time(t, u)
    torch.testing.assert_close(times[-1], expected[:, None].expand(4, 5))
