"""`selfalign check`: what is found in a model, what training steps show, and what goes wrong."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.only("torch")
TESTS = Path(__file__).parents[1]
ONE_STEP = ("--repeat", "1")


def test_check_of_a_dit(report):
    inputs = ("--input", "5,4", "--classes", "10", "--batch", "3")
    found = report("check", f"{TESTS}/dit_models.py:DiT", *inputs, *ONE_STEP)
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


def test_check_as_text(shown, lines):
    options = ("--kwargs", '{"depth": 12}', "--preset", "SiT-B/2")
    code, out, errors = shown("check", "dit_models:DiT", *options)
    assert (code, errors) == (0, "")
    assert {
        "model DiT of dit_models:DiT",
        "student layer 3",
        "teacher layer 8",
        "student blocks.2",
        "noise path linear",
        "training steps none: give --input or --example",
        "blocks 12 Block",
    } <= set(lines(out))


def test_check_of_a_class_of_diffusers(report):
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 6,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    options = ("--kwargs", json.dumps(sizes), "--example", "cli_models:diffusers_call")
    model = "diffusers:DiTTransformer2DModel"
    found = report("check", model, *options, "--path", "discrete", *ONE_STEP)
    assert (found["student"], found["tokens"]) == ("transformer_blocks.1", [2, 16, 32])
    assert found["noise_path"] == "discrete"
    assert found["gradient_in_blocks"] == [1, 2]


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (
            "frozen_first",
            ("--example", "cli_models:call", "--student", "2", "--teacher", "3"),
            {"frozen_parameters": 72, "teacher_bytes": 3 * 72 * 4, "gradient_in_blocks": [2]},
        ),
        (
            "ambiguous_width",
            ("--example", "cli_models:call"),
            {"width": 8, "width_from": "the first forward", "tokens": [2, 5, 8]},
        ),
        ("ambiguous_width", (), {"width": None, "width_from": "the first forward"}),
        ("ambiguous_width", ("--width", "8"), {"width": 8, "width_from": "--width"}),
        (
            "ambiguous_width",
            ("--example", "cli_models:call_in_thousandths", "--time-scale", "1000"),
            {"width": 8},
        ),
        (
            "half",
            ("--input", "5,8", "--device", "cpu"),
            {"teacher_bytes": 4 * 72 * (2 + 4), "tokens": [2, 5, 8]},
        ),
        (
            "InDict",
            ("--input", "5,8", "--path", "edm", "--student", "1"),
            {"noise_path": "edm", "student_layer": 1},
        ),
        ("Chain", ("--input", "5,8", "--path", "discrete"), {"noise_path": "discrete", "depth": 4}),
        (
            "TwoLists",
            ("--blocks", "refiners", "--blocks", "blocks"),
            {"depth": 6, "student": "refiners.1", "teacher": "blocks.1"},
        ),
    ],
)
def test_check_takes_what_it_is_told(report, model, options, expected):
    found = report("check", f"cli_models:{model}", *options, *ONE_STEP)
    assert {name: found[name] for name in expected} == expected


def test_what_a_model_prints_is_no_part_of_the_report(shown):
    _, out, errors = shown("check", "cli_models:frozen_first", "--json")
    assert json.loads(out)["model"] == "Chain of cli_models:frozen_first"
    assert errors == "building\n"


PROBLEMS = {
    "no blocks": (
        ("cli_models:plain",),
        "The model must have exactly one list of alike blocks, or the caller names it. "
        'Received: found none. Pass blocks="path.to.the.list"',
    ),
    "several block lists": (
        ("cli_models:TwoLists",),
        "Received: found 'blocks' (4 x Linear), 'refiners' (2 x Linear). Pass",
    ),
    "a layer beyond the depth": (
        ("cli_models:Chain", "--student", "2", "--teacher", "9"),
        "teacher_layer must be at most the model's depth. Received: layer 9 of 4 blocks.",
    ),
    "a factory that raises": (
        ("cli_models:raises",),
        "The factory must return a model. Received: RuntimeError: no weights on "
        f"disk ({TESTS}/cli_models.py:",
    ),
    "arguments that the factory lacks": (
        ("cli_models:Chain", "--kwargs", '{"size": 3}'),
        "got an unexpected keyword argument",
    ),
    "inputs that the model does not take": (
        ("cli_models:Chain", "--input", "5,7"),
        "The model must take the inputs. Received: RuntimeError: mat1 and mat2",
    ),
    "no tensor": (
        ("cli_models:NoTensor", "--example", "cli_models:call"),
        "begins with one. Received: str. Wrap it",
    ),
    "an example without time": (
        ("cli_models:Chain", "--example", "cli_models:lone_sample"),
        "a dict that begins with the sample and the time. Received: Tensor. Return the sample",
    ),
    "an example of words": (
        ("cli_models:Chain", "--example", "cli_models:words"),
        "Received: str, str. Return the sample",
    ),
    "an example that raises": (
        ("cli_models:Chain", "--example", "cli_models:raises"),
        "--example must name a function without arguments. Received: RuntimeError: no weights",
    ),
    "a time off the path": (
        ("cli_models:Chain", "--example", "cli_models:call_in_thousandths"),
        "t must lie in [0, 1]. Received: values from 250 to 750. The linear path counts time in "
        "[0, 1]: check the model's time scale. Or pass --time-scale, or another --path.",
    ),
    "a gradient that is cut": (
        ("cli_models:Parted", "--example", "cli_models:call", "--student", "2", "--teacher", "3"),
        "none after it. Received: gradient in blocks [2] instead of [1, 2]. Look for detach()",
    ),
    "a backward that fails": (
        ("cli_models:NoBackward", "--example", "cli_models:call"),
        "no kernel for this backward",
    ),
    "a device that is not there": (
        ("cli_models:Chain", "--device", "abacus"),
        "--device must be one that torch has. Received: RuntimeError: Expected one of cpu",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_is_told_and_ends_in_1(shown, arguments, message):
    code, out, errors = shown("check", *arguments, "--json")
    assert code == 1
    assert message in json.loads(out)["error"]
    assert f"selfalign: {json.loads(out)['error']}\n" in errors


def test_what_was_found_before_a_problem_is_shown(shown, lines):
    code, out, errors = shown("check", "cli_models:TwoLists")
    assert code == 1
    assert {"block_list blocks class", "blocks 4 Linear", "refiners 2 Linear"} <= set(lines(out))
    assert errors.startswith("selfalign: The model must have exactly one list")


def test_an_error_of_the_models_own_shows_where(shown):
    _, _, errors = shown("check", "cli_models:NoBackward", "--example", "cli_models:call")
    assert "Traceback" in errors
    assert "in _fails" in errors


USAGE = {
    "no colon": (
        ("cli_models",),
        "is named like package.module:name or path/to/file.py:name. Received: 'cli_models'.",
    ),
    "no module": (
        ("nowhere.at_all:model",),
        "The module must exist. Received: no module 'nowhere' from",
    ),
    "no file": (
        ("nowhere.py:model",),
        "The file must exist. Received: nowhere.py. Check the path.",
    ),
    "no such name": (
        ("dit_models:DIT",),
        "after the colon. Received: dit_models without 'DIT'. It has: ",
    ),
    "no model": (
        ("cli_models:a_number",),
        "MODEL must give a torch.nn.Module or a keras.Model. Received: int 3. Name a",
    ),
    "a model of JAX": (
        ("cli_models:OfJax",),
        "This command is for PyTorch and Keras models. Received: OfJax, a model of JAX. "
        "docs/jax.md tells how features come out of it",
    ),
    "arguments in no JSON": (
        ("cli_models:Chain", "--kwargs", "depth=3"),
        "--kwargs must be a JSON object. Received: depth=3.",
    ),
    "a list of arguments": (
        ("cli_models:Chain", "--kwargs", "[3]"),
        "--kwargs must be a JSON object. Received: [3].",
    ),
    "an unknown preset": (
        ("cli_models:Chain", "--preset", "UNet"),
        'A preset is named like "SiT-XL/2"',
    ),
    "layers in the wrong order": (
        ("cli_models:Chain", "--student", "0.8"),
        "student_layer must come before teacher_layer.",
    ),
    "two kinds of inputs": (
        ("cli_models:Chain", "--input", "4", "--example", "cli_models:call"),
        "or from --example. Received: --example beside --input. Give one of the two, or neither.",
    ),
    "labels alone": (
        ("cli_models:Chain", "--classes", "4"),
        "Received: --classes without --input.",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_ends_in_2(shown, lines, arguments, message):
    code, out, errors = shown("check", *arguments)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    if out:  # the model was built and is none: all that is known is what it is called
        model = json.loads(shown("check", *arguments, "--json")[1])["model"]
        assert lines(out) == [f"model {model}"]


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (
            "import nowhere_at_all",
            1,
            "The module must import. Received: ModuleNotFoundError: No module named 'nowhere_at",
        ),
        (
            "raise SystemExit('usage: train.py')",
            1,
            "The module must import. Received: SystemExit: usage: train.py",
        ),
        ("def model(:", 1, "The module must import. Received: SyntaxError: invalid syntax"),
        ("", 2, "It has: nothing to call."),
    ],
)
def test_a_file_that_does_not_import(shown, tmp_path, body, code, message):
    (tmp_path / "train.py").write_text(body)
    ended, _, errors = shown("check", f"{tmp_path}/train.py:model")
    assert ended == code
    assert message in errors


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_check_of_keras_models(report, shown):
    found = report("check", "keras_models:functional")
    assert found["block_lists"] == [
        {"block_list": "block_{}", "blocks": 6, "first": "block_1", "last": "block_6"}
    ]
    assert (found["student"], found["teacher"], found["width"]) == ("block_2", "block_4", 16)
    assert found["training_steps"].startswith("none: of Keras models the layers are shown")
    assert report("check", "keras_models:subclassed", "--width", "16")["trained_parameters"] > 0
    code, _, errors = shown("check", "keras_models:functional", "--blocks", "stage_{}")
    assert code == 1
    assert "The backbone must have exactly one kind of numbered blocks" in errors
