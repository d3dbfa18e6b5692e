"""The examples run as a user runs them: as scripts, in their short mode, in an empty folder."""

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# the examples that train, and what their checkpoints are called
TRAINING = {
    "torch_sit.py": "checkpoint.pt",
    "jax_nnx_sit.py": "checkpoint",
    "jax_linen_dit.py": "checkpoint.msgpack",
    "jax_equinox_sit.py": "checkpoint.eqx",
    "torch_diffusers_dit.py": "checkpoint.pt",
}
METRICS = (
    "Linear probe, block 1 (student's)",
    "Linear probe, block 3 (teacher's)",
    "Held-out denoising loss",
    "Frechet distance (judge features)",
    "Judge's accuracy on samples",
    "Distance to nearest training image",
)
SAME = """
import sys, torch
def compare(a, b, where):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            compare(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            compare(x, y, f"{where}.{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where
first, second = (torch.load(file, weights_only=True) for file in sys.argv[1:])
compare(first, second, "checkpoint")
print("step", first["step"], "tensors", len(first["model"]))
"""
SAME_ORBAX = """
import sys, numpy as np, jax, orbax.checkpoint as ocp
from pathlib import Path
def read(file):
    with ocp.StandardCheckpointer() as checkpointer:
        like = checkpointer.metadata(file).item_metadata.tree
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like)
        return jax.tree_util.tree_leaves_with_path(checkpointer.restore(file, like))
first, second = (read(Path(file).absolute() / "state") for file in sys.argv[1:])
for (path, a), (other, b) in zip(first, second, strict=True):
    assert path == other and np.array_equal(a, b), path
print(len(first))
"""
PAIRED_ARMS = """
import sys, importlib
sys.path.insert(0, sys.argv[1])
import common
example = importlib.import_module(sys.argv[2])
def losses(*more):
    settings = common.parse(common.command_line(None, "paired"), ["--short", *more])
    run = example.Run(common.load_data(settings), settings)
    return [tuple(map(float, run.training_step())) for _ in range(3)]
aligned, plain = losses(), losses("--no-sra")
assert aligned[0][0] == plain[0][0] and aligned[0][1] > 0 and plain[0][1] == 0, (aligned, plain)
assert aligned[2][0] != plain[2][0]  # SRA moves the model
print("paired")
"""
PAIRED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import common, torch_sit
def start(*more):
    settings = common.parse(torch_sit.PARSER, ["--short", "--patch", "2", *more])
    return torch_sit.Run(common.load_data(settings), settings)
aligned, plain, resumed = start(), start("--no-sra"), start("--no-sra")
for a, b in zip(aligned.model.parameters(), plain.model.parameters(), strict=True):
    assert torch.equal(a, b)
assert aligned.training_step()[0] == plain.training_step()[0]  # same weights, batch, labels, noise, times: same loss
assert torch.equal(aligned.draws.get_state(), plain.draws.get_state())
assert (aligned.chosen() == plain.chosen()).all()
file = Path("checkpoint.pt")
plain.save(file)
resumed.load(file)
for _ in range(50):  # past the end of an epoch
    assert plain.training_step()[0] == resumed.training_step()[0]
for a, b in zip(plain.ema.parameters(), resumed.ema.parameters(), strict=True):
    assert torch.equal(a, b)
print("paired")
"""


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """JAX compiles once per worker: a folder for each, since JAX does not write its cache at once."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.getbasetemp() / "jax")
    os.environ["JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Wide enough for a table without wrapped names, one thread, and no Keras backend but the example's own."""
    kept = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    return kept | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=110)


def succeed(folder: Path, *arguments: object) -> str:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_picture(file: Path, least: tuple[int, int]) -> None:
    """A PNG of at least this (height, width) that is not of one colour."""
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert height >= least[0]
    assert width >= least[1]
    assert len(content) > 10_000  # an empty canvas of this size is far smaller


def write_images(folder: Path) -> None:
    from PIL import Image

    draws = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(draws.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")


def write_idx(folder: Path) -> None:
    draws = np.random.default_rng(0)
    folder.mkdir()
    for part in ("train", "t10k"):
        images, labels = draws.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))


SAME_H5 = """
import io, sys, zipfile, h5py, numpy as np
def arrays(file):
    found = {}
    with h5py.File(io.BytesIO(zipfile.ZipFile(file).read("model.weights.h5"))) as weights:
        weights.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found
first, second = map(arrays, sys.argv[1:])
assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
print(len(first))
"""


KERAS = ("-W", "ignore:__array__ implementation")  # Keras's, under NumPy 2.4
PAIRED_KERAS = """
import sys
sys.path.insert(0, sys.argv[1])
import common, keras_dit
def fitted(*more):
    settings = common.parse(keras_dit.PARSER, ["--short", *more])
    run = keras_dit.Run(common.load_data(settings), settings)
    history = run.model.fit(keras_dit.Batches(run, 1), epochs=3, shuffle=False, verbose=0).history
    return history["denoising"], history["alignment"]
aligned, plain = fitted(), fitted("--no-sra")
assert aligned[0][0] == plain[0][0] and min(aligned[1]) > 0 and plain[1] == [0, 0, 0], (aligned, plain)
assert aligned[0][2] != plain[0][2]  # SRA moves the model
print("paired")
"""


def test_both_arms_in_keras_start_alike(tmp_path: Path) -> None:
    assert succeed(tmp_path, *KERAS, "-c", PAIRED_KERAS, EXAMPLES) == "paired\n"


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_runs_and_resumes_bit_for_bit(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = (*KERAS, EXAMPLES / "keras_dit.py")
    kept = environment() | {"KERAS_BACKEND": backend}
    monkeypatch.setattr(sys.modules[__name__], "environment", lambda: kept)
    succeed(tmp_path, *example, "--short", "--steps", 8, "--save-every", 4, "--out", "whole")
    succeed(tmp_path, *example, "--short", "--steps", 4, "--save-every", 4, "--out", "halves")
    succeed(tmp_path, *example, "--short", "--steps", 8, "--save-every", 4, "--out", "halves", "--resume", "--guidance", 1.5)
    assert int(succeed(tmp_path, "-c", SAME_H5, "whole/checkpoint.keras", "halves/checkpoint.keras")) > 100
    check_picture(tmp_path / "halves" / "samples.png", (500, 500))
    other = run(tmp_path, *example, "--short", "--out", "halves", "--resume", "--no-sra")
    assert "resumed with the settings it began with. Received: others than sra=True" in other.stderr
    assert other.returncode != 0
    (tmp_path / "halves" / "checkpoint.json").unlink()
    bare = run(tmp_path, *example, "--short", "--out", "halves", "--resume")
    assert "A checkpoint has its settings beside it. Received: no file" in bare.stderr
    assert bare.returncode != 0


def same_checkpoint(folder: Path, *files: str) -> None:
    """PyTorch's and orbax's checkpoints hold times and names: their numbers are compared; the others byte by byte."""
    if files[0].endswith(".pt"):
        assert "step 12" in succeed(folder, "-c", SAME, *files)
    elif (folder / files[0]).is_dir():
        assert int(succeed(folder, "-c", SAME_ORBAX, *files)) > 100
    else:
        first, second = ((folder / file).read_bytes() for file in files)
        assert len(first) > 100_000
        assert first == second


@pytest.mark.parametrize(("script", "checkpoint"), TRAINING.items())
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, script: str, checkpoint: str) -> None:
    example = EXAMPLES / script
    text = succeed(tmp_path, example, "--short", "--steps", 12, "--out", "whole")
    assert str(Path("whole") / "samples.png") in text
    check_picture(tmp_path / "whole" / "samples.png", (500, 500))
    succeed(tmp_path, example, "--short", "--steps", 5, "--out", "halves")
    succeed(tmp_path, example, "--short", "--steps", 12, "--out", "halves", "--resume")
    same_checkpoint(tmp_path, f"whole/{checkpoint}", f"halves/{checkpoint}")
    assert (tmp_path / "whole" / "samples.png").read_bytes() == (tmp_path / "halves" / "samples.png").read_bytes()
    assert sorted(file.name for file in (tmp_path / "halves").iterdir()) == [checkpoint, "samples.png"]

    other = run(tmp_path, example, "--short", "--out", "halves", "--resume", "--no-sra")
    assert other.returncode != 0
    assert "resumed with the settings it began with. Received: others than sra=True" in other.stderr


@pytest.mark.parametrize("script", list(TRAINING)[1:])
def test_examples_train_without_sra_and_guide(tmp_path: Path, script: str) -> None:
    """The arm to compare with starts alike: SRA's draws are its own, and the denoising loss of the first step is the same."""
    succeed(tmp_path, EXAMPLES / script, "--short", "--steps", 3, "--no-sra", "--guidance", 1.5)
    check_picture(tmp_path / "runs" / script.removesuffix(".py") / "samples.png", (500, 500))
    assert succeed(tmp_path, "-c", PAIRED_ARMS, EXAMPLES, script.removesuffix(".py")) == "paired\n"


def test_both_arms_share_weights_batches_and_noise_and_the_plain_arm_resumes(tmp_path: Path) -> None:
    assert succeed(tmp_path, "-c", PAIRED, EXAMPLES) == "paired\n"


@pytest.mark.parametrize("script", ["torch_sit.py", "keras_dit.py"])
def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path: Path, script: str) -> None:
    example = (*KERAS, EXAMPLES / script, "--short", "--out", "stopped")
    arguments = ("--steps", 1_000_000, "--save-every", 5)
    process = subprocess.Popen(command(*example, *arguments), cwd=tmp_path, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    checkpoint = wait_for(tmp_path / "stopped" / TRAINING.get(script, "checkpoint.keras"), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1, errors
    assert "the same command with --resume continues" in errors
    step = int(errors.partition("Stopped at step ")[2].partition(";")[0])
    if script == "torch_sit.py":
        assert f"step {step} " in succeed(tmp_path, "-c", SAME, checkpoint, checkpoint)
    else:
        again = succeed(tmp_path, *example, "--resume", "--steps", step + 1, "--save-every", 1)
        assert f"Epoch {step + 1}/{step + 1}" in again


@pytest.mark.parametrize("script", ["torch_sit.py"])
def test_a_killed_run_resumed_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, script: str) -> None:
    """Killed without warning, amid an epoch and past its last checkpoint."""
    example, checkpoint = EXAMPLES / script, TRAINING[script]
    process = subprocess.Popen(command(example, "--short", "--steps", 1_000_000, "--save-every", 3, "--out", "killed"),
                               cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    wait_for(tmp_path / "killed" / checkpoint, process)
    process.kill()
    process.communicate(timeout=30)
    step = int(succeed(tmp_path, "-c", SAME, f"killed/{checkpoint}", f"killed/{checkpoint}").split()[1])
    succeed(tmp_path, example, "--short", "--steps", step + 9, "--out", "killed", "--resume")
    succeed(tmp_path, example, "--short", "--steps", step + 9, "--out", "whole")
    assert f"step {step + 9} " in succeed(tmp_path, "-c", SAME, f"whole/{checkpoint}", f"killed/{checkpoint}")


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")  # for as many processes as follow
LIGHTNING = ("-W", "ignore:`isinstance(treespec, LeafSpec)` is deprecated", "-W", "ignore:Checkpoint directory",
             "-W", "ignore:The 'train_dataloader' does not have many workers")  # fmt: skip
SAME_LIGHTNING = """
for name in ("state_dict", "optimizer_states", "align", "settings", "global_step"):  # beside Lightning's counters of epochs
    compare(first[name], second[name], name)
assert not any("teacher" in name for name in first["state_dict"])
assert any("projector" in name for name in first["state_dict"])
print("step", first["align"]["step"])
"""
SAME_LIGHTNING = SAME.partition("compare(first, second")[0] + SAME_LIGHTNING


@pytest.fixture
def children_in_cpu_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun starts knows nothing of -W; and there may be fewer GPUs than processes."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.usefixtures("children_in_cpu_processes")
def test_ddp_resumes_bit_for_bit(tmp_path: Path) -> None:
    example = (*TORCHRUN, 2, EXAMPLES / "torch_ddp.py", "--short")
    text = succeed(tmp_path, *example, "--steps", 12, "--out", "whole")
    assert text.count("step 12: denoising") == text.count("samples.png") == 1  # the first process speaks for all
    check_picture(tmp_path / "whole" / "samples.png", (500, 500))
    succeed(tmp_path, *example, "--steps", 5, "--out", "halves")
    succeed(tmp_path, *example, "--steps", 12, "--out", "halves", "--resume")
    same_checkpoint(tmp_path, "whole/checkpoint.pt", "halves/checkpoint.pt")
    assert (tmp_path / "whole" / "samples.png").read_bytes() == (tmp_path / "halves" / "samples.png").read_bytes()


@pytest.mark.usefixtures("children_in_cpu_processes")
@pytest.mark.parametrize(
    ("processes", "arguments", "text"),
    [
        (0, [], "torchrun starts the processes. Received: plain python."),
        (1, ["--batch-size", "32", "--resume"], "--resume needs a checkpoint"),
        (3, ["--batch-size", "32"], "equal shares of a batch. Received: --batch-size 32 for 3 processes"),
    ],
)
def test_ddp_refuses_in_a_sentence(tmp_path: Path, processes: int, arguments: list[str], text: str) -> None:
    done = run(tmp_path, *((*TORCHRUN, processes) if processes else ()), EXAMPLES / "torch_ddp.py", "--short", *arguments)
    assert done.returncode != 0
    assert text in done.stderr


def test_accelerate_resumes_with_accumulation_in_bfloat16(tmp_path: Path) -> None:
    example = (EXAMPLES / "torch_accelerate.py", "--short", "--accumulate", 2, "--mixed-precision", "bf16")
    succeed(tmp_path, *example, "--steps", 8, "--out", "whole")
    check_picture(tmp_path / "whole" / "samples.png", (500, 500))
    succeed(tmp_path, *example, "--steps", 3, "--out", "halves")
    succeed(tmp_path, *example, "--steps", 8, "--out", "halves", "--resume")
    step = "import sys, torch; print(torch.load(sys.argv[1], weights_only=True)['step'])"
    assert succeed(tmp_path, "-c", step, "whole/checkpoint/custom_checkpoint_0.pkl") == "8\n"  # EMA: not per micro-batch
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "run.json"):
        first, second = ((tmp_path / folder / "checkpoint" / name).read_bytes() for folder in ("whole", "halves"))
        assert first == second, name
    assert sorted(file.name for file in (tmp_path / "halves").iterdir()) == ["checkpoint", "samples.png"]


@pytest.mark.usefixtures("children_in_cpu_processes")
def test_accelerate_runs_in_several_processes_and_without_sra(tmp_path: Path) -> None:
    example = (EXAMPLES / "torch_accelerate.py", "--short", "--steps", 4)
    succeed(tmp_path, *TORCHRUN, 2, *example, "--accumulate", 2, "--out", "two")
    check_picture(tmp_path / "two" / "samples.png", (500, 500))
    other = run(tmp_path, *example, "--accumulate", 2, "--out", "two", "--resume")
    assert "others than processes=2 in the checkpoint" in other.stderr
    assert "SRA 0.000" in succeed(tmp_path, *example, "--no-sra", "--guidance", 1.5)


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    example = (*LIGHTNING, EXAMPLES / "lightning_sit.py", "--short", "--accumulate", 2)
    succeed(tmp_path, *example, "--steps", 8, "--out", "whole")
    check_picture(tmp_path / "whole" / "samples.png", (500, 500))
    succeed(tmp_path, *example, "--steps", 3, "--out", "halves")
    succeed(tmp_path, *example, "--steps", 8, "--out", "halves", "--resume")
    files = ("whole/checkpoint.ckpt", "halves/checkpoint.ckpt")
    assert succeed(tmp_path, "-c", SAME_LIGHTNING, *files) == "step 8\n"  # of the teacher: not per micro-batch
    assert (tmp_path / "whole" / "samples.png").read_bytes() == (tmp_path / "halves" / "samples.png").read_bytes()


def test_lightning_runs_without_sra_and_refuses_other_settings(tmp_path: Path) -> None:
    example = (*LIGHTNING, EXAMPLES / "lightning_sit.py", "--short")
    succeed(tmp_path, *example, "--steps", 4, "--no-sra", "--guidance", 1.5, "--out", "plain")
    check_picture(tmp_path / "plain" / "samples.png", (500, 500))
    other = run(tmp_path, *example, "--out", "plain", "--resume")
    assert "resumed with the settings it began with. Received: others than sra=False" in other.stderr
    assert "Traceback" not in other.stderr


def wait_for(file: Path, process: subprocess.Popen) -> Path:
    deadline = time.monotonic() + 60
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return file


@pytest.mark.parametrize("kind", ["folder", "fashion-mnist"])
def test_torch_sit_reads_other_data(tmp_path: Path, kind: str) -> None:
    (write_images if kind == "folder" else write_idx)(tmp_path / "images")
    data = ("images", "--image-size", 16) if kind == "folder" else ("fashion-mnist", "--data-dir", "images")
    succeed(tmp_path, EXAMPLES / "torch_sit.py", "--short", "--steps", 3, "--guidance", 1.5, "--data", *data)
    check_picture(tmp_path / "runs" / "torch_sit" / "samples.png", (100, 500))


@pytest.mark.parametrize(
    ("script", "arguments", "text"),
    [
        ("torch_sit.py", ["--data", "mnits"], "--data must be digits, fashion-mnist, or a folder of images"),
        ("torch_sit.py", ["--data", "."], "one subfolder per class, and ten images at least. Received: . with 0 images"),
        ("torch_sit.py", ["--data", "fashion-mnist", "--data-dir", "nowhere"], "Debian package dataset-fashion-mnist"),
        ("torch_sit.py", ["--resume"], "--resume needs a checkpoint"),
        ("torch_sit.py", ["--short", "--patch", "3"], "The patch must divide the side"),
        ("demo.py", ["--seeds", "1", "1"], "seeds must differ. Received: 600, [1, 1]"),
        ("demo.py", ["--layers", "8"], "unrecognized arguments: --layers"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(tmp_path: Path, script: str, arguments: list[str], text: str) -> None:
    done = run(tmp_path, EXAMPLES / script, *arguments)
    assert done.returncode != 0
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_prints_its_metrics_and_draws_its_picture(tmp_path: Path) -> None:
    text = succeed(tmp_path, EXAMPLES / "demo.py", "--short")
    rows = {name: [line for line in text.splitlines() if name in line] for name in METRICS}
    for name, (row, sentence) in rows.items():
        assert row.count("±") == 3, name  # each arm, and their difference
        assert any(word in sentence for word in ("better with SRA", "worse with SRA", "lower", "higher", "spread")), name
    assert "Time per training step" in text
    assert "FID" not in text
    assert str(Path("runs") / "demo" / "demo.png") in text
    check_picture(tmp_path / "runs" / "demo" / "demo.png", (900, 1400))
