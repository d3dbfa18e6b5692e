"""Every error of the diagnostics: the rule, what was received, and what to do."""

import ast
import pathlib
import re
import sys

import numpy as np
import pytest
from support import tensor

import selfalign
from selfalign import diagnostics


def ones(*shape):
    return tensor(np.ones(shape))


class Writer:
    """What TensorBoard's writer has."""

    def add_scalar(self, name, value, step):
        """Nothing is written."""


LABELS = [0, 1] * 3
ERRORS = {
    # name: (call, kind, rule, received, fix)
    "a log without a file": (
        lambda: diagnostics.CSVLogger(None),
        TypeError,
        "path must be that of a file",
        "None",
        "Pass a string or a Path.",
    ),
    "a prefix that is none": (
        lambda: diagnostics.TensorBoardLogger(Writer(), prefix=None),
        TypeError,
        "prefix must be a string",
        "None",
        'Pass for instance "sra/", or "" for none.',
    ),
    "percentiles that fall": (
        lambda: diagnostics.pca_maps(np.ones((2, 6, 4)), (2, 3), (99, 1)),
        ValueError,
        "percentiles must be two rising numbers in [0, 100]",
        "(99, 1)",
        "Pass for instance (1.0, 99.0).",
    ),
    "half of what is held out": (
        lambda: diagnostics.linear_probe(np.eye(6), LABELS, held_out=(1,)),
        TypeError,
        "held_out must be (features, labels)",
        "tuple (1,)",
        "Pass both of other samples, or leave it out.",
    ),
    "layers without times": (
        lambda: diagnostics.per_layer([1], diagnostics.feature_norm),
        TypeError,
        "features must be {time: [features of each layer]}",
        "list [1]",
        "Take them from selfalign.adapters.torch.features.",
    ),
    "a measure by its name": (
        lambda: diagnostics.compare([np.eye(6)], [np.eye(6)], "cka"),
        TypeError,
        "measure must be a function",
        "str 'cka'",
        "Pass the function itself, not its name or its result.",
    ),
    "complex features": (
        lambda: diagnostics.feature_norm(np.ones((2, 3), "complex64")),
        TypeError,
        "tokens must be an array of real numbers",
        "dtype complex64",
        "Pass a block's features.",
    ),
    "features in words": (
        lambda: diagnostics.cknna("x", np.eye(6)),
        TypeError,
        "Features must be an array of numbers",
        "str 'x'",
        "Pass a tensor, or what NumPy can read.",
    ),
    "no layers to compare": (
        lambda: diagnostics.compare([], [np.eye(6)]),
        TypeError,
        "left must be a list of features, not empty",
        "list []",
        "Pass those of each layer.",
    ),
    "features without rows": (
        lambda: diagnostics.feature_norm(ones(3)),
        ValueError,
        "tokens must be features [n, D] or tokens [B, N, D], not empty",
        "shape (3,)",
        "the width as the last axis.",
    ),
    "empty features": (
        lambda: diagnostics.effective_rank(ones(0, 3)),
        ValueError,
        "tokens must be features [n, D] or tokens [B, N, D], not empty",
        "shape (0, 3)",
        "the width as the last axis.",
    ),
    "no tensor": (
        lambda: diagnostics.participation_ratio([[1.0]]),
        TypeError,
        "tokens must be a tensor",
        "list",
        "Convert",
    ),
    "drift of other trees": (
        lambda: diagnostics.drift({"a": ones(2)}, {"b": ones(2)}),
        ValueError,
        "Teacher and student must have the same structure and shapes",
        "at 'a': teacher (2,), student missing",
        "as a copy",
    ),
    "signal of a time outside": (
        lambda: diagnostics.snr_decibels(selfalign.paths.Linear(), tensor([1.5])),
        ValueError,
        "t must lie in [0, 1]",
        "values from 1.5 to 1.5",
        "check the model's time scale.",
    ),
    "cka of other samples": (
        lambda: diagnostics.cka(ones(4, 2), ones(5, 2)),
        ValueError,
        "x and y must be features of the same samples",
        "x (4, 2), y (5, 2)",
        "on one batch, in one order.",
    ),
    "cknna of other samples": (
        lambda: diagnostics.cknna(np.ones((4, 2)), np.ones((5, 2))),
        ValueError,
        "x and y must be features of the same samples",
        "x (4, 2), y (5, 2)",
        "on one batch, in one order.",
    ),
    "cknna of tokens": (
        lambda: diagnostics.cknna(np.ones((4, 2, 3)), np.ones((4, 2))),
        ValueError,
        "x must be an array [n, D] of at least two samples",
        "shape (4, 2, 3)",
        "Take the mean over tokens",
    ),
    "cknna of NaN": (
        lambda: diagnostics.cknna(np.ones((4, 2)), np.full((4, 2), np.nan)),
        ValueError,
        "y must be finite",
        "NaN or infinity",
        "Find the layer that gives them first.",
    ),
    "too many neighbours": (
        lambda: diagnostics.cknna(np.ones((4, 2)), np.ones((4, 2)), 4),
        ValueError,
        "k must be in [1, 3]",
        "4",
        "It counts neighbours among the other samples; 10 in the paper.",
    ),
    "labels of other samples": (
        lambda: diagnostics.linear_probe(np.ones((4, 2)), LABELS),
        ValueError,
        "labels must hold one class per sample, [n]",
        "shape (6,), for 4 samples",
        "Pass the classes of the samples",
    ),
    "a class too small": (
        lambda: diagnostics.linear_probe(np.ones((4, 2)), [0, 0, 0, 1]),
        ValueError,
        "A probe needs two classes or more, each with as many samples as there are folds",
        "2 classes, the smallest of 1 samples, 3 folds",
        "Take more samples, or fewer folds.",
    ),
    "one fold": (
        lambda: diagnostics.linear_probe(np.ones((6, 2)), LABELS, folds=1),
        ValueError,
        "folds must be finite and at least 2",
        "1",
        "Pass a value inside these bounds.",
    ),
    "neighbours beyond the fold": (
        lambda: diagnostics.knn_probe(np.ones((6, 2)), LABELS, k=5),
        ValueError,
        "k must not exceed the samples that are left to vote",
        "k=5, 4 samples",
        "Take more samples.",
    ),
    "held-out features of another layer": (
        lambda: diagnostics.linear_probe(
            np.ones((6, 2)), LABELS, held_out=(np.ones((6, 3)), LABELS)
        ),
        ValueError,
        "Held-out features must have the width of the others",
        "3 and 2",
        "Take both from one layer.",
    ),
    "maps of mean tokens": (
        lambda: diagnostics.pca_maps(np.ones((4, 8)), (2, 2)),
        ValueError,
        "Maps need tokens [B, N, D], at least three of them, with D at least 3",
        "shape (4, 8)",
        "not their mean.",
    ),
    "another grid": (
        lambda: diagnostics.pca_maps(np.ones((2, 6, 8)), (2, 2)),
        ValueError,
        "grid must be (H, W) or (T, H, W) with H W or T H W = N",
        "(2, 2), for 6 tokens",
        "leave out class and text tokens.",
    ),
    "maps of NaN": (
        lambda: diagnostics.pca_maps(np.full((2, 4, 8), np.inf), (2, 2)),
        ValueError,
        "tokens must be finite",
        "NaN or infinity",
        "Find the layer",
    ),
    "a picture of no colours": (
        lambda: diagnostics.draw_maps({"a": np.ones((2, 4, 6))}, "x.png"),
        ValueError,
        "Maps must be colours [B, H, W, 3] or [B, T, H, W, 3]",
        "'a' of shape (2, 4, 6)",
        "Take them from pca_maps.",
    ),
    "no features": (
        lambda: diagnostics.find_layers({}),
        ValueError,
        "features must be {time: [features of each layer]}",
        "layers by time {}",
        "Take them after every block of the model.",
    ),
    "times of two depths": (
        lambda: diagnostics.find_layers({0.1: [1, 2], 0.5: [1, 2, 3]}),
        ValueError,
        "features must be {time: [features of each layer]}",
        "layers by time {0.1: 2, 0.5: 3}",
        "after every block",
    ),
    "one time and no labels": (
        lambda: diagnostics.find_layers({0.1: [1, 2]}),
        ValueError,
        "Without labels the finder compares noise levels",
        "features at 0.1 alone",
        "or labels.",
    ),
    "tolerance of all": (
        lambda: diagnostics.find_layers({0.1: [1, 2]}, tolerance=1),
        ValueError,
        "tolerance must be in [0, 0.999999]",
        "1",
        "Pass a value inside these bounds.",
    ),
    "a metric per sample": (
        lambda: diagnostics.CSVLogger("x.csv").log(0, {"cosine": ones(3)}),
        ValueError,
        "A metric must be a scalar",
        "'cosine' of shape (3,)",
        "Log its mean.",
    ),
    "a writer that cannot": (
        lambda: diagnostics.TensorBoardLogger(print),
        TypeError,
        "writer must have add_scalar(name, value, step)",
        "builtin_function_or_method",
        "Pass a SummaryWriter",
    ),
    "written every half step": (
        lambda: diagnostics.CSVLogger("x.csv", every=0.5),
        TypeError,
        "every must be an integer",
        "0.5",
        "Pass a Python int or float.",
    ),
}


@pytest.mark.parametrize(("call", "kind", "rule", "received", "fix"), ERRORS.values(), ids=ERRORS)
def test_rule_received_and_fix(call, kind, rule, received, fix):
    parts = [f"^{re.escape(rule)}", f"Received: .*{re.escape(received)}", re.escape(fix)]
    with pytest.raises(kind, match=".*".join(parts)):
        call()


def test_every_error_of_the_diagnostics_is_in_the_table():
    messages = [message_of(call) for call, *_ in ERRORS.values()]
    folder = pathlib.Path(diagnostics.__file__).parent
    trees = [ast.parse(file.read_text("utf-8")) for file in folder.glob("*.py")]
    rules = {rule for tree in trees for rule in literal_rules(tree)}
    assert len(rules) > 10
    assert sorted(rule for rule in rules if not any(rule in message for message in messages)) == []


def message_of(call):
    try:
        call()
    except Exception as error:  # of the wrong kind: the test above says so
        return str(error)
    return ""


def literal_rules(tree):
    """The longest string in the first argument of each invalid(), ValueError() and TypeError()."""
    for node in ast.walk(tree):
        called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if called in ("invalid", "ValueError", "TypeError"):
            parts = [part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
            texts = [part.value for part in parts if isinstance(part.value, str)]
            if texts:
                yield max(texts, key=len)


@pytest.mark.only("torch")
@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        (
            "sklearn.linear_model",
            "scikit-learn",
            lambda: diagnostics.linear_probe(np.ones((6, 2)), LABELS),
        ),
        (
            "matplotlib.figure",
            "matplotlib",
            lambda: diagnostics.draw_maps(np.ones((1, 2, 2, 3)), "x.png"),
        ),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch, module, package, call):
    monkeypatch.setitem(sys.modules, module, None)
    fix = re.escape('Install it with: pip install "selfalign[diagnostics]"')
    message = rf"^This diagnostic needs {package}\. Received: .*\. {fix}"
    with pytest.raises(ImportError, match=message):
        call()
