# SPDX-License-Identifier: BSD-3-Clause
"""One HTML file that needs nothing else: text, tables and pictures, for a wide screen and for a narrow one."""

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchrec_scratchpipe.errors import ConfigError

__all__ = ["Page", "check_page"]

WIDE, NARROW = (10.5, 4.2), (4.2, 4.2)  # inches
_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff }
body { max-width: 1080px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.6em; line-height: 1.2; margin: .4em 0 } h2 { font-size: 1.2em; margin: 1.6em 0 .4em }
p, li { max-width: 75ch } .table { overflow-x: auto }
table { border-collapse: collapse; font-size: .88em; font-variant-numeric: tabular-nums }
th, td { padding: 3px 12px 3px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #d8dee4 }
th:first-child, td:first-child { text-align: left }
figure { margin: 8px 0 } figure img { width: 100%; height: auto } .narrow { display: none }
@media (max-width: 700px) { .wide { display: none } .narrow { display: block } }
"""


class Page:
    """Puts a page together, from the top down.

    Args:
        title: Its heading, and the name of the window.
    """

    def __init__(self, title: str) -> None:
        self._title = html.escape(title)
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """One paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def points(self, texts: Sequence[str]) -> None:
        """A list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>")

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others are numbers."""
        head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(
            f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def picture(self, alternative: str, draw: Callable[[Any, bool], None]) -> None:
        """A picture in two widths.

        Args:
            alternative: What it shows, for who cannot see it.
            draw: Takes a figure of matplotlib, and whether it is the narrow one.
        """
        shown = html.escape(alternative)
        images = "".join(
            f'<img class="{name}" alt="{shown}" src="data:image/svg+xml;base64,{_svg(draw, is_narrow)}">'
            for name, is_narrow in (("wide", False), ("narrow", True))
        )
        self._parts.append(f"<figure>{images}</figure>")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page."""
        Path(path).write_text(
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{self._title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
            f"<body><h1>{self._title}</h1>\n" + "\n".join(self._parts) + "\n</body></html>\n",
            encoding="utf-8",
        )


def check_page(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError if a page cannot have pictures."""
    try:
        import matplotlib.figure  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ConfigError(f"{path}: an HTML report needs matplotlib. Install torchrec-scratchpipe[plots].") from error


def _svg(draw: Callable[[Any, bool], None], is_narrow: bool) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=NARROW if is_narrow else WIDE, layout="constrained")
        draw(figure, is_narrow)
        target = io.BytesIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
    return base64.b64encode(target.getvalue()).decode("ascii")
