"""How the log shows text from outside, such as a name: on one line, in printable ASCII, with a bounded length."""

import codecs

LIMIT = 1_000
"""Characters of a name or a reason that the log shows. It shows only the beginning and the end of a longer one."""

_END = 100
codecs.lookup("unicode_escape")  # loaded now: when it is first used, all file descriptors may be taken


def shown(name: str) -> str:
    """Return a name in quotation marks, escaped as in Python, and cut to about `LIMIT` characters."""
    return cut(ascii(name))


def escaped(text: str) -> str:
    """Return a text, escaped as in a Python literal, and cut to about `LIMIT` characters."""
    return cut(text.encode("unicode_escape").decode())


def cut(text: str) -> str:
    """Return the text; if it is longer than `LIMIT`, its beginning, the number of characters left out, and its end."""
    if len(text) <= LIMIT:
        return text
    return f"{text[: LIMIT - _END]}[... {len(text) - LIMIT} characters ...]{text[-_END:]}"
