"""What importing selfalign costs and imports, and which backend it chooses then.

Each test runs in a process of its own.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

TORCH = "import torch; x = torch.ones(2, 3, 4)\n"
JAX = "import jax; y = jax.numpy.ones((2, 3, 4))\n"
NUMPY = "import numpy; z = numpy.ones((2, 3, 4), 'float32')\n"
LOSS = "import selfalign; loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)\n"
REPORT = """
import sys
print(sys.modules["keras"].backend.backend(), type(term).__module__.partition(".")[0])
"""
FRAMEWORKS = """
import sys
frameworks = {"torch", "jax", "jaxlib", "keras", "tensorflow", "numpy"}
print(sorted({name.partition(".")[0] for name in sys.modules} & frameworks))
"""


def python(code, folder, backend=None, options=()):
    """Run `code` in a fresh interpreter in `folder`, with KERAS_BACKEND as given.

    Returns what it printed, and its errors.
    """
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    if backend:
        environment["KERAS_BACKEND"] = backend
    environment["KERAS_HOME"] = str(folder)  # no settings file of the user's decides
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.strip(), done.stderr.strip()


def test_importing_selfalign_imports_no_framework(tmp_path):
    printed, errors = python("import selfalign\n" + FRAMEWORKS, tmp_path)
    assert (printed, errors) == ("[]", "")


def test_importing_the_diagnostics_imports_neither_a_framework_nor_what_they_may_need(tmp_path):
    code = (
        "import sys, selfalign.diagnostics\n"
        "print(sorted({'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)))\n"
    )
    printed, errors = python(code + FRAMEWORKS, tmp_path)
    assert (printed, errors) == ("[]\n['numpy']", "")


SETTINGS = """
import selfalign
from selfalign import adapting
losses = [
    selfalign.SRALoss.preset("DiT-B/2", recipe="paper"),
    selfalign.LayerSyncLoss.preset("SiT-L/2"),
    selfalign.REPALoss.preset("SiT-XL/2"),
]
for loss in losses:
    loss.weight_at(5004 * 400), loss.layers(28), loss.source, loss.head
    assert selfalign.objectives.from_settings(loss.settings()) == loss
objectives = adapting.named_objectives(losses)
adapting.shared_teacher(objectives).decay_at(3)
adapting.head_shapes(losses[2], 384)
"""


def test_settings_need_no_framework(tmp_path):
    printed, errors = python(SETTINGS + FRAMEWORKS, tmp_path)
    assert (printed, errors) == ("[]", "")


def test_the_check_for_frameworks_can_fail(tmp_path):
    printed, errors = python("import selfalign, numpy\n" + FRAMEWORKS, tmp_path)
    assert (printed, errors) == ("['numpy']", "")


def test_importing_selfalign_takes_less_than_50_ms(tmp_path):
    """Of processor time, which other programs do not lengthen as they do the clock's."""
    code = "import time\nbegin = time.process_time()\nimport selfalign\nend = time.process_time()\n"

    def seconds():
        return float(python(code + "print(end - begin)", tmp_path)[0])

    assert any(0 < seconds() < 0.05 for _ in range(5))


CHOICES = {
    # which KERAS_BACKEND, what runs, the backend it ends on and the framework of the result
    "numpy": {
        "NumPy arrays alone": (None, NUMPY + LOSS + "term = loss(z, z + 1)\n", "numpy numpy"),
        "NumPy arrays where KERAS_BACKEND says jax": (
            "jax",
            NUMPY + LOSS + "term = loss(z, z + 1)\n",
            "jax jaxlib",
        ),
    },
    "torch": {
        "a torch tensor, with jax imported too": (
            None,
            "import jax\n" + TORCH + LOSS + "term = loss(x, x + 1)\n",
            "torch torch",
        ),
        "NumPy arrays, with torch imported": (
            None,
            "import torch\n" + NUMPY + LOSS + "term = loss(z, z + 1)\n",
            "torch torch",
        ),
        "nested tensors where KERAS_BACKEND says torch": (
            "torch",
            TORCH + LOSS + "term = selfalign.ema_update([{'a': x}], [{'a': x}], 0.5)[0]['a']\n",
            "torch torch",
        ),
    },
    "jax": {
        "a JAX array": (None, JAX + LOSS + "term = loss(y, y + 1)\n", "jax jaxlib"),
        "a JAX array, with torch imported too": (
            None,
            "import torch\n" + JAX + LOSS + "term = loss(y, y + 1)\n",
            "jax jaxlib",
        ),
        "the first call is jitted": (
            None,
            JAX + LOSS + "term = jax.jit(loss)(y, y + 1)\n",
            "jax jaxlib",
        ),
    },
}
REFUSALS = {
    # which KERAS_BACKEND, what runs, the message
    "numpy": {
        "a framework that Keras lacks": (
            None,
            "import sys, types\nclass A: pass\n"
            "sys.modules['cupy'] = types.SimpleNamespace(ndarray=A)\n" + LOSS + "loss(A(), A())\n",
            r"Received: a cupy tensor, with the Keras backend "
            r"'torch/jax/tensorflow/numpy/openvino' \(these are the backends Keras has\)",
        ),
    },
    "torch": {
        "KERAS_BACKEND says jax": (
            "jax",
            TORCH + LOSS + "loss(x, x)\n",
            r"Received: a torch tensor, with the Keras backend 'jax' \(the environment variable "
            r"KERAS_BACKEND asks for it\)\. Set KERAS_BACKEND=torch before the first import of "
            r"Keras, or pass jax tensors\.",
        ),
        "Keras runs on NumPy already": (
            None,
            "import os; os.environ['KERAS_BACKEND'] = 'numpy'\n"
            "import keras; del os.environ['KERAS_BACKEND']\n" + TORCH + LOSS + "loss(x, x)\n",
            r"Received: a torch tensor, with the Keras backend 'numpy' \(Keras already runs on it "
            r"in this process, and it cannot change\)\. Set KERAS_BACKEND=torch before the first "
            r"import of Keras, or pass numpy tensors\.",
        ),
    },
    "jax": {
        "KERAS_BACKEND says torch": (
            "torch",
            JAX + LOSS + "loss(y, y)\n",
            r"Received: a jax tensor, with the Keras backend 'torch' \(the environment variable "
            r"KERAS_BACKEND asks for it\)\. Set KERAS_BACKEND=jax before the first import of "
            r"Keras, or pass torch tensors\.",
        ),
        "two frameworks in one call": (
            None,
            TORCH + JAX + LOSS + "loss(x, y)\n",
            r"All tensors of one call must belong to one framework\. Received: tensors of jax and "
            r"torch\. Convert them",
        ),
        "torch after jax": (
            None,
            TORCH + JAX + LOSS + "loss(y, y); loss(x, x)\n",
            r"Received: a torch tensor, with the Keras backend 'jax' \(Keras already runs on it in "
            r"this process",
        ),
    },
}
HERE = os.environ.get("KERAS_BACKEND", "")


@pytest.mark.parametrize(("asked", "code", "expected"), CHOICES[HERE].values(), ids=CHOICES[HERE])
def test_the_backend_is_that_of_the_first_tensor(asked, code, expected, tmp_path):
    printed, errors = python(code + REPORT, tmp_path, asked)
    assert printed == expected, errors


@pytest.mark.parametrize(("asked", "code", "message"), REFUSALS[HERE].values(), ids=REFUSALS[HERE])
def test_a_tensor_of_another_framework_is_refused_by_name(asked, code, message, tmp_path):
    printed, errors = python(code, tmp_path, asked)
    assert printed == ""
    assert re.search(f"^TypeError: .*{message}", errors, re.MULTILINE), errors


GLOBALS = """
import os, random, sys, numpy, {framework}
def state():
    return {{
        "environment": dict(os.environ), "path": sys.path[:], "folder": os.getcwd(),
        "Python's random stream": random.getstate(),
        "NumPy's random stream": str(numpy.random.get_state()),
        "NumPy's errors": numpy.geterr(), {look}
    }}
before = state()
import selfalign
from selfalign import adapting
loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, normalise="standardise")
x = {make}
t = x[:, 0, 0] * 0.5
loss(x, x)
loss.metrics(x, x)
loss.teacher_time(t, t)
loss.path.add_noise(x, x, t)
loss.path.add_less_noise(x, x, t, t, 0.2)
loss.path.draw_times(t)
repa = selfalign.REPALoss(student_layer=1, width=4, hidden=3)
draws = {{name: numpy.ones(s, "float32") for name, s in adapting.head_shapes(repa, 4).items()}}
repa.evaluate(adapting.init_head(repa, draws), x, x, logged=True)
selfalign.ema_update([x], [x], 0.9)
print([name for name, value in state().items() if value != before[name]])
keras = sys.modules["keras"]
print(keras.config.floatx(), keras.config.dtype_policy().name, keras.config.image_data_format())
"""
LOOK = {
    "torch": """
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(),
        "threads": torch.get_num_threads(), "gradients": torch.is_grad_enabled(),
        "torch's random stream": str(torch.get_rng_state().tolist()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    """,
    "jax": '"settings": dict(jax.config.values),',
    "numpy": "",
}
MAKE = {
    "torch": "torch.ones(2, 3, 4)",
    "jax": "jax.numpy.ones((2, 3, 4))",
    "numpy": "numpy.ones((2, 3, 4), 'float32')",
}


def test_nothing_global_is_changed(tmp_path):
    """Environment, seeds, default dtype and device stay, also through the first import of Keras."""
    code = GLOBALS.format(framework=HERE, look=LOOK[HERE], make=MAKE[HERE])
    printed, errors = python(code, tmp_path)
    assert printed.splitlines() == ["[]", "float32 float32 channels_last"], errors


TESTS = pathlib.Path(__file__).resolve().parent


def collected(paths, folder, backend):
    """What pytest says when it collects these tests in a process of its own."""
    options = ["--collect-only", "-c", str(TESTS.parent / "pyproject.toml"), *map(str, paths)]
    code = f"import sys, pytest; sys.exit(pytest.main({options!r}))"
    return "".join(python(code, folder, backend))


def test_the_suite_itself_fails_with_a_backend_that_it_does_not_know(tmp_path):
    said = collected([TESTS / "test_layers.py"], tmp_path, "theano")
    assert "KERAS_BACKEND must name a backend that the suite knows" in said
    assert "Received: KERAS_BACKEND='theano'. Run for instance: KERAS_BACKEND=torch pytest" in said


@pytest.mark.heavy
@pytest.mark.only("torch")
@pytest.mark.parametrize(
    ("paths", "backend"),
    [(["test_layers.py"], "torch"), (["adapters/jax/test_contract.py"], "jax")],
)
def test_the_suite_chooses_a_backend_and_says_so(paths, backend, tmp_path):
    said = collected([TESTS / path for path in paths], tmp_path, None)
    assert f"selfalign: Keras backend {backend}, chosen: KERAS_BACKEND is not set" in said
    assert "error" not in said


@pytest.mark.heavy
@pytest.mark.only("torch")
def test_the_suite_says_which_backend_was_asked_for(tmp_path):
    said = collected([TESTS / "test_layers.py"], tmp_path, "numpy")
    assert "selfalign: Keras backend numpy, by KERAS_BACKEND" in said


@pytest.mark.heavy
@pytest.mark.only("torch")
def test_adapters_of_another_backend_are_not_collected(tmp_path):
    """Not even when the whole suite is: nothing of them is imported."""
    said = collected([TESTS / "adapters"], tmp_path, "jax")
    folders = set(re.findall(r"<Dir (\w+)>", said))
    assert {"jax", "keras"} <= folders
    assert "torch" not in folders


@pytest.mark.only("torch")
def test_a_first_call_under_torch_compile_is_refused(tmp_path):
    """torch.compile cannot trace the import of Keras: a clear error says so."""
    compiled = "torch.compile(lambda a, b: loss(a, b), fullgraph=True, backend='eager')(x, x)\n"
    _, errors = python(TORCH + LOSS + compiled, tmp_path)
    assert (
        "Keras must be imported before torch.compile traces selfalign. Received: a first" in errors
    )
    assert "Build the SelfAlignment first, or run the first step eagerly." in errors


@pytest.mark.only("numpy")
def test_an_import_of_keras_that_fails_does_not_count(tmp_path):
    """The second call says what the first said, not something about a Keras that is not there."""
    code = """
import numpy, selfalign
for _ in range(2):
    try:
        selfalign.paths.Linear().snr(numpy.array([0.5]))
    except Exception as error:
        print(type(error).__name__, "theano" in str(error))
"""
    printed, _ = python(code, tmp_path, backend="theano")
    first, second = printed.splitlines()
    assert first == second
    assert first.endswith("True")
