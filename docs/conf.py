"""How the documentation is built: `sphinx-build -W -b html docs docs/_build/html`."""

import re

import downloadview_async

project = "downloadview_async"
author = "the downloadview_async contributors"
copyright = "the downloadview_async contributors"
version = release = downloadview_async.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"downloadview_async {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True


def plain_docstring(app, what, name, obj, options, lines):
    """Make reStructuredText of docstrings, in which single backticks are around code.

    A line such as "size: bytes." begins a paragraph of its own, about what it names.
    """
    text = re.sub(
        r"`([^`\n]+)`|([*|]|_(?=\W|$))",
        lambda found: f"``{found[1]}``" if found[1] else f"\\{found[2]}",
        "\n".join(lines),
    )
    text = re.sub(
        r"^([a-z][a-z_]*(?:, [a-z_]+)*)(?=(?: \([^)\n]*\))?: )",
        r"\n**\1**",
        text,
        flags=re.MULTILINE,
    )
    lines[:] = text.split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", plain_docstring)
