"""How the log shows what others have written, such as a name: on one line, in printable ASCII, of bounded length."""

import codecs

LIMIT = 1_000
"""Characters of a name or a reason that the log shows; of a longer one it shows the beginning and the end."""

_END = 100
codecs.lookup("unicode_escape")  # now: when it is first needed, there may be no descriptor left to load it by


def shown(name: str) -> str:
    """Return a name in quotation marks, escaped as in Python, and cut to about `LIMIT` characters."""
    return cut(ascii(name))


def escaped(text: str) -> str:
    """Return a text, escaped as in a Python literal, and cut to about `LIMIT` characters."""
    return cut(text.encode("unicode_escape").decode())


def cut(text: str) -> str:
    """Return the text, or the beginning and the end of one that is longer than `LIMIT`, with how much is left out."""
    if len(text) <= LIMIT:
        return text
    return f"{text[: LIMIT - _END]}[... {len(text) - LIMIT} characters ...]{text[-_END:]}"
