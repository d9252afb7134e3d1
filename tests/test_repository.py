"""The files of the repository that GitHub reads: forms for issues, and what must not be there."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import downloadview_async
from tests.servers import PROJECT

TEMPLATES = PROJECT / ".github" / "ISSUE_TEMPLATE"
FORMS = sorted(path for path in TEMPLATES.glob("*.yml") if path.name != "config.yml")


def loaded(path: Path) -> dict[str, Any]:
    form: dict[str, Any] = yaml.safe_load(path.read_text())
    return form


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in FORMS])
def test_the_forms_for_issues_have_the_keys_that_github_knows(path: Path) -> None:
    form = loaded(path)
    assert set(form) <= {"name", "description", "title", "labels", "assignees", "projects", "type", "body"}
    assert form["name"]
    assert form["description"]
    ids = []
    for element in form["body"]:
        assert set(element) <= {"type", "id", "attributes", "validations"}
        if element["type"] == "markdown":
            assert set(element["attributes"]) == {"value"}
            continue
        assert element["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert set(element["attributes"]) <= {"label", "description", "placeholder", "value", "render"}
        assert set(element.get("validations", {})) <= {"required"}
        ids.append(element["id"])
    assert len(set(ids)) == len(ids) > 0


def test_there_is_at_least_one_form_and_a_configuration() -> None:
    assert [path.stem for path in FORMS] == ["bug", "idea"]
    assert loaded(TEMPLATES / "config.yml") == {"blank_issues_enabled": True}


def test_the_files_that_people_look_for_are_here() -> None:
    for name in ("CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"):
        assert (PROJECT / name).is_file()
    assert list(PROJECT.glob("CITATION*")) == []


def test_the_security_policy_names_this_version() -> None:
    minor = ".".join(downloadview_async.__version__.split(".")[:2])
    rows = re.findall(r"(?m)^\| (\d+\.\d+)", (PROJECT / "SECURITY.md").read_text())
    assert minor in rows
