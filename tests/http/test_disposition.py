"""Content-Disposition: what a client is told to call a file, whatever the file is called."""

import re
import unicodedata
from email import message_from_string
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from downloadview_async.http.disposition import MAX_BYTES, client_filename, content_disposition, is_device_name
from tests.http.asking import LARGE

# (name, fallback, exact name; None where the fallback is exact)
NAMES = [
    # nothing to do
    ("foo.html", "foo.html", None),
    ("plain.txt", "plain.txt", None),
    ("a b.txt", "a b.txt", None),
    ("foo-%41.html", "foo-_41.html", "foo-%41.html"),
    (".bashrc", ".bashrc", None),
    ("Makefile", "Makefile", None),
    ("x.tar.gz", "x.tar.gz", None),
    ("plus+.txt", "plus+.txt", None),
    (",.txt", ",.txt", None),
    ("@at.txt", "@at.txt", None),
    ("h#.txt", "h#.txt", None),
    ("a;b.txt", "a;b.txt", None),
    ("a=b&c'd.txt", "a=b&c'd.txt", None),
    # HTTP.md and RFC 6266: other scripts
    ("π.txt", "download.txt", "π.txt"),
    ("é.txt", "e.txt", "é.txt"),
    ("foo-ä.html", "foo-a.html", "foo-ä.html"),
    ("foo-ä-€.html", "foo-a-.html", "foo-ä-€.html"),
    ("€ rates", "rates", "€ rates"),
    ("文件.tar.gz", "download.tar.gz", "文件.tar.gz"),
    ("отчёт", "download", "отчёт"),
    ("отчёт 2024.pdf", "2024.pdf", "отчёт 2024.pdf"),
    ("файл.документ", "download", "файл.документ"),
    ("x.файл", "x", "x.файл"),
    (".π", "download", ".π"),
    ("👩\u200d💻.txt", "download.txt", "👩\u200d💻.txt"),
    ("می\u200cخواهم.txt", "download.txt", "می\u200cخواهم.txt"),
    ("e\u0301.txt", "e.txt", "é.txt"),
    ("ｆｕｌｌ.txt", "full.txt", "ｆｕｌｌ.txt"),
    # quoting
    ('a"; filename="x.bat', "a_; filename=_x.bat", 'a"; filename="x.bat'),
    ('foo"bar.html', "foo_bar.html", 'foo"bar.html'),
    ("50%.txt", "50_.txt", "50%.txt"),
    ("50%25.txt", "50_25.txt", "50%25.txt"),
    ("a%20b.txt", "a_20b.txt", "a%20b.txt"),
    ("%2e%2e%2fpasswd", "_2e_2e_2fpasswd", "%2e%2e%2fpasswd"),
    ("q?.txt", "q_.txt", "q?.txt"),
    ("a<b>:|*.txt", "a_b____.txt", "a<b>:|*.txt"),
    ("a.txt::$DATA", "a.txt__$DATA", "a.txt::$DATA"),
    ("UTF-8''x.txt", "UTF-8''x.txt", None),
    ("=?utf-8?q?x?=.txt", "=_utf-8_q_x_=.txt", "=?utf-8?q?x?=.txt"),
    # path parts
    ("/etc/passwd", "passwd", None),
    ("../../etc/passwd", "passwd", None),
    ("C:\\Users\\x\\report.doc", "report.doc", None),
    ("\\\\server\\share\\f.txt", "f.txt", None),
    ("a/b\\c.txt", "c.txt", None),
    ("a\\b/c.txt", "c.txt", None),
    ("dir/", "dir", None),
    ("dir/file.txt/", "file.txt", None),
    ("a／b.txt", "a_b.txt", "a／b.txt"),
    ("℀.txt", "a_c.txt", "℀.txt"),
    # controls and what nobody sees
    ("a\r\nSet-Cookie: x=1", "aSet-Cookie_ x=1", "aSet-Cookie: x=1"),
    ("a\x00b.txt", "ab.txt", None),
    ("a\tb.txt", "ab.txt", None),
    ("a\x7fb\x85c.txt", "abc.txt", None),
    ("exe\u202etxt.scr", "exetxt.scr", None),
    ("a\u200e\u200f\u061c\u2066\u2069b.txt", "ab.txt", None),
    ("a\u200b\ufeff\u00adb.txt", "ab.txt", None),
    ("a\u2028b\u2029.txt", "ab.txt", None),
    ("a\ue000b\uffff.txt", "ab.txt", None),
    ("a\ud800b.txt", "a_b.txt", "a?b.txt"),
    ("e\u00ad\u0301.txt", "e.txt", "é.txt"),
    # blanks and dots around it
    (" a.txt ", "a.txt", None),
    ("a.txt...", "a.txt", None),
    ("a.txt. . ", "a.txt", None),
    ("a.txt.\u3000.", "a.txt", None),
    ("\u00a0a.txt\u2003", "a.txt", None),
    # nothing left
    ("", "download", None),
    (".", "download", None),
    ("..", "download", None),
    ("...", "download", None),
    ("/", "download", None),
    ("///", "download", None),
    ("\\", "download", None),
    (" ", "download", None),
    (" . ", "download", None),
    ("\x00", "download", None),
    ("dir/\u200e", "download", None),
    ("\u200d\u200c", "download", None),
    ("." * 300, "download", None),
    # devices of Windows
    ("CON", "_CON", None),
    ("nul.txt", "_nul.txt", None),
    ("COM1", "_COM1", None),
    ("b/COM1", "_COM1", None),
    ("lpt9.tar.gz", "_lpt9.tar.gz", None),
    ("aux .txt", "_aux.txt", "_aux .txt"),
    ("con" + " " * 300 + "x", "_con", None),
    ("ＣＯＮ.txt", "_CON.txt", "ＣＯＮ.txt"),
    ("COM¹.txt", "_COM1.txt", "_COM¹.txt"),
    ("console.txt", "console.txt", None),
    ("com10", "com10", None),
]  # fmt: skip


@pytest.mark.parametrize("name, fallback, exact", NAMES)
def test_names_for_clients(name: str, fallback: str, exact: str | None) -> None:
    assert client_filename(name) == (fallback if exact is None else exact)
    value = content_disposition(name)
    assert value.startswith(f'attachment; filename="{fallback}"')
    rest = value.removeprefix(f'attachment; filename="{fallback}"')
    assert rest.startswith("; filename*=UTF-8''") or exact is None
    assert unquote(rest.removeprefix("; filename*=UTF-8''")) == (exact or "")


def test_the_value_is_written_as_rfc_8187_has_it() -> None:
    assert content_disposition("plain.txt") == 'attachment; filename="plain.txt"'
    assert content_disposition("€ rates.txt") == (
        "attachment; filename=\"rates.txt\"; filename*=UTF-8''%E2%82%AC%20rates.txt"
    )
    assert content_disposition("π!#$&+-.^_`|~'()*%.x").endswith("filename*=UTF-8''%CF%80!#$&+-.^_`|~%27%28%29%2A%25.x")


def test_an_inline_file_has_a_name_too() -> None:
    assert content_disposition("π.txt", attachment=False) == (
        "inline; filename=\"download.txt\"; filename*=UTF-8''%CF%80.txt"
    )


@pytest.mark.parametrize(
    "name, length, end",
    [
        ("a" * 300 + ".txt", 255, ".txt"),
        ("a" * 255, 255, "a"),
        ("a" * 256, 255, "a"),
        ("é" * 200 + ".txt", 255, "é.txt"),
        ("漢" * 100 + ".tar.gz", 255, "漢.gz"),
        ("a" * 100 + "." + "b" * 300, 255, "b"),
        ("." + "a" * 300, 255, "a"),
        ("a" * 203 + "  " + "a" * 40 + "." + "b" * 50, 254, "a." + "b" * 50),
        ("con." + "x" * 251, 255, "x"),
        ("👩" * 80, 252, "👩"),
    ],
)
def test_long_names_are_cut_before_their_extension(name: str, length: int, end: str) -> None:
    cut = client_filename(name)
    assert cut.endswith(end)
    assert len(cut.encode()) <= length <= MAX_BYTES


def test_a_long_name_of_dots_is_no_empty_name() -> None:
    assert client_filename("." * 300 + "a" * 100) == "download"


def test_a_fallback_that_grows_is_cut_too() -> None:
    name = "㎯" * 85  # "rad∕s²": five ASCII characters for three bytes
    match = re.fullmatch(r'attachment; filename="([^"]*)"; filename\*=.*', content_disposition(name))
    assert match is not None
    assert 0 < len(match[1]) <= MAX_BYTES


@pytest.mark.parametrize(
    "name",
    [
        "CON", "con", "PRN", "AUX", "NUL", "nul.txt", "NUL.tar.gz", "COM0", "COM1", "com9", "LPT1", "lpt9.x", "COM¹",
        "LPT³", "CONIN$", "conout$", "con ", "con .txt", "nul.\n",
    ],
)  # fmt: skip
def test_device_names(name: str) -> None:
    assert is_device_name(name)


@pytest.mark.parametrize(
    "name", ["", "co", "conn", "con-1", "xcon", "com", "com10", "COMx", "lpt", "nul_", ".con", "a.con"]
)
def test_names_that_are_no_devices(name: str) -> None:
    assert not is_device_name(name)


# All that a name may be made of, with what matters here often.
nasty = st.text(st.characters() | st.sampled_from("./\\\";%=' *:\r\n\x00\u202e\u200d\u3000\u0301éπ漢👩\ud800conCON12"))
VALUE = re.compile(
    r'(attachment|inline); filename="([^"\\\x00-\x1f\x7f]+)"(?:; filename\*=UTF-8\'\'([!#$&+.^_`|~0-9A-Za-z%-]+))?'
)


@given(nasty, st.booleans())
@example('a"; filename="x.bat', True)
@example("." * 300 + "a" * 100, True)
@example("㎯" * 85, True)
def test_every_name_gives_a_pure_ascii_value_with_one_name_in_it(name: str, attachment: bool) -> None:
    value = content_disposition(name, attachment=attachment)
    match = VALUE.fullmatch(value)
    assert match is not None
    kind, fallback, exact = match.groups()
    assert value.isascii()
    assert (kind == "attachment") is attachment
    assert (unquote(exact, errors="strict") if exact else fallback) == client_filename(name)
    assert not set(fallback) & set('\\/<>:"|?*%')
    assert fallback.strip(". ")
    assert not fallback.endswith((" ", "."))
    assert len(fallback) <= MAX_BYTES
    assert not is_device_name(fallback)


@given(nasty)
def test_a_mail_parser_reads_the_very_name(name: str) -> None:
    value = content_disposition(name)
    if "filename*=" in value:
        value = re.sub('filename="[^"]*"; ', "", value)  # which of two names to take is not a mail parser's business
    assert message_from_string(f"Content-Disposition: {value}\n\n").get_filename() == client_filename(name)


@given(nasty)
@example("e\u00ad\u0301")
@example("a.\u3000.")
@example("con" + " " * 300 + "x")
def test_a_name_for_clients_is_safe_and_stays_as_it_is(name: str) -> None:
    safe = client_filename(name)
    assert safe
    assert client_filename(safe) == safe
    assert len(safe.encode()) <= MAX_BYTES
    assert not set(safe) & set("/\\")
    assert safe.strip(" .\u200c\u200d")
    assert not safe[-1].isspace()
    assert not safe[0].isspace()
    assert not is_device_name(safe)
    assert not {unicodedata.category(character) for character in safe} & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(character) for character in safe} & {
        "LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
    }  # fmt: skip


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text",
    [".", " ", "a", '"', "\\", "/", "a/", "con", "con ", "π", "\u0301", "\u0327\u0301", "%", "\u200d", "\u3000.", "㎯"],
    ids=repr,
)
def test_a_huge_name_is_decided(text: str) -> None:
    name = text * (LARGE // len(text))
    assert len(client_filename(name).encode()) <= MAX_BYTES
    assert len(content_disposition(f"a{name}x")) < 60 + 4 * MAX_BYTES
