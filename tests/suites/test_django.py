"""Django's own tests of FileResponse, given by our response, and of its ASGI handler, with ours in its place."""

from pathlib import Path

import pytest

from tests.suites.released import run_suite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_FROM_THE_START = "a response sends a file from its beginning, wherever the file object stands"
_CHARSET = "a text has its charset in Content-Type"
_NAMED = "every download has a name in Content-Disposition"
_TYPES = "content types come from the library's table, which has application/x-bzip2 and no type for brotli"
DIFFERENCES = {
    "FileResponseTests::test_compressed_response": _TYPES,
    "FileResponseTests::test_content_disposition_buffer": _NAMED,
    "FileResponseTests::test_content_disposition_buffer_attachment": _NAMED,
    "FileResponseTests::test_content_disposition_escaping": "as in django-downloadview, a name in ASCII has no blanks",
    "FileResponseTests::test_content_length_nonzero_starting_position_buffer": _FROM_THE_START,
    "FileResponseTests::test_content_length_nonzero_starting_position_file": _FROM_THE_START,
    "FileResponseTests::test_content_length_nonzero_starting_position_file_seekable_no_tell": _FROM_THE_START,
    "FileResponseTests::test_content_type_buffer_named": _CHARSET,
    "FileResponseTests::test_content_type_file": _CHARSET,
    "FileResponseTests::test_repr": "the class has another name",
    "FileResponseTests::test_response_nonzero_starting_position": _FROM_THE_START,
    "FileResponseTests::test_unicode_attachment": "filename* is spelled UTF-8, and a name in ASCII precedes it",
    "ASGITest::test_assert_in_listen_for_disconnect": "what ASGI does not have is taken for the leaving client",
    "ASGITest::test_wrong_connection_type": "the error has another text",
}
"""Tests that our response or our handler fails, each with the reason why it answers differently."""


def test_file_response_and_asgi(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    outcomes = run_suite(
        "django",
        ["responses/test_fileresponse.py", "asgi/tests.py"],
        plugin="django_suite",
        cache=pytestconfig.cache.mkdir("suites"),
        directory=tmp_path,
        beneath="tests",
        parts=("tests/responses/", "tests/asgi/", "tests/urls.py"),
    )
    outcomes.check(differences=DIFFERENCES, skips={}, at_least=35)
