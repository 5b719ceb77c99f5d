"""The book that `make book` builds: the README, the notebooks with their committed outputs, and the notes on data."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml

project = "sptseg"
html_title = "sptseg"
extensions = ["myst_nb"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "data/*.md", "notebooks/*.ipynb"]
html_theme = "furo"
html_static_path: list[str] = []
html_extra_path = ["index.html"]
html_show_sourcelink = html_copy_source = False
html_math_renderer = "mathml"  # MathJax would come from elsewhere
nb_execution_mode = "off"
myst_heading_anchors = 4  # such as GitHub makes
CONTENTS = "\n```{toctree}\n:hidden:\n:glob:\n\nnotebooks/*\ndata/*\nCONTRIBUTING\n```\n"
LINKED_PICTURE = re.compile(r'<a href="(\S+)"><img src="(\S+)"[^>]* alt="([^"]*)"></a>')


def readme_as_page(app: Any, name: str, text: list[str]) -> None:
    """HTML of GitHub's becomes Markdown, whose links are followed; the list of contents comes last."""
    if name == root_doc:
        readme = LINKED_PICTURE.sub(r"[![\3](\2)](\1)", text[0]).replace("```mermaid", "```text")
        text[0] = readme + CONTENTS


def links_in_outputs(_app: Any, _name: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """What cells print is no page to Sphinx: its links to notebooks lead to their pages."""
    if "body" in context:
        context["body"] = re.sub(r'href="(\w+)\.ipynb', r'href="\1.html', context["body"])


def formula(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """MathML in the page, which browsers draw themselves."""
    writer.body.append(latex2mathml.tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    app.connect("source-read", readme_as_page)
    app.connect("html-page-context", links_in_outputs)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
