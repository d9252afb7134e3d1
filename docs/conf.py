"""How the documentation is built: `sphinx-build -W -b html docs docs/_build/html`."""

import re
from pathlib import Path

import downloadview_async

project = "downloadview_async"
author = "the downloadview_async contributors"
copyright = "the downloadview_async contributors"
version = release = downloadview_async.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinx_design"]
myst_enable_extensions = ["colon_fence", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {"release": release}
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"downloadview_async {release}"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

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


MISSING = {
    '<p class="caption" role="heading"': 'aria-level="2"',
    '<aside class="sidebar-drawer"': 'aria-label="Pages"',
    '<aside class="toc-drawer': 'aria-label="On this page"',
    # what scrolls in a small window can be scrolled by keys
    "<pre": 'tabindex="0"',
    '<div class="table-wrapper': 'tabindex="0"',
}


def mend_pages(app, error):
    """Add to the pages what axe-core misses. Pages that have it stay as they are."""
    if error is None and app.builder.name == "html":
        for page in Path(app.outdir).rglob("*.html"):
            text = page.read_text()
            for tag, attribute in MISSING.items():
                name, space, rest = tag.partition(" ")
                old = f"{name}(?! {attribute})(?=[ >]){space}{rest}"
                text = re.sub(old, f"{name} {attribute}{space}{rest}", text)
            title, results = "<h1>Search</h1>", '<div id="search-results">'
            if title not in text:
                text = text.replace(results, title + results)
            page.write_text(text)


def setup(app):
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("build-finished", mend_pages)
