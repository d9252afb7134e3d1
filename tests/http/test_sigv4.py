"""The query signature of S3: Amazon's own example, botocore's answers, and what must change it."""

from datetime import UTC, datetime
from urllib.parse import parse_qs, parse_qsl, urlsplit

import botocore.auth
import botocore.awsrequest
import botocore.credentials
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from downloadview_async.http.sigv4 import Credentials, presigned_url

# https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
EXAMPLE = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
MOMENT = datetime(2013, 5, 24, tzinfo=UTC).timestamp()


def test_the_example_of_amazon() -> None:
    url = presigned_url(
        "https://examplebucket.s3.amazonaws.com/test.txt", EXAMPLE, region="us-east-1", seconds=86400, now=MOMENT
    )
    assert url == (
        "https://examplebucket.s3.amazonaws.com/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256"
        "&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request"
        "&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
        "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )


def by_botocore(
    url: str, credentials: Credentials, region: str, seconds: int, parameters: dict[str, str], method: str
) -> dict[str, str]:
    request = botocore.awsrequest.AWSRequest(method=method, url=url, params=parameters)
    key = botocore.credentials.Credentials(credentials.access_key_id, credentials.secret_access_key, credentials.token)
    botocore.auth.S3SigV4QueryAuth(key, "s3", region, expires=seconds).add_auth(request)
    return dict(parse_qsl(urlsplit(request.url).query, keep_blank_values=True))


DISPOSITION = "attachment; filename=\"a b_.txt\"; filename*=UTF-8''%CF%80%20b%22.txt"
TABLE: list[tuple[str, dict[str, str], str | None, str]] = [
    ("https://bucket.s3.eu-west-1.amazonaws.com/a.txt", {}, None, "GET"),
    ("https://s3.eu-west-1.amazonaws.com/bucket/a.txt", {}, None, "HEAD"),
    ("http://127.0.0.1:8333/bucket/a%20prefix/b%25.txt", {"response-content-type": "text/plain"}, None, "GET"),
    (
        "https://files.example.org:443/bucket/%CF%80%2B%3F%23.txt",
        {"response-content-disposition": DISPOSITION},
        None,
        "GET",
    ),
    ("http://files.example.org:80/bucket/a~b-c_d.e", {"response-cache-control": "private, no-store"}, None, "GET"),
    ("https://FILES.example.org/bucket/a", {"a-b": "1", "a": "2", "A": "~ +/=&", "empty": ""}, None, "GET"),
    ("https://[::1]:9000/bucket/a", {}, "a session/token+with==", "GET"),
    ("https://files.example.org/", {}, "t", "GET"),
]


@pytest.mark.parametrize("url, parameters, token, method", TABLE)
def test_botocore_makes_the_same(url: str, parameters: dict[str, str], token: str | None, method: str) -> None:
    credentials = Credentials("AKIDEXAMPLE", "a secret/with+odd=characters", token)
    theirs = by_botocore(url, credentials, "eu-west-1", 600, parameters, method)
    now = datetime.strptime(theirs["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    ours = presigned_url(
        url, credentials, region="eu-west-1", seconds=600, now=now, parameters=parameters, method=method
    )
    assert dict(parse_qsl(urlsplit(ours).query, keep_blank_values=True)) == theirs
    assert ours.startswith(f"{url}?")


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text("abcxyz-AZ0", min_size=1), st.text(st.characters(codec="utf-8")), max_size=4))
def test_botocore_makes_the_same_of_any_parameters(parameters: dict[str, str]) -> None:
    url = "https://files.example.org/bucket/a.txt"
    theirs = by_botocore(url, EXAMPLE, "us-east-1", 60, parameters, "GET")
    now = datetime.strptime(theirs["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    ours = presigned_url(url, EXAMPLE, region="us-east-1", seconds=60, now=now, parameters=parameters)
    assert parse_qs(urlsplit(ours).query)["X-Amz-Signature"] == [theirs["X-Amz-Signature"]]


def test_everything_is_signed() -> None:
    url = "https://files.example.org/bucket/a.txt"
    same = {"region": "us-east-1", "seconds": 60, "now": MOMENT, "parameters": {"response-content-type": "text/plain"}}
    changes: list[dict[str, object]] = [
        {"region": "eu-west-1"},
        {"seconds": 61},
        {"now": MOMENT + 1},
        {"parameters": {"response-content-type": "text/html"}},
        {"parameters": {}},
        {"method": "HEAD"},
    ]
    variants = [
        presigned_url(url, EXAMPLE, **same),  # type: ignore[arg-type]
        presigned_url(url.replace("a.txt", "b.txt"), EXAMPLE, **same),  # type: ignore[arg-type]
        presigned_url(url.replace("files", "other"), EXAMPLE, **same),  # type: ignore[arg-type]
        *[presigned_url(url, EXAMPLE, **(same | changed)) for changed in changes],  # type: ignore[arg-type]
        presigned_url(url, Credentials(EXAMPLE.access_key_id, "other"), **same),  # type: ignore[arg-type]
    ]
    assert len({variant.rpartition("=")[2] for variant in variants}) == len(variants)


def test_secrets_are_not_shown() -> None:
    shown = repr(Credentials("AKID", "hidden", "hidden too"))
    assert "AKID" in shown
    assert "hidden" not in shown
