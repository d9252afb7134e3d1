"""`PasswordFile`: the users in a file of `htpasswd -B`, which is read again when it changes."""

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping

from downloadview_async.errors import ConfigurationError

logger = logging.getLogger("downloadview_async")

CHECK_SECONDS = 1.0
"""How long a change of the file may go unnoticed."""

MAX_COST = 17
"""The highest cost of a hash: that of `htpasswd`. Higher ones would keep a thread busy for minutes."""

_SETTLED_NS = 2_000_000_000  # a file may change again without another modification time, whose grain is up to 2 s
_HASH = re.compile(rb"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{53}")


class PasswordFile:
    """The names and bcrypt hashes of a file with a line `name:hash` for each user.

    Raises `ConfigurationError` if the file cannot be read, has no user, or has a line that is not of this form. The
    error names the line, but never shows it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._seen: tuple[int, ...] | None = None
        self._failure: str | None = None
        self._next_check = 0.0
        self.hashes: Mapping[str, bytes] = self._read()

    def refresh(self) -> bool:
        """Read the file again if it has changed, and return whether its users have.

        The file is looked at once in `CHECK_SECONDS`. If it is wrong or missing now, the users stay as they were, and
        the error is logged once.
        """
        now = time.monotonic()
        if now < self._next_check:
            return False
        self._next_check = now + CHECK_SECONDS
        try:
            if _version_of(os.stat(self._path)) == self._seen:
                return False
            hashes = self._read()
        except (OSError, ConfigurationError) as exc:
            if self._failure != str(exc):
                self._failure = str(exc)
                logger.error("the users stay as they were: %s", exc)
            return False
        self._failure = None
        if hashes == self.hashes:
            return False
        self.hashes = hashes
        return True

    def _read(self) -> dict[str, bytes]:
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                lines = file.read().split(b"\n")
        except OSError as exc:
            raise ConfigurationError(
                f"{self._path!r} cannot be read ({exc.strerror}): create it with `htpasswd -cB {self._path} NAME`"
            ) from exc
        is_settled = abs(time.time_ns() - status.st_mtime_ns) > _SETTLED_NS
        self._seen = _version_of(status) if is_settled else None
        hashes = self._parsed(lines)
        if not hashes:
            raise ConfigurationError(f"{self._path!r} has no users: add one with `htpasswd -B {self._path} NAME`")
        return hashes

    def _parsed(self, lines: Iterable[bytes]) -> dict[str, bytes]:
        hashes: dict[str, bytes] = {}
        for number, raw_line in enumerate(lines, 1):
            line = raw_line.strip()
            if not line or line.startswith(b"#"):
                continue
            raw_name, _, value = line.partition(b":")
            match = _HASH.fullmatch(value)
            if match is None or not raw_name:
                raise self._error(number, "is not `name:hash` with a hash of bcrypt: write it with `htpasswd -B`")
            if not 4 <= int(match[1]) <= MAX_COST:
                raise self._error(number, f"has a hash whose cost is not between 4 and {MAX_COST}: make another")
            try:
                name = raw_name.decode()
            except UnicodeDecodeError:
                raise self._error(number, "has a name that is not UTF-8: write the name in UTF-8") from None
            if name in hashes:
                raise self._error(number, "has the name of an earlier line: remove one of them")
            hashes[name] = value
        return hashes

    def _error(self, number: int, problem: str) -> ConfigurationError:
        return ConfigurationError(f"{self._path!r}: line {number} {problem}")


def _version_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
