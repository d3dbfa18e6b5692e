"""The report: verdicts that follow from the seeds, interpolations by hand, and the page that is committed."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.only("torch")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("studies", "examples")]

import records  # noqa: E402
import report  # noqa: E402
import verdicts  # noqa: E402

numbers = st.lists(st.tuples(st.integers(-999, 999), st.integers(-999, 999)), min_size=1, max_size=6)


@given(numbers, st.randoms(use_true_random=False))
def test_a_verdict_is_the_opposite_the_other_way_round_and_knows_no_order(found, random):
    sign = verdicts.decided(*zip(*found, strict=True))
    assert verdicts.decided(*zip(*((b, a) for a, b in found), strict=True)) == -sign
    random.shuffle(found)
    assert verdicts.decided(*zip(*found, strict=True)) == sign
    if sign:
        assert all((b - a) * sign > 0 for a, b in found)


def test_a_verdict_needs_agreement_and_more_than_the_spread():
    a = [1.0, 1.1, 1.2]
    assert verdicts.decided(a, [2.0, 2.1, 2.2]) == 1
    assert verdicts.decided(a, [1.05, 1.15, 1.25]) == 0  # all larger, but by less than the seeds differ
    assert verdicts.decided(a, [0.9, 3.0, 3.1]) == 0  # one is smaller
    assert verdicts.decided(a, [1.3, 9.0, 1.3]) == 0  # all larger, by chance for all one knows
    assert verdicts.decided([1.0], [2.0]) == 0
    assert verdicts.mean_sd([1.0, 2.0], "+", 1) == "+1.5 ± 0.7"
    assert verdicts.mean_sd([1.0]) == "1.000"


@pytest.fixture
def results(tmp_path):
    """none falls 1.0, 0.5, 0.25; default is twice as fast and takes 1.25 of the time; the seeds differ by a hundredth."""
    file = tmp_path / "toy-core.csv"
    for seed in (1, 2, 3):
        for arm, losses in (("none", (1.0, 0.5, 0.25)), ("default", (0.5, 0.25, 0.125))):
            rows = [(step, "held-out loss", "", loss + seed / 100) for step, loss in zip((100, 200, 300), losses, strict=True)]
            rows += [(300, "time of a step", "", 1.25)] if arm == "default" else []
            rows += [(300, report.EMA, f"block {n} t 0.5", 0.1 * n) for n in (1, 2, 3)]
            records.keep(file, arm, seed, rows)
    return records.Results(file)


def test_results_by_seed_step_and_block(results):
    assert "none" in results
    assert "another" not in results
    assert results.seeds("default") == [1, 2, 3]
    assert results.at(200, "none", "held-out loss") == [0.51, 0.52, 0.53]
    assert results.at(250, "none", "held-out loss") == []
    assert results.curve("default", 2, "held-out loss") == ([100, 200, 300], [0.52, 0.27, 0.145])
    assert results.blocks(300, "none", report.EMA, 0.5) == [[0.1] * 3, [0.2] * 3, [0.3] * 3]


def test_sides_are_compared_over_the_seeds_that_both_have(results, tmp_path):
    file = tmp_path / "more.csv"
    records.keep(file, "late", 2, [(300, "held-out loss", "", 0.5)])
    both = records.Results(tmp_path / "toy-core.csv", file)
    assert both.both(300, "none", "late", "held-out loss") == ([0.27], [0.5])


def test_a_table_marks_what_the_seeds_decide(results):
    text = report.by_arm(results, ["none", "default"], 300)
    assert "| without SRA | 0.270 ± 0.010 | x 1 |" in text.replace(" 0.200 ± 0.000 |", "")
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
    text = report.steps_to_the_baselines_end(results, 100, ["default", "none"])  # good enough when first looked at
    assert "| held-out loss ↓ | 1.00, 1.00, 1.00 | 1.00, 1.00, 1.00 |" in text


def test_between_two_checkpoints_the_step_is_read_on_a_logarithmic_axis(results, tmp_path):
    file = tmp_path / "more.csv"
    records.keep(file, "paper recipe", 1, [(100, "held-out loss", "", 0.46), (400, "held-out loss", "", 0.06)])
    both = records.Results(tmp_path / "toy-core.csv", file)
    assert "| held-out loss ↓ | 0.67 |" in report.steps_to_the_baselines_end(both, 300, ["paper recipe"])  # 0.26 at step 200


def test_an_end_that_is_not_reached_is_said(results, tmp_path):
    file = tmp_path / "more.csv"
    records.keep(file, "paper recipe", 1, [(step, "held-out loss", "", 0.5) for step in (100, 300)])
    both = records.Results(tmp_path / "toy-core.csv", file)
    assert "| held-out loss ↓ | not reached |" in report.steps_to_the_baselines_end(both, 300, ["paper recipe"])


def test_claims_say_what_was_seen(results):
    text = report.at_equal_steps(results, 300, ["default"])
    assert "| held-out loss ↓ | -0.125 ± 0.000 | **reproduced** |" in text
    worse = report.differs(results, 300, ("default", "held-out loss", ""), ("none", "held-out loss", ""), -1)
    assert worse == (-1, "+0.125 ± 0.000")
    assert report.claim(-1) == "**not reproduced: the opposite**"


def test_results_of_other_data_are_printed_as_far_as_they_go(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "digits"])
    report.main()
    text = capsys.readouterr().out
    assert "claim 3:" in text
    assert "not measured" in text  # no probe at t = 0.3
    assert "ablations:" not in text
    monkeypatch.setattr(sys, "argv", ["report.py", "digits", "--write"])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "docs/study.md is about Fashion-MNIST. Received: --write, and digits." in capsys.readouterr().err


def test_the_committed_page_is_what_the_committed_results_say():
    assert (ROOT / "docs" / "study.md").read_text() == report.page(ROOT / "studies" / "results")


def test_arms_that_are_one_run_by_construction_came_out_equal():
    """Runs of different processes, hours apart: what the page says of them."""
    folder = ROOT / "studies" / "results"
    results = records.Results(*(folder / f"fashion-mnist-{group}.csv" for group in ("core", "ablations")))
    for decay in (0.99, 0.9999):
        for m in report.measured(results, 600):
            default, other = results.both(600, "default", f"decay {decay}, warm-up", m.metric, m.where)
            assert default == other
            assert len(other) == 3


@pytest.mark.parametrize(("group", "page"), [("core", "evidence.md"), ("cheaper", "cheaper.md")])
def test_tables_quoted_elsewhere_are_the_committed_ones(group, page):
    file = ROOT / "studies" / "results" / f"digits-{group}.csv"
    text = report.by_arm(records.Results(file), report.arms_of(file), 600)
    rows = [line.split(" | ")[1:6] for line in text.splitlines()[2:-1]]  # without the names, and without the real images
    quoted = (ROOT / "docs" / page).read_text()
    assert len(rows) == len(report.arms_of(file))
    for row in rows:
        cells = " | ".join(cell.rstrip(" ▲▼|") for cell in row)
        assert cells in quoted


@pytest.mark.parametrize("page", ["settings.md", "evidence.md"])
def test_figures_quoted_from_the_study_are_in_it(page):
    text = (ROOT / "docs" / page).read_text()
    if page == "evidence.md":  # before the digits' table
        text = text.partition("After 1,800 steps")[2].partition("On the digits")[0]
    quoted = set(re.findall(r"\d\.\d+ ± \d\.\d+", text))
    study = (ROOT / "docs" / "study.md").read_text()
    assert len(quoted) > 5
    assert [figure for figure in quoted if figure not in study] == []


def test_a_report_of_nothing_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "digits", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "A report needs results. Received: digits, and no file digits-core.csv" in capsys.readouterr().err
