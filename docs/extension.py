"""Extend Sphinx where its own extensions are not enough for this site.

- Show below a block of commands that the build did not run the reason that its page gives in a comment.
- The reports of the benchmarks, which are JSON, become pages.
- Links of pages to files of the repository, which are not pages, become downloads.
- MathJax is copied into the site from the package that carries it.
- The sentence beneath a constant is shown as it is, and an indented example as code.
- A name in a docstring, written as it is in its module, links to where that object is documented.
"""

from __future__ import annotations

import json
import re
import sys
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.fileutil import copy_asset

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness

SKIP = re.compile(r'<!--\s*skip: (next|start) "(?P<reason>[^"]+)"\s*-->')
"""The comment before a block that is not run; ``conftest.py`` obeys the same."""

RUN = {"shell", "console", "python"}
"""Languages of blocks that are run, or say why not."""

UNMARKED = {"benchmarks/*": "measures for many minutes", "performance": "measures, or needs a GPU"}
"""Pages that report measurements, and why none of their blocks is run."""

RELATIVE_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]`]+)\]\((?P<path>\.\./[^)#\s]+)\)")

MATHJAX = ["tex-chtml.js", "output/chtml/fonts/woff-v2"]
"""What a page with equations loads of MathJax."""


def show_reasons(app: Sphinx, doctree: nodes.document) -> None:
    """Behind each block of commands whose page says why it is not run, put that reason."""
    page = app.env.current_document.docname
    everywhere = next((reason for pages, reason in UNMARKED.items() if fnmatch(page, pages)), "")
    for block in list(doctree.findall(nodes.literal_block)):
        before = block.previous_sibling()
        said = SKIP.match(before.astext()) if isinstance(before, nodes.raw | nodes.comment) else None
        if reason := said["reason"] if said else everywhere if block.get("language") in RUN else "":
            note = nodes.paragraph("", f"Not run by the build of this page: {reason}.", classes=["not-run"])
            block.parent.insert(block.parent.index(block) + 1, note)


def link_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn links to files outside the folder of the pages, which GitHub shows, into downloads of them."""
    here = app.env.doc2path(page).parent

    def linked(link: re.Match[str]) -> str:
        file = (here / link["path"]).resolve()
        inside = file.is_relative_to(app.srcdir.resolve())
        return link[0] if inside else f"{{download}}`{link['text']} <{link['path']}>`"

    source[0] = RELATIVE_LINK.sub(linked, source[0])


def write_reports(app: Sphinx) -> None:
    """Write a page for each report in ``docs/benchmarks``, which the benchmarks record as JSON."""
    for file in sorted(Path(app.srcdir, "benchmarks").glob("*.json")):
        text = harness.page(json.loads(file.read_text(encoding="utf-8")), file.stem[11:].capitalize())
        pictures = [f"![{path.stem}]({path.name})" for path in sorted(file.parent.glob(f"{file.stem}*.png"))]
        file.with_suffix(".md").write_text("\n\n".join([text, *pictures]) + "\n", encoding="utf-8")


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copy MathJax into the static files of a site that was built."""
    spec = find_spec("sphinx-mathjax-offline")
    if error or app.builder.format != "html" or spec is None or spec.origin is None:
        return
    source = Path(spec.origin).parent / "static/mathjax"
    for part in MATHJAX:
        target = app.outdir / "_static/mathjax" / part
        copy_asset(source / part, target.parent if target.suffix else target)


class PlainValues:
    """Keeps napoleon, which reads "Table 1: the models" as a type and a text, from the docstrings of values."""

    kinds = ("data", "attribute", "property")

    def __init__(self, app: Sphinx) -> None:
        self.lines: dict[str, list[str]] = {}
        app.connect("autodoc-process-docstring", self.keep, priority=400)
        app.connect("autodoc-process-docstring", self.restore, priority=600)

    def keep(self, app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        """Ahead of napoleon."""
        if what in self.kinds:
            self.lines[name] = list(lines)

    def restore(self, app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        """Behind it."""
        if what in self.kinds:
            lines[:] = self.lines.pop(name)


def name_factories(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Write the default of a dataclass's field that a factory makes as an ellipsis, which can be parsed."""
    return signature and signature.replace("<factory>", "..."), returned


def show_examples(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make an indented example in a module's docstring, behind a line that ends in a colon, a literal block."""
    for i, line in enumerate(lines[:-2] if what == "module" else []):
        if line.endswith(":") and not line.endswith("::") and not lines[i + 1] and lines[i + 2].startswith("    "):
            lines[i] = f"{line}:"


def resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Return the object of a short name in a docstring, if one is nearest to the docstring's module."""
    if node.get("refdomain") != "py":
        return None
    domain, last = env.domains.python_domain, node["reftarget"].rpartition(".")[2]
    here = (node.get("py:module") or "").split(".")
    near: dict[int, list[str]] = {}
    for name, entry in domain.objects.items():
        if name.rpartition(".")[2] == last and not entry.aliased:
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(here, name.split("."), strict=False))
            near.setdefault(len(list(shared)), []).append(name)
    found = near[max(near)] if near else []
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the above."""
    app.connect("builder-inited", write_reports)
    app.connect("source-read", link_files)
    app.connect("doctree-read", show_reasons)
    app.connect("build-finished", copy_mathjax)
    PlainValues(app)
    app.connect("autodoc-process-signature", name_factories)
    app.connect("autodoc-process-docstring", show_examples)
    app.connect("missing-reference", resolve_short_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
