"""How much of our Python runs in one warm step: that is what a reader has to follow, too."""

import collections
import sys
from pathlib import Path

import pytest
import torch
from dit_models import DiT, make_batch, seen

import selfalign
from selfalign.adapters import torch as adapter

FOLDERS = (str(Path(selfalign.__file__).parent), str(Path(adapter.__file__).parents[1]))


class Calls:
    """The calls of our functions while `run` runs, and the tensors that each was given."""

    def __init__(self, run):
        self.functions = collections.Counter()
        self.checked = collections.Counter()
        self.kept = []  # an id belongs to one tensor as long as that lives
        sys.setprofile(self.note)
        try:
            run()
        finally:
            sys.setprofile(None)

    def note(self, frame, event, argument):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(FOLDERS):
            return
        if code.co_name.startswith("<"):  # part of the function around it
            return
        self.functions[code.co_filename, code.co_qualname] += 1
        if code.co_name.startswith(("check_", "_check_")):
            for value in frame.f_locals.values():
                if isinstance(value, torch.Tensor):
                    self.kept.append(value)
                    self.checked[code.co_qualname, id(value)] += 1

    def files(self):
        return {file for file, _ in self.functions}


@pytest.fixture(params=["sra", "layersync"])
def warm(request):
    """A loop after two steps, the condition passed: its batch, and the alignment."""
    kinds = {"sra": selfalign.SRALoss, "layersync": selfalign.LayerSyncLoss}
    loss = kinds[request.param](student_layer=2, teacher_layer=4)
    model = DiT()
    align = adapter.SelfAlignment(model, loss)
    optimizer = torch.optim.SGD([*model.parameters(), *align.projector.parameters()], lr=0.1)
    batch = make_batch()
    for _ in range(2):
        (model(*seen(batch)).square().mean() + align(*batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        align.update()
    model(*seen(batch))
    return align, batch


def test_few_functions_of_few_files(warm, capsys):
    align, batch = warm
    calls = Calls(lambda: align(*batch))
    functions = len(calls.functions)
    files = len(calls.files())
    with capsys.disabled():
        kind = align.loss.kind
        print(f"\none warm step of {kind}: {functions} functions in {files} files")
    assert 5 < functions <= 50, "\n".join(sorted(name for _, name in calls.functions))
    assert files <= 10, "\n".join(sorted(calls.files()))


def test_no_check_runs_twice_on_the_same_tensor(warm):
    align, batch = warm
    calls = Calls(lambda: align(*batch))
    assert calls.checked
    assert not {what: count for what, count in calls.checked.items() if count > 1}


def test_the_count_counts():
    """A function of ours that checks one tensor twice is found."""
    tokens = torch.zeros(1, 2, 3)
    check = selfalign.distances.check_features
    calls = Calls(lambda: (check("student", tokens), check("student", tokens)))
    assert max(calls.checked.values()) == 2
    assert ("check_features", id(tokens)) in calls.checked
