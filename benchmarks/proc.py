"""What the kernel knows of processes: processor time, memory and descriptors, from /proc (Linux)."""

import os
import platform
import re
import time
from collections.abc import Iterable
from pathlib import Path


def of_sessions(leaders: Iterable[int]) -> list[int]:
    """Return the processes of the sessions that `leaders` lead: a server's master, its workers and helpers."""
    wanted = set(leaders)
    numbers = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            session = int(_stat(int(directory.name))[3])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if session in wanted:
            numbers.append(int(directory.name))
    return numbers


def cpu_seconds(processes: Iterable[int]) -> float:
    """Return what the processes have used of the processor, user and system, to the nanosecond, without children."""
    return sum(time.clock_gettime(_clock(process)) for process in processes)


def _clock(process: int) -> int:
    # the number of another process's clock, as clock_getcpuclockid(3) makes it
    return (~process << 3) | 2


def resident(processes: Iterable[int]) -> int:
    """Return the resident memory of the processes in bytes."""
    return sum(_status(process, "VmRSS") for process in processes)


def reset_peak(processes: Iterable[int]) -> None:
    """Let `resident_peak` begin at what is resident now."""
    for process in processes:
        Path(f"/proc/{process}/clear_refs").write_text("5")


def resident_peak(processes: Iterable[int]) -> int:
    """Return the most that has been resident, in bytes, summed over the processes."""
    return sum(_status(process, "VmHWM") for process in processes)


def descriptors(processes: Iterable[int]) -> int:
    """Return how many descriptors the processes have open."""
    return sum(len(os.listdir(f"/proc/{process}/fd")) for process in processes)


def busy_share(seconds: float) -> float:
    """Return how much of this machine's processors is in use by whatever else it does, from 0 to 1."""
    idle, everything = _idle()
    time.sleep(seconds)
    idle_then, everything_then = _idle()
    return 1 - (idle_then - idle) / max(everything_then - everything, 1)


def _idle() -> tuple[int, int]:
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _stat(process: int) -> list[str]:
    # the fields after the name, which may contain anything: state, parent, group, session, ...
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _status(process: int, name: str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0  # a process that has ended and is not reaped


def processor() -> str:
    """Return the name of the processor."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return model[1] if model else platform.machine()
