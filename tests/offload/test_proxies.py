"""`ProxyKind` and `proxy_kinds` as tables: what each value says, and which values are refused."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import downloadview_async as dv
from downloadview_async.http.fields import OFFLOAD_HEADERS, OFFLOAD_ORDERS
from downloadview_async.offload.places import percent_encoded, plain, raw

NAMED: dict[str, Any] = {"name": "toy", "title": "Toy", "header": "X-Toy", "targets": "uri", "encode": percent_encoded}


class _At:
    name = "file"

    def __init__(self, location: str) -> None:
        self.location = location

    def open(self, request: dv.DownloadRequest = dv.DownloadRequest()) -> Any:  # noqa: B008
        raise AssertionError("no backend opens a file")


@pytest.fixture
def clean() -> Iterator[None]:
    """Leave the sets of headers as they were, for other tests in this process."""
    before = OFFLOAD_ORDERS.copy(), OFFLOAD_HEADERS.copy()
    yield
    for headers, kept in zip((OFFLOAD_ORDERS, OFFLOAD_HEADERS), before, strict=True):
        headers.clear()
        headers.update(kept)


def test_every_header_that_some_proxy_obeys_is_left_to_backends() -> None:
    orders = {"x-accel-redirect", "x-sendfile", "x-sendfile2", "x-lighttpd-send-file", "x-litespeed-location"}
    assert orders | {"x-reproxy-url"} <= OFFLOAD_ORDERS
    controls = {"x-accel-buffering", "x-accel-charset", "x-accel-expires", "x-accel-limit-rate", "x-offload-target"}
    assert controls | OFFLOAD_ORDERS <= OFFLOAD_HEADERS
    assert not controls & OFFLOAD_ORDERS
    for kind in dv.proxy_kinds().values():
        assert kind.header.lower() in OFFLOAD_ORDERS & kind.headers
        assert kind.headers <= OFFLOAD_HEADERS


@pytest.mark.parametrize("name", dv.proxy_kinds())
@pytest.mark.parametrize("path", ["plain.txt", "a b.txt", "50%.txt", "π.txt", "\udce9", "blank ", "a/b.txt"])
def test_a_backend_writes_what_the_kind_encodes(name: str, path: str) -> None:
    kind = dv.proxy_kinds()[name]
    target = "/_files/" if kind.targets == "uri" else "/srv/seen"
    made = kind.make_backend([dv.Rule("/srv/files", target)]).headers_for(_At(f"/srv/files/{path}"))
    encoded = kind.encode(path if kind.targets == "uri" else f"/srv/seen/{path}")
    value = encoded if encoded is None or kind.targets == "directory" else f"/_files/{encoded}"
    assert made == (None if value is None else {kind.header.lower(): value})


@pytest.mark.parametrize(
    "path, by_percent, as_bytes, as_plain",
    [
        ("a/b-~_.txt", "a/b-~_.txt", "a/b-~_.txt", "a/b-~_.txt"),
        ("50%.txt", "50%25.txt", "50%.txt", None),
        ("é", "%C3%A9", "Ã©", None),
        ("\udcff", "%FF", "ÿ", None),
        ("blank ", "blank%20", None, None),
    ],
)
def test_encodings(path: str, by_percent: str, as_bytes: str | None, as_plain: str | None) -> None:
    assert (percent_encoded(path), raw(path), plain(path)) == (by_percent, as_bytes, as_plain)


@pytest.mark.usefixtures("clean")
def test_a_kind_without_a_backend_sends_local_files_by_its_header() -> None:
    rules = [dv.Rule("/srv", "/_a/")]
    backend = dv.ProxyKind(**NAMED).make_backend(rules, storages=[])
    assert backend.headers_for(_At("/srv/a b")) == {"x-toy": "/_a/a%20b"}
    assert backend.headers_for(_At("/else/a b")) is None
    with pytest.raises(dv.ConfigurationError, match=r"Toy sends .*: 'http://x/' is not an absolute directory$"):
        dv.ProxyKind(**NAMED).make_backend([dv.Rule("http://x/", "/_a/")])
    by_path = dv.ProxyKind(**NAMED | {"targets": "directory", "encode": raw})
    assert by_path.make_backend([dv.Rule("/srv", "/mnt")]).headers_for(_At("/srv/a b")) == {"x-toy": "/mnt/a b"}
    with pytest.raises(dv.ConfigurationError, match="Toy sends local files: a rule from '/srv' to 'mnt'"):
        by_path.make_backend([dv.Rule("/srv", "mnt")])


@pytest.mark.usefixtures("clean")
def test_a_header_is_left_to_backends_from_when_its_kind_is_made() -> None:
    dv.DownloadResponse(dv.LocalFile("/srv/a"), headers={"X-Toy-Speed": "1"})
    dv.ProxyKind(**NAMED, further_orders=("X-Toy-Too",), controls=("X-Toy-Speed",))
    assert {"x-toy", "x-toy-too"} <= OFFLOAD_ORDERS
    assert "x-toy-speed" in OFFLOAD_HEADERS - OFFLOAD_ORDERS
    with pytest.raises(ValueError, match="x-toy-speed"):
        dv.DownloadResponse(dv.LocalFile("/srv/a"), headers={"X-Toy-Speed": "2"})


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    "changed, message",
    [
        ({"name": "a toy"}, "'a toy' is not a valid name"),
        ({"name": ""}, "'' is not a valid name"),
        (
            {"options": {"rules": dv.ProxyOption(bool, takes="true")}, "backend": dv.XReproxyURL},
            "'rules' is not a valid name",
        ),
        ({"options": {"speed": dv.ProxyOption(int, takes="a number")}}, "has options, but no backend"),
        ({"header": "Content-Type"}, "cannot obey the header 'Content-Type'"),
        ({"controls": ("X-A: b",)}, "cannot obey the header 'X-A: b'"),
    ],
)
def test_kinds_that_are_refused(changed: dict[str, Any], message: str) -> None:
    before = OFFLOAD_HEADERS.copy()
    with pytest.raises(dv.ConfigurationError, match=message):
        dv.ProxyKind(**NAMED | changed)
    assert before == OFFLOAD_HEADERS


_KIND = (
    "from downloadview_async import ProxyKind, ProxyOption\nTOY = ProxyKind(name='toy', title='Toy', header='X-Toy', "
)
_KIND += "targets='uri', encode=str"


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    "text, message",
    [
        ("raise OSError('gone')", "toy = toy:TOY of downloadview_async.proxies cannot be loaded (OSError: gone)"),
        ("", "cannot be loaded (AttributeError: module 'toy' has no attribute 'TOY')"),
        ("TOY = 1", "is not a ProxyKind"),
        (_KIND.replace("'toy'", "'h2o'") + ")", "is a second proxy with the name 'h2o'"),
        (
            _KIND + ", backend=str, options={'encoding': ProxyOption(bool, takes='true')})",
            "different options with the name 'encoding'",
        ),
        (
            _KIND
            + ", backend=str, options={'charset': ProxyOption(str, takes='a charset, such as utf-8', default='x')})",
            None,
        ),
    ],
)
def test_entry_points(text: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(text)
    metadata = tmp_path / "toy-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[downloadview_async.proxies]\ntoy = toy:TOY\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    load = dv.proxy_kinds.__wrapped__  # without what it has kept
    if message is None:
        assert list(load()) == [*dv.proxy_kinds(), "toy"]
        return
    with pytest.raises(dv.ConfigurationError) as refused:
        load()
    assert message in str(refused.value)


def test_options_have_the_defaults_of_their_kind() -> None:
    rules = [dv.Rule("/srv", "/srv")]
    headers = {
        (name, given): kind.make_backend(rules, encoding=given).headers_for(_At("/srv/50%"))
        for name, kind in dv.proxy_kinds().items()
        if "encoding" in kind.options
        for given in (None, "raw", "percent")
    }
    as_bytes, decoded = {"x-sendfile": "/srv/50%"}, {"x-sendfile": "/srv/50%25"}
    assert headers == {
        ("apache", None): as_bytes,
        ("apache", "raw"): as_bytes,
        ("apache", "percent"): decoded,
        ("lighttpd", None): decoded,
        ("lighttpd", "raw"): as_bytes,
        ("lighttpd", "percent"): decoded,
    }
    assert dv.proxy_kinds()["apache"].options["encoding"].type == Literal["raw", "percent"]


@pytest.mark.parametrize("name", dv.proxy_kinds())
@pytest.mark.parametrize(
    "rules", [dv.Rule("/srv", "/_srv/"), {"/srv": "/_srv/"}, [("/srv", "/_srv/")], "/srv", None], ids=repr
)
def test_a_backend_takes_a_list_of_rules(name: str, rules: Any) -> None:
    with pytest.raises(dv.ConfigurationError, match="takes a list of rules, such as"):
        dv.proxy_kinds()[name].make_backend(rules)
    if name != "litespeed":
        with pytest.raises(dv.ConfigurationError, match="takes a list of rules, such as"):
            dv.proxy_config(name, rules)
