"""What others have written, as the log shows it: on one line, printable, and of bounded length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downloadview_async.http.log_text import LIMIT, cut, escaped, shown


@pytest.mark.parametrize(
    "text, name, reason",
    [
        ("a b.txt", "'a b.txt'", "a b.txt"),
        ("é\n\x1b[31m", r"'\xe9\n\x1b[31m'", r"\xe9\n\x1b[31m"),
        ("a'b", '"a\'b"', "a'b"),
        ("\ud800\u2028", r"'\ud800\u2028'", r"\ud800\u2028"),
        ("", "''", ""),
    ],
)
def test_names_and_reasons(text: str, name: str, reason: str) -> None:
    assert (shown(text), escaped(text)) == (name, reason)


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    assert cut("a" * LIMIT) == "a" * LIMIT
    assert cut("a" * LIMIT + "z") == f"{'a' * 900}[... 1 characters ...]{'a' * 99}z"
    assert cut("b" + "a" * 9_999) == f"b{'a' * 899}[... 9000 characters ...]{'a' * 100}"


@given(st.text())
def test_any_text_is_one_short_line_of_printable_ascii(text: str) -> None:
    for made in (shown(text * 50), escaped(text * 50)):
        assert made.isascii()
        assert made == "" or made.isprintable()
        assert len(made) < LIMIT + 50
