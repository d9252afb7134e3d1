"""What `downloadview serve` says at its start: what is served where, and by whom."""

from pathlib import Path

import pytest

from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.served import served

SOURCES = """
[sources.files]
type = "path"
root = "files"

[sources.bucket]
type = "storage"
url = "s3://bucket/prefix"
presign = {}

[sources.copied]
type = "path"
root = "files"
edge = { kind = "bunny", url = "https://zone.b-cdn.net/files/", secret = "0123456789abcdef" }

[sources.mirror]
type = "remote"
url = "https://files.example.org/pub"

[sources.made]
type = "virtual"
factory = "app.reports:report"
"""
ROUTES = [
    ("files", None),
    ("files", "stream"),
    ("bucket", "redirect"),
    ("mirror", None),
    ("made", None),
    ("copied", "redirect"),
]


@pytest.mark.parametrize("backend", [None, "nginx", "apache"])
def test_each_route_has_a_line(backend: str | None, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    text = SOURCES + "".join(
        f'[[routes]]\npath = "/{number}/{{path:path}}"\nsource = "{source}"\n' + (f'send = "{send}"\n' if send else "")
        for number, (source, send) in enumerate(ROUTES)
    )
    if backend is not None:
        text += f'[offload]\nbackend = "{backend}"\n'
    (tmp_path / "downloads.toml").write_text(text)
    title = {None: "this service", "nginx": "nginx", "apache": "Apache"}[backend]
    lines = [*served(load_settings(tmp_path / "downloads.toml", environ={}))]
    assert lines[: len(ROUTES)] == [
        f"/0/{{path:path}}: files of {tmp_path}/files, sent by {title}",
        f"/1/{{path:path}}: files of {tmp_path}/files, sent by this service",
        "/2/{path:path}: files of s3://bucket/prefix, sent by the store, to which clients are redirected",
        "/3/{path:path}: files of https://files.example.org/pub, sent by this service",
        "/4/{path:path}: files of the source made, sent by this service",
        f"/5/{{path:path}}: files of {tmp_path}/files, sent by https://zone.b-cdn.net/files/, to which clients are "
        "redirected",
    ]
    last = [f"{title} sends files: open its address, and not this one, where such an answer has no body"]
    assert lines[len(ROUTES) :] == (last if backend else [])


def test_the_root_path_is_part_of_the_line(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    text = SOURCES + '[[routes]]\npath = "/{path:path}"\nsource = "files"\n[server]\nroot_path = "/downloads"\n'
    (tmp_path / "downloads.toml").write_text(text)
    (line,) = served(load_settings(tmp_path / "downloads.toml", environ={}))
    assert line.startswith("/downloads/{path:path}: ")
