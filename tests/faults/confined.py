"""Mounts that only one process and its children see: a full disk, a read-only one, no `/proc`."""

import os
import subprocess
from collections.abc import Sequence
from functools import cache


def confined(*commands: str) -> list[str]:
    """Return what the command of a process begins with: a mount namespace, in which the shell runs `commands` first."""
    unshare = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid() != 0:
        unshare += ["--map-root-user"]
    return [*unshare, "sh", "-ec", "; ".join([*commands, 'exec "$@"']), "sh"]


def tmpfs(path: object, size: str = "8m") -> str:
    """Return the command that mounts an empty disk of a size in memory."""
    return f"mount -t tmpfs -o size={size} none '{path}'"


@cache
def why_not() -> str | None:
    """Return why nothing can be mounted here for one process alone, or None if it can."""
    command: Sequence[str] = [*confined(tmpfs("/mnt")), "true"]
    trial = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if trial.returncode == 0 else f"mounts for one process: {trial.stderr.strip()}"
