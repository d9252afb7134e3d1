"""`strace`: system calls of a running process fail, or return less, while a test wants them to."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.servers import wait_for_text


@contextlib.contextmanager
def injected(pid: int, *faults: str, path: str | None = None) -> Iterator[Path]:
    """Inject faults into all threads of a process: `sendfile:error=EINVAL`, `pread64:error=EIO:when=3+`.

    path: only into calls with this path, as they have it. Gives the file in which strace writes the calls.
    """
    with tempfile.TemporaryDirectory() as directory:
        log, calls = Path(directory, "log"), Path(directory, "calls")
        names = ",".join(fault.partition(":")[0] for fault in faults)
        command = ["strace", "-f", "-o", str(calls), "-e", f"trace={names}"]
        for fault in faults:
            command += ["-e", f"inject={fault}"]
        if path is not None:
            command += ["-P", path]
        with log.open("wb") as output:
            strace = subprocess.Popen([*command, "-p", str(pid)], stdout=output, stderr=output)
        try:
            wait_for_text(log, "attached")
            yield calls
        finally:
            strace.terminate()
            strace.wait(30)


@cache
def why_not() -> str | None:
    """Return why strace cannot be attached to a process here, or None if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed: apt install strace"
    trial = subprocess.run(
        ["strace", "-f", "-o", "/dev/null", "-e", "inject=sendfile:error=EINVAL", sys.executable, "-c", ""],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if trial.returncode == 0 else f"strace: {trial.stderr.strip()}"
