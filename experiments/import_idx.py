"""Turns raw IDX files into a TFDS data set: `python -m experiments.import_idx --name fashion_mnist`.

The set has the name, version, features and order of the official one, so that the same config serves those who
have built that one from the network. Neither network nor TensorFlow is needed. Fashion-MNIST comes with Debian and
Ubuntu: `apt-get install dataset-fashion-mnist`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from experiments import texts
from experiments.data import idx, sources, writer


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _options(argv)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        print(f"error: {texts.plain(error)}", file=sys.stderr)
        return 1


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.import_idx", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--name", default="fashion_mnist", help="of the TFDS data set: fashion_mnist, mnist, or your own"
    )
    parser.add_argument("--source", help="folder of the four IDX files; that of a Debian package, if it has one")
    parser.add_argument("--data_dir", help="of TFDS; $TFDS_DATA_DIR or ~/tensorflow_datasets if not given")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> int:
    name, special = options.name, sources.known(options.name)
    source = options.source or special.folder
    if source is None:
        raise ValueError(f"--source must name the folder with the IDX files of {name!r}")
    if options.source is None and not Path(source).is_dir():
        raise ValueError(f"{source} is not there; type: apt-get install {special.package}, or give --source FOLDER")
    data_dir = os.fspath(writer.data_root(options.data_dir))
    if there := writer.written(name, data_dir):
        print(f"{there} is there already; remove it to import again")
        return 0
    tfds.disable_progress_bar()  # its three nested bars; ours says the same in one
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        total = sum(len(idx.read(labels)) for _, labels in idx.find(source).values())
        write, check = (progress.add_task(text, total=total) for text in ("writing", "checking"))
        folder, parts = idx.import_folder(name, source, data_dir, lambda: progress.advance(write))
        written = sources.prepared(name, data_dir)
        for part, split in zip(parts.values(), (written.train, written.test), strict=True):
            if _digests(*part) != _digests(split.images, split.labels):
                raise ValueError(f"{folder} does not read back as it was written; remove it and try again")
            progress.advance(check, len(part.labels))
    print(f"{folder}: {' + '.join(str(len(part.labels)) for part in parts.values())} examples, read back and compared")
    return 0


def _digests(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    """One digest for each example, sorted: TFDS shuffles what it writes."""
    pairs = zip(images, np.asarray(labels).astype(np.uint8), strict=True)
    return sorted(hashlib.blake2b(image.tobytes() + label.tobytes(), digest_size=16).digest() for image, label in pairs)


if __name__ == "__main__":
    sys.exit(main())
