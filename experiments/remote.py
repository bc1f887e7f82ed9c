"""What starts a run on other machines: on several hosts, or on every worker of a TPU slice."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

from experiments.command import ROOT


def on_hosts(command: Sequence[str], hosts: Sequence[str], port: int) -> list[str]:
    """The command of each host for one run: the same but for its number. The first host is the coordinator.

    Args:
      command: of the run, whose directory must be one folder that all hosts see.
      hosts: addresses by which the hosts reach each other.
      port: free on the first host.

    Raises:
      ValueError: fewer than 2 hosts, or one named twice.
    """
    if len(hosts) < 2 or len(set(hosts)) < len(hosts) or not all(re.fullmatch(r"[\w.:\[\]-]+", host) for host in hosts):
        raise ValueError(f"launch: --hosts takes two or more different addresses, got {','.join(hosts)!r}")
    if not 0 < port < 1 << 16:
        raise ValueError(f"launch: --port must be from 1 to 65535, got {port}")
    line = shlex.join(["python", *_in_project(command[1:]), "--distributed"])
    place = f"JAX_COORDINATOR_ADDRESS={shlex.quote(f'{hosts[0]}:{port}')} JAX_NUM_PROCESSES={len(hosts)}"
    return [f"# on {host}\n{place} JAX_PROCESS_ID={i} {line}" for i, host in enumerate(hosts)]


def _in_project(arguments: Sequence[str]) -> list[str]:
    """The arguments for another machine, in its copy of the project: there the project's configs have another path."""
    configs = f"{ROOT}{os.sep}configs{os.sep}"
    return [f"configs/{a.removeprefix(configs)}" if a.startswith(configs) else a for a in arguments]


def on_tpu(command: Sequence[str], slice_: str) -> str:
    """The one command that starts a run on every worker of a TPU slice, `NAME:ZONE`; JAX finds their places itself.

    Raises:
      ValueError: not a name and a zone.
    """
    name, _, zone = slice_.partition(":")
    if not all(re.fullmatch(r"\w[\w.-]*", part) for part in (name, zone)):
        raise ValueError(f"launch: --tpu takes NAME:ZONE, got {slice_!r}")
    line = shlex.join([".venv/bin/python", *_in_project(command[1:]), "--distributed"])
    remote = f"cd {shlex.quote(ROOT.name)} && {line}"
    return shlex.join(
        ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, "--zone", zone, "--worker=all", f"--command={remote}"]
    )
