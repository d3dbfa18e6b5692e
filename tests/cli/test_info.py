"""`selfalign info`: versions, devices, and which adapters work."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import selfalign
from selfalign.cli import installed

pytestmark = pytest.mark.only("torch")


def test_info_of_this_environment():
    """By the installed command, in a process of its own: all packages are imported."""
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    command = [str(Path(sys.executable).with_name("selfalign")), "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in report["adapters"]] == ["works"] * 3
    working = {row["package"] for row in report["packages"] if row["state"] == "works"}
    assert working >= {"torch", "jax", "keras", "diffusers"}
    assert report["keras_backend"] == "the first tensor's: torch or jax"
    assert report["torch_devices"][0] == "cpu"
    assert report["selfalign"] == selfalign.__version__


def pretend(monkeypatch, **states):
    """Packages in these states; all others are missing."""

    def state(name):
        return states.get(name.replace("-", "_"), "missing")

    monkeypatch.setattr(installed, "_state", state)
    monkeypatch.setattr(installed, "_devices", lambda name: ["cpu"])


def test_info_without_frameworks_says_how_to_install(shown, lines, monkeypatch):
    pretend(monkeypatch, keras="works")
    monkeypatch.delenv("KERAS_BACKEND")
    code, out, errors = shown("info")
    assert code == 1
    assert re.search(r'torch +\S+ +missing: pip install "selfalign\[torch\]"', out)
    assert re.search(r"diffusers +\S+ +missing: pip install diffusers", out)
    assert re.search(r"selfalign\.adapters\.torch +needs torch\n", out)
    assert re.search(r"selfalign\.adapters\.keras +needs torch or jax$", out, re.M)
    assert "keras backend the first tensor's: none" in lines(out)
    message = "selfalign: One adapter at least must work. Received: none that does. The table of"
    assert errors.startswith(message)


def test_info_says_where_keras_is_told_another_backend(report, monkeypatch):
    working = ("torch", "keras", "jax", "selfalign.adapters.jax")
    pretend(monkeypatch, **dict.fromkeys(working, "works"))
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    found = report("info")
    states = {row["adapter"].rpartition(".")[2]: row["state"] for row in found["adapters"]}
    assert states["torch"] == "needs KERAS_BACKEND=torch, or none; it is jax"
    assert states["jax"] == "works"
    assert found["keras_backend"] == "jax, by KERAS_BACKEND"


def test_info_describes_a_broken_package(shown, lines, monkeypatch, tmp_path):
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('its\\n  library is missing')")
    (tmp_path / "wanting_one.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(installed, "OPTIONAL", ("broken-one", "wanting-one", "missing-one"))
    monkeypatch.setattr(installed, "TRAINS", ("torch",))
    code, out, errors = shown("info")
    assert code == 1
    wanted = {
        "broken-one - broken (RuntimeError: its library is missing)",
        "missing-one - missing: pip install missing-one",
        "wanting-one - broken (ModuleNotFoundError: No module named 'nowhere_at_all')",
    }
    assert wanted <= set(lines(out))
    message = (
        "What is installed must import. Received: broken-one broken (RuntimeError: its library"
    )
    assert message in errors


def test_devices(monkeypatch):
    device = types.SimpleNamespace(platform="tpu", id=0, device_kind="TPU v5e")
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(devices=lambda: [device]))
    assert installed._devices("jax") == ["tpu:0 (TPU v5e)"]
    cuda = types.SimpleNamespace(device_count=lambda: 1, get_device_name=lambda n: "H100")
    mps = types.SimpleNamespace(is_available=lambda: True)
    torch = types.SimpleNamespace(cuda=cuda, backends=types.SimpleNamespace(mps=mps))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert installed._devices("torch") == ["cpu", "cuda:0 (H100)", "mps"]


def test_devices_that_do_not_answer(monkeypatch):
    def devices():
        raise RuntimeError("no driver")

    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(devices=devices))
    assert installed._devices("jax") == ["broken (no driver)"]
