"""The code blocks of README.md and docs/ run as printed, in fresh processes that know what the text takes for granted."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


README_TORCH = """
import torch
from dit_models import DiT, make_batch
model = DiT()
loader = [make_batch()[::3] for _ in range(3)]
"""
DOCS_TORCH = (
    README_TORCH
    + """
import selfalign
from selfalign.adapters.torch import SelfAlignment
from torch.distributed.fsdp import fully_shard
warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # an advice about operations in place
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
loss, blocks = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7), []
"""
)
AFRESH = "'align' in globals() and align.detach()\n"  # each block attaches for itself
DOCS_DIAGNOSTICS = """
import selfalign
loss, null_class, labels = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7), 10, torch.arange(60) % 2
x0 = torch.randn(60, 6, 4)
"""
DIAGNOSTICS_RAN = """
assert layers.student < layers.teacher and len(accuracies[0.5]) == len(between_layers) == len(between_times) == 6
assert os.path.getsize("layers.png") and os.path.getsize("maps.png")
assert open("log.csv").read().count("cosine") == len(loader) and float(factor) == 1
"""
DOCS_TORCH_RAN = """
assert blocks == [3, 0, 0, 0]
x0, noise, t, y = make_batch()
model(align.path.add_noise(x0, noise, t), t, y)
align(x0, noise, t).backward()
assert all(hasattr(p, "to_local") for p in align.teacher.parameters())
torch.distributed.destroy_process_group()
"""
README_JAX = """
import jax
from jax_models import forward as model, make_batch, make_params
params = {name: jax.numpy.asarray(value) for name, value in make_params().items()}
loader = [make_batch(seed=seed)[::3] for seed in range(3)]
"""
README_KERAS = """
import numpy
warnings.filterwarnings("ignore", "__array__ implementation")
from keras_models import functional
backbone, images, labels = functional(), numpy.ones((64, 5, 4), "float32"), numpy.arange(64) % 10
"""
KERAS_RAN = "assert int(model.steps) == 4 and samples_from.weights"
DOCS_JAX = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import optax
import selfalign
from flax import nnx
from jax_loop import apply_at
from jax_models import EquinoxModel, LinenModel, LinenScannedModel, NnxModel, make_batch, make_params
from jax_models import forward as model
from selfalign.adapters import jax as sra
loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
x0, noise, t, y = make_batch(8)
empty = jax.numpy.full(8, 10)
x, key, apply_fourth = loss.path.add_noise(x0, noise, t), jax.random.key(0), apply_at(4)
params = {name: jax.numpy.asarray(value) for name, value in make_params().items()}
features, projector = model(params, x, t, y)[1], sra.init_projector(key, 16)
nnx_model = nnx.view(NnxModel(nnx.Rngs(0)), deterministic=True)
linen_model, scanned_model, equinox_model = LinenModel(), LinenScannedModel(), EquinoxModel(key)
linen_params, scanned_params = (m.init(key, x, t, y)["params"] for m in (linen_model, scanned_model))
mesh = jax.make_mesh((4,), ("data",))
sharded_batch = jax.device_put((x0, noise, t, y), jax.NamedSharding(mesh, jax.P("data")))
terms, shapes = [], []
"""
DOCS_KERAS = """
os.environ["KERAS_BACKEND"] = "torch"
warnings.filterwarnings("ignore", "__array__ implementation")
import keras, numpy, torch
import selfalign
from keras_models import functional
from selfalign.adapters.keras import SelfAligned
from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT
mmdit = MMDiT(2, 16, 6, 2, 8, latent_shape=(8, 8, 4), context_shape=(6, 12), pooled_projection_shape=(20,))
loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
backbone, images = functional(), numpy.random.default_rng(0).normal(size=(32, 5, 4)).astype("float32")
labels, noisy_images, times = numpy.arange(32) % 10, images, numpy.ones(32, "float32")
"""
START_TORCH = """
for text in (".*does not have many workers", ".*logging interval", ".*litlogger", ".*LeafSpec"):
    warnings.filterwarnings("ignore", text)  # Lightning's advice
warnings.filterwarnings("ignore", module="diffusers|torch")
"""
START_KERAS = "warnings.filterwarnings('ignore', '__array__ implementation')"
EXPECT = (
    README_TORCH
    + """
import selfalign
from selfalign.adapters.torch import SelfAlignment
loss = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7)
"""
)
EAGER = """
torch.compiler.set_stance("force_eager")  # compiled terms have tests of their own
batch = make_batch()
"""
CHEAPER = """
prediction = model(align.path.add_noise(*batch[:3]), *batch[2:])
(prediction.mean() + align(*batch[:3])).backward()
torch.optim.SGD([*model.parameters(), *align.projector.parameters()]).step()
align.update()
"""


def cheaper(code):
    """The second block goes on with the first one's `align`; after the last, a step."""
    ready = "optimizer = torch.optim.AdamW([*model.parameters(), *align.projector.parameters()])\n"
    code = [code[0] + ready, code[1], *(AFRESH + block for block in code[2:-1]), AFRESH + code[-1] + CHEAPER]
    return [block + "\nblocks.append(align.step)" for block in code]


NOTE = "\nterms.append(globals().get('term')); shapes.append(student_tokens.shape)"  # after each block
# what a page takes for granted, its blocks, and what must be true afterwards
RUNS = {
    "README.md, PyTorch": (README_TORCH, blocks("README.md")[:1], "assert align.step == len(loader)"),
    "README.md, JAX": (README_JAX, blocks("README.md")[1:2], "assert teacher.step == len(loader)"),
    "README.md, Keras on torch": ("os.environ['KERAS_BACKEND'] = 'torch'\n" + README_KERAS, blocks("README.md")[2:], KERAS_RAN),
    "README.md, Keras on jax": ("os.environ['KERAS_BACKEND'] = 'jax'\n" + README_KERAS, blocks("README.md")[2:], KERAS_RAN),
    "docs/start.md, PyTorch": (
        START_TORCH,
        blocks("docs/start.md")[:5],
        "assert module.align.step == align.step == 4 ",
    ),
    "docs/start.md, JAX": ("", blocks("docs/start.md")[5:9], "assert teacher.step == 4"),
    "docs/start.md, Keras": (START_KERAS, blocks("docs/start.md")[9:], "assert int(model.steps) == 8 and samples_from.weights"),
    "docs/settings.md": ("", blocks("docs/settings.md"), ""),
    "docs/from_official.md": ("", blocks("docs/from_official.md"), ""),
    "docs/extending.md": ("", blocks("docs/extending.md"), "assert average.keys() == model.state_dict().keys()"),
    "docs/expect.md": (
        EXPECT,
        blocks("docs/expect.md"),
        "assert sorted(logged)[:2] == ['cosine', 'distance'] and align.step == 0",
    ),
    "docs/jax.md": (
        DOCS_JAX,
        [block + NOTE for block in blocks("docs/jax.md")],
        "assert len(terms) == 8 and len({float(term) for term in terms[1:5]}) == 4, terms\n"
        "assert set(shapes) == {(8, 5, 16)} and 0 < value < 1 and len(ranks[0.5]) == 6",
    ),
    "docs/torch.md": (
        DOCS_TORCH,
        [AFRESH + block + "\nblocks.append(align.step)" for block in blocks("docs/torch.md")],
        DOCS_TORCH_RAN,
    ),
    "docs/cheaper.md": (
        'warnings.filterwarnings("ignore", ".*script_method. is deprecated")\n' + DOCS_TORCH + EAGER,
        cheaper(blocks("docs/cheaper.md")),
        "assert blocks == [0, 4, 0, 1], blocks\ntorch.distributed.destroy_process_group()",
    ),
    "docs/diagnostics.md": (README_TORCH + DOCS_DIAGNOSTICS, blocks("docs/diagnostics.md"), DIAGNOSTICS_RAN),
    "docs/keras.md": (
        DOCS_KERAS,
        blocks("docs/keras.md"),
        "assert int(model.steps) == 4 and velocity.shape == (32, 5, 4) and sd3._tapped_names()[1] == 'joint_block_3'\n"
        "assert history.history['alignment'][0] > 0 and not numpy.array_equal(*(w.numpy() for w in (teacher.weights[1], "
        "backbone.weights[1]))) and similar.shape == (6, 6)",
    ),
}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def tool(name):
    """A module of docs/tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_block_is_run():
    pages = {page: len(blocks(page.relative_to(ROOT))) for page in PAGES}
    assert sum(pages.values()) == sum(len(run[1]) for name, run in RUNS.items() if name != "README.md, Keras on jax")


@pytest.mark.parametrize("name", RUNS)
def test_blocks_run(name, tmp_path):
    given, code, check = RUNS[name]
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(["import os, warnings", "warnings.simplefilter('error')", given, *code, check]))
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"} | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_relative_links_lead_somewhere():
    for page in PAGES:
        links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
        assert all((page.parent / link.partition("#")[0]).exists() for link in links), links


def test_every_public_name_is_in_the_reference_with_a_docstring():
    names = tool("names")
    assert names.missing(ROOT) == []
    public = {name for name, _ in names.public(ROOT)}
    import selfalign

    modules = {name for name in selfalign.__all__ if (ROOT / "selfalign" / f"{name}.py").exists()}
    short = {name.rpartition(".")[2] for name in public}
    assert short >= set(selfalign.__all__) - modules
    assert all(any(name.startswith(f"selfalign.{module}.") for name in public) for module in modules)
    assert {
        "selfalign.adapters.torch.SelfAlignment",
        "selfalign.adapters._jax_taps.tap",
        "selfalign.adapters.keras.SelfAligned",
    } < public


def test_a_name_without_a_place_would_be_found(tmp_path):
    for folder in ("selfalign", "adapters", "docs/reference"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "selfalign" / "new.py").write_text("def forgotten(): pass\n")
    assert tool("names").missing(tmp_path) == [
        "selfalign.new.forgotten has no docstring",
        "selfalign.new.forgotten is not in docs/reference/",
    ]


def test_the_list_of_errors_has_every_message_of_the_sources():
    """The longest literal of each rule, as test_errors.py reads it, and of each warning."""
    listed = "\n".join(" ".join(entry) for entries in tool("messages").all_messages(ROOT).values() for entry in entries)
    rules = []
    for file in [*(ROOT / "selfalign").rglob("*.py"), *(ROOT / "adapters").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", ""))
            if isinstance(node, ast.Call) and name in tool("messages").CALLS:
                literals = [c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
                if literals and (not name.endswith("Error") or any("Received: " in literal for literal in literals)):
                    rules.append(max(literals, key=len).partition(" Received: ")[0].strip(" ."))
    assert len(rules) > 100
    assert [rule for rule in rules if rule not in listed] == []


def test_the_figures_are_drawn_from_the_committed_results(tmp_path):
    figures = ROOT / "docs" / "figures"
    command = [sys.executable, str(figures / "draw.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in figures.glob("*.svg"))
    drawn = [*tmp_path.glob("expect_*"), *tmp_path.glob("study_*")]
    assert all(file.read_text() == (figures / file.name).read_text() for file in drawn)


def test_the_runs_behind_the_figures_run(tmp_path):
    script = str(ROOT / "docs" / "figures" / "runs.py")
    command = [sys.executable, script, "--steps", "10", "--out", str(tmp_path), "--runs", "schedule", "frozen"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    committed = (ROOT / "docs" / "figures" / "runs.csv").read_text().splitlines()
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    assert rows[0] == committed[0]
    begun = [row.split(",")[:2] for row in committed if row.startswith(("schedule,10,", "frozen,10,"))]
    assert [row.split(",")[:2] for row in rows[1:]] == begun
