"""Sphinx builds the site from the Markdown of the whole checkout: `make site`, then open build/site/docs/index.html.

The files are those that people read in the checkout, with links between them; nothing is fetched from the network.
"""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

project = "TokenFormer trainer"
author = copyright = "the authors, Apache-2.0"  # noqa: A001 - Sphinx reads this name
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/**.md", "megatron/**.md", "tools/**.md"]

myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 4
# Its links to files that are no pages of the site become downloads.
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_title = project
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
highlight_language = "bash"


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    number = get_node_equation_number(self, node) if node.get("label") else ""
    label = f'<span class="eqno">({number})</span>' if number else ""
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}{label}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Writes formulas as MathML, which browsers draw without a script."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
