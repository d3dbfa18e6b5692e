"""The documentation: its code runs as printed, its links lead somewhere, its lists are whole."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WARNINGS = os.environ.get("PYTHONWARNINGS", "error")  # make test-lowest: no errors
COLUMNS = 88  # what a page shows without scrolling


def blocks(page):
    """The code blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def tool(name):
    """A module of docs/tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Code blocks: what a page takes for granted, its blocks, and what must be true afterwards

TORCH = """
import torch
from dit_models import DiT, make_batch
model = DiT()
loader = [make_batch()[::3] for _ in range(3)]
"""
ATTACHED = """
import selfalign
from selfalign.adapters.torch import SelfAlignment
loss = selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7)
"""
# each block attaches for itself, and says how many steps it has done
AFRESH = "'align' in globals() and align.detach()\n"
DONE = "\ndone.append(align.step)"
SHARDED = """
from torch import distributed
from torch.distributed.fsdp import fully_shard
warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # an advice about operations in place
store = distributed.HashStore()
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
done = []
"""
TORCH_PAGE = """
x0, noise, t, y = make_batch()
"""
TORCH_PAGE_CHECK = """
assert done == [3, 0, 0, 0, 0, 0, 0, 0], done
model(align.path.add_noise(x0, noise, t), t, y)
align(x0, noise, t).backward()
assert all(hasattr(p, "to_local") for p in align.teacher.parameters())
distributed.destroy_process_group()
"""
CHEAPER = """
warnings.filterwarnings("ignore", ".*script_method. is deprecated")
torch.compiler.set_stance("force_eager")  # compiled terms have tests of their own
batch = make_batch()
"""
CHEAPER_STEP = """
prediction = model(align.path.add_noise(*batch[:3]), *batch[2:])
(prediction.mean() + align(*batch[:3])).backward()
torch.optim.SGD([*model.parameters(), *align.projector.parameters()]).step()
align.update()
"""
CHEAPER_CHECK = """
assert done == [0, 4, 0, 1], done
distributed.destroy_process_group()
"""
DIAGNOSTICS = """
null_class = 10
labels = torch.arange(60) % 2
x0 = torch.randn(60, 6, 4)
"""
DIAGNOSTICS_CHECK = """
assert layers.student < layers.teacher
assert len(accuracies[0.5]) == len(between_layers) == len(between_times) == 6
assert os.path.getsize("layers.png") and os.path.getsize("maps.png")
from pathlib import Path
assert Path("log.csv").read_text().count("cosine") == len(loader) and float(factor) == 1
"""
OBJECTIVES = """
x0, noise, t, y = make_batch()
encoder = torch.nn.Linear(4, 12).requires_grad_(False)
"""
LIGHTNING = """
for text in (".*does not have many workers", ".*logging interval", ".*litlogger", ".*LeafSpec"):
    warnings.filterwarnings("ignore", text)  # advice
warnings.filterwarnings("ignore", module="diffusers|torch")
"""
JAX = """
import jax
from jax_models import LinenModel, make_batch
model = LinenModel()
x0, _, t, y = make_batch()
params = model.init(jax.random.key(0), x0, t, y)["params"]
loader = [make_batch(seed=seed)[::3] for seed in range(3)]
"""
JAX_PAGE = """
import functools, pathlib, tempfile, warnings
warnings.filterwarnings("ignore", "Using 'Module.sow")  # by the test's own model
import jax
jax.config.update("jax_num_cpu_devices", 4)
import flax.serialization
import optax
import orbax.checkpoint as ocp
import selfalign
from flax import nnx
from jax_loop import apply_at
from jax_models import EquinoxListed, LinenModel, LinenScannedModel, NnxModel
from jax_models import forward as model, make_batch, make_params
from selfalign.adapters import jax as sra
loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
x0, noise, t, y = make_batch(8)
empty = jax.numpy.full(8, 10)
x = loss.path.add_noise(x0, noise, t)
key = jax.random.key(0)
apply_fourth = apply_at(4)
params = {name: jax.numpy.asarray(value) for name, value in make_params().items()}
features = model(params, x, t, y)[1]
projector = sra.init_projector(key, 16)
nnx_model = NnxModel(nnx.Rngs(0))
linen_model, scanned_model, equinox_model = LinenModel(), LinenScannedModel(), EquinoxListed(key)
linen_params = linen_model.init(key, x, t, y)["params"]
scanned_params = scanned_model.init(key, x, t, y)["params"]
mesh = jax.make_mesh((4,), ("data",))
sharded_batch = jax.device_put((x0, noise, t, y), jax.NamedSharding(mesh, jax.P("data")))
terms, shapes = [], []
"""
# after each block
JAX_NOTE = "\nterms.append(globals().get('term')); shapes.append(student_tokens.shape)"
JAX_PAGE_CHECK = """
assert len(terms) == 19 and len({float(term) for term in terms[:9]}) == 8, terms
assert set(shapes) == {(8, 5, 16)} and 0 < value < 1 and len(ranks[0.5]) == 6
"""
KERAS_WARNS = "warnings.filterwarnings('ignore', '__array__ implementation')"
KERAS = f"""
import numpy
{KERAS_WARNS}
from keras_models import functional
backbone = functional()
images = numpy.ones((64, 5, 4), "float32")
labels = numpy.arange(64) % 10
"""
KERAS_CHECK = "assert int(model.steps) == 4 and samples_from.weights"
KERAS_PAGE = f"""
{KERAS_WARNS}
import keras, numpy, torch
import selfalign
from keras_models import functional
from selfalign.adapters.keras import SelfAligned
from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT
mmdit = MMDiT(
    2, 16, 6, 2, 8,
    latent_shape=(8, 8, 4), context_shape=(6, 12), pooled_projection_shape=(20,),
)
loss = selfalign.SRALoss(student_layer=2, teacher_layer=4)
backbone = functional()
images = numpy.random.default_rng(0).normal(size=(32, 5, 4)).astype("float32")
labels = numpy.arange(32) % 10
noisy_images, times = images, numpy.ones(32, "float32")
"""
KERAS_PAGE_CHECK = """
assert int(model.steps) == 4 and velocity.shape == (32, 5, 4)
assert history.history["alignment"][0] > 0 and similar.shape == (6, 6)
mine, theirs = teacher.weights[1].numpy(), backbone.weights[1].numpy()
assert not numpy.array_equal(mine, theirs)
"""


class Run(NamedTuple):
    """Blocks that run in one process: a new one, or this one, which has PyTorch already."""

    code: list[str]
    given: str = ""
    check: str = ""
    backend: str | None = None  # KERAS_BACKEND; None: selfalign chooses
    here: bool = False


def each_afresh(page):
    """The blocks of a page, of which each attaches for itself."""
    return [AFRESH + block + DONE for block in blocks(page)]


def cheaper():
    """The second block goes on with the first one's `align`; after the last, a step."""
    compiled, every, *others = blocks("docs/cheaper.md")
    ready = "optimizer = torch.optim.AdamW([*model.parameters(), *align.projector.parameters()])"
    parts = [compiled + ready, every, *(AFRESH + block for block in others)]
    parts[-1] += CHEAPER_STEP
    return [part + DONE for part in parts]


README = blocks("README.md")
START = blocks("docs/start.md")
RUNS = {
    "README.md, PyTorch": Run(README[:1], TORCH, "assert align.step == len(loader)", here=True),
    "README.md, JAX": Run(README[1:2], JAX, "assert teacher.step == len(loader)"),
    "README.md, Keras on torch": Run(README[2:], KERAS, KERAS_CHECK, "torch"),
    "README.md, Keras on jax": Run(README[2:], KERAS, KERAS_CHECK, "jax"),
    "docs/start.md, PyTorch": Run(
        START[:5], LIGHTNING, "assert module.align.step == align.step == 4"
    ),
    "docs/start.md, JAX": Run(START[5:9], check="assert teacher.step == 4"),
    "docs/start.md, Keras": Run(
        START[9:], KERAS_WARNS, "assert int(model.steps) == 8 and samples_from.weights"
    ),
    "docs/settings.md": Run(blocks("docs/settings.md")),
    "docs/from_official.md": Run(blocks("docs/from_official.md")),
    "docs/layersync.md": Run(
        blocks("docs/layersync.md"),
        check="assert align.step == 1 and align.teacher is None",
        here=True,
    ),
    "docs/repa.md": Run(
        blocks("docs/repa.md"),
        check="assert align.step == 1 and target.shape == (4, 5, 12)",
        here=True,
    ),
    "docs/objectives.md": Run(
        blocks("docs/objectives.md"),
        TORCH + OBJECTIVES,
        "assert align.step == 1 and len(align.metrics) == 18 and head.output_bias.shape == (12,)",
        here=True,
    ),
    "docs/extending.md": Run(
        blocks("docs/extending.md"),
        check="assert average.keys() == model.state_dict().keys()",
        here=True,
    ),
    "docs/expect.md": Run(
        blocks("docs/expect.md"),
        TORCH + ATTACHED,
        "assert sorted(logged)[:2] == ['cosine', 'distance'] and align.step == 0",
        here=True,
    ),
    "docs/torch.md": Run(
        each_afresh("docs/torch.md"), TORCH + ATTACHED + SHARDED + TORCH_PAGE, TORCH_PAGE_CHECK
    ),
    "docs/cheaper.md": Run(cheaper(), TORCH + ATTACHED + SHARDED + CHEAPER, CHEAPER_CHECK),
    "docs/diagnostics.md": Run(
        blocks("docs/diagnostics.md"),
        TORCH + ATTACHED + DIAGNOSTICS,
        DIAGNOSTICS_CHECK,
        here=True,
    ),
    "docs/jax.md": Run(
        [block + JAX_NOTE for block in blocks("docs/jax.md")], JAX_PAGE, JAX_PAGE_CHECK
    ),
    "docs/keras.md": Run(blocks("docs/keras.md"), KERAS_PAGE, KERAS_PAGE_CHECK, "torch"),
}

SELDOM = {"README.md, Keras on jax"}  # the same blocks as on torch
NAMES = [pytest.param(n, marks=pytest.mark.heavy if n in SELDOM else []) for n in RUNS]


def test_every_block_is_run():
    printed = sum(len(blocks(page.relative_to(ROOT))) for page in PAGES)
    assert printed == sum(len(run.code) for name, run in RUNS.items() if name not in SELDOM)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_run(name, tmp_path, monkeypatch):
    run = RUNS[name]
    strict = f"import os, warnings\nwarnings.simplefilter({WARNINGS!r})"
    text = "\n".join([strict, run.given, *run.code, run.check])
    if run.here:
        monkeypatch.chdir(tmp_path)
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
        return
    script = tmp_path / "blocks.py"
    script.write_text(text)
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
    if run.backend:
        environment["KERAS_BACKEND"] = run.backend
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_blocks_are_narrow():
    for page in PAGES:
        lines = [line for block in blocks(page.relative_to(ROOT)) for line in block.splitlines()]
        assert [line for line in lines if len(line) > COLUMNS] == [], page


def test_the_objective_of_the_page_is_the_one_that_every_adapter_is_tested_with():
    """Comments aside, the page's first block is tests/third_party.py."""
    page = ast.parse(blocks("docs/extending.md")[0])
    file = ast.parse((ROOT / "tests" / "third_party.py").read_text())
    assert isinstance(file.body[0], ast.Expr)  # its docstring
    assert list(map(ast.dump, page.body)) == list(map(ast.dump, file.body[1:]))


def test_relative_links_lead_somewhere():
    for page in PAGES:
        links = re.findall(r"\]\(([^)]+)\)", page.read_text())
        inner = [link.partition("#")[0] for link in links if "://" not in link]
        assert [link for link in inner if not (page.parent / link).exists()] == [], page


# Lists


def test_every_public_name_is_in_the_reference_with_a_docstring():
    names = tool("names")
    assert names.missing(ROOT) == []


def test_the_public_names_are_those_that_a_user_imports():
    import selfalign

    public = {name for name, _ in tool("names").public(ROOT)}
    short = {name.rpartition(".")[2] for name in public}
    for name in selfalign.__all__:
        if inspect.ismodule(getattr(selfalign, name)):
            assert any(full.startswith(f"selfalign.{name}.") for full in public), name
        else:
            assert name in short, name
    adapters = {"torch.SelfAlignment", "jax.tap", "keras.SelfAligned"}
    assert {f"selfalign.adapters.{name}" for name in adapters} < public


def test_a_name_without_a_place_would_be_found(tmp_path):
    for folder in ("selfalign", "adapters/torch", "docs/reference"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "selfalign" / "new.py").write_text("def forgotten(): pass\n")
    (tmp_path / "adapters" / "torch" / "__init__.py").write_text('__all__ = ["Lost"]\n')
    (tmp_path / "adapters" / "torch" / "lost.py").write_text('class Lost:\n    """Example"""\n')
    assert tool("names").missing(tmp_path) == [
        "selfalign.new.forgotten has no docstring",
        "selfalign.new.forgotten is not in docs/reference/",
        "selfalign.adapters.torch.Lost is not in docs/reference/",
    ]


def test_the_types_page_has_every_type():
    aliases = ast.parse((ROOT / "selfalign" / "typing.py").read_text()).body
    names = [node.target.id for node in aliases if isinstance(node, ast.AnnAssign)]
    page = (ROOT / "docs" / "reference" / "typing.md").read_text()
    assert len(names) > 10
    assert [name for name in names if f"`{name}`" not in page] == []


def test_every_option_of_the_torch_adapter_is_in_the_table():
    from selfalign.adapters.torch import SelfAlignment

    kinds = inspect.signature(SelfAlignment).parameters.values()
    options = [p.name for p in kinds if p.kind == inspect.Parameter.KEYWORD_ONLY]
    page = (ROOT / "docs" / "torch.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page.partition("## Options")[2], re.M)
    assert rows == options


def literals(node):
    """The texts in an expression."""
    return [
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def rules(file):
    """The longest literal of each rule in a source file: of each error and warning."""
    calls = tool("messages").CALLS
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        found = literals(node.args[0])
        received = any("Received: " in literal for literal in found)
        if name in calls and found and (received or not name.endswith("Error")):
            yield max(found, key=len).partition(" Received: ")[0].strip(" .")


def test_the_list_of_errors_has_every_message_of_the_sources():
    found = tool("messages").all_messages(ROOT)
    listed = "\n".join(" ".join(entry) for entries in found.values() for entry in entries)
    files = [file for folder in ("selfalign", "adapters") for file in (ROOT / folder).rglob("*.py")]
    wanted = [rule for file in files for rule in rules(file)]
    assert len(wanted) > 100
    assert [rule for rule in wanted if rule not in listed] == []


def test_a_rule_that_stands_in_a_variable_is_listed_too():
    tree = ast.parse(
        "def check(many):\n"
        '    rule = f"Too {many} cooks"\n'
        '    raise invalid(rule, "cooks", "Send some home.")\n'
    )
    assert list(tool("messages").messages(tree, {})) == [
        ("ValueError", "Too {many} cooks", "Received: cooks. Send some home.")
    ]


# Figures


def test_the_figures_are_drawn_from_the_committed_results(tmp_path):
    figures = ROOT / "docs" / "figures"
    command = [sys.executable, str(figures / "draw.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == sorted(file.name for file in figures.glob("*.svg"))
    drawn = [*tmp_path.glob("expect_*"), *tmp_path.glob("study_*")]
    assert all(file.read_text() == (figures / file.name).read_text() for file in drawn)


@pytest.mark.heavy
def test_the_runs_behind_the_figures_run(tmp_path):
    figures = ROOT / "docs" / "figures"
    command = [sys.executable, str(figures / "runs.py"), "--steps", "10", "--out", str(tmp_path)]
    command += ["--runs", "schedule", "frozen"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    committed = (figures / "runs.csv").read_text().splitlines()
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    assert rows[0] == committed[0]
    first = [row for row in committed if row.startswith(("schedule,10,", "frozen,10,"))]
    assert [row.split(",")[:2] for row in rows[1:]] == [row.split(",")[:2] for row in first]
