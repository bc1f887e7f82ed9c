"""Turns text into a TFDS data set for character models: `python -m experiments.import_text --name kjv`.

The source is a file, or a folder with a file each for training, validation and test, as WikiText-103 is published. The
King James text, 4 MB, comes with Debian and Ubuntu: `apt-get install bible-kjv`, and needs no source.
Neither network nor TensorFlow is needed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tensorflow_datasets as tfds

from experiments import texts
from experiments.data import text, writer

KJV = "kjv"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        return _run(_options(argv))
    except (ValueError, OSError) as error:
        print(f"error: {texts.plain(error)}", file=sys.stderr)
        return 1


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.import_text", description=__doc__.splitlines()[0])
    parser.add_argument("--name", default=KJV, help="of the data set, lower case")
    parser.add_argument("--source", help="file or folder of text; not needed for kjv")
    parser.add_argument("--data_dir", help="of TFDS; $TFDS_DATA_DIR or ~/tensorflow_datasets if not given")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> int:
    name = options.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"--name must be lower-case letters, digits and underscores, got {name!r}")
    if options.source is None and name != KJV:
        raise ValueError(f"--source must name the file or the folder with the text of {name!r}")
    data_dir = os.fspath(writer.data_root(options.data_dir))
    if there := writer.written(name, data_dir):
        print(f"{there} is there already; remove it to import again")
        return 0
    tfds.disable_progress_bar()
    if options.source is None:
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder) / name).write_bytes(king_james())
            parts = text.read_source(file)
    else:
        parts = text.read_source(options.source)
    folder = text.write(name, parts, data_dir)
    if text.prepared(name, data_dir) != parts:
        raise ValueError(f"{folder} does not read back as it was written; remove it and try again")
    print(f"{folder}: {' + '.join(str(len(part)) for part in parts.values())} bytes, read back and compared")
    return 0


def king_james() -> bytes:
    """The text that Debian's `bible` prints, a verse a line, without the numbers of the verses.

    Raises:
      ValueError: the command is not there, or prints something else.
    """
    if shutil.which("bible") is None:
        raise ValueError("the command bible is not there; type: apt-get install bible-kjv, or give --source")
    printed = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], stdout=subprocess.PIPE, check=True).stdout
    found = re.sub(rb"(?m)^[0-9]?[A-Z][a-z]+[0-9]+:[0-9]+ ", b"", printed)
    if not found.startswith(b"In the beginning God created") or len(found) < 4_000_000:
        raise ValueError(f"bible must print the whole text, from Genesis on, got {found[:40]!r}, {len(found)} bytes")
    return found


if __name__ == "__main__":
    sys.exit(main())
