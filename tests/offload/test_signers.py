"""What signs the URLs of stores and CDNs: published vectors, the answers of others' code, and what must change them."""

import base64
import hashlib
import hmac
import importlib.metadata
import json
import re
import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote_plus, unquote, urlsplit

import pytest
from botocore.signers import CloudFrontSigner
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from downloadview_async import (
    ConfigurationError,
    Edge,
    Signed,
    Signer,
    SignerKind,
    SignerOption,
    SourceUnavailable,
    signer_kinds,
    signer_of,
)
from downloadview_async.http.sigv4 import GOOGLE_RSA, unsigned_url
from downloadview_async.offload.signers import base, keys
from tests.servers import PROJECT

SECRET = "0123456789abcdef0123456789abcdef"
NOW = 1_700_000_000.25
FILES = "https://edge.example.org/files/"
KEY_ID = "K2JCJMDEHXQW5F"
DISPOSITION = "attachment; filename=\"a b_.txt\"; filename*=UTF-8''%CF%80%20b%22.txt"
HEADERS = {"content-disposition": DISPOSITION, "content-type": "text/plain; charset=utf-8"}
PATHS = ["a.txt", "a%20b.txt", "sub/%CF%80.pdf", "100%25.txt", "a%26b%3Dc%2B.txt", "a%27%28b%29~.txt"]


def pem(key: Any) -> str:
    form = serialization.PrivateFormat.PKCS8
    text: bytes = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return text.decode()


RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_PEM = pem(RSA_KEY)


@pytest.fixture
def account(tmp_path: Path) -> Path:
    file = tmp_path / "account.json"
    file.write_text(json.dumps({"client_email": "signer@project.iam.gserviceaccount.com", "private_key": RSA_PEM}))
    return file


def signed(
    signer: Signer, path: str, headers: Mapping[str, str] = {}, *, now: float = NOW, seconds: int = 600
) -> Signed:
    made = signer.sign(path, headers, now=now, seconds=seconds)
    assert made is not None
    return made


def query_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))


# ---- Google Cloud Storage

# googleapis/conformance-tests, storage/v1/v4_signatures.json: the last line of the text that is signed
GOOGLE = [
    ("test-object", "2019-02-01", 10, "00e2fb794ea93d7adb703edaebdd509821fcc7d4f1a79ac5c8d2b394df109320"),
    ("test-object", "2019-03-01", 20, "779f19fdb6fd381390e2d5af04947cf21750277ee3c20e0c97b7e46a1dff8907"),
]


@pytest.mark.parametrize("path, day, seconds, digest", GOOGLE)
def test_the_texts_that_google_publishes(path: str, day: str, seconds: int, digest: str) -> None:
    url, text = unsigned_url(
        f"https://storage.googleapis.com/test-bucket/{path}",
        "test-iam-credentials@dummy-project-id.iam.gserviceaccount.com",
        region="auto",
        seconds=seconds,
        now=datetime.fromisoformat(f"{day}T09:00:00Z").timestamp(),
        parameters={},
        dialect=GOOGLE_RSA,
    )
    date = day.replace("-", "")
    assert text == f"GOOG4-RSA-SHA256\n{date}T090000Z\n{date}/auto/storage/goog4_request\n{digest}"
    assert url == (
        f"https://storage.googleapis.com/test-bucket/{path}?X-Goog-Algorithm=GOOG4-RSA-SHA256&X-Goog-Credential="
        f"test-iam-credentials%40dummy-project-id.iam.gserviceaccount.com%2F{date}%2Fauto%2Fstorage%2Fgoog4_request"
        f"&X-Goog-Date={date}T090000Z&X-Goog-Expires={seconds}&X-Goog-SignedHeaders=host"
    )


def test_a_service_account_signs_what_is_in_the_url(account: Path) -> None:
    signer = signer_of("gcs", "https://storage.googleapis.com/bucket/", key_file=account)
    made = signed(signer, "a%20b.txt", HEADERS)
    query = query_of(made.url)
    assert query["response-content-disposition"] == DISPOSITION
    assert query["response-content-type"] == "text/plain; charset=utf-8"
    begun = datetime.strptime(query["X-Goog-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    unsigned, text = unsigned_url(
        "https://storage.googleapis.com/bucket/a%20b.txt",
        "signer@project.iam.gserviceaccount.com",
        region="auto",
        seconds=600,
        now=begun,
        parameters={f"response-{name}": value for name, value in HEADERS.items()},
        dialect=GOOGLE_RSA,
    )
    assert made.url.startswith(f"{unsigned}&X-Goog-Signature=")
    signature = bytes.fromhex(query["X-Goog-Signature"])
    RSA_KEY.public_key().verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())
    assert NOW - 75 <= begun <= NOW
    assert made.seconds == int(begun + 600 - NOW)


def test_an_hmac_key_of_google_signs_with_its_own_words() -> None:
    """The derivation of the key: https://docs.cloud.google.com/storage/docs/authentication/signatures."""
    signer = signer_of("gcs", "https://storage.googleapis.com/bucket", key_id="GOOG1EXAMPLE", secret=SECRET)
    made = signed(signer, "a.txt", HEADERS)
    query = query_of(made.url)
    assert query["X-Goog-Credential"] == "GOOG1EXAMPLE/20231114/auto/storage/goog4_request"
    assert query["X-Goog-Algorithm"] == "GOOG4-HMAC-SHA256"
    url, _, signature = made.url.rpartition("&X-Goog-Signature=")
    request = f"GET\n/bucket/a.txt\n{urlsplit(url).query}\nhost:storage.googleapis.com\n\nhost\nUNSIGNED-PAYLOAD"
    text = (
        f"GOOG4-HMAC-SHA256\n{query['X-Goog-Date']}\n20231114/auto/storage/goog4_request\n"
        f"{hashlib.sha256(request.encode()).hexdigest()}"
    )
    key = f"GOOG4{SECRET}".encode()
    for part in ("20231114", "auto", "storage", "goog4_request", text):
        key = hmac.digest(key, part.encode(), "sha256")
    assert signature == key.hex()


# ---- CloudFront


def by_botocore(key: Any = RSA_KEY) -> CloudFrontSigner:
    return CloudFrontSigner(KEY_ID, lambda text: key.sign(text, padding.PKCS1v15(), hashes.SHA1()))


@pytest.mark.parametrize("origin, headers", [("other", {}), ("s3", HEADERS)])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("policy", ["canned", "custom"])
def test_botocore_makes_the_same_urls_of_cloudfront(
    policy: str, path: str, origin: str, headers: dict[str, str]
) -> None:
    signer = signer_of("cloudfront", FILES, key_id=KEY_ID, private_key=RSA_PEM, policy=policy, origin=origin)
    made = signed(signer, path, headers)
    plain = re.sub("[?&](Expires|Policy)=.*", "", made.url)
    until = datetime.fromtimestamp(int(NOW) // 75 * 75 + 600, UTC)
    theirs = by_botocore()
    options = {"date_less_than": until} if policy == "canned" else {"policy": theirs.build_policy(plain, until)}
    assert made.url == theirs.generate_presigned_url(plain, **options)
    assert plain.startswith(FILES + path)
    assert query_of(plain) == {f"response-{name}": value for name, value in headers.items()}
    assert made.seconds == int(until.timestamp() - NOW)


@pytest.mark.parametrize("key", [RSA_KEY, EC_KEY], ids=["rsa", "ecdsa"])
@pytest.mark.parametrize("digest", ["sha1", "sha256"])
def test_both_kinds_of_keys_and_both_digests_sign_the_canned_policy(key: Any, digest: str) -> None:
    signer = signer_of("cloudfront", FILES, key_id=KEY_ID, private_key=pem(key), digest=digest)
    url = signed(signer, "a.txt").url
    query = query_of(url)
    assert query.get("Hash-Algorithm") == (None if digest == "sha1" else "SHA256")
    assert list(query)[:3] == ["Expires", "Signature", "Key-Pair-Id"]
    policy = (
        f'{{"Statement":[{{"Resource":"{FILES}a.txt","Condition":{{"DateLessThan":'
        f'{{"AWS:EpochTime":{query["Expires"]}}}}}}}]}}'
    ).encode()
    signature = b64decode(query["Signature"].translate(str.maketrans("-_~", "+=/")))
    chosen = hashes.SHA1() if digest == "sha1" else hashes.SHA256()
    if key is RSA_KEY:
        key.public_key().verify(signature, policy, padding.PKCS1v15(), chosen)
    else:
        key.public_key().verify(signature, policy, ec.ECDSA(chosen))


@pytest.mark.parametrize("covers", ["file", "all"])
def test_cookies_of_cloudfront(covers: str) -> None:
    signer = signer_of(
        "cloudfront",
        FILES,
        key_id=KEY_ID,
        private_key=RSA_PEM,
        cookies=True,
        cookie_domain="example.org",
        covers=covers,
    )
    made = signed(signer, "sub/a%20b.txt")
    assert made.url == f"{FILES}sub/a%20b.txt"
    values = dict(cookie.partition(";")[0].split("=", 1) for cookie in made.cookies)
    assert {*values} == {
        "CloudFront-Expires" if covers == "file" else "CloudFront-Policy",
        "CloudFront-Signature",
        "CloudFront-Key-Pair-Id",
    }
    path = "/files/sub/a%20b.txt" if covers == "file" else "/files/"
    end = f"; Path={path}; Max-Age={made.seconds}; Domain=example.org; Secure; HttpOnly; SameSite=Lax"
    assert all(cookie.endswith(end) for cookie in made.cookies)
    until = datetime.fromtimestamp(int(NOW) // 75 * 75 + 600, UTC)
    policy = by_botocore().build_policy(made.url if covers == "file" else f"{FILES}*", until).encode()
    signature = b64decode(values["CloudFront-Signature"].translate(str.maketrans("-_~", "+=/")))
    RSA_KEY.public_key().verify(signature, policy, padding.PKCS1v15(), hashes.SHA1())
    if covers == "all":
        assert b64decode(values["CloudFront-Policy"].translate(str.maketrans("-_~", "+=/"))) == policy


def test_a_signature_of_all_files_is_the_same_for_all() -> None:
    signer = signer_of("cloudfront", FILES, key_id=KEY_ID, private_key=RSA_PEM, covers="all")
    first, second = (urlsplit(signed(signer, path).url).query for path in ("a.txt", "b/c.txt"))
    assert first == second
    assert parse_qs(first)["Policy"]


def test_a_slow_signature_is_made_once_for_an_eighth_of_its_time() -> None:
    signer = signer_of("cloudfront", FILES, key_id=KEY_ID, private_key=EC_KEY and pem(EC_KEY))
    times = [NOW + second for second in range(150)]
    urls = [signed(signer, "a.txt", now=now).url for now in times]  # each signature by ECDSA is another one
    assert len({*urls}) == 3
    assert all(525 <= signed(signer, "a.txt", now=now).seconds <= 600 for now in times)


# ---- Azure


def azure_text(query: Mapping[str, str], resource: str, *, delegated: bool) -> str:
    """The text that is signed, by the tables on the pages of Azure."""
    key = ["skoid", "sktid", "skt", "ske", "sks", "skv", "saoid", "suoid", "scid"]
    names = ["sp", "st", "se", "resource", *(key if delegated else ["si"]), "sip", "spr", "sv", "sr", "snapshot", "ses"]
    names += ["rscc", "rscd", "rsce", "rscl", "rsct"]
    return "\n".join({**query, "resource": resource}.get(name, "") for name in names)


ACCOUNT_KEY = b64encode(b"k" * 64).decode()
BLOBS = "https://account.blob.core.windows.net/box/"


def test_the_key_of_an_azure_account_signs_a_blob() -> None:
    made = signed(signer_of("azure", BLOBS, secret=ACCOUNT_KEY), "a%20b/%CF%80.txt", HEADERS)
    query = query_of(made.url)
    assert made.url.startswith(f"{BLOBS}a%20b/%CF%80.txt?sp=r&se=2023-11-14T22%3A23%3A20Z&")
    assert (query["rscd"], query["rsct"], query["spr"]) == (DISPOSITION, HEADERS["content-type"], "https")
    text = azure_text(query, "/blob/account/box/a b/π.txt", delegated=False)
    assert query["sig"] == b64encode(hmac.digest(b"k" * 64, text.encode(), "sha256")).decode()


@pytest.mark.asyncio
@pytest.mark.parametrize("as_mapping", [False, True])
async def test_a_user_delegation_key_signs_until_it_expires_and_is_renewed_before(as_mapping: bool) -> None:
    given: list[dict[str, str]] = []

    async def provider() -> Any:
        start = datetime.now(UTC)
        key = {"signed_oid": "oid", "signed_tid": "tid", "signed_service": "b", "signed_version": "2022-11-02"}
        key |= {"signed_start": f"{start:%Y-%m-%dT%H:%M:%SZ}", "value": ACCOUNT_KEY}
        key["signed_expiry"] = f"{start + timedelta(hours=2):%Y-%m-%dT%H:%M:%SZ}"
        given.append(key)
        return key if as_mapping else SimpleNamespace(**key)

    signer: Any = signer_of("azure", BLOBS, delegation_key=provider)
    assert "delegation" not in repr(signer)
    for _ in range(3):
        await signer.renew()
    assert len(given) == 1
    now = datetime.now(UTC).timestamp()
    made = signed(signer, "a.txt", HEADERS, now=now, seconds=86_400)
    assert 7190 <= made.seconds <= 7200  # not longer than the key
    query = query_of(made.url)
    assert (query["skoid"], query["sktid"], query["ske"]) == ("oid", "tid", given[0]["signed_expiry"])
    text = azure_text(query, "/blob/account/box/a.txt", delegated=True)
    assert query["sig"] == b64encode(hmac.digest(b"k" * 64, text.encode(), "sha256")).decode()
    with pytest.raises(SourceUnavailable, match="expired"):
        signer.sign("a.txt", {}, now=now + 7201, seconds=600)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "key", [None, {}, {"signed_oid": "x"}, *({"signed_expiry": end} for end in ("soon", "2020-01-01T00:00:00Z"))]
)
async def test_a_provider_without_a_valid_delegation_key_gives_a_503(key: Any) -> None:
    rest = dict.fromkeys(("oid", "tid", "start", "service", "version"), "x")
    full = {f"signed_{name}": value for name, value in rest.items()} | {"value": ACCOUNT_KEY}
    signer: Any = signer_of("azure", BLOBS, delegation_key=lambda: {**full, **key} if key else key)
    with pytest.raises(SourceUnavailable, match="delegation_key failed") as caught:
        await signer.renew()
    assert caught.value.status == 503
    assert ACCOUNT_KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url, account, resource",
    [
        ("https://account.blob.core.windows.net/box", None, "/blob/account/box/a.txt"),
        ("https://account.z6.blob.storage.azure.net/box", None, "/blob/account/box/a.txt"),
        ("https://files.example.org/box/deep", "account", "/blob/account/box/deep/a.txt"),
        ("https://files.example.org/photos", "photos", "/blob/photos/photos/a.txt"),
        ("http://127.0.0.1:10000/devstore/box", "devstore", "/blob/devstore/box/a.txt"),
    ],
)
def test_the_resource_of_an_azure_url(url: str, account: str | None, resource: str) -> None:
    query = query_of(signed(signer_of("azure", url, account=account, secret=ACCOUNT_KEY), "a.txt").url)
    text = azure_text(query, resource, delegated=False)
    assert query["sig"] == b64encode(hmac.digest(b"k" * 64, text.encode(), "sha256")).decode()
    assert query.get("spr") == ("https" if url.startswith("https") else None)


# ---- tokens of CDNs


def test_the_vectors_that_bunny_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """BunnyWay/BunnyCDN.TokenAuthentication, e2e/vectors.json: "plain"."""
    monkeypatch.setattr(keys, "_SHORTEST", 1)
    signer = signer_of("bunny", "https://token-tester.b-cdn.net/", secret="SecurityKey")
    made = signed(signer, "300kb.jpg", now=1598024587 - 60, seconds=60)
    assert made.url == (
        "https://token-tester.b-cdn.net/300kb.jpg?token=HS256-o10JRWlsAItyAsdKS6jJKjabHN4FrFsplDHPV1idcX4"
        "&expires=1598024587"
    )


def test_bunny_signs_the_decoded_parameters_in_their_order() -> None:
    made = signed(signer_of("bunny", FILES, secret=SECRET, origin="s3"), "a%20b.txt", HEADERS)
    query = query_of(made.url)
    token, expires = query.pop("token"), query.pop("expires")
    parameters = "&".join(f"{name}={value}" for name, value in sorted(query.items()))
    text = f"/files/a%20b.txt{expires}{parameters}"
    mac = hmac.digest(SECRET.encode(), text.encode(), "sha256")
    assert token == f"HS256-{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"
    assert query == {f"response-{name}": value for name, value in HEADERS.items()}


@pytest.mark.parametrize("parameter", [None, "accesskey"])
@pytest.mark.parametrize("origin, headers", [("other", {}), ("s3", HEADERS)])
def test_cloudflare_finds_the_message_the_separator_the_time_and_the_mac(
    origin: str, headers: dict[str, str], parameter: str | None
) -> None:
    """By the grammar of https://developers.cloudflare.com/ruleset-engine/rules-language/functions/#messagemac."""
    name = parameter or "verify"
    made = signed(signer_of("cloudflare", FILES, secret=SECRET, parameter=parameter, origin=origin), "a.txt", headers)
    uri = made.url.removeprefix("https://edge.example.org")
    match = re.fullmatch(rf"(.+)(.{{{len(f'?{name}=')}}})(\d{{10}})-(.{{43,}})", uri)
    assert match is not None
    message, separator, timestamp, mac = match.groups()
    assert separator[1:] == f"{name}="
    assert timestamp == "1700000000"
    assert mac == quote_plus(b64encode(hmac.digest(SECRET.encode(), f"{message}{timestamp}".encode(), "sha256")))
    assert query_of(message) == {f"response-{header}": value for header, value in headers.items()}


AKAMAI = {
    "secret": "aabbccddeeff00112233445566778899",
    "secret_encoding": "hex",
    "text": "exp={expires}~url={path}",
    "token": "exp={expires}~hmac={signature}",
    "parameter": "hdnts",
}


def test_a_token_of_akamai() -> None:
    """By the rules of akamai/EdgeAuth-Token-Python: the parts of the token, and then the URL."""
    made = signed(signer_of("hmac", FILES, **AKAMAI), "a%20b.txt")
    key = bytes.fromhex(AKAMAI["secret"])
    mac = hmac.new(key, b"exp=1700000600~url=/files/a%20b.txt", hashlib.sha256).hexdigest()
    assert made.url == f"{FILES}a%20b.txt?hdnts=exp=1700000600~hmac={mac}"


def test_a_token_of_fastly() -> None:
    """By the VCL of https://www.fastly.com/documentation/guides/security/tls-and-url-tokens."""
    key = b64encode(b"a key of twenty bytes").decode()
    made = signed(
        signer_of("hmac", FILES, secret=key, secret_encoding="base64", algorithm="sha1", text="{path}{expires}"),
        "a.txt",
    )
    match = re.fullmatch(r"(\d{10,11})_([a-f0-9]{40})", query_of(made.url)["token"])
    assert match is not None
    text = f"{urlsplit(made.url).path}{match[1]}".encode()
    assert match[2] == hmac.new(b"a key of twenty bytes", text, hashlib.sha1).hexdigest()


def test_the_encodings_of_a_signature_and_all_that_can_be_signed() -> None:
    text = "{host} {path} {query} {now} {seconds} {expires}"
    for encoding, read in (("base64", b64decode), ("base64url", lambda value: base64.urlsafe_b64decode(f"{value}=="))):
        signer = signer_of(
            "hmac",
            FILES,
            secret=SECRET,
            text=text,
            token="{signature}",
            algorithm="sha512",
            signature_encoding=encoding,
            origin="s3",
        )
        url = signed(signer, "a.txt", {"content-type": "text/plain"}).url
        said = "edge.example.org /files/a.txt response-content-type=text%2Fplain 1700000000 600 1700000600"
        token = unquote(url.rpartition("token=")[2])
        assert read(token) == hmac.digest(SECRET.encode(), said.encode(), "sha512")


# ---- nginx: tests/proxies/test_edge.py has the real one


def test_the_example_of_nginx(monkeypatch: pytest.MonkeyPatch) -> None:
    """`echo -n '2147483647/s/link127.0.0.1 secret' | openssl md5`: in its documentation, without the address here."""
    monkeypatch.setattr(keys, "_SHORTEST", 1)
    expression = "$secure_link_expires$uri ${secret}"
    signer = signer_of("nginx", "https://example.org/s/", secret="secret", expression=expression)
    made = signed(signer, "link", now=2147483647 - 60, seconds=60)
    md5 = hashlib.md5(b"2147483647/s/link secret").digest()
    assert made.url == (
        f"https://example.org/s/link?md5={base64.urlsafe_b64encode(md5).decode().rstrip('=')}&expires=2147483647"
    )
    assert signer.carries == frozenset()


def test_nginx_signs_the_decoded_path_and_the_arguments_as_they_are_sent() -> None:
    signer = signer_of("nginx", FILES, secret=SECRET, key_id="2026b")
    made = signed(signer, "a%20b/%CF%80.txt", HEADERS)
    arguments = dict(pair.split("=", 1) for pair in urlsplit(made.url).query.split("&"))
    md5 = arguments.pop("md5")
    assert arguments == {
        "expires": "1700000600",
        "key": "2026b",
        "disposition": "attachment",
        "filename": "%CF%80%20b%22.txt",
        "type": "text/plain;charset=utf-8",
    }
    text = (
        f"{SECRET} 1700000600 attachment %CF%80%20b%22.txt text/plain;charset=utf-8 /files/a b/π.txt {SECRET}"
    ).encode()
    assert md5 == base64.urlsafe_b64encode(hashlib.md5(text).digest()).decode().rstrip("=")


# ---- all of them

EACH: dict[str, dict[str, Any]] = {
    "azure": {"secret": ACCOUNT_KEY, "account": "account"},
    "bunny": {"secret": SECRET, "origin": "s3"},
    "cloudflare": {"secret": SECRET, "origin": "s3"},
    "cloudfront": {"key_id": KEY_ID, "private_key": RSA_PEM, "origin": "s3"},
    "gcs": {"key_id": "GOOG1EXAMPLE", "secret": SECRET},
    "hmac": {"secret": SECRET, "origin": "s3", "text": "{expires}{path}?{query}"},
    "nginx": {"secret": SECRET},
}


def test_each_kind_is_tested_here_and_has_a_file_a_page_and_a_section() -> None:
    assert {*EACH} == {*signer_kinds()}
    directory = Path(base.__file__).parent
    assert {file.stem for file in directory.glob("*.py")} == {
        *(kind.signer.__module__.rpartition(".")[2] for kind in signer_kinds().values()),
        *("__init__", "base", "keys"),
    }
    page = (PROJECT / "docs" / "howto" / "edge.md").read_text()
    for kind in signer_kinds().values():
        assert re.search(rf'^kind = "{kind.name}"$', page, re.MULTILINE), f"{kind.name} has no example"
        for option in kind.options:
            assert f"`{option}`" in page, f"the page says nothing of {option}"


@pytest.mark.parametrize("kind", EACH)
def test_whatever_a_url_carries_is_signed(kind: str) -> None:
    """A client that changes the path, the time, the name or the type has a URL that nobody has signed."""

    def signature(url: str, path: str = "a.txt", headers: Mapping[str, str] = HEADERS, now: float = NOW) -> str:
        made = signed(
            signer_of(kind, url, **EACH[kind]), path, {n: headers[n] for n in headers if n in carried}, now=now
        )
        return re.search(r"(?:md5|sig|Signature|token|verify)=([^&]+)", made.url)[1]  # type: ignore[index]

    carried = signer_of(kind, FILES, **EACH[kind]).carries
    assert {"content-disposition", "content-type"} <= carried
    made = [
        signature(FILES),
        signature(FILES, "b.txt"),
        signature(FILES, headers={**HEADERS, "content-type": "text/html"}),
        signature(FILES, headers={**HEADERS, "content-disposition": 'inline; filename="a b_.txt"'}),
        signature(FILES, headers={}),
        signature(FILES, now=NOW + 600),
        signature("https://edge.example.org/other/"),
    ]
    assert len({*made}) == len(made)


@pytest.mark.parametrize("kind", EACH)
def test_another_secret_gives_another_signature_and_nothing_shows_one(kind: str) -> None:
    other = {"private_key": pem(EC_KEY)} if kind == "cloudfront" else {"secret": b64encode(b"o" * 64).decode()}
    first, second = signer_of(kind, FILES, **EACH[kind]), signer_of(kind, FILES, **(EACH[kind] | other))
    made = signed(first, "a.txt")
    assert made.url != signed(second, "a.txt").url
    for shown in (repr(first), repr(made), repr(signed(first, "a.txt"))):
        assert not any(value in shown for value in EACH[kind].values() if len(value) > 20)
        assert "a.txt" not in shown


@settings(max_examples=50, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1),
    st.sampled_from([kind for kind in EACH if kind != "cloudfront"]),
)
def test_no_value_of_a_header_leaves_its_parameter(value: str, kind: str) -> None:
    signer = signer_of(kind, FILES, **EACH[kind])
    url = signed(signer, "a.txt", {"content-type": value}).url
    assert re.fullmatch(r"https://[!-~]+", url)
    assert "#" not in url
    plain = {*query_of(signed(signer, "a.txt").url)}
    assert {*query_of(url)} - plain <= {"response-content-type", "rsct", "type"}


WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    ("cdn", FILES, {}, "'cdn' is not a kind of store or CDN"),
    ("bunny", FILES, {"sekret": SECRET}, "sekret: bunny.net has no such option: use secret"),
    ("bunny", FILES, {}, "secret: missing"),
    ("bunny", FILES, {"secret": ""}, "secret: the value does not fit"),
    ("bunny", FILES, {"secret": f" {SECRET}"}, "with a blank around it"),
    ("bunny", FILES, {"secret": "short"}, "it could be guessed"),
    ("bunny", FILES, {"secret": SECRET, "origin": "elsewhere"}, "origin: 'elsewhere' does not fit: give s3"),
    *[
        ("bunny", url, {"secret": SECRET}, "is not the URL of an edge")
        for url in (
            "cdn.example.org",
            "ftp://x/",
            "https://",
            "https://u:p@x/",
            "https://x/?a",
            "https://x/a b",
            "/x",
            "",
        )
    ],
    ("cloudflare", FILES, {"secret": SECRET, "parameter": "a b"}, "parameter: 'a b' is not a name"),
    ("azure", FILES, {"secret": ACCOUNT_KEY}, "account: edge.example.org does not tell"),
    ("azure", BLOBS, {"secret": "not base64, but long enough"}, "secret: not base64"),
    ("azure", BLOBS, {"secret": b64encode(b"too short").decode() + "A" * 4}, "secret: "),
    ("azure", BLOBS, {}, "secret: give either this"),
    ("azure", BLOBS, {"secret": ACCOUNT_KEY, "delegation_key": dict}, "secret: give either this"),
    ("azure", BLOBS, {"delegation_key": "module:function"}, "delegation_key: 'module:function' does not fit"),
    ("gcs", FILES, {}, "key_file: give either this"),
    ("gcs", FILES, {"secret": SECRET}, "key_id: missing"),
    ("gcs", FILES, {"key_file": "/nothing/is/here"}, "key_file: '/nothing/is/here' cannot be read"),
    ("cloudfront", FILES, {"key_id": KEY_ID}, "private_key: missing"),
    ("cloudfront", FILES, {"private_key": RSA_PEM}, "key_id: missing"),
    ("cloudfront", FILES, {"key_id": "k", "private_key": RSA_PEM}, "key_id: missing, or not an id"),
    ("cloudfront", FILES, {"key_id": KEY_ID, "private_key": "/nothing/is/here"}, "cannot be read"),
    # the key itself in place of its file, without the line before it or behind a byte order mark
    ("cloudfront", FILES, {"key_id": KEY_ID, "private_key": SECRET}, "private_key: the file cannot be read"),
    (
        "cloudfront",
        FILES,
        {"key_id": KEY_ID, "private_key": f"\ufeff{RSA_PEM}"},
        "private_key: the file cannot be read",
    ),
    ("gcs", FILES, {"key_file": f'{{"private_key": "{RSA_PEM}"}}'}, "key_file: the file cannot be read"),
    (
        "bunny",
        f"https://ada:{SECRET}@edge.example.org/",
        {"secret": SECRET},
        "url: the value is not the URL of an edge",
    ),
    ("cloudfront", FILES, {"key_id": KEY_ID, "private_key": "/etc/hostname"}, "private_key: not a private key in PEM"),
    ("cloudfront", FILES, {"key_id": KEY_ID, "private_key": RSA_PEM[:900]}, "private_key: not a private key in PEM"),
    (
        "cloudfront",
        FILES,
        {"key_id": KEY_ID, "private_key": RSA_PEM, "covers": "all", "origin": "s3"},
        "covers: a signature for all files leaves",
    ),
    (
        "cloudfront",
        FILES,
        {"key_id": KEY_ID, "private_key": RSA_PEM, "cookies": True, "cookie_domain": "example.com"},
        "cookie_domain: edge.example.org is not in 'example.com'",
    ),
    (
        "cloudfront",
        FILES,
        {"key_id": KEY_ID, "private_key": RSA_PEM, "cookie_domain": "example.org"},
        "cookie_domain: only cookies have a domain",
    ),
    ("nginx", FILES, {"secret": SECRET, "expression": "$uri$secret"}, "expression: without \\$secure_link_expires"),
    ("nginx", FILES, {"secret": SECRET, "expression": "$secure_link_expires$secret"}, "expression: without \\$uri"),
    ("nginx", FILES, {"secret": SECRET, "expression": "$secure_link_expires$uri x"}, "expression: without \\$secret"),
    ("nginx", FILES, {"secret": SECRET, "expression": "$uri$remote_addr"}, "expression: \\$remote_addr is not known"),
    ("nginx", FILES, {"secret": SECRET, "key_id": "a b"}, "key_id: 'a b' is not an id"),
    ("nginx", FILES, {"secret": SECRET, "origin": "s3"}, "origin: nginx sends the name"),
    ("hmac", FILES, {"secret": SECRET, "text": "{expires}"}, "text: without {path}"),
    ("hmac", FILES, {"secret": SECRET, "text": "{path}"}, "text: without {path} and {expires}"),
    ("hmac", FILES, {"secret": SECRET, "text": "{path.__class__}{expires}"}, "text: {path.__class__} is unknown"),
    ("hmac", FILES, {"secret": SECRET, "text": "{path!r}{expires}"}, "text: {path} is unknown"),
    ("hmac", FILES, {"secret": SECRET, "text": "{path}{expires"}, "text: .* has a brace"),
    ("hmac", FILES, {"secret": SECRET, "token": "{expires}"}, "token: without {signature}"),
    ("hmac", FILES, {"secret": SECRET, "origin": "s3"}, "text: without {query}"),
    ("hmac", FILES, {"secret": "zz" * 16, "secret_encoding": "hex"}, "secret: not an even number"),
    ("hmac", FILES, {"secret": SECRET, "algorithm": "md5"}, "algorithm: 'md5' does not fit"),
]


@pytest.mark.parametrize("kind, url, options, said", WRONG)
def test_what_cannot_sign_is_refused_at_the_start(kind: str, url: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        signer_of(kind, url, **options)
    shown = str(caught.value)
    assert SECRET not in shown
    assert ACCOUNT_KEY not in shown
    assert "PRIVATE KEY" not in shown
    assert "\n" not in shown


@pytest.mark.parametrize(
    "key, said",
    [
        (rsa.generate_private_key(65537, 3072), "RSA key of 2,048 bits"),
        (ec.generate_private_key(ec.SECP384R1()), "P-256"),
    ],
)
def test_cloudfront_takes_two_kinds_of_keys(key: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        signer_of("cloudfront", FILES, key_id=KEY_ID, private_key=pem(key))


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(ConfigurationError, match=r"needs cryptography: install .* with its extra `cdn`"):
        signer_of("cloudfront", FILES, key_id=KEY_ID, private_key=RSA_PEM)
    assert signer_of("bunny", FILES, secret=SECRET)


def test_a_key_with_a_password_is_refused() -> None:
    closed = RSA_KEY.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    ).decode()
    with pytest.raises(ConfigurationError, match="has a password"):
        signer_of("cloudfront", FILES, key_id=KEY_ID, private_key=closed)


def test_a_file_that_is_not_a_service_account_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"client_email": "x"}', '{"client_email": "x", "private_key": "secret text"}'):
        file = tmp_path / "account.json"
        file.write_text(text)
        with pytest.raises(ConfigurationError, match="key_file: ") as caught:
            signer_of("gcs", FILES, key_file=file)
        assert "secret text" not in str(caught.value)


# ---- kinds of other packages


class Mine:
    """A signer of another package."""

    max_seconds = 60
    carries = frozenset[str]()
    is_served_alike = True

    def __init__(self, edge: Edge) -> None:
        self.edge = edge

    def sign(self, path: str, headers: Mapping[str, str], *, now: float, seconds: int) -> Signed | None:
        return Signed(f"{self.edge.url}{path}?until={int(now) + seconds}", seconds)


def entry_point(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    point = SimpleNamespace(name="mine", value="mine:KIND", load=lambda: value)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [point])
    signer_kinds.cache_clear()


def test_a_package_adds_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SignerKind(name="mine", title="Mine", signer=Mine, options={})
    try:
        entry_point(monkeypatch, kind)
        assert signed(signer_of("mine", "https://mine.example.org"), "a.txt", seconds=60).url == (
            "https://mine.example.org/a.txt?until=1700000060"
        )
        taken: list[tuple[Any, str]] = [
            ("no kind", "not a SignerKind"),
            (replace(kind, name="bunny"), "a second signer with the name 'bunny'"),
            (
                replace(kind, options={"secret": SignerOption(bool, takes="x")}),
                "different options with the name 'secret'",
            ),
        ]
        for value, said in taken:
            entry_point(monkeypatch, value)
            with pytest.raises(ConfigurationError, match=said):
                signer_kinds()
    finally:
        monkeypatch.undo()
        signer_kinds.cache_clear()


@pytest.mark.parametrize("name", ["kind", "url", "expires", "Mine", "my-cdn", ""])
def test_names_that_settings_cannot_have(name: str) -> None:
    with pytest.raises(ConfigurationError, match="not a valid name"):
        SignerKind(name="mine", title="Mine", signer=Mine, options={name: SignerOption(str, takes="x")})
