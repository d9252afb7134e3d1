"""The providers' own libraries make the same signed URLs as ours."""

import json
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from downloadview_async import Signer, signer_of
from downloadview_async.offload.signers import azure

pytestmark = pytest.mark.slow

PACKAGES = Path(sys.prefix) / "clients"
"""Where `make clients` installs them: requirements/clients.txt."""

NAMES = ["a.txt", "a b.txt", "sub/π ü.pdf", "100%.txt", "a&b=c+d;e.txt", "a'(b)~*!.txt", "a#b?.txt", "日本.pdf"]
HEADERS: list[dict[str, str]] = [
    {},
    {"content-type": "text/plain; charset=utf-8"},
    {
        "content-disposition": "attachment; filename=\"a b_.txt\"; filename*=UTF-8''%CF%80%20b%22+%26.txt",
        "content-type": "application/vnd.x+json; a=b",
    },
]
NOW = 1_700_000_000
ACCOUNT_KEY = b64encode(bytes(range(64))).decode()
DELEGATION = {
    "signed_oid": "11111111-1111-1111-1111-111111111111",
    "signed_tid": "22222222-2222-2222-2222-222222222222",
    "signed_start": "2023-11-14T00:00:00Z",
    "signed_expiry": "2099-11-14T00:00:00Z",
    "signed_service": "b",
    "signed_version": "2022-11-02",
    "value": b64encode(b"delegated" * 7).decode(),
}
GOOGLE = """
import datetime, json, sys
from urllib.parse import quote
from google.cloud.storage import _signing
from google.oauth2.service_account import Credentials

account, cases, begun = json.load(sys.stdin)
signer = Credentials.from_service_account_info(account | {"token_uri": "https://example.org"})

urls = []
begun = datetime.datetime.fromtimestamp(begun, datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
for name, headers, endpoint in cases:
    urls.append(
        _signing.generate_signed_url_v4(
            signer,
            resource="/bucket/" + quote(name.encode(), safe=b"/~"),
            expiration=datetime.timedelta(seconds=600),
            api_access_endpoint=endpoint,
            response_disposition=headers.get("content-disposition"),
            response_type=headers.get("content-type"),
            _request_timestamp=begun,
        )
    )
print(json.dumps(urls))
"""
AZURE = """
import datetime, json, sys
from types import SimpleNamespace
from azure.storage.blob import BlobSasPermissions, UserDelegationKey, generate_blob_sas
from azure.storage.blob import _shared_access_signature
from azure.storage.blob._shared import shared_access_signature

key, delegation, version, cases, until = json.load(sys.stdin)
for module in (_shared_access_signature, shared_access_signature):
    module.X_MS_VERSION = version
delegated = UserDelegationKey()
for name, value in delegation.items():
    setattr(delegated, name, value)
found = []
for name, headers in cases:
    for given in ({"account_key": key}, {"user_delegation_key": delegated}):
        found.append(
            generate_blob_sas(
                "account",
                "box",
                name,
                permission=BlobSasPermissions(read=True),
                expiry=datetime.datetime.fromtimestamp(until, datetime.timezone.utc),
                protocol="https",
                cache_control=headers.get("cache-control"),
                content_disposition=headers.get("content-disposition"),
                content_encoding=headers.get("content-encoding"),
                content_language=headers.get("content-language"),
                content_type=headers.get("content-type"),
                **given,
            )
        )
print(json.dumps(found))
"""


def answers(code: str, module: str, question: Any) -> Any:
    """Run code with a package that only clients have; the test is skipped where `make clients` has not run."""
    if not (PACKAGES / module).exists():
        pytest.skip(f"{module} is not installed in {PACKAGES}: make clients")
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(PACKAGES)},
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def query_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


def signed(signer: Signer, path: str, headers: dict[str, str], seconds: int = 600) -> str:
    made = signer.sign(path, headers, now=NOW, seconds=seconds)
    assert made is not None
    return made.url


def test_google_cloud_storage_makes_the_same_urls(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {"client_email": "signer@project.iam.gserviceaccount.com", "private_key": pem}
    file = tmp_path / "account.json"
    file.write_text(json.dumps(account))
    endpoints = ["https://storage.googleapis.com", "https://files.example.org"]
    cases = [(name, headers, endpoint) for name in NAMES for headers in HEADERS for endpoint in endpoints]
    theirs = answers(GOOGLE, "google/cloud/storage", [account, cases, NOW // 75 * 75])
    for (name, headers, endpoint), url in zip(cases, theirs, strict=True):
        ours = signed(signer_of("gcs", f"{endpoint}/bucket/", key_file=file), quote(name), headers)
        assert query_of(ours) == query_of(url), name
        assert unquote(urlsplit(ours).path) == unquote(urlsplit(url).path)
        assert urlsplit(ours)[:2] == urlsplit(url)[:2]


@pytest.mark.asyncio
async def test_azure_storage_blob_makes_the_same_urls() -> None:
    cases = [(name, headers) for name in NAMES for headers in [*HEADERS, {"cache-control": "private, no-store"}]]
    cases.append(("a.txt", {"content-encoding": "gzip", "content-language": "de"}))
    theirs = answers(AZURE, "azure/storage/blob", [ACCOUNT_KEY, DELEGATION, azure.VERSION, cases, NOW + 600])
    blobs = "https://account.blob.core.windows.net/box/"
    by_account = signer_of("azure", blobs, secret=ACCOUNT_KEY)
    by_delegation: Any = signer_of("azure", blobs, delegation_key=lambda: DELEGATION)
    await by_delegation.renew()
    signers = [by_account, by_delegation] * len(cases)
    for (name, headers), signer, query in zip([case for case in cases for _ in range(2)], signers, theirs, strict=True):
        ours = signed(signer, quote(name), headers)
        assert query_of(ours) == dict(parse_qsl(query, keep_blank_values=True)), name
        assert ours.startswith(f"{blobs}{quote(name)}?")
