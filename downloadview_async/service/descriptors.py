"""The file descriptors of a process: as many as the system allows it, and an error if it cannot start with them."""

import contextlib
import os
import resource

from downloadview_async.service.settings import Unavailable

_TO_START = 32
"""An event loop takes about 10, and each source, log, store and database some more."""


def use_all_descriptors() -> None:
    """Raise the limit of this process, and of those that it starts, as far as it may.

    Each connection takes one or two descriptors. The limit of a shell is often 1,024, but that protects programs that
    use `select`, and whoever set it allows more: the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS has a hard limit that it does not accept
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_descriptors() -> None:
    """Check that this process can start. Raises `Unavailable` if not: it would fail in a place that cannot say why."""
    opened: list[int] = []
    try:
        while len(opened) < _TO_START:
            opened += os.pipe()
    except OSError as exc:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise Unavailable(
            f"cannot start with the file descriptors that are left ({(exc.strerror or str(exc)).lower()}; this process "
            f"may have {limit:,}): raise its limit, such as by `ulimit -n 65536` or LimitNOFILE= of systemd"
        ) from exc
    finally:
        for one in opened:
            os.close(one)
