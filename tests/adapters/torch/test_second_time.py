"""What else a model is told that is a function of the time: it would stay behind in the teacher."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import selfalign
from selfalign.adapters.torch import SelfAlignment
from selfalign.adapters.torch.second_time import FirstTimes, is_no_chance, ordered_columns

SEEDS = st.integers(0, 2**31)
FUNCTIONS = {
    "half, in thousandths": lambda t: 500 * t,
    "whole thousandths": lambda t: (1000 * t).long(),
    "twenty steps before": lambda t: (1000 * t - 20).long().clamp(min=0),
    "log of the signal-to-noise ratio": lambda t: ((1 - t) / t).log().clamp(-9, 9),
    "a scale": lambda t: (t.view(-1, 1, 1) ** 2 + 0.25).rsqrt(),
    "coefficients": lambda t: torch.stack([(1 - t) ** 2, t**2], 1),
    "an embedding": lambda t: (t[:, None] * torch.arange(1.0, 17)).sin(),
}


def in_order(times, columns):
    return is_no_chance(ordered_columns(times, columns), columns.shape[1])


@given(SEEDS, st.sampled_from(sorted(FUNCTIONS)), st.integers(1, 9))
def test_a_function_of_the_time_is_found_whatever_the_batches(seed, function, size):
    generator = torch.Generator().manual_seed(seed)
    first = FirstTimes()
    found = None
    for _ in range(12):
        t = torch.rand(size, generator=generator)
        found = found or first.add(t, {"label": torch.ones(size), "e": FUNCTIONS[function](t)})
        assert found or not first.full
    assert found == "e"


@given(SEEDS, st.integers(1, 40), st.integers(1, 600), st.booleans())
def test_numbers_are_in_the_times_order_by_chance_seldom(seed, samples, columns, whole):
    """Fewer than one in a thousand: of a hundred draws, two are not met."""
    generator = torch.Generator().manual_seed(seed)
    found = 0
    for _ in range(10):
        numbers = torch.randn(samples, columns, generator=generator)
        numbers = numbers.round() if whole else numbers
        found += in_order(torch.rand(samples, generator=generator).double(), numbers.double())
    assert found < 2


def test_equal_times_that_are_told_otherwise_are_no_function():
    t = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]).double()
    rising = torch.arange(10.0).double()[:, None]
    assert not in_order(t, rising)
    assert in_order(t, t[:, None] ** 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.input = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, t, beside):
        (told,) = beside.values() if isinstance(beside, dict) else (beside,)
        given = told.float().reshape(len(x), -1).mean(1)
        tokens = self.input(x) + self.embed((t + given)[:, None])[:, None]
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


def steps(told, condition=lambda told: (), count=4):
    model = Model()
    align = SelfAlignment(model, selfalign.SRALoss(student_layer=1, teacher_layer=2))
    for _ in range(count):
        x0, noise, t = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.rand(3)
        beside = told(t)
        model(align.path.add_noise(x0, noise, t), t, beside)
        align(x0, noise, t, *condition(beside)).backward()


@pytest.mark.parametrize("nest", [lambda told: told, lambda told: {"r": told}])
def test_a_second_time_is_refused_in_any_unit(nest):
    with pytest.raises(
        ValueError,
        match=r"the teacher's own\. Received: argument 2.*, shape \(3,\) .* in the order of the "
        r"times\. Pass call=, .* hand it to align\(\) as well\.",
    ):
        steps(lambda t: nest((500 * t).long()))


def test_a_condition_that_is_a_function_of_the_time_is_accepted():
    steps(lambda t: 500 * t, condition=lambda told: (told,))


def test_other_numbers_per_sample_are_accepted():
    for told in (torch.tensor([3.5, 4.0, 3.8]), torch.tensor([512, 64, 30]), torch.zeros(3)):
        steps(lambda t, told=told: told[torch.randperm(3)])
