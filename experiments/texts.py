"""Names that come from files, made safe for where they are shown: one function for each place."""

from __future__ import annotations

import html as _html
import re
import zlib

from rich.text import Text

from rigl_jax.messages import printable


def plain(text: object) -> str:
    r"""One line that a terminal only prints: control characters, line ends and lone surrogates as escapes.

    >>> plain("a\x1b[31m b\n")
    'a\\x1b[31m b\\n'
    """
    return printable(str(text))


def terminal(text: object) -> Text:
    """For rich, which takes brackets in a str for markup."""
    return Text(plain(text))


def html(text: object) -> str:
    """For an HTML page, between tags and in quoted attributes."""
    return _html.escape(plain(text))


def markdown(text: object) -> str:
    """For a cell of a Markdown table."""
    return plain(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def figure(text: object) -> str:
    """For matplotlib, which takes what stands between dollars for a formula, and hides labels that begin with "_"."""
    shown = plain(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def file_name(text: str) -> str:
    """For a file: letters, digits and a few signs, and short enough.

    >>> file_name("digits/mlp-accuracy")
    'digits_mlp-accuracy'
    """
    name = re.sub(r"[^\w.,=+ -]", "_", text)
    return name if len(name.encode()) <= 200 else f"{name[:40]}-{zlib.crc32(name.encode()):08x}-{name[-9:]}"
