"""Checkpoints: asynchronous, atomic, the latest few and the best, checked when written and when read.

* Orbax writes a checkpoint under another name and renames it when it is complete. A killed run leaves complete
  checkpoints only.
* Each checkpoint lists the sizes and checksums of its files, which are checked before anything else is read. Every
  process of a run checks them, so that no process waits in a collective operation for one that failed.
* A digest of the state, computed on the devices and saved with it, finds errors between the devices and the disk.
* A checkpoint contains the config of its run and is used for that run only, in whatever folder it is.
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
from experiments.io import digests, fields, files, sums
from rigl_jax.base import PyTree
from rigl_jax.messages import listed

UNKNOWN = -1.0
"""The accuracy of a checkpoint that was not evaluated, below all others. Orbax warns where there are no metrics."""

CONFIG = "config"
"""The key of the config among the facts of a checkpoint."""

Warn = Callable[[str], None]


class Checkpoints(NamedTuple):
    """The checkpoints of one run.

    Attributes:
      save: `(step, state, facts, accuracy)` starts writing and returns; the state may be donated at once. `facts` is
        JSON data saved with it, `accuracy` (None: unknown) ranks the checkpoint.
      restore: `abstract state -> (state, facts)` of the newest undamaged checkpoint, None where there is none.
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
    trusted: bool = True,
    step_of: Callable[[PyTree], int] | None = None,
    warn: Warn = logging.warning,
) -> Checkpoints:
    """Opens (or makes) a run's checkpoint folder.

    Args:
      directory: the folder, made if missing.
      keep: how many of the latest are kept, besides the best by accuracy.
      config: of the run, saved with every checkpoint. `restore` refuses a checkpoint of another run. None: neither.
      trusted: whether checkpoints without a config, as earlier versions wrote them, are known to be of this run.
      step_of: `state -> step`. A checkpoint whose folder has another number is renamed.
      warn: gets a line for a checkpoint that is damaged, has another number, is not named by a number (it is not
        read), or holds no config.

    Raises:
      OSError: here and from `save` and `close`: the folder cannot be written; earlier checkpoints are intact. From
        `restore`: a file cannot be read, which does not mean that it is damaged; nothing was changed.
      ValueError: from `restore`: the newest checkpoint is of another run.
    """
    with _one_line_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)  # orbax does not notice a file of that name
    _check_metrics(directory, warn)
    n_arrays, owner = 0, _Owner(config, trusted, warn)
    where, leave = _orbax_path(directory)
    try:
        with _one_line_errors(directory):
            manager = _manager(where, keep, lambda: _read_back(where, n_arrays))
    except OSError:
        leave()
        raise

    def save(step: int, state: PyTree, facts: Mapping[str, Any], accuracy: float | None) -> None:
        nonlocal n_arrays
        if step in manager.all_steps():
            return
        whole = {"state": fields.written(state), "digest": digests.digest(state)}
        n_arrays = len(jax.tree.leaves(whole))
        known = dict(facts) if config is None else {**facts, CONFIG: dict(config)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(whole), facts=ocp.args.JsonSave(known))
        with _one_line_errors(directory):  # also an error of the checkpoint before, which was still being written
            manager.save(step, args=args, metrics={"accuracy": UNKNOWN if accuracy is None else accuracy})

    def restore(abstract: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        manager.wait_until_finished()
        _warn_of_other_names(directory, warn)
        while steps := manager.all_steps():
            path = directory / str(step := max(steps))
            if flaw := _agreed_flaw(path):
                _set_aside(path, flaw, warn)
            elif (found := _read(manager, step, abstract, owner)) is None:
                _set_aside(path, "its digest does not fit its content", warn)
            elif step_of is None or (own := step_of(found[0])) == step:
                return found
            else:
                _rename_to_step(path, own, warn)
            sharding.all_agree(True)  # the first process has renamed it, so all read the list again
            manager.reload()
        return None

    def close() -> None:
        try:
            with _one_line_errors(directory):
                _close(manager)
        finally:
            leave()

    return Checkpoints(save, restore, close)


def _close(manager: ocp.CheckpointManager) -> None:
    """Closes the manager of orbax, and after an error waits for its other threads.

    They would fail when the interpreter ends, each waiting ten minutes for another one.
    """
    try:
        manager.close()
    except BaseException:
        with contextlib.suppress(Exception):
            manager.close()  # orbax raises an error once: this call continues where the first one stopped
        raise


_MISREAD = re.compile(r"[][*?\\:\udc80-\udcff]|^/(gs|s3|az)/")
"""Parts of a path that orbax would read as a pattern, a separator or a bucket, or cannot write as UTF-8."""


def _orbax_path(directory: Path) -> tuple[Path, Callable[[], None]]:
    """A path to the folder that orbax does not misread, and a function that releases it.

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
def _one_line_errors(directory: Path) -> Iterator[None]:
    """Turns any error of orbax and tensorstore into an OSError of one line.

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
    """The manager of orbax. The first process calls `written` when all files of a checkpoint exist, before a rename."""

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


def _check_metrics(directory: Path, warn: Warn) -> None:
    """Sets aside checkpoints with unreadable metrics, on which orbax would fail: it reads all metrics when it opens.

    Raises:
      OSError: in every process, where the first cannot read one.
    """
    failed = None
    for file in directory.glob("[0-9]*/metrics/metrics") if jax.process_index() == 0 else ():
        if not file.parents[1].name.isdigit():  # an incomplete one, which orbax removes
            continue
        try:
            if not isinstance((files.read_json(file) or {}).get("accuracy"), float):
                raise ValueError("its accuracy is no number")
        except ValueError as error:
            _set_aside(file.parents[1], _reason(error), warn)
        except OSError as error:
            failed = error
    _agree_that_read(failed)  # and no process opens the folder while the first one renames


def _agree_that_read(failed: OSError | None) -> None:
    """Stops all processes where one of them cannot read a file. All must call it.

    Raises:
      OSError: names the file. That it cannot be read now does not mean that it is damaged.
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
"""Names of folders that are checkpoints, were set aside, or are removed by orbax."""


def _warn_of_other_names(directory: Path, warn: Warn) -> None:
    """Warns of checkpoints that are not read because the name of their folder is not a step."""
    names = sorted(path.parent.name for path in directory.glob("*/state"))
    if others := [name for name in names if not _STEP.fullmatch(name)]:
        warn(f"checkpoint: {directory} holds {listed(others)}, not read: a checkpoint's folder is named by its step")


def _set_aside(path: Path, flaw: str, warn: Warn) -> None:
    _rename(path, f"damaged-{path.name}", f"is damaged and set aside ({flaw[:160]}); a whole one before it", warn)


def _rename_to_step(path: Path, step: int, warn: Warn) -> None:
    """Renames a checkpoint to its own step, or sets it aside where that name is taken."""
    if (right := path.with_name(str(step))).exists():
        _rename(path, f"damaged-{path.name}", f"is that of step {step} and set aside; the other of that step", warn)
    else:
        _rename(path, right.name, f"is that of step {step} and gets its number back; the newest one", warn)


def _rename(path: Path, name: str, why: str, warn: Warn) -> None:
    warn(f"checkpoint {path.name} {why} is used, if any")
    if jax.process_index() == 0:
        path.rename(_free(path.with_name(name)))


def _free(path: Path) -> Path:
    """The path, with a number appended if it is taken."""
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


class _Owner(NamedTuple):
    """The run that checkpoints must belong to; see `open_checkpoints`."""

    config: Mapping[str, Any] | None
    trusted: bool
    warn: Warn

    def check(self, step: int, made_with: Mapping[str, Any] | None) -> None:
        """Refuses a checkpoint of another run.

        Raises:
          ValueError: lists the differences.
        """
        if self.config is None:
            return
        if made_with is not None:
            if found := resuming.differences(made_with, self.config):
                differ = "; ".join(found)
                raise ValueError(f"checkpoint {step} is of another run ({differ}); move it away to go on without it")
            return
        silent = f"checkpoint {step} was written by an earlier version and does not say of which run it is"
        if not self.trusted:
            raise ValueError(f"{silent}, nor does a config.json; put that back, or give another workdir")
        self.warn(f"{silent}; it is believed")


def _read(
    manager: ocp.CheckpointManager, step: int, abstract: PyTree, owner: _Owner
) -> tuple[PyTree, dict[str, Any]] | None:
    """The content of a checkpoint with undamaged files; None, in every process, where its digest does not match.

    Raises:
      ValueError: it does not fit what is asked for, or is of another run.
    """
    facts = _restored(manager, step, facts=ocp.args.JsonRestore())["facts"]
    owner.check(step, facts.pop(CONFIG, None))
    placed = jax.tree.leaves(abstract)[0].sharding
    if isinstance(placed, NamedSharding):
        placed = NamedSharding(placed.mesh, PartitionSpec())
    wanted = {"state": fields.written(abstract), "digest": jax.ShapeDtypeStruct((), jnp.uint32, sharding=placed)}
    found = _restored(manager, step, state=ocp.args.StandardRestore(wanted))["state"]
    state = fields.read(abstract, found["state"])
    if int(found["digest"]) != int(digests.digest(state)):
        return None
    # Copies: what orbax restored may be memory that it owns, and the training step donates its state.
    return jax.tree.map(_copied, abstract, state), facts


def _copied(wanted: Any, leaf: Any) -> Any:
    """A copy of a restored array. Of a typed key, as older checkpoints hold, the data where data are wanted."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and wanted.dtype == jnp.uint32:
        return jax.device_put(jax.random.key_data(leaf), wanted.sharding)
    return jnp.copy(leaf)


def _restored(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # of whatever type orbax chooses
        raise ValueError(f"checkpoint {step} is whole but does not fit this run: {_reason(error)}") from error
