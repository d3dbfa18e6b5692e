"""What importing selfalign costs and imports, and which backend it then chooses: each in a process of its own."""

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
REPORT = "import sys; print(sys.modules['keras'].backend.backend(), type(term).__module__.partition('.')[0])\n"
FRAMEWORKS = """
import sys
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "jax", "jaxlib", "keras", "tensorflow", "numpy"}))
"""


def python(code, folder, backend=None, options=()):
    """Run `code` in a fresh interpreter, in `folder`, with KERAS_BACKEND as given; what it printed, and its errors."""
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    if backend:
        environment["KERAS_BACKEND"] = backend
    environment["KERAS_HOME"] = str(folder)  # no settings file of the user's decides
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip(), done.stderr.strip()


def test_importing_selfalign_imports_no_framework(tmp_path):
    printed, errors = python("import selfalign\n" + FRAMEWORKS, tmp_path)
    assert (printed, errors) == ("[]", "")


def test_importing_the_diagnostics_imports_neither_a_framework_nor_what_they_may_need(tmp_path):
    code = "import sys, selfalign.diagnostics; print(sorted({'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)))\n"
    printed, errors = python(code + FRAMEWORKS, tmp_path)
    assert (printed, errors) == ("[]\n['numpy']", "")


def test_settings_need_no_framework(tmp_path):
    code = (
        LOSS + "selfalign.SRALoss.preset('DiT-B/2', recipe='paper').weight_at(5004 * 400); loss.settings(); loss.layers(12)\n"
    )
    printed, errors = python(code + FRAMEWORKS, tmp_path)
    assert (printed, errors) == ("[]", "")


def test_the_check_for_frameworks_can_fail(tmp_path):
    printed, errors = python("import selfalign, numpy\n" + FRAMEWORKS, tmp_path)
    assert (printed, errors) == ("['numpy']", "")


def test_importing_selfalign_takes_less_than_50_ms(tmp_path):
    def microseconds():
        _, errors = python("import selfalign", tmp_path, options=["-X", "importtime"])
        return int(re.search(r"\|\s*(\d+) \| selfalign$", errors, re.MULTILINE)[1])

    assert any(0 < microseconds() < 50_000 for _ in range(10))  # a busy machine needs more than one try


CHOICES = {
    # which KERAS_BACKEND, what runs, the backend it ends on and the framework of the result
    "numpy": {
        "NumPy arrays alone": (None, NUMPY + LOSS + "term = loss(z, z + 1)\n", "numpy numpy"),
        "NumPy arrays where KERAS_BACKEND says jax": ("jax", NUMPY + LOSS + "term = loss(z, z + 1)\n", "jax jaxlib"),
    },
    "torch": {
        "a torch tensor, with jax imported too": (
            None,
            "import jax\n" + TORCH + LOSS + "term = loss(x, x + 1)\n",
            "torch torch",
        ),
        "NumPy arrays, with torch imported": (None, "import torch\n" + NUMPY + LOSS + "term = loss(z, z + 1)\n", "torch torch"),
        "nested tensors where KERAS_BACKEND says torch": (
            "torch",
            TORCH + "import selfalign; term = selfalign.ema_update({'a': [x]}, {'a': [x]}, 0.5)['a'][0]\n",
            "torch torch",
        ),
    },
    "jax": {
        "a JAX array": (None, JAX + LOSS + "term = loss(y, y + 1)\n", "jax jaxlib"),
        "a JAX array, with torch imported too": (None, "import torch\n" + JAX + LOSS + "term = loss(y, y + 1)\n", "jax jaxlib"),
        "the first call is jitted": (None, JAX + LOSS + "term = jax.jit(loss)(y, y + 1)\n", "jax jaxlib"),
    },
}
REFUSALS = {
    # which KERAS_BACKEND, what runs, the framework received, the backend at fault, the reason or rule
    "numpy": {
        "a framework that Keras lacks": (
            None,
            "import sys, types, selfalign\nclass A: pass\nsys.modules['cupy'] = types.SimpleNamespace(ndarray=A)\n"
            "selfalign.SRALoss(student_layer=1, teacher_layer=2)(A(), A())\n",
            r"Received: a cupy tensor, with the Keras backend 'torch/jax/tensorflow/numpy/openvino' "
            r"\(these are the backends Keras has\)",
        ),
    },
    "torch": {
        "KERAS_BACKEND says jax": (
            "jax",
            TORCH + LOSS + "loss(x, x)\n",
            r"Received: a torch tensor, with the Keras backend 'jax' \(the environment variable KERAS_BACKEND asks for it\)\. "
            r"Set KERAS_BACKEND=torch before the first import of Keras, or pass jax tensors\.",
        ),
        "Keras runs on NumPy already": (
            None,
            "import os; os.environ['KERAS_BACKEND'] = 'numpy'; import keras; del os.environ['KERAS_BACKEND']\n"
            + TORCH
            + LOSS
            + "loss(x, x)\n",
            r"Received: a torch tensor, with the Keras backend 'numpy' \(Keras already runs on it in this process, and it "
            r"cannot change\)\. Set KERAS_BACKEND=torch before the first import of Keras, or pass numpy tensors\.",
        ),
    },
    "jax": {
        "KERAS_BACKEND says torch": (
            "torch",
            JAX + LOSS + "loss(y, y)\n",
            r"Received: a jax tensor, with the Keras backend 'torch' \(the environment variable KERAS_BACKEND asks for it\)\. "
            r"Set KERAS_BACKEND=jax before the first import of Keras, or pass torch tensors\.",
        ),
        "two frameworks in one call": (
            None,
            TORCH + JAX + LOSS + "loss(x, y)\n",
            r"All tensors of one call must belong to one framework\. Received: tensors of jax and torch\. Convert them",
        ),
        "torch after jax": (
            None,
            TORCH + JAX + LOSS + "loss(y, y); loss(x, x)\n",
            r"Received: a torch tensor, with the Keras backend 'jax' \(Keras already runs on it in this process",
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
        "Python's random stream": random.getstate(), "NumPy's random stream": str(numpy.random.get_state()),
        "NumPy's errors": numpy.geterr(), {look}
    }}
before = state()
import selfalign
loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
x = {make}
t = x[:, 0, 0] * 0.5
loss(x, x); loss.metrics(x, x); loss.teacher_time(t, t); loss.path.add_noise(x, x, t); selfalign.ema_update([x], [x], 0.9)
print([name for name, value in state().items() if value != before[name]])
keras = sys.modules["keras"]
print(keras.config.floatx(), keras.config.dtype_policy().name, keras.config.image_data_format())
"""
LOOK = {
    "torch": """
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "threads": torch.get_num_threads(),
        "torch's random stream": str(torch.get_rng_state().tolist()), "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    """,
    "jax": '"settings": dict(jax.config.values),',
    "numpy": "",
}
MAKE = {"torch": "torch.ones(2, 3, 4)", "jax": "jax.numpy.ones((2, 3, 4))", "numpy": "numpy.ones((2, 3, 4), 'float32')"}


def test_nothing_global_is_changed(tmp_path):
    """Environment, seeds, default dtype and default device stay as they were, also through the first import of Keras."""
    printed, errors = python(GLOBALS.format(framework=HERE, look=LOOK[HERE], make=MAKE[HERE]), tmp_path)
    assert printed.splitlines() == ["[]", "float32 float32 channels_last"], errors


@pytest.mark.parametrize(("backend", "message"), [(None, "KERAS_BACKEND=None"), ("theano", "KERAS_BACKEND='theano'")])
def test_the_suite_itself_fails_without_a_backend(backend, message, tmp_path):
    tests = pathlib.Path(__file__).resolve().parent
    options = ["--collect-only", "-q", "-c", str(tests.parent / "pyproject.toml"), str(tests)]
    code = f"import sys, pytest; sys.exit(pytest.main({options!r}))"
    printed, errors = python(code, tmp_path, backend)
    assert message in printed + errors
    assert "The suite runs once per backend" in printed + errors


@pytest.mark.only("torch")
def test_a_first_call_under_torch_compile_is_refused(tmp_path):
    """torch.compile cannot trace the import of Keras: better a clear error than a graph break with a riddle."""
    code = TORCH + LOSS + "torch.compile(lambda a, b: loss(a, b), fullgraph=True, backend='eager')(x, x)\n"
    _, errors = python(code, tmp_path)
    assert "Keras must be imported before torch.compile traces selfalign. Received: a first call under torch.compile." in errors
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
