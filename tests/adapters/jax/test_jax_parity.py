"""The same numbers as the torch adapter and as the NumPy oracle: two processes, one file each."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from jax_models import WIDTH, forward, make_params

HERE = Path(__file__).parent
STEPS = 5
# what the oracle computes with, by name: path, distance, weight, max_gap
SETTINGS = {
    "cosine": (oracle.linear(1), "cosine", 0.5, 0.2),
    "paper": (oracle.cosine_path(1), "smooth_l1", 0.2, 0.2),
    "reversed": (oracle.linear(0), "l2", 0.5, 0.3),
}


@pytest.fixture(scope="module")
def given():
    """First weights, and the batches and draws of five steps."""
    rng = np.random.default_rng(0)
    inputs = {f"model.{name}": value for name, value in make_params().items()}
    shapes = {
        "hidden_kernel": (WIDTH, 2 * WIDTH),
        "hidden_bias": (2 * WIDTH,),
        "output_kernel": (2 * WIDTH, WIDTH),
        "output_bias": (WIDTH,),
    }
    inputs |= {f"projector.{name}": (0.2 * rng.normal(size=shape)).astype("float32") for name, shape in shapes.items()}
    for step in range(STEPS):
        inputs |= {f"{part}.{step}": rng.normal(size=(6, 5, 4)).astype("float32") for part in ("x0", "noise")}
        inputs |= {f"{part}.{step}": rng.random(6, "float32") for part in ("t", "u")}
        inputs[f"y.{step}"] = rng.integers(0, 10, 6)
    return inputs


@pytest.fixture(scope="module")
def results(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    np.savez(folder / "given.npz", **given)
    for framework in ("torch", "jax"):
        environment = os.environ | {"KERAS_BACKEND": framework, "PYTHONPATH": str(HERE.parents[1])}
        command = [
            sys.executable,
            str(HERE / "parity.py"),
            framework,
            str(folder / "given.npz"),
            str(folder / f"{framework}.npz"),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return {framework: dict(np.load(folder / f"{framework}.npz")) for framework in ("torch", "jax")}


def check_close(mine, theirs, rtol, name):
    """Relative to the largest number of the array: single ones may nearly cancel."""
    np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize("name", SETTINGS)
def test_terms_gradients_and_ema_equal_the_torch_adapters(results, name):
    ours, theirs = ({k: v for k, v in results[f].items() if k.startswith(f"{name}/")} for f in ("jax", "torch"))
    assert ours.keys() == theirs.keys()
    assert sum("gradient" in key for key in ours) > 60
    for key, value in ours.items():
        first = "gradient" in key or key.endswith("term.0") or "/teacher.0." in key
        check_close(value, theirs[key], 1e-5 if first else 1e-4, key)


def test_the_runs_move(results, given):
    """Equal because both stand still would be no equality."""
    for name in SETTINGS:
        moved = results["jax"][f"{name}/model.blocks.1.qkv.weight"] - given["model.blocks.1.qkv.weight"]
        assert np.abs(moved).max() > 1e-3
        assert results["jax"][f"{name}/gradient.model.blocks.1.qkv.weight"].any()
        assert not results["jax"][f"{name}/gradient.model.blocks.2.qkv.weight"].any()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_first_step_equals_the_oracle(results, given, name):
    path, distance, weight, max_gap = SETTINGS[name]
    wide = {key: value.astype("float64") if value.dtype == "float32" else value for key, value in given.items()}
    model = {key.removeprefix("model."): value for key, value in wide.items() if key.startswith("model.")}
    projector = {key.removeprefix("projector."): value for key, value in wide.items() if key.startswith("projector.")}
    x0, noise, t, y, u = (wide[f"{part}.0"] for part in ("x0", "noise", "t", "y", "u"))
    t_teacher = oracle.teacher_time(path, t, u, max_gap)
    target = forward(model, oracle.add_noise(path, x0, noise, t_teacher), t_teacher, y, np)[1][3]
    student = forward(model, oracle.add_noise(path, x0, noise, t), t, y, np)[1][1]

    def term(projector):
        return oracle.loss(distance, weight, oracle.project(projector, student), target)

    check_close(results["jax"][f"{name}/term.0"], term(projector), 1e-5, "term")
    for key in ("hidden_bias", "output_bias", "output_kernel"):
        slope = oracle.gradient(lambda value, key=key: term({**projector, key: value}), projector[key].copy())
        check_close(results["jax"][f"{name}/gradient.projector.{key}"], slope, 1e-5, key)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_ema_equals_the_oracles(results, name):
    """The last average from the one before and the student, by the formula."""
    run = {
        key.removeprefix(f"{name}/"): value.astype("float64") for key, value in results["jax"].items() if key.startswith(name)
    }
    decay = min(0.9, (1 + STEPS - 1) / (10 + STEPS - 1))
    for key in (key.removeprefix("model.") for key in run if key.startswith("model.")):
        expected = oracle.ema(run[f"teacher.{STEPS - 2}.{key}"], run[f"model.{key}"], decay)
        check_close(run[f"teacher.{STEPS - 1}.{key}"], expected, 1e-5, key)
