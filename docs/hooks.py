# SPDX-License-Identifier: BSD-3-Clause
"""What the build of the docs site does to pages; mkdocs.yml names this file."""

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings, such as the one for a class, as names; those that the page explains are links.

    Args:
        html: The content of a page.
        _: What else MkDocs gives.

    Returns:
        The content without roles.
    """

    def as_name(match: re.Match[str]) -> str:
        name = match[1]
        anchor = f"torchrec_scratchpipe.{name.removeprefix('torchrec_scratchpipe.')}"
        code = f"<code>{name}</code>"
        return f'<a href="#{anchor}">{code}</a>' if f'id="{anchor}"' in html else code

    return ROLE.sub(as_name, html)
