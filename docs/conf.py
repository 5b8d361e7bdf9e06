"""How Sphinx builds these pages: `make docs`. Warnings are errors; what comes out opens from disk, without a network."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from generate import write_pages  # noqa: E402
from tables import tables  # noqa: E402

from ubsmoe import __version__  # noqa: E402

project = "ubsmoe"
release = __version__
copyright = "the ubsmoe contributors"
extensions = ["myst_parser"]
exclude_patterns = ["Thumbs.db", "generated/tables"]  # tables.md includes these
highlight_language = "text"
myst_enable_extensions = ["deflist"]  # the glossary
myst_heading_anchors = 3
html_theme = "furo"
html_title = "ubsmoe"
html_static_path = ["static"]
html_css_files = ["ubsmoe.css"]
html_copy_source = False
html_show_sphinx = False

LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(?:https?:)?//[^>]*>|<link(?![^>]*canonical)[^>]*href=\"(?:https?:)?//[^>]*>"
)


def setup(app: Sphinx) -> None:
    """Generate pages before the build; look for anything from elsewhere after it."""
    write_pages(HERE / "generated", tables())
    app.connect("build-finished", _check_offline)


def _check_offline(app: Sphinx, failure: Exception | None) -> None:
    """Refuse a page that would load something from a network."""
    if failure or app.builder.name != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        loaded = LOADED.search(page.read_text(encoding="utf-8"))
        if loaded:
            raise SphinxError(f"{page.name} loads from a network: {loaded[0]}")
