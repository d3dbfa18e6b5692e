"""The same numbers from fit on torch, from fit on jax, and from the JAX adapter's functions on the same backbone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RUNS = {"fit on torch": ("fit", "torch"), "fit on jax": ("fit", "jax"), "functions": ("functions", "jax")}


@pytest.mark.only("jax")
def test_five_steps_agree_across_backends_and_adapters(tmp_path):
    results = {}
    for name, (mode, backend) in RUNS.items():
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "KERAS_BACKEND": backend}
        command = [sys.executable, str(Path(__file__).with_name("parity.py")), mode, str(tmp_path / "out.npz")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results[name] = dict(np.load(tmp_path / "out.npz"))
    reference = results.pop("functions")
    assert len(reference) > 50
    assert np.ptp(reference["terms"]) > 1e-3
    for name, result in results.items():
        assert result.keys() == reference.keys()
        np.testing.assert_allclose(result["terms"][0], reference["terms"][0], rtol=1e-5, err_msg=name)
        for key, value in reference.items():
            np.testing.assert_allclose(result[key], value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=f"{name} {key}")
