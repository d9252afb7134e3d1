"""`Users`: names and passwords by HTTP Basic authentication [RFC 7617], for `Download(source, access=...)`."""

import binascii
import hmac
import os
import re
import secrets
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import anyio
from starlette.requests import Request

from downloadview_async.errors import AuthenticationRequired, ConfigurationError, SourceUnavailable
from downloadview_async.policy.access import Access, UserAccess
from downloadview_async.policy.addresses import ANYONE, network_of
from downloadview_async.policy.htpasswd import PasswordFile
from downloadview_async.policy.login_throttle import LoginThrottle
from downloadview_async.sources.workers import Workers

MAX_PASSWORD_BYTES = 72
"""bcrypt uses no more of a password, and `htpasswd` drops the rest, too."""

THREADS = 2
"""How many passwords are checked at once."""

MAX_QUEUE = 32
"""How many addresses may wait for a thread."""

QUEUE_SECONDS = 10.0
"""Seconds that a request waits for a thread at most."""

KEEP_SECONDS = 60.0
"""Seconds for which a name and its password are not checked again."""

MAX_KEPT = 1024
"""How many names with their passwords are kept."""

_MAX_UNREAD_BODY = 1 << 20  # bytes; a client that sends more while it waits is treated as gone
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_REALM = re.compile(r"[ !#-\[\]-~]+")


class Users:
    """The users in a file of `htpasswd -B`. `allow` returns what `Download` takes as `access`.

        users = Users("users.htpasswd")
        Download(source, access=users.allow("ada", "bob"))

    file: it has lines `name:hash` with hashes of bcrypt. It is read again when it changes; if it is wrong then, the
    users stay as they were, and the log says why. realm: the text that browsers show when they ask for the password.

    Of a password, the first 72 bytes are compared, as `htpasswd` and Apache do. Passwords are checked in two threads. A
    good name and password are kept for 60 seconds, as a keyed hash, or until the file changes. After a wrong one, the
    client's address (of IPv6, its /64) waits before its next check, up to 16 seconds. A request that cannot be checked
    in time gets 503. All this is for one process, and one event loop at a time.

    Raises `ConfigurationError` for a wrong file or realm, and if the package bcrypt is not installed.
    """

    def __init__(self, file: str | os.PathLike[str], *, realm: str = "downloads") -> None:
        try:
            import bcrypt
        except ModuleNotFoundError as exc:
            raise ConfigurationError("users need bcrypt: install downloadview_async with its extra `auth`") from exc
        if not _REALM.fullmatch(realm):
            raise ConfigurationError(f"realm is {realm!r}: give printable ASCII without quotes and backslashes")
        self._file = PasswordFile(file)
        self._bcrypt = bcrypt
        self._challenge = f'Basic realm="{realm}", charset="UTF-8"'
        self._secret = secrets.token_bytes(32)
        self._kept: OrderedDict[bytes, float] = OrderedDict()
        self._throttle = LoginThrottle()
        self._workers = Workers(THREADS, patience=QUEUE_SECONDS)
        self._in_queue = 0

    @property
    def names(self) -> frozenset[str]:
        """The names of the users."""
        return frozenset(self._file.hashes)

    def allow(self, *names: str) -> Access:
        """Return the access of the users with these names; `*` stands for all users.

        Raises `ConfigurationError` for a name that the file does not have.
        """
        for name in names:
            if name != ANYONE and name not in self._file.hashes:
                raise ConfigurationError(f"there is no user {name!r} in the file of the users: add it, or correct it")
        if not names:
            raise ConfigurationError("users.allow needs a name, or '*' for all users")
        return UserAccess(names, self.authenticate)

    async def authenticate(self, request: Request) -> str:
        """Return the name of the user who sends a request.

        Raises `AuthenticationRequired` without a valid name and password, and `SourceUnavailable` if too many others
        are checked.
        """
        credentials = _credentials(request)
        if credentials is None:
            raise self._refusal("there is no name and password")
        if self._file.refresh():
            self._kept.clear()
        if not self._is_kept(*credentials):

            async def check() -> None:
                await self._check(request, *credentials)

            if not await _until_the_client_leaves(request, check):
                raise self._refusal("the client has left before its password was checked")
        return credentials[0]

    async def _check(self, request: Request, name: str, password: bytes) -> None:
        address = network_of(request.client.host if request.client else None)
        async with self._throttle.turn(address):
            if self._is_kept(name, password):  # one of several connections of a client has been checked meanwhile
                return
            await self._throttle.begin(address)
            hashes = self._file.hashes
            try:
                matches = await self._matches(name, password)
            except SourceUnavailable:
                self._throttle.succeeded(address)  # it has not failed
                raise
            if not matches:
                raise self._refusal("the name or the password is wrong")
            self._throttle.succeeded(address)
            if hashes is self._file.hashes:
                self._keep(name, password)

    async def _matches(self, name: str, password: bytes) -> bool:
        hashed = self._file.hashes.get(name)
        against = hashed or self._dummy_hash(name)
        if self._in_queue >= THREADS + MAX_QUEUE:
            raise SourceUnavailable("too many passwords are being checked")
        self._in_queue += 1
        try:
            matches = await self._workers.run(self._bcrypt.checkpw, password[:MAX_PASSWORD_BYTES], against)
        finally:
            self._in_queue -= 1
        return matches and hashed is not None

    def _dummy_hash(self, name: str) -> bytes:
        """Return a hash for a name without one, so that its check takes as long as that of a user.

        Its cost is that of some user, always the same for a name: the costs in a file may differ.
        """
        number = int.from_bytes(self._digest(name, b""))
        hashes = list(self._file.hashes.values())
        return hashes[number % len(hashes)]

    def _digest(self, name: str, password: bytes) -> bytes:
        encoded = name.encode()
        return hmac.digest(self._secret, len(encoded).to_bytes(8) + encoded + password, "sha256")

    def _is_kept(self, name: str, password: bytes) -> bool:
        return self._kept.get(self._digest(name, password), 0.0) > time.monotonic()

    def _keep(self, name: str, password: bytes) -> None:
        key = self._digest(name, password)
        self._kept[key] = time.monotonic() + KEEP_SECONDS
        self._kept.move_to_end(key)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def _refusal(self, reason: str) -> AuthenticationRequired:
        return AuthenticationRequired(reason, challenge=self._challenge)


def _credentials(request: Request) -> tuple[str, bytes] | None:
    """Return the name and the password in the header Authorization; None if it does not have exactly one of each."""
    values = request.headers.getlist("authorization")
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != "basic":
        return None
    try:
        decoded = b64decode(token.strip(), validate=True)
        raw_name, colon, password = decoded.partition(b":")
        name = raw_name.decode()
    except (binascii.Error, ValueError):
        return None
    return (name, password) if name and colon and not _CONTROL.search(decoded) else None


async def _until_the_client_leaves(request: Request, work: Callable[[], Awaitable[None]]) -> bool:
    """Run `work`, and cancel it when the client disconnects. Return whether it has ended. Raises what `work` raises."""
    failure: Exception | None = None
    has_ended = False
    async with anyio.create_task_group() as tasks:

        async def listen() -> None:
            unread, is_complete = 0, False
            try:
                while unread <= _MAX_UNREAD_BODY:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        break
                    if is_complete:  # some middleware repeats the body for ever
                        return
                    is_complete = not message.get("more_body", False)
                    unread += len(message.get("body", b""))
            except RuntimeError:  # the request was made without `receive`
                return
            tasks.cancel_scope.cancel()

        tasks.start_soon(listen)
        try:
            await work()
        except Exception as exc:
            failure = exc  # raised below, so that it is not wrapped in an ExceptionGroup
        has_ended = True
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return has_ended
