"""The command `selfalign`: what each command shows, as text and as JSON, and how it ends."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import selfalign
from selfalign import _installed, cli

pytestmark = pytest.mark.only("torch")
TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    """The command is at home in a process of its own: it puts folders on the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture
def shown(capsys):
    """Runs the command line: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.main(list(arguments))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def report(shown):
    """Runs the command line with --json: the report of a run that ends well."""

    def run(*arguments):
        code, out, errors = shown(*arguments, "--json")
        assert code == 0, errors
        return json.loads(out)

    return run


def lines(text):
    """The text's lines, with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines()]


# presets


def test_presets_are_the_papers(report):
    models = {row["model"]: row for row in report("presets")["models"]}
    for name, row in models.items():
        assert (row["student_layer"], row["teacher_layer"]) == selfalign.preset_layers(name)
    assert (models["SiT-XL/2"]["depth"], models["SiT-XL/2"]["path"]) == (28, "linear")
    assert (models["DiT-L/2"]["depth"], models["DiT-L/2"]["path"]) == (24, "discrete")
    assert len(models) == 8


def test_presets_show_the_recipes_weights(report):
    rows = {(row["recipe"], row["models"]): row for row in report("presets")["recipes"]}
    assert len(rows) == 8
    assert rows["paper", "SiT"] == {"recipe": "paper", "models": "SiT", "distance": "smooth_l1", "weight": 0.2,
                                    "epoch_400": 0.11221, "epoch_800": 0.04467, "decay": 0.9999}  # fmt: skip
    assert [rows["paper", "DiT"][name] for name in ("weight", "epoch_400")] == [0.04, 0.02244]
    assert rows["official-2026-07", "DiT"]["distance"] == "official-2026-07"
    assert (rows["short", "SiT"]["weight"], rows["short", "SiT"]["decay"]) == (0.1, 0.999)  # once it has warmed up


def test_presets_of_one_recipe_at_another_resolution(report, shown):
    (sit, _) = report("presets", "--recipe", "paper", "--resolution", "512")["recipes"]
    assert sit["epoch_400"] == round(0.2 * 10 ** (-(400 - 99) / 800), 5)
    code, out, errors = shown("presets", "--recipe", "paper")
    assert (code, errors) == (0, "")
    assert {"SiT-XL/2 28 8 20 linear", "paper SiT smooth_l1 0.2 0.1122 0.04467 0.9999"} <= set(lines(out))
    assert len(lines(out)) == 9 + 1 + 3


# info


def test_info_of_this_environment():
    """By the installed command, in a process of its own: all packages are imported."""
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    command = [str(Path(sys.executable).with_name("selfalign")), "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in report["adapters"]] == ["works"] * 3
    assert {row["package"] for row in report["packages"] if row["state"] == "works"} >= {"torch", "jax", "keras", "diffusers"}
    assert report["keras_backend"] == "the first tensor's: torch or jax"
    assert report["torch_devices"][0] == "cpu"
    assert report["selfalign"] == selfalign.__version__


def pretend(monkeypatch, **states):
    """Packages in these states; all others are missing."""
    monkeypatch.setattr(_installed, "_state", lambda name: states.get(name.replace("-", "_"), "missing"))
    monkeypatch.setattr(_installed, "_devices", lambda name: ["cpu"])


def test_info_without_frameworks_says_how_to_install(shown, monkeypatch):
    pretend(monkeypatch, keras="works")
    monkeypatch.delenv("KERAS_BACKEND")
    code, out, errors = shown("info")
    assert code == 1
    assert re.search(r'torch +\S+ +missing: pip install "selfalign\[torch\]"', out)
    assert re.search(r"diffusers +\S+ +missing: pip install diffusers", out)
    assert re.search(r"selfalign\.adapters\.torch +needs torch\n", out)
    assert re.search(r"selfalign\.adapters\.keras +needs torch or jax$", out, re.M)
    assert "keras backend the first tensor's: none" in lines(out)
    assert errors.startswith("selfalign: One adapter at least must work. Received: none that does. The table of adapters says")


def test_info_says_where_keras_is_told_another_backend(report, monkeypatch):
    pretend(monkeypatch, **{"torch": "works", "keras": "works", "jax": "works", "selfalign.adapters.jax": "works"})
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    found = report("info")
    states = {row["adapter"].rpartition(".")[2]: row["state"] for row in found["adapters"]}
    assert states["torch"] == "needs KERAS_BACKEND=torch, or none; it is jax"
    assert states["jax"] == "works"
    assert found["keras_backend"] == "jax, by KERAS_BACKEND"


def test_info_describes_a_broken_package(shown, monkeypatch, tmp_path):
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('its\\n  library is missing')")
    (tmp_path / "wanting_one.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_installed, "_OPTIONAL", ("broken-one", "wanting-one", "missing-one"))
    monkeypatch.setattr(_installed, "_TRAINS", ("torch",))
    code, out, errors = shown("info")
    assert code == 1
    assert {"broken-one - broken (RuntimeError: its library is missing)", "missing-one - missing: pip install missing-one",
            "wanting-one - broken (ModuleNotFoundError: No module named 'nowhere_at_all')"} <= set(lines(out))  # fmt: skip
    assert "What is installed must import. Received: broken-one broken (RuntimeError: its library" in errors


def test_devices(monkeypatch):
    device = types.SimpleNamespace(platform="tpu", id=0, device_kind="TPU v5e")
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(devices=lambda: [device]))
    assert _installed._devices("jax") == ["tpu:0 (TPU v5e)"]
    cuda = types.SimpleNamespace(device_count=lambda: 1, get_device_name=lambda n: "H100")
    mps = types.SimpleNamespace(is_available=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda, backends=types.SimpleNamespace(mps=mps)))
    assert _installed._devices("torch") == ["cpu", "cuda:0 (H100)", "mps"]


def test_devices_that_do_not_answer(monkeypatch):
    def devices():
        raise RuntimeError("no driver")

    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(devices=devices))
    assert _installed._devices("jax") == ["broken (no driver)"]


# check

ONE_STEP = ("--repeat", "1")


def test_check_of_a_dit(report):
    found = report("check", f"{TESTS}/dit_models.py:DiT", "--input", "5,4", "--classes", "10", "--batch", "3", *ONE_STEP)
    assert found["block_lists"] == [{"block_list": "blocks", "blocks": 6, "class": "Block"}]
    assert (found["depth"], found["student_layer"], found["teacher_layer"]) == (6, 2, 4)
    assert (found["student"], found["teacher"]) == ("blocks.1", "blocks.3")
    assert (found["width"], found["width_from"], found["tokens"]) == (16, "the block", [3, 5, 16])
    assert (found["frozen_parameters"], found["projector_parameters"]) == (0, 4 * 16**2 + 3 * 16)
    assert found["teacher_bytes"] == 4 * found["trained_parameters"]
    assert found["gradient_in_blocks"] == [1, 2]
    assert 0 < found["term"] < 1
    assert found["plain_step_ms"] > 0 < found["step_with_sra_ms"]
    assert found["ratio"] == pytest.approx(found["step_with_sra_ms"] / found["plain_step_ms"])


def test_check_as_text(shown):
    code, out, errors = shown("check", "dit_models:DiT", "--kwargs", '{"depth": 12}', "--preset", "SiT-B/2")
    assert (code, errors) == (0, "")
    assert {"model DiT of dit_models:DiT", "student layer 3", "teacher layer 8", "student blocks.2", "noise path linear",
            "training steps none: give --input or --example", "blocks 12 Block"} <= set(lines(out))  # fmt: skip


def test_check_of_a_class_of_diffusers(report):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 6,
             "sample_size": 8, "num_embeds_ada_norm": 10}  # fmt: skip
    found = report("check", "diffusers:DiTTransformer2DModel", "--kwargs", json.dumps(sizes), "--example",
                   "cli_models:diffusers_call", "--path", "discrete", *ONE_STEP)  # fmt: skip
    assert (found["student"], found["tokens"], found["noise_path"]) == ("transformer_blocks.1", [2, 16, 32], "discrete")
    assert found["gradient_in_blocks"] == [1, 2]


@pytest.mark.parametrize(("model", "options", "expected"), [
    ("frozen_first", ("--example", "cli_models:call", "--student", "2", "--teacher", "3"),
     {"frozen_parameters": 72, "teacher_bytes": 3 * 72 * 4, "gradient_in_blocks": [2]}),
    ("ambiguous_width", ("--example", "cli_models:call"),
     {"width": 8, "width_from": "a dry run: pass width= to SelfAlignment", "tokens": [2, 5, 8]}),
    ("ambiguous_width", ("--width", "8"), {"width": 8, "width_from": "--width"}),
    ("ambiguous_width", ("--example", "cli_models:call_in_thousandths", "--time-scale", "1000"), {"width": 8}),
    ("half", ("--input", "5,8", "--device", "cpu"), {"teacher_bytes": 4 * 72 * (2 + 4), "tokens": [2, 5, 8]}),
    ("InDict", ("--input", "5,8", "--path", "edm", "--student", "1"), {"noise_path": "edm", "student_layer": 1}),
    ("Chain", ("--input", "5,8", "--path", "discrete"), {"noise_path": "discrete", "depth": 4}),
    ("TwoLists", ("--blocks", "refiners", "--blocks", "blocks"), {"depth": 6, "student": "refiners.1", "teacher": "blocks.1"}),
])  # fmt: skip
def test_check_takes_what_it_is_told(report, model, options, expected):
    found = report("check", f"cli_models:{model}", *options, *ONE_STEP)
    assert {name: found[name] for name in expected} == expected


def test_what_a_model_prints_is_no_part_of_the_report(shown):
    _, out, errors = shown("check", "cli_models:frozen_first", "--json")
    assert json.loads(out)["model"] == "Chain of cli_models:frozen_first"
    assert errors == "building\n"


PROBLEMS = {
    "no blocks": (("cli_models:plain",), "The model must have exactly one list of alike blocks, or the caller names it. "
                  'Received: found none. Pass blocks="path.to.the.list"'),
    "several block lists": (("cli_models:TwoLists",), "Received: found 'blocks' (4 x Linear), 'refiners' (2 x Linear). Pass"),
    "a layer beyond the depth": (("cli_models:Chain", "--student", "2", "--teacher", "9"),
                                 "teacher_layer must be at most the model's depth. Received: layer 9 of 4 blocks."),
    "an unknown width": (("cli_models:ambiguous_width",), "The width of the tapped block must be known. Received: 'blocks.0'"),
    "a factory that raises": (("cli_models:raises",), "The factory must return a model. Received: RuntimeError: no weights on "
                              f"disk ({TESTS}/cli_models.py:"),
    "arguments that the factory lacks": (("cli_models:Chain", "--kwargs", '{"size": 3}'), "got an unexpected keyword argument"),
    "inputs that the model does not take": (("cli_models:Chain", "--input", "5,7"),
                                            "The model must take the inputs. Received: RuntimeError: mat1 and mat2"),
    "no tensor": (("cli_models:NoTensor", "--example", "cli_models:call"), "begins with one. Received: str. Wrap it"),
    "an example without time": (("cli_models:Chain", "--example", "cli_models:lone_sample"),
                                "a dict that begins with the sample and the time. Received: Tensor. Return the sample"),
    "an example of words": (("cli_models:Chain", "--example", "cli_models:words"), "Received: str, str. Return the sample"),
    "an example that raises": (("cli_models:Chain", "--example", "cli_models:raises"),
                               "--example must name a function without arguments. Received: RuntimeError: no weights"),
    "a time off the path": (("cli_models:Chain", "--example", "cli_models:call_in_thousandths"),
                            "t must lie in [0, 1]. Received: values from 250 to 750. The linear path counts time in [0, 1]: "
                            "check the model's time scale. Or pass --time-scale, or another --path."),
    "a gradient that is cut": (("cli_models:Parted", "--example", "cli_models:call", "--student", "2", "--teacher", "3"),
                               "none after it. Received: gradient in blocks [2] instead of [1, 2]. Look for detach()"),
    "a backward that fails": (("cli_models:NoBackward", "--example", "cli_models:call"), "no kernel for this backward"),
    "a device that is not there": (("cli_models:Chain", "--device", "abacus"), "--device must be one that torch has. Received: "
                                   "RuntimeError: Expected one of cpu"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_is_told_and_ends_in_1(shown, arguments, message):
    code, out, errors = shown("check", *arguments, "--json")
    assert code == 1
    assert message in json.loads(out)["error"]
    assert f"selfalign: {json.loads(out)['error']}\n" in errors


def test_what_was_found_before_a_problem_is_shown(shown):
    code, out, errors = shown("check", "cli_models:TwoLists")
    assert code == 1
    assert {"block_list blocks class", "blocks 4 Linear", "refiners 2 Linear"} <= set(lines(out))
    assert errors.startswith("selfalign: The model must have exactly one list")


def test_an_error_that_nobody_has_put_into_words_shows_where(shown):
    _, _, errors = shown("check", "cli_models:NoBackward", "--example", "cli_models:call")
    assert "Traceback" in errors
    assert "in _fails" in errors


USAGE = {
    "no colon": (("cli_models",), "is named like package.module:name or path/to/file.py:name. Received: 'cli_models'."),
    "no module": (("nowhere.at_all:model",), "The module must exist. Received: no module 'nowhere' from"),
    "no file": (("nowhere.py:model",), "The file must exist. Received: nowhere.py. Check the path."),
    "no such name": (("dit_models:DIT",), "after the colon. Received: dit_models without 'DIT'. It has: FlopCounterMode, Bl"),
    "no model": (("cli_models:a_number",), "MODEL must give a torch.nn.Module or a keras.Model. Received: int 3. Name a"),
    "a model of JAX": (("cli_models:OfJax",), "This command is for PyTorch and Keras models. Received: OfJax, a model of JAX. "
                       "docs/jax.md tells how features come out of it"),
    "arguments in no JSON": (("cli_models:Chain", "--kwargs", "depth=3"), "--kwargs must be a JSON object. Received: depth=3."),
    "a list of arguments": (("cli_models:Chain", "--kwargs", "[3]"), "--kwargs must be a JSON object. Received: [3]."),
    "an unknown preset": (("cli_models:Chain", "--preset", "UNet"), "A preset is named like \"SiT-XL/2\""),
    "layers in the wrong order": (("cli_models:Chain", "--student", "0.8"), "student_layer must come before teacher_layer."),
    "two kinds of inputs": (("cli_models:Chain", "--input", "4", "--example", "cli_models:call"),
                            "or from --example. Received: --example beside --input. Give one of the two, or neither."),
    "labels alone": (("cli_models:Chain", "--classes", "4"), "Received: --classes without --input."),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_ends_in_2(shown, arguments, message):
    code, out, errors = shown("check", *arguments)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not out or set(lines(out)) == {f"model {json.loads(shown('check', *arguments, '--json')[1])['model']}"}


@pytest.mark.parametrize(("body", "code", "message"), [
    ("import nowhere_at_all", 1, "The module must import. Received: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ("raise SystemExit('usage: train.py')", 1, "The module must import. Received: SystemExit: usage: train.py"),
    ("def model(:", 1, "The module must import. Received: SyntaxError: invalid syntax"),
    ("", 2, "It has: nothing to call."),
])  # fmt: skip
def test_a_file_that_does_not_import(shown, tmp_path, body, code, message):
    (tmp_path / "train.py").write_text(body)
    ended, _, errors = shown("check", f"{tmp_path}/train.py:model")
    assert ended == code
    assert message in errors


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_check_of_keras_models(report, shown):
    found = report("check", "keras_models:functional")
    assert found["block_lists"] == [{"block_list": "block_{}", "blocks": 6, "first": "block_1", "last": "block_6"}]
    assert (found["student"], found["teacher"], found["width"]) == ("block_2", "block_4", 16)
    assert found["training_steps"].startswith("none: of Keras models the layers are shown")
    assert report("check", "keras_models:subclassed", "--width", "16")["trained_parameters"] > 0
    code, _, errors = shown("check", "keras_models:functional", "--blocks", "stage_{}")
    assert code == 1
    assert "The backbone must have exactly one kind of numbered blocks, or the caller names it." in errors


# the command line itself


def test_an_interrupt_ends_quietly(shown):
    assert shown("check", "cli_models:interrupts", "--json") == (130, "", "")


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "the following arguments are required: COMMAND"),
    (("presets", "--recipe", "best"), "invalid choice: 'best'"),
    (("check", "m:f", "--student", "early"), "must be a block's number from 1, or a fraction of the depth. Received: 'early'."),
    (("check", "m:f", "--input", "4,0"), "It must be sizes such as 4,32,32. Received: '4,0'."),
    (("check", "m:f", "--repeat", "0"), "It must be a whole number from 1. Received: '0'."),
    (("check", "m:f", "--time-scale", "0"), "It must be a number above 0. Received: '0'."),
])  # fmt: skip
def test_arguments_that_cannot_be_read_end_in_2(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        cli.main(list(arguments))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [(), ("presets",), ("info",), ("check",)])
def test_help_has_examples_and_exit_codes(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert f"examples:\n  selfalign {command[0] if command else 'presets'}" in text
    assert "exit codes: 0 fine, 1 a problem was found, 2 wrong usage, 130 interrupted." in text


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "selfalign", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"selfalign {selfalign.__version__}\n", "")


def test_the_command_costs_an_import_of_selfalign_nothing():
    code = (
        "import sys, selfalign; print('selfalign.cli' in sys.modules, 'argparse' in sys.modules); import selfalign.cli; "
        "print(sorted({'torch', 'jax', 'keras', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False False", "[]"], done.stderr


def test_the_docs_show_what_the_command_shows(capsys):
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
    assert cli.main(["presets", "--recipe", "paper"]) == 0
    assert f"$ selfalign presets --recipe paper\n{capsys.readouterr().out}```" in page
