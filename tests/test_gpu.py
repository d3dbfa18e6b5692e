"""`make gpu`: what its driver does with parts that are cut off, die, or find nothing."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.only("numpy")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"

WRITES = """
import sys, time
out = sys.argv[sys.argv.index("--out") + 1]
with open(out, "a") as file:
    file.write('{"name": "first", "ok": true}\\n')
"""
SCRIPTS = {
    "whole": WRITES,
    "slow": WRITES + "time.sleep(60)",
    "torn": WRITES + "open(out, 'a').write('{\"name\": \"sec'); time.sleep(60)",
    "dies": WRITES + "raise SystemExit('what it died of')",
    "silent": "",
    "wrong": WRITES.replace("true", "false"),
}


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run")
    for name in ("run", "found"):
        sys.modules.pop(name, None)


@pytest.fixture
def run_part(driver, tmp_path, monkeypatch):
    """Run a script of the above as a part."""

    def run(name, seconds=20, **options):
        monkeypatch.setattr(driver, "FOLDER", tmp_path)
        (tmp_path / f"{name}.py").write_text(SCRIPTS[name])
        part = driver.Part(name, seconds, (f"{name}.py",))
        return driver.run(part, tmp_path / f"{name}.jsonl", short=False, **options)

    return run


def test_a_whole_part_is_right(driver, run_part):
    found = run_part("whole")
    assert (found["ended"], driver.is_right(found)) == ("to its end", True)


@pytest.mark.parametrize("name", ["slow", "torn"])
def test_a_part_that_is_cut_off_keeps_what_it_wrote(driver, run_part, name):
    found = run_part(name, seconds=1)
    assert found["ended"] == "cut off after 1 s"
    assert [check["name"] for check in found["checks"]] == ["first"]
    assert not driver.is_right(found)


def test_the_study_is_right_as_far_as_it_came(driver, run_part):
    found = run_part("slow", driver.ALL, deadline=driver.time.monotonic() + 1)
    assert found["ended"] == "cut off after 1 s"
    assert driver.is_right(found)


def test_a_part_that_dies_is_wrong_and_has_its_log(driver, run_part):
    found = run_part("dies")
    assert found["ended"] == "with exit code 1"
    assert "what it died of" in found["log"]
    assert not driver.is_right(found)


@pytest.mark.parametrize("name", ["silent", "wrong"])
def test_a_part_that_finds_nothing_or_something_wrong_is_not_right(driver, run_part, name):
    found = run_part(name)
    assert found["ended"] == "to its end"
    assert not driver.is_right(found)


def test_the_command_says_what_is_wrong(driver, tmp_path, monkeypatch, capsys):
    for name in ("whole", "dies"):
        (tmp_path / f"{name}.py").write_text(SCRIPTS[name])
    monkeypatch.setattr(driver, "FOLDER", tmp_path)
    parts = tuple(driver.Part(name, 20, (f"{name}.py",)) for name in ("dies", "whole"))
    monkeypatch.setattr(driver, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["run.py", "--short", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        driver.main()
    assert ended.value.code == 1
    assert "Not right: dies." in capsys.readouterr().out
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["ended"] for part in written["parts"].values()] == [
        "with exit code 1",
        "to its end",
    ]


def test_a_section_of_the_page_is_written_and_nothing_else(driver, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{driver.BEGIN}old\n{driver.END}after\n")
    checks = [{"name": "one", "ok": False, "error": "no", "value": 0.5}]
    part = {"ended": "to its end", "seconds": 3, "checks": checks}
    driver.write_page({"date": "today", "hardware": "a GPU", "parts": {"Cost": part}}, page)
    text = page.read_text()
    assert text.startswith(f"Before\n{driver.BEGIN}`make gpu`, today: a GPU.\n")
    assert text.endswith(f"{driver.END}after\n")
    assert "- one: **wrong**: no; value 0.5" in text
    assert "old" not in text
    page.write_text("without marks")
    with pytest.raises(ValueError, match=r"must have the marks.*Received: .*page\.md without"):
        driver.write_page({"date": "", "hardware": "", "parts": {}}, page)
    assert page.read_text() == "without marks"


def test_the_parts_fit_into_the_time(driver):
    *others, study = driver.PARTS
    assert study.seconds == driver.ALL
    assert sum(part.seconds for part in others) + 60 <= driver.ALL


def test_targets_are_verdicts_on_a_gpu_alone(driver, tmp_path):
    found = sys.modules["found"]
    out = tmp_path / "out.jsonl"
    for value, on_a_gpu in ((0.9, True), (1.2, True), (1.2, False), (None, True)):
        found.judge(out, "a ratio", value, 1.0, on_a_gpu)
    assert [line["ok"] for line in found.read(out)] == [True, False, True]
