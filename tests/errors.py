"""What a refusal must be: an error of one line, raised on purpose, that names the argument, leaf, key or file."""

import contextlib
import pathlib
import re
import traceback

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = tuple(str(ROOT / package) for package in ("rigl_jax", "experiments", "configs"))


def names(text, name):
    """Whether `name` stands in the text as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def check(error, *named):
    """One line that holds all names, and comes from our own `raise`, not from something that we call."""
    text = str(error)
    assert text.strip()
    assert "\n" not in text
    assert [name for name in named if not names(text, name)] == [], text
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename.startswith(OURS), f"raised in {last.filename}: {error}"
    assert last.line.startswith("raise"), f"not raised on purpose, at {last.line!r}: {error}"


@contextlib.contextmanager
def refused(*named, error=ValueError):
    """What is done inside must raise such an error; see `check`."""
    with pytest.raises(error) as caught:
        yield caught
    check(caught.value, *named)


def one_line(capsys, *named, start="error: "):
    """The line on stderr of a command that refused."""
    text = capsys.readouterr().err
    assert [name for name in named if not names(text, name)] == [], text
    assert text.startswith(start)
    assert text.count("\n") == 1
    assert "Traceback" not in text
