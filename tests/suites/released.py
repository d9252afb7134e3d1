"""Test suites of other projects: fetched with their releases, and run against our parts in place of theirs."""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PLUGINS = Path(__file__).parent / "plugins"
_PINS = PROJECT / "requirements" / "dev.txt"


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a suite's tests gave, each by its class or module and its name."""

    passed: frozenset[str]
    failed: Mapping[str, str]
    """With the output of each."""
    skipped: Mapping[str, str]
    """With the reason of each."""

    def check(self, *, differences: Mapping[str, str], skips: Mapping[str, str], at_least: int) -> None:
        """Fail unless exactly the tests in `differences` failed, and exactly those in `skips` were skipped.

        at_least: how many tests have to pass: a suite that is not collected is not a suite that passes.
        """
        unexpected = {name: output for name, output in self.failed.items() if name not in differences}
        assert not unexpected, "\n\n".join(f"{name}:\n{output}" for name, output in unexpected.items())
        outdated = sorted(set(differences) - set(self.failed))
        assert not outdated, f"listed as a difference, but does not fail: {outdated}"
        assert dict(self.skipped) == dict(skips)
        assert len(self.passed) >= at_least, f"only {len(self.passed)} tests ran"


def release(name: str, cache: Path) -> Path:
    """Return the source distribution of the pinned version of a package, which is the installed one.

    cache: where it is kept for the next time. The test is skipped where the registry cannot be reached.
    """
    pinned = rf"^{name}=={re.escape(version(name))}(?: ;[^\\\n]*)?(?: \\\n    --hash=\S+)+\n"
    pin = re.search(pinned, _PINS.read_text(), re.MULTILINE)
    assert pin is not None, f"{name} {version(name)} is installed, but not pinned in {_PINS}"
    pattern = f"{name}-{version(name)}.tar.gz"
    if not list(cache.glob(pattern)):
        pins = cache / f"{name}.txt"
        pins.write_text(pin[0])
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--require-hashes"]
        # pip asks the release for its metadata: what builds it is installed, and pinned too
        command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--retries", "2"]
        run = subprocess.run(
            [*command, "--dest", str(cache), "--requirement", str(pins)], capture_output=True, encoding="utf-8"
        )
        if run.returncode != 0 and "after connection broken by" in run.stderr:
            pytest.skip(f"{name}'s own tests: the registry cannot be reached for {pattern}")
        assert run.returncode == 0, run.stderr
    return next(cache.glob(pattern))


def run_suite(
    name: str,
    tests: Sequence[str],
    *,
    plugin: str,
    cache: Path,
    directory: Path,
    beneath: str = ".",
    parts: Sequence[str] = ("tests/",),
) -> Outcomes:
    """Unpack a release in `directory` and run some of its tests, with one of `plugins/` putting our parts in.

    tests: paths below `beneath`, which is where the suite is run from. parts: what of the release is unpacked: the code
    that is tested is the installed one.
    """
    with tarfile.open(release(name, cache)) as archive:
        members = [member for member in archive if member.name.partition("/")[2].startswith(tuple(parts))]
        archive.extractall(directory, members, filter="data")
    (root,) = directory.iterdir()
    report, settings = root / "report.xml", root / "suite.ini"
    settings.write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", "-c", str(settings)]
    command += ["--rootdir", str(root), "--junitxml", str(report), "-o", "junit_family=xunit1", *tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        command,
        cwd=root / beneath,
        env={**environment, "PYTHONPATH": os.pathsep.join(map(str, (PLUGINS, root / beneath, PROJECT)))},
        capture_output=True,
        encoding="utf-8",
        timeout=200,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    return _read(report)


def _read(report: Path) -> Outcomes:
    passed: set[str] = set()
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        assert name not in passed, f"two tests are called {name}"
        if broken := [part for part in case if part.tag in ("failure", "error")]:
            failed[name] = "\n".join(part.text or "" for part in broken)
        elif (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message", "")
        else:
            passed.add(name)
    return Outcomes(frozenset(passed), failed, skipped)
