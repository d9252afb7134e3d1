"""The MCP server of docs/howto/mcp.md, and its client: the package `mcp` as `make clients` installs it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.running import run
from tests.servers import PROJECT, free_port, serving

pytestmark = pytest.mark.slow

PACKAGES = Path(sys.prefix) / "clients"
PAGE = PROJECT / "docs" / "howto" / "mcp.md"
TOOLS = """
import asyncio, json, sys
from mcp import Client

async def main():
    async with Client(f"{sys.argv[1]}/mcp") as client:
        listed = await client.call_tool("list_reports", {})
        denied = [await client.call_tool("get_report", {"name": name}) for name in ("no.csv", "../secret", "link")]
        print(json.dumps({
            "tools": [tool.name for tool in (await client.list_tools()).tools],
            "reports": [content.text for content in listed.content],
            "denied": [(result.is_error, [content.text for content in result.content]) for result in denied],
        }))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files of the page."""
    if not (PACKAGES / "mcp").exists():
        pytest.skip(f"mcp is not installed in {PACKAGES}: make clients")
    directory = tmp_path_factory.mktemp("mcp")
    blocks = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in blocks] == ["reports.py", "client.py"]
    for name, text in blocks:
        (directory / name).write_text(text)
    (directory / "reports").mkdir()
    (directory / "secret").write_text("secret")
    (directory / "reports" / "link").symlink_to(directory / "secret")
    return directory


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[str]:
    port = free_port()
    env = {"PYTHONPATH": os.pathsep.join([str(PACKAGES), str(PROJECT)]), "BASE_URL": f"http://127.0.0.1:{port}"}
    command = [sys.executable, "-m", "uvicorn", "reports:app", "--port", str(port)]
    with serving(command, port, log=site / "log", env=env, cwd=site):
        yield f"http://127.0.0.1:{port}"


def called(script: list[str], site: Path) -> str:
    return run([sys.executable, *script], site, env={"PYTHONPATH": str(PACKAGES)})


def test_a_client_fetches_the_link_that_a_tool_returns(server: str, site: Path) -> None:
    size = (site / "reports" / "june.csv").stat().st_size
    assert called(["client.py", server], site).splitlines() == [
        f"june.csv text/csv {size}",
        "206 day,visits",
        f"200 {size} 403",
    ]


def test_the_tools_tell_nothing_of_files_that_are_not_there(server: str, site: Path) -> None:
    told = json.loads(called(["-c", TOOLS, server], site))
    assert told["tools"] == ["list_reports", "get_report"]
    assert told["reports"] == ["june.csv"]
    texts = []
    for (is_error, lines), name in zip(told["denied"], ("no.csv", "../secret", "link"), strict=True):
        assert is_error
        texts += [line.replace(name, "NAME") for line in lines]
    assert len(set(texts)) == 1
    assert "Errno" not in texts[0]


def test_the_page_needs_no_other_package(site: Path) -> None:
    """What the page says to install is enough: `mcp`, and the package with its extra `server`."""
    code = "import runpy; runpy.run_path('reports.py')"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(PACKAGES), str(PROJECT)])}
    subprocess.run([sys.executable, "-c", code], cwd=site, env=env, check=True)
