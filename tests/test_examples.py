"""The examples run as a user runs them: as scripts, in their short mode, in an empty folder.

What they refuse, and what two arms have in common, is looked at in this process: a script takes
seconds to start. Not so for JAX's examples: this process has Keras on torch.
"""

import gzip
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.only("torch")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import common  # noqa: E402
import torch_sit  # noqa: E402

# the examples that have a loop of their own, and what their checkpoints are called
TRAINING = {
    "torch_sit.py": "checkpoint.pt",
    "jax_nnx_sit.py": "checkpoint",
    "jax_linen_dit.py": "checkpoint.msgpack",
    "jax_equinox_sit.py": "checkpoint.eqx",
    "torch_diffusers_dit.py": "checkpoint.pt",
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")  # and how many

# warnings of others
WARNINGS = os.environ.get("PYTHONWARNINGS", "error")  # make test-lowest: no errors
KERAS_WARNINGS = ["__array__ implementation"]  # Keras's, under NumPy 2.4
LIGHTNING_WARNINGS = [
    "`isinstance(treespec, LeafSpec)` is deprecated",
    "Checkpoint directory",
    "The 'train_dataloader' does not have many workers",
]
OTHER_SETTINGS = "A run is resumed with the settings it began with. Received: others than"

# --------------------------------------------------------------------------------------------------
# Scripts


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """JAX compiles once per worker. Each has its folder: JAX does not write its cache at once."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.getbasetemp() / "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.fixture(autouse=True)
def backend_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts choose their Keras backend by themselves. One thread each; tables are not wrapped."""
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def children_in_cpu_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun starts knows nothing of -W; and there may be fewer GPUs than processes."""
    monkeypatch.setenv("PYTHONWARNINGS", WARNINGS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def command(*arguments: object) -> list[str]:
    """Of Python; warnings are errors, but those of others."""
    ignored = KERAS_WARNINGS + LIGHTNING_WARNINGS
    filters = [WARNINGS, *(f"ignore:{warning}" for warning in ignored)]
    options = [option for each in filters for option in ("-W", each)]
    return [sys.executable, *options, *map(str, arguments)]


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    whole = command(*arguments)
    return subprocess.run(whole, cwd=folder, capture_output=True, text=True, timeout=300)


def succeed(folder: Path, *arguments: object) -> str:
    """The output of a script that ends well."""
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


SEVERAL_RUNS = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import common
example = importlib.import_module(sys.argv[2])
for arguments in json.loads(sys.argv[3]):
    example.main(common.parse(example.PARSER, arguments))
"""


def succeed_in_turn(folder: Path, script: str, *runs: tuple[object, ...]) -> str:
    """The output of runs of one script after one another, in a process: frameworks start slowly."""
    texts = json.dumps([["--short", *map(str, arguments)] for arguments in runs])
    return succeed(folder, "-c", SEVERAL_RUNS, EXAMPLES, script.removesuffix(".py"), texts)


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(*arguments), cwd=folder, text=True, **pipes)


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


# --------------------------------------------------------------------------------------------------
# What scripts leave behind


def check_picture(file: Path, least: tuple[int, int] = (500, 500)) -> None:
    """A PNG of at least this (height, width) that is not of one colour."""
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert height >= least[0]
    assert width >= least[1]
    assert len(content) > 10_000  # an empty canvas of this size is far smaller


def check_same_pictures(folder: Path) -> None:
    first, second = (folder / name / "samples.png" for name in ("whole", "halves"))
    assert first.read_bytes() == second.read_bytes()


def check_equal(first: Any, second: Any, where: str = "checkpoint") -> None:
    """Equal to the last bit, tensors and all else."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            check_equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            check_equal(a, b, f"{where}.{index}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def load(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True, map_location="cpu")


SAME_ORBAX = """
import sys, numpy as np, jax, orbax.checkpoint as ocp
from pathlib import Path
def read(file):
    with ocp.StandardCheckpointer() as checkpointer:
        like = checkpointer.metadata(file).item_metadata.tree
        on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device)
        restored = checkpointer.restore(file, jax.tree.map(shape, like))
        return jax.tree_util.tree_leaves_with_path(restored)
first, second = (read(Path(file).absolute() / "state") for file in sys.argv[1:])
for (path, a), (other, b) in zip(first, second, strict=True):
    assert path == other and np.array_equal(a, b), path
print(len(first))
"""


def check_same_checkpoint(folder: Path, name: str) -> None:
    """PyTorch's and orbax's hold times and names: numbers are compared; the others' bytes."""
    first, second = (folder / part / name for part in ("whole", "halves"))
    if name.endswith(".pt"):
        check_equal(load(first), load(second))
        assert load(first)["step"] == 12
    elif first.is_dir():
        assert int(succeed(folder, "-c", SAME_ORBAX, first, second)) > 100
    else:
        assert len(first.read_bytes()) > 100_000
        assert first.read_bytes() == second.read_bytes()


def keras_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of a .keras file."""
    arrays: dict[str, np.ndarray] = {}

    def keep(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    weights = zipfile.ZipFile(file).read("model.weights.h5")
    with h5py.File(io.BytesIO(weights)) as opened:
        opened.visititems(keep)
    return arrays


# --------------------------------------------------------------------------------------------------
# Resuming


SHALLOW = ("--depth", 3)  # of four blocks: compilers have a quarter less to do


def whole_and_halves(first: int, last: int, *options: object) -> tuple[tuple[object, ...], ...]:
    """The arguments of an uninterrupted run, and of the same in two halves."""
    whole = (*options, "--steps", last, "--out", "whole")
    first_half = (*options, "--steps", first, "--out", "halves")
    second_half = (*options, "--steps", last, "--out", "halves", "--resume")
    return whole, first_half, second_half


SELDOM = ("jax_linen_dit.py", "jax_equinox_sit.py")  # resumed in the heavy run alone


@pytest.mark.parametrize(
    ("script", "checkpoint"),
    [
        pytest.param(*names, marks=pytest.mark.heavy if names[0] in SELDOM else [])
        for names in TRAINING.items()
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, script: str, checkpoint: str
) -> None:
    """The second half is a process of its own, as a user's is."""
    whole, first_half, second_half = whole_and_halves(5, 12, *SHALLOW)
    text = succeed_in_turn(tmp_path, script, whole, first_half)
    assert str(Path("whole") / "samples.png") in text
    check_picture(tmp_path / "whole" / "samples.png")
    succeed(tmp_path, EXAMPLES / script, "--short", *second_half)
    check_same_checkpoint(tmp_path, checkpoint)
    check_same_pictures(tmp_path)
    files = sorted(file.name for file in (tmp_path / "halves").iterdir())
    assert files == [checkpoint, "samples.png"]


@pytest.mark.parametrize("script", SELDOM)
def test_examples_train_and_draw(tmp_path: Path, script: str) -> None:
    whole, _, _ = whole_and_halves(5, 12, *SHALLOW)
    succeed(tmp_path, EXAMPLES / script, "--short", *whole)
    check_picture(tmp_path / "whole" / "samples.png")


@pytest.fixture
def one_thread() -> Any:
    """As the scripts have it: sums are the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torch_sit_run(*arguments: str) -> torch_sit.Run:
    settings = common.parse(torch_sit.PARSER, ["--short", *arguments])
    return torch_sit.Run(common.load_data(settings), settings)


@pytest.mark.heavy
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_resumed_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """Killed without warning, amid an epoch and past its last checkpoint."""
    example = (EXAMPLES / "torch_sit.py", "--short", "--out", "killed")
    process = start(tmp_path, *example, "--steps", 1_000_000, "--save-every", 3)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    wait_for(checkpoint, process)
    process.kill()
    process.communicate(timeout=30)
    steps = load(checkpoint)["step"] + 9
    succeed(tmp_path, *example, "--steps", steps, "--resume")

    whole = torch_sit_run("--steps", str(steps))
    assert len(list(torch_sit.train(whole))) == steps
    whole.save(tmp_path / "whole.pt")
    check_equal(load(tmp_path / "whole.pt"), load(checkpoint))


@pytest.mark.parametrize(
    "script", ["torch_sit.py", pytest.param("keras_dit.py", marks=pytest.mark.heavy)]
)
def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path: Path, script: str) -> None:
    example = (EXAMPLES / script, "--short", "--out", "stopped")
    process = start(tmp_path, *example, "--steps", 1_000_000, "--save-every", 5)
    checkpoint = tmp_path / "stopped" / TRAINING.get(script, "checkpoint.keras")
    wait_for(checkpoint, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1, errors
    assert "the same command with --resume continues" in errors
    step = int(errors.partition("Stopped at step ")[2].partition(";")[0])
    if script == "torch_sit.py":
        assert load(checkpoint)["step"] == step
    else:
        one_more = ("--steps", step + 1, "--save-every", 1)
        again = succeed(tmp_path, *example, "--resume", *one_more)
        assert f"Epoch {step + 1}/{step + 1}" in again


# --------------------------------------------------------------------------------------------------
# With and without SRA

BOTH_ARMS = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import common
example = importlib.import_module(sys.argv[2])
def parse(*more):
    return common.parse(example.PARSER, ["--short", "--steps", "3", *more])
def losses(*more):
    settings = parse(*more)
    run = example.Run(common.load_data(settings), settings)
    return [tuple(map(float, both)) for both in example.train(run)]
example.main(parse("--no-sra", "--guidance", "1.5"))
try:
    example.main(parse("--resume"))
except SystemExit as error:
    refused = str(error)
print(json.dumps({"aligned": losses(), "plain": losses("--no-sra"), "refused": refused}))
"""


@pytest.mark.heavy
@pytest.mark.parametrize("script", list(TRAINING)[1:])
def test_examples_train_without_sra_and_guide(tmp_path: Path, script: str) -> None:
    """Both arms start alike: SRA's draws are its own, and the first denoising loss is the same."""
    name = script.removesuffix(".py")
    output = succeed(tmp_path, "-c", BOTH_ARMS, EXAMPLES, name)
    check_picture(tmp_path / "runs" / name / "samples.png")
    found = json.loads(output.splitlines()[-1])
    check_arms(found["aligned"], found["plain"])
    assert f"{OTHER_SETTINGS} sra=False" in found["refused"]


def check_arms(aligned: list[list[float]], plain: list[list[float]]) -> None:
    """(denoising, alignment) of three steps."""
    assert aligned[0][0] == plain[0][0]
    assert all(alignment > 0 for _, alignment in aligned)
    assert all(alignment == 0 for _, alignment in plain)
    assert aligned[2][0] != plain[2][0]  # SRA moves the model


def test_both_arms_share_weights_batches_and_noise() -> None:
    arguments = ("--patch", "2")
    aligned = torch_sit_run(*arguments)
    plain = torch_sit_run(*arguments, "--no-sra")
    pairs = zip(aligned.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    first, _ = next(torch_sit.train(aligned))
    plain_first, _ = next(torch_sit.train(plain))
    assert first == plain_first  # same weights, batch, labels, noise, times
    assert torch.equal(aligned.draws.get_state(), plain.draws.get_state())


def test_the_plain_arm_resumes(tmp_path: Path) -> None:
    """Over 50 steps: past the end of an epoch."""
    arguments = ("--patch", "2", "--no-sra", "--steps", "51")
    plain = torch_sit_run(*arguments)
    training = torch_sit.train(plain)
    next(training)
    plain.save(tmp_path / "checkpoint.pt")
    resumed = torch_sit_run(*arguments)
    resumed.load(tmp_path / "checkpoint.pt")
    for both, both_resumed in zip(training, torch_sit.train(resumed), strict=True):
        assert both == both_resumed
    assert resumed.step == 51
    pairs = zip(plain.ema.parameters(), resumed.ema.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --------------------------------------------------------------------------------------------------
# Keras


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_both_arms_in_keras_start_alike() -> None:
    keras_dit = importlib.import_module("keras_dit")

    def fitted(*arguments: str) -> list[tuple[float, float]]:
        settings = common.parse(keras_dit.PARSER, ["--short", *arguments])
        data = common.load_data(settings)
        model = keras_dit.make_model(data, settings)
        batches = keras_dit.Batches(data, settings, model, count=1)
        history = model.fit(batches, epochs=3, shuffle=False, verbose=0).history
        return list(zip(history["denoising"], history["alignment"], strict=True))

    check_arms(fitted(), fitted("--no-sra"))


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.heavy)])
def test_keras_runs_and_resumes_bit_for_bit(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", backend)
    whole, first_half, second_half = whole_and_halves(4, 8, *SHALLOW, "--save-every", 4)
    succeed_in_turn(tmp_path, "keras_dit.py", whole, first_half)
    succeed(tmp_path, EXAMPLES / "keras_dit.py", "--short", *second_half, "--guidance", 1.5)
    first, second = (
        keras_arrays(tmp_path / name / "checkpoint.keras") for name in ("whole", "halves")
    )
    assert len(first) > 100
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    check_picture(tmp_path / "halves" / "samples.png")

    keras_dit = importlib.import_module("keras_dit")
    out = str(tmp_path / "halves")
    arguments = ["--short", *map(str, SHALLOW), "--out", out, "--resume"]
    with pytest.raises(SystemExit, match=f"{OTHER_SETTINGS} sra=True"):
        keras_dit.main(common.parse(keras_dit.PARSER, [*arguments, "--no-sra"]))
    (tmp_path / "halves" / "checkpoint.json").unlink()
    with pytest.raises(SystemExit, match=r"has its settings beside it\. Received: no file"):
        keras_dit.main(common.parse(keras_dit.PARSER, arguments))


# --------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.usefixtures("children_in_cpu_processes")
def test_ddp_resumes_bit_for_bit(tmp_path: Path) -> None:
    example = (*TORCHRUN, 2, EXAMPLES / "torch_ddp.py", "--short")
    text = succeed(tmp_path, *example, "--steps", 12, "--out", "whole")
    assert text.count("step 12: denoising") == 1  # the first process speaks for all
    assert text.count("samples.png") == 1
    check_picture(tmp_path / "whole" / "samples.png")
    succeed(tmp_path, *example, "--steps", 5, "--out", "halves")
    succeed(tmp_path, *example, "--steps", 12, "--out", "halves", "--resume")
    check_same_checkpoint(tmp_path, "checkpoint.pt")
    check_same_pictures(tmp_path)


@pytest.mark.usefixtures("children_in_cpu_processes")
def test_ddp_refuses_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, *TORCHRUN, 1, EXAMPLES / "torch_ddp.py", "--short", "--resume")
    assert done.returncode != 0
    assert "error: --resume needs a checkpoint" in done.stderr

    torch_ddp = importlib.import_module("torch_ddp")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit, match=r"torchrun starts the processes\. Received: plain"):
        torch_ddp.join_processes()
    monkeypatch.setattr(torch_ddp.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch_ddp.distributed, "get_world_size", lambda: 3)
    settings = common.parse(torch_ddp.PARSER, ["--short", "--batch-size", "32"])
    with pytest.raises(SystemExit, match="Received: --batch-size 32 for 3 processes"):
        torch_ddp.main(settings, torch.device("cpu"))


def test_accelerate_resumes_with_accumulation_in_bfloat16(tmp_path: Path) -> None:
    options = ("--accumulate", 2, "--mixed-precision", "bf16")
    succeed_in_turn(tmp_path, "torch_accelerate.py", *whole_and_halves(3, 8, *options))
    check_picture(tmp_path / "whole" / "samples.png")
    align = load(tmp_path / "whole" / "checkpoint" / "custom_checkpoint_0.pkl")
    assert align["step"] == 8  # of the EMA: not per micro-batch
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "run.json"):
        first, second = (tmp_path / part / "checkpoint" / name for part in ("whole", "halves"))
        assert first.read_bytes() == second.read_bytes(), name
    files = sorted(file.name for file in (tmp_path / "halves").iterdir())
    assert files == ["checkpoint", "samples.png"]


@pytest.mark.heavy
@pytest.mark.usefixtures("children_in_cpu_processes")
def test_accelerate_runs_in_several_processes_and_without_sra(tmp_path: Path) -> None:
    example = (EXAMPLES / "torch_accelerate.py", "--short", "--steps", 4)
    succeed(tmp_path, *TORCHRUN, 2, *example, "--accumulate", 2, "--out", "two")
    check_picture(tmp_path / "two" / "samples.png")
    other = run(tmp_path, *example, "--accumulate", 2, "--out", "two", "--resume")
    assert other.returncode != 0
    assert f"{OTHER_SETTINGS} processes=2 in the checkpoint" in other.stderr
    assert "SRA 0.000" in succeed(tmp_path, *example, "--no-sra", "--guidance", 1.5)


# --------------------------------------------------------------------------------------------------
# Lightning


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    succeed_in_turn(tmp_path, "lightning_sit.py", *whole_and_halves(3, 8, "--accumulate", 2))
    check_picture(tmp_path / "whole" / "samples.png")
    first, second = (load(tmp_path / part / "checkpoint.ckpt") for part in ("whole", "halves"))
    for name in ("state_dict", "optimizer_states", "align", "settings", "global_step"):
        check_equal(first[name], second[name], name)  # beside them are Lightning's own counters
    assert not any("teacher" in name for name in first["state_dict"])
    assert any("projector" in name for name in first["state_dict"])
    assert first["align"]["step"] == 8  # of the teacher: not per micro-batch
    check_same_pictures(tmp_path)


@pytest.mark.heavy
@pytest.mark.filterwarnings(*(f"ignore:{re.escape(warning)}" for warning in LIGHTNING_WARNINGS))
def test_lightning_runs_without_sra_and_refuses_other_settings(tmp_path: Path) -> None:
    example = (EXAMPLES / "lightning_sit.py", "--short")
    options = ("--steps", 4, "--no-sra", "--guidance", 1.5)
    succeed(tmp_path, *example, *options, "--out", "plain")
    check_picture(tmp_path / "plain" / "samples.png")

    lightning_sit = importlib.import_module("lightning_sit")
    arguments = ["--short", "--out", str(tmp_path / "plain"), "--resume"]
    with pytest.raises(SystemExit, match=f"{OTHER_SETTINGS} sra=False"):
        lightning_sit.main(common.parse(lightning_sit.PARSER, arguments))
    uneven = ["--short", "--out", str(tmp_path), "--accumulate", "5"]
    with pytest.raises(SystemExit, match="Received: --batch-size 32 for 5 parts"):
        lightning_sit.main(common.parse(lightning_sit.PARSER, uneven))


# --------------------------------------------------------------------------------------------------
# Other data, and errors


def write_images(folder: Path) -> None:
    from PIL import Image

    draws = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = draws.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def write_idx(folder: Path) -> None:
    draws = np.random.default_rng(0)
    folder.mkdir()
    for part in ("train", "t10k"):
        images = draws.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        labels = np.arange(40, dtype=np.uint8) % 10
        for name, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            content = gzip.compress(bytes(header) + values.tobytes())
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(content)


def torch_sit_main(*arguments: str) -> None:
    torch_sit.main(common.parse(torch_sit.PARSER, list(arguments)))


@pytest.mark.parametrize("kind", ["folder", "fashion-mnist"])
def test_torch_sit_reads_other_data(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "folder":
        write_images(tmp_path / "images")
        data = ["images", "--image-size", "16"]
    else:
        write_idx(tmp_path / "images")
        data = ["fashion-mnist", "--data-dir", "images"]
    torch_sit_main("--short", "--steps", "3", "--guidance", "1.5", "--data", *data)
    check_picture(tmp_path / "runs" / "torch_sit" / "samples.png", least=(100, 500))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data mnits", "--data must be digits, fashion-mnist, or a folder of images"),
        ("--data .", r"one subfolder per class, and ten images at least. Received: \. with 0 ima"),
        ("--data fashion-mnist --data-dir nowhere", "Debian package dataset-fashion-mnist"),
        ("--resume", "--resume needs a checkpoint"),
        ("--short --patch 3", "The patch must divide the side"),
        ("--short --student-layer 9", "student_layer must be at most the model.s depth"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(
    tmp_path: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        torch_sit_main(*arguments.split())
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_of_a_script_has_no_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, EXAMPLES / "torch_sit.py", "--resume")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --resume needs a checkpoint. Received: no file")
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------
# The demo

METRICS = (
    "Linear probe, block 1 (student's)",
    "Linear probe, block 3 (teacher's)",
    "Held-out denoising loss",
    "Frechet distance (judge features)",
    "Judge's accuracy on samples",
    "Distance to nearest training image",
)
VERDICTS = ("better with SRA", "worse with SRA", "lower", "higher", "spread")


@pytest.mark.heavy
def test_the_demo_prints_its_metrics_and_draws_its_picture(tmp_path: Path) -> None:
    text = succeed(tmp_path, EXAMPLES / "demo.py", "--short")
    for name in METRICS:
        row, sentence = (line for line in text.splitlines() if name in line)
        assert row.count("±") == 3, name  # each arm, and their difference
        assert any(verdict in sentence for verdict in VERDICTS), name
    assert "Time per training step" in text
    assert "FID" not in text
    assert str(Path("runs") / "demo" / "demo.png") in text
    check_picture(tmp_path / "runs" / "demo" / "demo.png", least=(900, 1400))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 1 1", "seeds must differ. Received: 600, [1, 1]"),
        ("--layers 8", "unrecognized arguments: --layers"),
    ],
)
def test_the_demo_refuses_in_a_sentence(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    demo = importlib.import_module("demo")
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert message in capsys.readouterr().err
