"""Checks what is pinned and installed, with a package index alone: `make audit`, and `make sbom` for the list of it.

    python requirements/audit.py requirements/dev.txt requirements/oldest.txt=.venv/oldest

Each argument is a lock file, with the directory into which it is installed; by default, that of this interpreter.

A pin is a problem if its index has withdrawn ("yanked") the release, or has none of the files whose hashes are pinned.
An installed package is a problem if no lock file pins it, or another version, if its files have changed since it was
installed, or if its licence is not permitted in `audit.toml`. The index is that of pip, by its configuration
or the variable PIP_INDEX_URL. The lists of files have no advisories, so known vulnerabilities are not found here.
"""

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^ ;\\]+)")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_JSON = "application/vnd.pypi.simple.v1+json"
_OURS = {"downloadview-async", "pip"}
_PATIENCE = 60  # seconds for one answer of the index
_CHANGED = 5  # files that are named for a package


def normal(name: str) -> str:
    """Return the name of a package as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass
class Pin:
    """A release that a lock file names, with the SHA-256 hashes of its files."""

    name: str
    version: str
    hashes: set[str] = field(default_factory=set)


def pins_of(lock: Path) -> list[Pin]:
    """Return the pins of a lock file."""
    pins: list[Pin] = []
    for line in lock.read_text().splitlines():
        if (match := _PIN.match(line)) is not None:
            pins.append(Pin(normal(match[1]), match[2]))
        if pins:
            pins[-1].hashes.update(_HASH.findall(line))
    return pins


@dataclass(frozen=True)
class File:
    """A file that the index lists. yanked: None, or the reason why it was withdrawn, which may be empty."""

    hash: str
    yanked: str | None


class _Links(HTMLParser):
    """The files of a page of an index in HTML: PEP 503 and PEP 592."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[File] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "a" and "#sha256=" in (href := attributes.get("href") or ""):
            yanked = (attributes["data-yanked"] or "") if "data-yanked" in attributes else None
            self.files.append(File(href.rpartition("#sha256=")[2], yanked))


def files_of(name: str, index: str) -> list[File]:
    """Return the files that an index has of a package; none if it does not know it."""
    request = urllib.request.Request(  # noqa: S310 - the index of pip
        f"{index.rstrip('/')}/{name}/", headers={"Accept": f"{_JSON}, text/html;q=0.1"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:  # noqa: S310
            body, kind = answer.read(), answer.headers.get_content_type()
    except urllib.error.HTTPError as exc:
        if exc.code in (404, 410):
            return []
        raise
    if kind != _JSON:
        links = _Links()
        links.feed(body.decode())
        return links.files
    return [
        File(file["hashes"].get("sha256", ""), None if (why := file.get("yanked", False)) is False else _reason(why))
        for file in json.loads(body)["files"]
    ]


def _reason(why: str | bool) -> str:
    return why if isinstance(why, str) else ""


def problems_of_pin(pin: Pin, files: Iterable[File]) -> Iterator[str]:
    """Yield what is wrong with a pin, by the files that the index has of its package."""
    pinned = [file for file in files if file.hash in pin.hashes]
    if not pin.hashes:
        yield f"{pin.name} {pin.version} is pinned without hashes"
    elif not pinned:
        yield f"{pin.name} {pin.version}: the index has none of the files that are pinned"
    elif yanked := [file.yanked for file in pinned if file.yanked is not None]:
        yield f"{pin.name} {pin.version} was yanked: {yanked[0] or 'without a reason'}"


@dataclass(frozen=True)
class Licences:
    """The licences that are permitted: see `audit.toml`."""

    permitted: frozenset[str]
    stated: Mapping[str, str]
    names: Mapping[str, str]

    @classmethod
    def read(cls) -> "Licences":
        """Return those of `audit.toml`."""
        settings = tomllib.loads((HERE / "audit.toml").read_text())
        return cls(frozenset(settings["permitted"]), settings["stated"], settings["names"])

    def of(self, package: Distribution) -> str:
        """Return the licence of a package as an expression of SPDX; "" if its metadata does not tell it."""
        metadata: Any = package.metadata
        if (stated := self.stated.get(normal(metadata["Name"]))) is not None:
            return stated
        if expression := metadata.get("License-Expression"):
            return str(expression)
        classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or () if _is_licence(line)]
        if classifiers:
            return " AND ".join(self.names.get(name, name) for name in classifiers)
        text = (metadata.get("License") or "").strip().partition("\n")[0]
        return self.names.get(text, text)

    def permit(self, expression: str) -> bool:
        """Return whether an expression of SPDX is permitted: one side of each OR, and both of each AND."""
        text = expression.replace("(", " ").replace(")", " ") if " OR " not in expression else expression
        if "(" in text:  # such as "A AND (B OR C)": each licence in it has to be permitted
            text = re.sub(r"[()]", " ", text).replace(" OR ", " AND ")
        return any(
            all(name.strip() in self.permitted for name in side.split(" AND ")) for side in text.split(" OR ") if side
        )


def _is_licence(classifier: str) -> bool:
    return classifier.startswith("License ::") and not classifier.endswith(("DFSG approved", "OSI Approved"))


def problems_of_package(package: Distribution, pins: Mapping[str, set[str]], licences: Licences) -> Iterator[str]:
    """Yield what is wrong with an installed package. pins: the versions that the lock files have of each."""
    name, version = normal(package.metadata["Name"]), package.version
    if name in _OURS:
        return
    if name not in pins:
        yield f"{name} {version} is installed, and no lock file has it"
    elif version not in pins[name]:
        yield f"{name} {version} is installed, and {' or '.join(sorted(pins[name]))} is pinned"
    licence = licences.of(package)
    if not licences.permit(licence):
        yield f"{name} {version} has the licence {licence!r}, which audit.toml does not permit"
    changed = [*_changed_files(package)]
    if changed:
        more = "" if len(changed) <= _CHANGED else f" and {len(changed) - _CHANGED} more"
        yield f"{name} {version}: {', '.join(changed[:_CHANGED])}{more} changed after the installation"


def _changed_files(package: Distribution) -> Iterator[str]:
    for file in package.files or ():
        if file.hash is None or file.hash.mode != "sha256" or file.parts[:1] == ("..",):
            continue  # scripts, into which the installer writes its interpreter
        path = Path(str(file.locate()))
        if not path.is_file():
            yield str(file)
            continue
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        if digest != file.hash.value:
            yield str(file)


def audit(places: Mapping[str, list[Path]], index: str) -> list[str]:
    """Return all problems. places: the lock files of each directory of packages."""
    problems: list[str] = []
    licences = Licences.read()
    every = {(pin.name, pin.version): pin for locks in places.values() for lock in locks for pin in pins_of(lock)}
    names = sorted({name for name, _ in every})
    with ThreadPoolExecutor(16) as threads:
        files = dict(zip(names, threads.map(lambda name: files_of(name, index), names), strict=True))
    for (name, _), pin in sorted(every.items()):
        problems += problems_of_pin(pin, files[name])
    for directory, locks in places.items():
        pins: dict[str, set[str]] = {}
        for pin in (pin for lock in locks for pin in pins_of(lock)):
            pins.setdefault(pin.name, set()).add(pin.version)
        for package in distributions(path=[directory]):
            problems += problems_of_package(package, pins, licences)
    return problems


def sbom(lock: Path, directory: str, version: str) -> dict[str, Any]:
    """Return the bill of materials of a lock file, as far as it is installed, in CycloneDX 1.6."""
    licences = Licences.read()
    installed = {normal(package.metadata["Name"]): package for package in distributions(path=[directory])}
    components = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{pin.name}@{pin.version}",
            "name": pin.name,
            "version": pin.version,
            "purl": f"pkg:pypi/{pin.name}@{pin.version}",
            "licenses": [{"expression": licences.of(installed[pin.name])}],
            "properties": [{"name": "pinned:sha256", "value": one} for one in sorted(pin.hashes)],
        }
        for pin in sorted(pins_of(lock), key=lambda pin: pin.name)
        if pin.name in installed and installed[pin.name].version == pin.version
    ]
    subject = f"pkg:pypi/downloadview-async@{version}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": subject,
                "name": "downloadview_async",
                "version": version,
                "licenses": [{"expression": "BSD-3-Clause"}],
                "purl": subject,
            }
        },
        "components": components,
    }


def _index() -> str:
    """Return the index of pip."""
    show = "from pip._internal.commands import create_command as c; print(c('download').parse_args(['x'])[0].index_url)"
    return subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-c", show], check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    """Audit the lock files that the command line names, or print the bill of materials of one."""
    parser = argparse.ArgumentParser(description="Check what is pinned and installed.")
    parser.add_argument("--sbom", metavar="VERSION", help="print the bill of materials of one lock file instead")
    parser.add_argument("locks", nargs="+", metavar="LOCK[=DIRECTORY]")
    given = parser.parse_args()
    places: dict[str, list[Path]] = {}
    for lock, _, directory in (one.partition("=") for one in given.locks):
        places.setdefault(directory or sysconfig.get_path("purelib"), []).append(Path(lock))
    if given.sbom is not None:
        ((directory, locks),) = places.items()
        print(json.dumps(sbom(locks[0], directory, given.sbom), indent=2))
        return
    problems = audit(places, _index())
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(f"{len(problems)} problems")
    print(f"audited {sum(len(pins_of(lock)) for locks in places.values() for lock in locks)} pins")


if __name__ == "__main__":
    main()
