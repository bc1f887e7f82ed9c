"""Checkpoints: asynchronous, atomic, the latest few and the best, checked when written and when read.

Orbax writes a checkpoint beside the run and renames it when it is whole, so a run that is killed leaves whole
checkpoints or none. What a disk does to a file later is found before anything else is read: each checkpoint lists the
sizes and checksums of its files, and every process of a run compares them by itself, so that none is left alone in a
collective by another that failed. What goes wrong between the devices and the disk is found by a digest, computed on
the devices over the bits of the state and saved with it. A checkpoint also holds the config of its run: it is not
believed for the folder that it lies in.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from experiments import resuming, sharding
from experiments.io import digests, files, sums
from rigl_jax.base import PyTree
from rigl_jax.messages import listed

UNKNOWN = -1.0
"""Stands for an accuracy that was not measured: below all that are. Without a metric, orbax warns of a checkpoint."""

CONFIG = "config"
"""Where the config lies among the facts of a checkpoint."""

Say = Callable[[str], None]


class Checkpoints(NamedTuple):
    """The checkpoints of one run.

    Attributes:
      save: `(step, state, facts, accuracy)` starts writing and returns; the state may be donated at once. `facts` is
        JSON data kept along, `accuracy` (None: unknown) ranks the checkpoint.
      restore: `abstract state -> (state, facts)` of the newest checkpoint that is whole, or None where there is none.
      close: waits until everything is on disk.
    """

    save: Callable[[int, PyTree, Mapping[str, Any], float | None], None]
    restore: Callable[[PyTree], tuple[PyTree, dict[str, Any]] | None]
    close: Callable[[], None]


def open_checkpoints(
    directory: Path,
    *,
    keep: int,
    config: Mapping[str, Any] | None = None,
    vouched: bool = True,
    step_of: Callable[[PyTree], int] | None = None,
    say: Say = logging.warning,
) -> Checkpoints:
    """Opens (or makes) a run's checkpoint folder.

    Args:
      directory: where; made if missing.
      keep: how many of the latest are kept; the best by accuracy is kept besides.
      config: of the run, saved with every checkpoint; one of a run that learns something else is refused by `restore`.
        None saves and checks none.
      vouched: whether something else says that checkpoints of earlier versions, which hold no config, are of this run.
      step_of: the step that a state is of. A checkpoint whose folder was given another number gets its own back.
      say: told when a checkpoint turns out to be damaged, to have another number, to have a name that is no number
        (it is not read), or to hold no config.

    Raises:
      OSError: here, or from `save` and `close`: the folder cannot be written. What was there before is intact. From
        `restore`: a file cannot be read, which is no damage; nothing was changed.
      ValueError: from `restore`: the newest checkpoint is of another run.
    """
    with _told(directory):
        directory.mkdir(parents=True, exist_ok=True)  # orbax does not notice a file of that name
    _check_metrics(directory, say)
    n_arrays, bound = 0, _Bound(config, vouched, say)
    where, leave = _seen_by_orbax(directory)
    try:
        with _told(directory):
            manager = _manager(where, keep, lambda: _read_back(where, n_arrays))
    except OSError:
        leave()
        raise

    def save(step: int, state: PyTree, facts: Mapping[str, Any], accuracy: float | None) -> None:
        nonlocal n_arrays
        if step in manager.all_steps():
            return
        whole = {"state": state, "digest": digests.digest(state)}
        n_arrays = len(jax.tree.leaves(whole))
        known = dict(facts) if config is None else {**facts, CONFIG: dict(config)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(whole), facts=ocp.args.JsonSave(known))
        with _told(directory):  # also what went wrong with the one before, which was still being written
            manager.save(step, args=args, metrics={"accuracy": UNKNOWN if accuracy is None else accuracy})

    def restore(abstract: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        manager.wait_until_finished()
        _tell_of_others(directory, say)
        while steps := manager.all_steps():
            path = directory / str(step := max(steps))
            if flaw := _agreed_flaw(path):
                _set_aside(path, flaw, say)
            elif (found := _read(manager, step, abstract, bound)) is None:
                _set_aside(path, "its digest does not fit its content", say)
            elif step_of is None or (own := step_of(found[0])) == step:
                return found
            else:
                _put_back(path, own, say)
            sharding.all_agree(True)  # the first process has renamed it: all look again
            manager.reload()
        return None

    def close() -> None:
        try:
            with _told(directory):
                manager.close()
        finally:
            leave()

    return Checkpoints(save, restore, close)


_MISREAD = re.compile(r"[][*?\\:\udc80-\udcff]|^/(gs|s3|az)/")
"""In a path: what orbax takes for a pattern, a separator or the address of a bucket, or cannot write as UTF-8."""


def _seen_by_orbax(directory: Path) -> tuple[Path, Callable[[], None]]:
    """A path to the folder that orbax reads as it is meant, and what to call when done with it.

    Raises:
      ValueError: there is none on this system.
    """
    if not _MISREAD.search(str(directory.absolute())):
        return directory.absolute(), lambda: None
    if not Path("/proc/self/fd").is_dir():
        raise ValueError(f"checkpoint: orbax cannot write where the path has one of []*?\\:, got {str(directory)!r}")
    descriptor = os.open(directory, os.O_RDONLY)
    return Path(f"/proc/self/fd/{descriptor}"), lambda: os.close(descriptor)


@contextlib.contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Turns whatever orbax and tensorstore raise where a disk is full or closed into one line.

    Raises:
      OSError: in place of theirs.
    """
    try:
        yield
    except Exception as error:
        folders = [path.name for path in directory.glob("[0-9]*") if path.is_dir()]
        steps = sorted((name for name in folders if name.isdigit()), key=int)
        reason = re.sub(r"/proc/self/fd/\d+", lambda _: str(directory), _reason(error))
        left = f"those of steps {', '.join(steps)} are intact" if steps else "there is none yet"
        raise OSError(f"checkpoint: cannot write to {directory}: {reason}; of earlier ones {left}") from error


def _reason(error: BaseException) -> str:
    """The first line of an error, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _manager(directory: Path, keep: int, written: Callable[[], None]) -> ocp.CheckpointManager:
    """Orbax's own; the first process calls `written` when a checkpoint's files are all there, not yet renamed."""

    def accuracy(metrics: Mapping[str, float]) -> float:
        return metrics["accuracy"]

    policy = AnyPreservationPolicy(
        [LatestN(keep), BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)]
    )
    # best_fn besides the policy: without it orbax does not read the metrics of earlier checkpoints back.
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=accuracy,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=written),
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _check_metrics(directory: Path, say: Say) -> None:
    """Sets aside what orbax would stumble over on opening the folder: it reads all metrics at once, and trusts them.

    Raises:
      OSError: in every process, where the first cannot read one.
    """
    failed = None
    for file in directory.glob("[0-9]*/metrics/metrics") if jax.process_index() == 0 else ():
        if not file.parents[1].name.isdigit():  # a half-written one, which orbax removes
            continue
        try:
            if not isinstance((files.read_json(file) or {}).get("accuracy"), float):
                raise ValueError("its accuracy is no number")
        except ValueError as error:
            _set_aside(file.parents[1], _reason(error), say)
        except OSError as error:
            failed = error
    _agree_that_read(failed)  # and no process opens the folder while the first one renames


def _agree_that_read(failed: OSError | None) -> None:
    """Stops all processes where one of them cannot read a file. All must call it.

    Raises:
      OSError: names the file. That it cannot be read now does not say that it is damaged.
    """
    if not sharding.all_agree(failed is None):
        what = "a file in another process" if failed is None else f"{failed.filename}: {failed.strerror or failed}"
        raise OSError(f"checkpoint: cannot read {what}; nothing was changed, try again") from failed


def _read_back(directory: Path, n_arrays: int) -> None:
    """Checks and lists the files of the checkpoint that is being written; there is only one at a time."""
    (path,) = directory.glob("*.orbax-checkpoint-tmp")
    sums.write(path, n_arrays)


def _agreed_flaw(path: Path) -> str:
    """What is wrong with a checkpoint's files, in any of the processes; empty: nothing.

    Raises:
      OSError: in every process, where one of them cannot read a file.
    """
    flaw, failed = "", None
    try:
        flaw = sums.flaw(path)
    except OSError as error:
        failed = error
    _agree_that_read(failed)
    return flaw if sharding.all_agree(not flaw) else flaw or "another process reads something else"


_STEP = re.compile(r"0|[1-9][0-9]*|damaged-.*|.*\.orbax-checkpoint-tmp.*", re.DOTALL)
"""Names of folders that orbax reads, that were set aside with a word, or that it removes."""


def _tell_of_others(directory: Path, say: Say) -> None:
    """Tells of checkpoints that are not looked at, because their folders were given names that are no steps."""
    names = sorted(path.parent.name for path in directory.glob("*/state"))
    if others := [name for name in names if not _STEP.fullmatch(name)]:
        say(f"checkpoint: {directory} holds {listed(others)}, not read: a checkpoint's folder is named by its step")


def _set_aside(path: Path, flaw: str, say: Say) -> None:
    _rename(path, f"damaged-{path.name}", f"is damaged and set aside ({flaw[:160]}); a whole one before it", say)


def _put_back(path: Path, step: int, say: Say) -> None:
    """Gives a checkpoint the number of its step, or sets it aside where there is one of that step."""
    if (right := path.with_name(str(step))).exists():
        _rename(path, f"damaged-{path.name}", f"is that of step {step} and set aside; the other of that step", say)
    else:
        _rename(path, right.name, f"is that of step {step} and gets its number back; the newest one", say)


def _rename(path: Path, name: str, why: str, say: Say) -> None:
    say(f"checkpoint {path.name} {why} is used, if any")
    if jax.process_index() == 0:
        path.rename(_free(path.with_name(name)))


def _free(path: Path) -> Path:
    """The path, or with a number where it is taken."""
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


class _Bound(NamedTuple):
    """To which run checkpoints must belong: see `open_checkpoints`."""

    config: Mapping[str, Any] | None
    vouched: bool
    say: Say

    def check(self, step: int, made_with: Mapping[str, Any] | None) -> None:
        """Refuses a checkpoint of another run.

        Raises:
          ValueError: says what differs.
        """
        if self.config is None:
            return
        if made_with is not None:
            if found := resuming.differences(made_with, self.config):
                differ = "; ".join(found)
                raise ValueError(f"checkpoint {step} is of another run ({differ}); move it away to go on without it")
            return
        silent = f"checkpoint {step} was written by an earlier version and does not say of which run it is"
        if not self.vouched:
            raise ValueError(f"{silent}, nor does a config.json; put that back, or give another workdir")
        self.say(f"{silent}; it is believed")


def _read(
    manager: ocp.CheckpointManager, step: int, abstract: PyTree, bound: _Bound
) -> tuple[PyTree, dict[str, Any]] | None:
    """A checkpoint whose files are whole; None where its digest does not fit, on every process alike.

    Raises:
      ValueError: it holds something else than what is asked for, or is of another run.
    """
    facts = _restored(manager, step, facts=ocp.args.JsonRestore())["facts"]
    bound.check(step, facts.pop(CONFIG, None))
    placed = jax.tree.leaves(abstract)[0].sharding
    if isinstance(placed, NamedSharding):
        placed = NamedSharding(placed.mesh, PartitionSpec())
    wanted = {"state": abstract, "digest": jax.ShapeDtypeStruct((), jnp.uint32, sharding=placed)}
    found = _restored(manager, step, state=ocp.args.StandardRestore(wanted))["state"]
    if int(found["digest"]) != int(digests.digest(found["state"])):
        return None
    # Copies: what orbax restored may be memory that it owns, and the training step donates its state.
    return jax.tree.map(_copied, abstract, found["state"]), facts


def _copied(wanted: Any, leaf: Any) -> Any:
    """A copy of what was restored; the data of a typed key, which older checkpoints hold, where data are wanted."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and wanted.dtype == jnp.uint32:
        return jax.device_put(jax.random.key_data(leaf), wanted.sharding)
    return jnp.copy(leaf)


def _restored(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # of whatever type orbax chooses
        raise ValueError(f"checkpoint {step} is whole but does not fit this run: {_reason(error)}") from error
