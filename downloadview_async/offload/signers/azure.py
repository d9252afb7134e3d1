"""Azure Blob Storage: shared access signatures (SAS) of a blob, by the account's key or a user delegation key.

https://learn.microsoft.com/rest/api/storageservices/create-service-sas
https://learn.microsoft.com/rest/api/storageservices/create-user-delegation-sas
"""

import hmac
import re
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote

from downloadview_async.errors import ConfigurationError, SourceUnavailable
from downloadview_async.offload.renewed import Renewed
from downloadview_async.offload.signers.base import (
    LONGEST,
    SECRET,
    Edge,
    Signed,
    Signer,
    SignerKind,
    SignerOption,
    encoded,
    joined,
)
from downloadview_async.offload.signers.keys import secret_base64

VERSION = "2022-11-02"
"""The version of the storage service that checks the signature, which says what is signed and in which order."""

_MAX_DELEGATED = 7 * 86_400
_PARAMETERS = {
    "cache-control": "rscc",
    "content-disposition": "rscd",
    "content-encoding": "rsce",
    "content-language": "rscl",
    "content-type": "rsct",
}
_DELEGATION = {
    "skoid": "signed_oid",
    "sktid": "signed_tid",
    "skt": "signed_start",
    "ske": "signed_expiry",
    "sks": "signed_service",
    "skv": "signed_version",
}
_RENEW_AHEAD = 3600.0


@dataclass(frozen=True, slots=True)
class _Key:
    """A key. fields: the parameters that name a user delegation key, in the order of the signature."""

    value: bytes = field(repr=False)
    fields: Mapping[str, str] | None = None


class _Blobs:
    """A signer of blobs, by one of the two kinds of keys."""

    carries = frozenset(_PARAMETERS)
    is_served_alike = False

    def __init__(self, edge: Edge, account: str | None) -> None:
        name, _, rest = edge.host.partition(".")
        if account is None and not re.match(r"(z\d+\.)?blob\.", rest):
            raise ConfigurationError(f"account: {edge.host} does not tell the storage account: give its name")
        self.edge = edge
        self._account = account or name
        self._protocol = "https" if edge.scheme == "https" else ""
        place = unquote(edge.prefix)
        is_emulator = edge.host == "localhost" or re.fullmatch("[0-9.]+|.*:.*", edge.host)
        self._place = (
            place.removeprefix(f"/{self._account}") if is_emulator else place
        )  # it has the account in the path

    def __repr__(self) -> str:
        return f"<signer of Azure Blob Storage at {self.edge.url}>"

    def _signed(self, key: _Key, path: str, headers: Mapping[str, str], now: float, seconds: int) -> Signed:
        expires = datetime.fromtimestamp(int(now) + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        replaced = {parameter: headers.get(name, "") for name, parameter in _PARAMETERS.items()}
        named = {"si": ""} if key.fields is None else {**key.fields, "saoid": "", "suoid": "", "scid": ""}
        values = {
            "sp": "r",
            "st": "",
            "se": expires,
            "resource": f"/blob/{self._account}{self._place}{unquote(path)}",
            **named,
            "sip": "",
            "spr": self._protocol,
            "sv": VERSION,
            "sr": "b",
            "snapshot": "",
            "ses": "",
            **replaced,
        }
        text = "\n".join(values.values())
        signature = b64encode(hmac.digest(key.value, text.encode(), "sha256")).decode()
        del values["resource"]
        pairs = [f"{name}={encoded(value)}" for name, value in values.items() if value]
        return Signed(joined(self.edge.url + path, *pairs, f"sig={quote(signature, safe='')}"), seconds)


class _ByAccount(_Blobs):
    """Signs with the key of the storage account."""

    max_seconds = LONGEST

    def __init__(self, edge: Edge, account: str | None, secret: str) -> None:
        super().__init__(edge, account)
        self._key = _Key(secret_base64("secret", secret))

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """See `Signer`."""
        return self._signed(self._key, path, headers, now, seconds)


class _ByDelegation(_Blobs):
    """Signs with user delegation keys, which the application gets for an identity, and which expire."""

    max_seconds = _MAX_DELEGATED

    def __init__(self, edge: Edge, account: str | None, provider: Callable[[], Any]) -> None:
        super().__init__(edge, account)
        self._renewed = Renewed(provider, name="delegation_key", read=_delegated, ahead=_RENEW_AHEAD)
        self._current: tuple[_Key, float] | None = None

    async def renew(self) -> None:
        """See `RenewingSigner`."""
        self._current = await self._renewed.get()

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        """See `Signer`. A URL does not outlive its key. Raises `SourceUnavailable` if the key has expired."""
        key, good_until = self._current or (_Key(b""), 0.0)
        seconds = int(min(seconds, good_until - now))
        if seconds < 1:
            raise SourceUnavailable("the user delegation key that signs URLs has expired")
        return self._signed(key, path, headers, now, seconds)


def _delegated(given: Any) -> tuple[_Key, float]:
    """Return a key of azure-storage-blob, or a mapping with the same names, and when it expires."""
    values = given if isinstance(given, Mapping) else vars(given)
    fields = {parameter: str(values[name]) for parameter, name in _DELEGATION.items()}
    expires = datetime.fromisoformat(fields["ske"])
    if (until := expires.replace(tzinfo=expires.tzinfo or UTC).timestamp()) <= time.time():
        raise ConfigurationError("the key has expired already")
    return _Key(b64decode(values["value"], validate=True), fields), until


def _signer(edge: Edge, *, account: str | None, secret: str | None, delegation_key: Callable[[], Any] | None) -> Signer:
    if (secret is None) == (delegation_key is None):
        raise ConfigurationError("secret: give either this, the key of the account, or delegation_key")
    if delegation_key is not None:
        return _ByDelegation(edge, account, delegation_key)
    assert secret is not None
    return _ByAccount(edge, account, secret)


KIND = SignerKind(
    name="azure",
    title="Azure Blob Storage",
    signer=_signer,
    options={
        "account": SignerOption(
            str, takes="the name of the storage account, if the host of url does not begin with it"
        ),
        "secret": SECRET,
        "delegation_key": SignerOption(
            str, takes='"module:function", which returns a user delegation key', is_function=True
        ),
    },
)
