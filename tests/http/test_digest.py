"""Repr-Digest and Want-Repr-Digest, RFC 9530."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.errors import ConfigurationError
from downloadview_async.http.digest import (
    Digests,
    check_algorithms,
    digests_of,
    new_hashes,
    parse_repr_digest,
    preferred_digest,
    repr_digest,
)
from tests.http.asking import LARGE

# The representation in the examples of appendix B, and its digests there.
CONTENT = b'{"hello": "world"}\n'
SHA256 = ("sha-256", hashlib.sha256(CONTENT).digest())
SHA512 = ("sha-512", hashlib.sha512(CONTENT).digest())
BOTH = (SHA256, SHA512)
IN_256 = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:"
IN_512 = "sha-512=:YMAam51Jz/jOATT6/zvHrLVgOYTGFy1d6GJiOHTohq4yP+pgk4vf2aCsyRZOtw8MjkM7iw7yZ/WkppmM44T3qg==:"


@pytest.mark.parametrize(
    "digests, field", [((SHA256,), IN_256), ((SHA512,), IN_512), (BOTH, f"{IN_256}, {IN_512}"), ((), "")]
)
def test_the_digests_of_a_file_become_a_field(digests: Digests, field: str) -> None:
    assert repr_digest(digests) == field
    assert parse_repr_digest(field) == digests


@pytest.mark.parametrize(
    "field, digests",
    [
        (f"{IN_512},\t {IN_256}", BOTH),
        (f"  {IN_256}  ", (SHA256,)),
        (f'{IN_256};a;b=1;c=?0; d="x\\"y";e=tok/en:1;f=:YQ==:;g=1.5;h=@12;i=%"z"', (SHA256,)),
        # members of other algorithms are ignored, whatever their type
        (f"md5=:YQ==:, {IN_256}", (SHA256,)),
        (f"sha, crc32c=?0, x=(1 a;q=2 :YQ==: ), y=(), z=( 1);p, w=tok, {IN_256}", (SHA256,)),
        # so are members whose value is not a digest of the algorithm
        (f"sha-512=1, {IN_256}", (SHA256,)),
        (f"sha-512, {IN_256}", (SHA256,)),
        (f"sha-512=(1), {IN_256}", (SHA256,)),
        (f"sha-512=:YQ==:, {IN_256}", (SHA256,)),
        (f"sha-512=:Y:, {IN_256}", (SHA256,)),
        (f"sha-512=:Y=Q=:, {IN_256}", (SHA256,)),
        # the last of several members with one name counts
        (f"sha-256=1, {IN_256}", (SHA256,)),
        (f"{IN_256}, sha-256=1", ()),
        # a field that does not parse is ignored as a whole
        (f"{IN_256},", ()),
        (f",{IN_256}", ()),
        (f"{IN_256} {IN_512}", ()),
        (f"{IN_256}, X=1", ()),
        (f"{IN_256}, a=1.", ()),
        (f"{IN_256}, a=1234567890123456", ()),
        (f"{IN_256}, a=1.2345", ()),
        (f"{IN_256}, a=(1", ()),
        (f"{IN_256}, a=(1,2)", ()),
        (f"{IN_256}, a=(1a)", ()),
        (f'{IN_256}, a="', ()),
        (f'{IN_256}, a="\\x"', ()),
        (f"{IN_256}, a=?2", ()),
        (f"{IN_256};", ()),
        (f"{IN_256};A", ()),
        ("sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=", ()),
        ("sha-256=RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=", ()),
        ("sha-256 =:YQ==:", ()),
        ("sha-256=:\xe9:", ()),
    ],
)
def test_a_field_of_another_server_is_read(field: str, digests: Digests) -> None:
    assert parse_repr_digest(field) == digests


@pytest.mark.parametrize(
    "want, sent",
    [
        (None, [SHA256]),
        # appendix C.1: sha-512 is preferred; C.2: the server does not know the algorithm
        ("sha-256=3, sha-512=10", [SHA512]),
        ("sha=10", [SHA256]),
        # section 4
        ("sha-256=1", [SHA256]),
        ("sha-512=3, sha-256=10, unixsum=0", [SHA256]),
        ("sha-512=1", [SHA512]),
        ("sha-512=0", [SHA256]),
        ("sha-512=0, sha-256=0", []),
        ("sha-256=0", [SHA512]),
        ("sha-256=0, sha-512=1", [SHA512]),
        ("sha-256=10, sha-512=10", [SHA256]),
        ("sha-512=10;q=1, sha-256=1;x", [SHA512]),
        ("sha-256=1, sha-512=5, sha-512=0", [SHA256]),
        # what is not a weight counts as not sent
        ("sha-512=11", [SHA256]),
        ("sha-512=-1", [SHA256]),
        ("sha-512=1.0", [SHA256]),
        ("sha-512", [SHA256]),
        ("sha-512=?1", [SHA256]),
        ("sha-512=(10)", [SHA256]),
        ('sha-512="10"', [SHA256]),
        ("sha-512=@10", [SHA256]),
        ("sha-512=010", [SHA512]),
        # a field that does not parse is ignored
        ("", [SHA256]),
        ("sha-512=10,", [SHA256]),
        ("SHA-512=10", [SHA256]),
        ("sha-256=0;", [SHA256]),
    ],
)
def test_the_client_gets_the_digest_that_it_prefers(want: str | None, sent: list[tuple[str, bytes]]) -> None:
    assert preferred_digest(BOTH, want) == tuple(sent)


@pytest.mark.parametrize(
    "digests, want, sent",
    [
        ((), None, ()),
        ((), "sha-256=10", ()),
        ((SHA512,), None, (SHA512,)),
        ((SHA512,), "sha-512=1", (SHA512,)),
        ((SHA512,), "sha-256=10", (SHA512,)),
        ((SHA512,), "sha-256=10, sha-512=0", ()),
        ((SHA256,), "sha-512=10", (SHA256,)),
        ((SHA256,), "sha-512=10, sha-256=0", ()),
        ((SHA256,), "sha-512=10, sha-256=1", (SHA256,)),
    ],
)
def test_only_known_digests_are_sent(digests: Digests, want: str | None, sent: Digests) -> None:
    assert preferred_digest(digests, want) == sent


@given(st.text(alphabet='sha-256=:;,()"\\ \t?@%.*0aA/', max_size=60))
def test_no_field_is_an_error(text: str) -> None:
    assert preferred_digest((SHA256,), text) in ((SHA256,), ())
    assert parse_repr_digest(text) == ()


@pytest.mark.parametrize("part", ["a", "a=1,", "a=(1 ", "a;", ";a", '"', "a=(", "( ", "a=:", "a, ", "-", " \t", "1"])
def test_a_long_field_takes_no_quadratic_time(part: str) -> None:
    for field in (part * (LARGE // len(part)), "a=" + part * (LARGE // len(part))):
        preferred_digest((SHA256,), field)


def test_hashes_are_those_of_the_algorithms() -> None:
    hashes = new_hashes(["sha-512", "sha-256"])
    for value in hashes.values():
        value.update(CONTENT)
    assert digests_of(hashes) == BOTH


@pytest.mark.parametrize("algorithms", ["sha-256", ["md5"], ["sha-256", "crc32"]])
def test_other_algorithms_are_refused(algorithms: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="digests= takes some of sha-256, sha-512"):
        check_algorithms(algorithms, "digests=")
    check_algorithms(["sha-512"], "digests=")
