"""What the site has beside the pages in docs/, as a hook of mkdocs; see mkdocs.yml.

These are README, changelog and examples as pages, formulas, and all error messages. Nothing here
needs a framework: sources are read, not imported.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "tools"))

from messages import all_messages
from names import missing

# files outside docs/ that are pages of the site: {file: page}
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
OTHER = {"CITATION.cff": "citing.md"}  # what a page of docs/ says in other words


def examples() -> dict[str, str]:
    """{file: page} of the examples."""
    return {
        f"examples/{file.name}": f"examples/{file.stem}.md"
        for file in sorted((ROOT / "examples").glob("*.py"))
    }


# The package as it is


def on_startup(**_: Any) -> None:
    """The package as it is when installed, with the adapters inside.

    The reference is read from there.
    """
    wrong = missing(ROOT)
    if wrong:
        raise PluginError("Every public name must be documented. " + "; ".join(wrong))
    package = ROOT / "build" / "reference" / "selfalign"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "selfalign", package, ignore=ignored)
    shutil.copytree(ROOT / "adapters", package / "adapters", ignore=ignored)


# The pages


def on_config(config: Any) -> Any:
    """The examples' places in the navigation."""
    entries = [{Path(file).stem: page} for file, page in examples().items()]
    for entry in config.nav:
        if "Examples" in entry:
            entry["Examples"] = entries
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages that are no files in docs/."""
    for source, page in {**PAGES, **examples()}.items():
        text = (ROOT / source).read_text("utf-8")
        text = relinked(text, page) if source.endswith(".md") else example_page(source, text)
        files.append(File.generated(config, page, content=text))
    return files


def example_page(source: str, text: str) -> str:
    """An example as a page: its docstring's first line, and all of it as code."""
    title = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return f"# {Path(source).name}\n\n{title}\n\n```python\n{text}```\n"


def relinked(text: str, page: str) -> str:
    """Links of a file in the root of the repository, as links of a page in the root of the site."""
    pages = {**PAGES, **OTHER, **examples()}

    def link(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        return f"]({pages.get(target, target.removeprefix('docs/'))}{hash_}{anchor})"

    return re.sub(r"\]\((?!\w+://)([^)]+)\)", link, text)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from docs/ to the examples lead to their pages.

    Formulas become MathML, which browsers draw by themselves.
    """
    markdown = re.sub(r"\]\(\.\./(examples/\w+)\.py\)", r"](\1.md)", markdown)
    for file, target in {**PAGES, **OTHER}.items():
        markdown = re.sub(rf"\]\(\.\./{re.escape(file)}(?=[)#])", f"]({target}", markdown)
    if page.file.src_uri == "errors.md":
        markdown += "\n" + errors()
    return with_marks(markdown, page)


def with_marks(markdown: str, page: Any) -> str:
    """Formulas, ```math blocks and $`inline` ones, as marks: Markdown must not read them."""
    page.formulas = []

    def mark(tex: str, display: str) -> str:
        page.formulas.append(formula(tex, display))
        return f"FORMULA{len(page.formulas) - 1}END"

    blocks = re.compile(r"^```math\n(.*?)^```$", re.M | re.S)
    markdown = blocks.sub(lambda m: f'<div class="formula">{mark(m[1], "block")}</div>', markdown)
    return re.sub(r"\$`([^`]+)`\$", lambda m: mark(m[1], "inline"), markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """The formulas, in the place of their marks."""
    return re.sub(r"FORMULA(\d+)END", lambda m: page.formulas[int(m[1])], html)


def formula(tex: str, display: Any) -> str:
    """TeX as MathML on one line; a prime is an operator, or it stands too low."""
    math = re.sub(r"\s*\n\s*", "", convert(tex.strip(), display=display))
    return math.replace("<mi>&#x02032;</mi>", "<mo>&#x02032;</mo>")


# The errors


def errors() -> str:
    """Every message of the library, by module.

    A heading with its rule, and below what was received and what to do.
    """
    parts = []
    for module, entries in all_messages(ROOT).items():
        parts.append(f"## {escaped(module)}\n")
        for kind, rule, rest in entries:
            parts.append(f"### {escaped(rule)}\n\n{escaped(rest)}\n\n*{kind}*\n")
    return "\n".join(parts)


def escaped(message: str) -> str:
    """A message as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", message).replace("\n", " ")
