"""The report: verdicts that follow from the seeds, interpolations by hand, the committed page."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.only("torch")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"
sys.path[:0] = [str(ROOT / folder) for folder in ("studies", "examples")]

import records  # noqa: E402
import report  # noqa: E402
import verdicts  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Verdicts

pairs_of_arms = st.lists(
    st.tuples(st.integers(-999, 999), st.integers(-999, 999)), min_size=1, max_size=6
)


@given(pairs_of_arms, st.randoms(use_true_random=False))
def test_a_verdict_turns_with_the_arms_and_has_no_order(pairs, random):
    a, b = zip(*pairs, strict=True)
    sign = verdicts.decided(a, b)
    assert verdicts.decided(b, a) == -sign
    random.shuffle(pairs)
    assert verdicts.decided(*zip(*pairs, strict=True)) == sign
    if sign:
        assert all((y - x) * sign > 0 for x, y in pairs)


@pytest.mark.parametrize(
    ("b", "sign"),
    [
        ([2.0, 2.1, 2.2], 1),
        ([0.0, 0.1, 0.2], -1),
        ([1.05, 1.15, 1.25], 0),  # all larger, but by less than the seeds differ
        ([0.9, 3.0, 3.1], 0),  # one is smaller
        ([1.3, 9.0, 1.3], 0),  # all larger, perhaps by chance
    ],
)
def test_a_verdict_needs_agreement_and_more_than_the_spread(b, sign):
    assert verdicts.decided([1.0, 1.1, 1.2], b) == sign


def test_one_seed_decides_nothing_and_has_no_spread():
    assert verdicts.decided([1.0], [2.0]) == 0
    assert verdicts.mean_sd([1.0]) == "1.000"
    assert verdicts.mean_sd([1.0, 2.0], "+", 1) == "+1.5 ± 0.7"


# --------------------------------------------------------------------------------------------------
# Tables of a toy study

LOSS = "held-out loss"
STEPS = (100, 200, 300)


@pytest.fixture
def file(tmp_path):
    """none falls 1.0, 0.5, 0.25; default is twice as fast, at 1.25 of the time.

    The seeds differ by a hundredth.
    """
    file = tmp_path / "toy-core.csv"
    arms = {"none": (1.0, 0.5, 0.25), "default": (0.5, 0.25, 0.125)}
    for seed in (1, 2, 3):
        for arm, losses in arms.items():
            rows = [
                (step, LOSS, "", loss + seed / 100)
                for step, loss in zip(STEPS, losses, strict=True)
            ]
            rows += [(300, report.EMA, f"block {n} t 0.5", 0.1 * n) for n in (1, 2, 3)]
            if arm == "default":
                rows.append((300, "time of a step", "", 1.25))
            records.keep(file, arm, seed, rows)
    return file


@pytest.fixture
def results(file):
    return records.Results(file)


@pytest.fixture
def with_another(file, tmp_path):
    """The toy study, and one more run of an arm: its losses by step."""

    def add(arm, seed, losses):
        more = tmp_path / "more.csv"
        records.keep(more, arm, seed, [(step, LOSS, "", loss) for step, loss in losses.items()])
        return records.Results(file, more)

    return add


def loss_of(arm):
    return records.Of(arm, LOSS)


def test_results_by_seed_step_and_block(results):
    assert "none" in results
    assert "another" not in results
    assert results.seeds("default") == [1, 2, 3]
    assert results.at(200, loss_of("none")) == [0.51, 0.52, 0.53]
    assert results.at(250, loss_of("none")) == []
    assert results.curve(2, loss_of("default")) == ([100, 200, 300], [0.52, 0.27, 0.145])
    assert results.blocks(300, "none", report.EMA, 0.5) == [[0.1] * 3, [0.2] * 3, [0.3] * 3]


def test_sides_are_compared_over_the_seeds_that_both_have(with_another):
    results = with_another("late", 2, {300: 0.5})
    assert results.pairs(300, loss_of("none"), loss_of("late")) == ([0.27], [0.5])


def test_a_table_marks_what_the_seeds_decide(results):
    text = report.by_arm(results, ["none", "default"], 300)
    assert "| without SRA | 0.200 ± 0.000 | 0.270 ± 0.010 | x 1 |" in text
    assert "0.145 ± 0.010 ▲ | x 1.25 |" in text
    assert "▼" not in text


def test_at_equal_time_a_slower_arm_is_read_earlier(results):
    text = report.at_equal_time(results, 300, ["default"])
    assert "the default, 240 steps" in text
    expected = 0.25 - 0.125 * np.log(240 / 200) / np.log(300 / 200) + 0.02
    assert f"| {expected:.3f} ± 0.010 ▲ |" in text


def test_steps_to_the_baselines_end_are_interpolated(results):
    text = report.steps_to_the_baselines_end(results, 300, ["default"])
    assert "| held-out loss ↓ | 0.67, 0.67, 0.67 |" in text  # at 200 of 300 steps


def test_an_arm_may_be_good_enough_when_first_looked_at(results):
    text = report.steps_to_the_baselines_end(results, 100, ["default", "none"])
    assert "| held-out loss ↓ | 1.00, 1.00, 1.00 | 1.00, 1.00, 1.00 |" in text


def test_between_two_checkpoints_the_step_is_read_on_a_logarithmic_axis(with_another):
    results = with_another("paper recipe", 1, {100: 0.46, 400: 0.06})
    text = report.steps_to_the_baselines_end(results, 300, ["paper recipe"])
    assert "| held-out loss ↓ | 0.67 |" in text  # 0.26 at step 200


def test_an_end_that_is_not_reached_is_said(with_another):
    results = with_another("paper recipe", 1, {100: 0.5, 300: 0.5})
    text = report.steps_to_the_baselines_end(results, 300, ["paper recipe"])
    assert "| held-out loss ↓ | not reached |" in text


def test_claims_say_what_was_seen(results):
    text = report.at_equal_steps(results, 300, ["default"])
    assert "| held-out loss ↓ | -0.125 ± 0.000 | **reproduced** |" in text
    worse = report.differs(results, 300, loss_of("default"), loss_of("none"), -1)
    assert worse == (-1, "+0.125 ± 0.000")
    assert report.claim(-1) == "**not reproduced: the opposite**"


# --------------------------------------------------------------------------------------------------
# The committed results


def printed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    report.main()


def test_results_of_other_data_are_printed_as_far_as_they_go(monkeypatch, capsys):
    printed(monkeypatch, "digits")
    text = capsys.readouterr().out
    assert "claim 3:" in text
    assert "not measured" in text  # no probe at t = 0.3
    assert "ablations:" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["digits", "--write"],
            "docs/study.md is about Fashion-MNIST. Received: --write, and digits.",
        ),
        (
            ["digits", "--results", "nowhere"],
            "A report needs results. Received: digits, and no file digits-core.csv",
        ),
    ],
)
def test_a_report_refuses_in_a_sentence(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        printed(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_the_committed_page_is_what_the_committed_results_say():
    assert (ROOT / "docs" / "study.md").read_text() == report.page(RESULTS)


def test_arms_that_are_one_run_by_construction_came_out_equal():
    """Runs of different processes, hours apart: what the page says of them."""
    files = (RESULTS / f"fashion-mnist-{group}.csv" for group in ("core", "ablations"))
    results = records.Results(*files)
    for decay in (0.99, 0.9999):
        for metric in report.measured(results, 600):
            same_run = metric.of(f"decay {decay}, warm-up")
            default, other = results.pairs(600, metric.of("default"), same_run)
            assert default == other
            assert len(other) == 3


@pytest.mark.parametrize(("group", "page"), [("core", "evidence.md"), ("cheaper", "cheaper.md")])
def test_tables_quoted_elsewhere_are_the_committed_ones(group, page):
    file = RESULTS / f"digits-{group}.csv"
    text = report.by_arm(records.Results(file), report.arms_of(file), 600)
    _, _, *rows, _ = text.splitlines()  # without the heading and the real images
    quoted = (ROOT / "docs" / page).read_text()
    assert len(rows) == len(report.arms_of(file))
    for row in rows:
        _, *cells = row.split(" | ")[:6]  # without the name
        assert " | ".join(cell.rstrip(" ▲▼|") for cell in cells) in quoted


@pytest.mark.parametrize("page", ["settings.md", "evidence.md"])
def test_figures_quoted_from_the_study_are_in_it(page):
    text = (ROOT / "docs" / page).read_text()
    if page == "evidence.md":  # before the digits' table
        text = text.partition("After 1,800 steps")[2].partition("On the digits")[0]
    quoted = set(re.findall(r"\d\.\d+ ± \d\.\d+", text))
    study = (ROOT / "docs" / "study.md").read_text()
    assert len(quoted) > 5
    assert [figure for figure in quoted if figure not in study] == []
