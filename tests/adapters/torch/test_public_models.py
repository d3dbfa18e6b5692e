"""The harness of tests/public_models, and what it has found, as docs/models.md tells it.

Public code is not run here.
"""

import importlib
import inspect
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from dit_models import DiT, make_batch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "public_models"))
import run
import table
from absent import ABSENT
from entry import Entry, Repository
from messages import expression, follow
from repositories import folder
from trial import find

# What falls short of being attached at once or after one message
# It packs samples into one sequence without a batch's axis, and takes them in lists
SHORT = {"Cosmos3OmniTransformer": "after two messages"}


def test_the_page_says_what_the_results_say():
    page = table.PAGE.read_text()
    for mark, lines in table.tables().items():
        assert f"<!-- {mark} -->\n" + "\n".join(lines) + "\n<!-- end -->\n" in page


def test_every_class_of_diffusers_is_tried_or_has_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of diffusers' own imports
        module = importlib.import_module("diffusers.models.transformers")
    classes = {name for name, kind in vars(module).items() if inspect.isclass(kind)}
    tried = {row["name"] for row in table.load() if row["repository"] == "diffusers"}
    assert {name.partition(",")[0] for name in tried} | set(ABSENT) == classes
    assert not tried & set(ABSENT)


def test_every_entry_has_a_result_and_none_is_silent():
    rows = table.load()
    entries = run.entries_of((*run.OWN, *run.PUBLIC))
    assert {row["name"] for row in rows} == {entry.name for entry in entries}
    assert len({entry.name for entry in entries}) == len(entries)
    bad = {row["name"]: row["outcome"] for row in rows if row["outcome"] not in table.GOOD}
    assert bad.keys() == SHORT.keys()
    assert all(bad[name].startswith(outcome) for name, outcome in SHORT.items())
    repositories = {row["repository"] for row in rows if row["outcome"] in table.GOOD[:2]}
    assert len(repositories - {"diffusers"}) >= 20


def labelled(size):
    x0, _, _, y = make_batch(size)
    return x0, {"y": y}


ENTRY = Entry("DiT", lambda: DiT(depth=4), labelled, 5, ("blocks.0", "blocks.2"))


def told_otherwise(model, x, t, condition):
    """In evaluation mode another time: what an adapter that tells the student's would differ by."""
    return model(x, t if model.training else t + 0.1, **condition)


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, "at once"),
        ({"pick": lambda output, condition: output.roll(1, dims=1)}, "WRONG: student"),
        ({"pick": lambda output, condition: output[:, 1:]}, "WRONG: student"),
        ({"run": told_otherwise}, "WRONG: teacher"),
        ({"taps": ("blocks.0", "blocks.3")}, "WRONG: teacher"),
        ({"refused": "a reason"}, "NOT REFUSED"),
        ({"build": lambda: DiT(depth=1)}, "NO WAY OUT"),
    ],
    ids=["right", "order", "number", "time", "layer", "not refused", "no way out"],
)
def test_the_harness_sees_what_is_wrong(changed, outcome):
    assert find(ENTRY._replace(**changed)).outcome.startswith(outcome)


def test_the_harness_follows_a_message_as_it_stands():
    text = "A rule. Received: 21. Pass select=, such as select=lambda output: output[:, -5:, :]."
    assert expression(text) == "lambda output: output[:, -5:, :]"
    given, _ = follow(text, ENTRY, 16)
    assert given["select"](torch.zeros(2, 21, 16)).shape == (2, 5, 16)
    assert follow("A rule. Received: 21. Pass select=, a function.", ENTRY, 16) == ({}, {})
    assert follow("Received: found 'a'. Pass blocks=.", ENTRY, 16) == ({}, {})
    answering = ENTRY._replace(answers={"blocks": "a"})
    assert follow("Received: found 'a'. Pass blocks=.", answering, 16)[0] == {"blocks": "a"}
    assert follow("Received: found 'b'. Pass blocks=.", answering, 16) == ({}, {})


@pytest.mark.parametrize("place", ["owner+name/repo", "owner/name.git", "name"])
def test_a_repository_is_taken_from_a_folder_of_git_directories(tmp_path, place):
    """At its commit, and without the web; other files than Python's stay behind."""
    mirror = tmp_path / "mirror"
    work = tmp_path / "work"
    work.mkdir()
    (work / "model.py").write_text("ANSWER = 42\n")
    (work / "picture.png").write_text("large")

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        done = subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    commit = git("rev-parse", "HEAD")
    (mirror / place).parent.mkdir(parents=True)
    (work / ".git").rename(mirror / place)
    found = folder(Repository("owner/name", commit), tmp_path / "cache", mirror)
    assert [path.name for path in found.iterdir()] == ["model.py"]
    shutil.rmtree(mirror)
    assert folder(Repository("owner/name", commit), tmp_path / "cache", mirror) == found


def test_a_repository_that_a_mirror_lacks_is_said(tmp_path):
    with pytest.raises(SystemExit, match="No git directory of owner/name in"):
        folder(Repository("owner/name", "0" * 40), tmp_path, tmp_path)
