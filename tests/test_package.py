"""The package as an index shows it, and as the Dockerfile builds it."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from hatch_build import absolute
from tests.servers import PROJECT
from tests.service.test_deploy import dockerfile

PAGE = """# Name
![a picture
in two lines](docs/a.svg)

A [page](docs/a.md#part), a [site](https://example.org/a), a [heading](#more), a
[link of two
words](LICENSE).
"""


@pytest.mark.parametrize(
    "repository, expected",
    [
        (
            None,
            "# Name\nA page, a [site](https://example.org/a), a [heading](#more), a\nlink of two\nwords.\n",
        ),
        (
            "https://example.org/r/",
            """# Name
![a picture
in two lines](https://example.org/r/raw/HEAD/docs/a.svg)

A [page](https://example.org/r/blob/HEAD/docs/a.md#part), a [site](https://example.org/a), a [heading](#more), a
[link of two
words](https://example.org/r/blob/HEAD/LICENSE).
""",
        ),
    ],
    ids=["no repository", "a repository"],
)
def test_relative_links_are_made_absolute_or_text(repository: str | None, expected: str) -> None:
    assert absolute(PAGE, repository) == expected


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the command of the Dockerfile from the files that it copies."""
    directory = tmp_path_factory.mktemp("build")
    build = dockerfile()[0]
    for name, rest in build[: next(number for number, (_, rest) in enumerate(build) if "--no-index ." in rest)]:
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = directory / target
                if (PROJECT / source).is_dir():
                    shutil.copytree(PROJECT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.mkdir(exist_ok=True)
                    shutil.copy(PROJECT / source, place)
    (command,) = [rest.partition(" && ")[0] for name, rest in build if name == "RUN" and "--no-index ." in rest]
    words = command.replace("pip install", "pip wheel --quiet --wheel-dir dist").split()
    subprocess.run([sys.executable, "-m", *words], cwd=directory, check=True)
    (made,) = (directory / "dist").glob("*.whl")
    return made


@pytest.mark.slow
def test_an_index_shows_no_link_that_leads_nowhere(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert isinstance(description, str)
    assert description.startswith("# downloadview_async\n")
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert [target for target in targets if not target.startswith("https://")] == []
    assert "| file \\ sent by | nginx |" in description


@pytest.mark.slow
def test_the_dockerfile_installs_the_whole_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = PROJECT / "downloadview_async"
    ours = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {str(path.relative_to(PROJECT)) for path in ours} <= names
