"""The code blocks of README.md run as printed, each in a fresh process that knows what the text takes for granted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)

GIVEN = {
    "torch": """
import torch
from dit_models import DiT, make_batch
model = DiT()
loader = [make_batch()[::3] for _ in range(3)]
""",
    "jax": """
import jax
x0 = noise = jax.random.normal(jax.random.key(1), (8, 4, 4))
tokens = jax.random.normal(jax.random.key(2), (8, 5, 16))
teacher = student = {"w": tokens, "blocks": [{"b": x0}, (noise,)]}
""",
}


def test_there_is_one_block_per_framework():
    assert [next(name for name in GIVEN if f"import {name}\n" in block) for block in BLOCKS] == list(GIVEN)


@pytest.mark.parametrize(("framework", "block"), list(zip(GIVEN, BLOCKS, strict=True)), ids=list(GIVEN))
def test_readme_block_runs(framework, block, tmp_path):
    check = {
        "torch": "assert align.step == len(loader)",
        "jax": "assert value > 0 and float(gradient['output_bias'].sum()) != 0",
    }
    script = tmp_path / "block.py"
    script.write_text(
        "\n".join(["import warnings", "warnings.simplefilter('error')", GIVEN[framework], block, check[framework]])
    )
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"} | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_relative_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
        assert all((page.parent / link.partition("#")[0]).exists() for link in links), links
