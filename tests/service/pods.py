"""What kustomize makes of `deploy/kubernetes/`, and its containers as processes of this machine."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.servers import PROJECT

KUBERNETES = PROJECT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
TOOLS = Path(sys.prefix) / "deploy"
"""Where `make deploy-tools` installs requirements/deploy.txt."""

Object = dict[str, Any]


def run_tool(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one of the tools, or Python with their packages; the test is skipped where they are not installed."""
    if not TOOLS.is_dir():
        pytest.skip(f"{TOOLS} does not exist: make deploy-tools")
    path = f"{TOOLS / 'bin'}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which(command[0], path=path)
    assert program is not None, f"{command[0]} is not installed"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(TOOLS)}
    return subprocess.run([program, *command[1:]], env=env, capture_output=True, text=True, timeout=120, **options)


@cache
def helm() -> Path:
    """Return the program Helm, which a package carries in an archive within an archive."""
    program = TOOLS / "bin" / "helm"
    if platform.machine() != "x86_64":
        pytest.skip("the package has Helm for x86_64 alone")
    if not program.exists():
        (package,) = TOOLS.glob("aws_cdk/*/_jsii/*.tgz")
        with tarfile.open(package) as outer:
            inner = outer.extractfile("package/lib/layer.zip")
            assert inner is not None
            with zipfile.ZipFile(inner) as layer, tempfile.NamedTemporaryFile(dir=program.parent, delete=False) as file:
                file.write(layer.read("helm/helm"))
        Path(file.name).chmod(0o755)
        Path(file.name).replace(program)  # in one step: other workers may do the same
    return program


@cache
def text_of(overlay: str) -> str:
    """Return what kustomize makes of an overlay."""
    made = run_tool("kubectl", "kustomize", KUBERNETES / "overlays" / overlay)
    assert (made.returncode, made.stderr) == (0, "")
    return made.stdout


def objects_of(overlay: str) -> list[Object]:
    """Return the objects of an overlay."""
    return list(yaml.safe_load_all(text_of(overlay)))


def only(objects: Sequence[Object], kind: str, name: str = "") -> Object:
    """Return the only object of a kind whose name begins so."""
    (chosen,) = [one for one in objects if one["kind"] == kind and one["metadata"]["name"].startswith(name)]
    return chosen


def pods_of(objects: Sequence[Object]) -> Iterator[Object]:
    """Yield the templates of pods."""
    yield from (one["spec"]["template"] for one in objects if one["kind"] in ("Deployment", "StatefulSet"))


def container_of(objects: Sequence[Object], name: str) -> Object:
    """Return a container of any pod."""
    (chosen,) = [one for pod in pods_of(objects) for one in pod["spec"]["containers"] if one["name"] == name]
    result: Object = chosen
    return result


def variables_of(container: Object, secrets: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a container, as the kubelet makes them. secrets: by "NAME/KEY"."""
    made: dict[str, str] = {}
    for one in container["env"]:
        if "valueFrom" in one:
            secret = one["valueFrom"]["secretKeyRef"]
            made[one["name"]] = secrets[f"{secret['name']}/{secret['key']}"]
        else:
            made[one["name"]] = expanded(one["value"], made)  # only variables that come before are known
    return made


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """Replace each $(NAME) of a known variable; others stay, as in Kubernetes."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)


@dataclass(frozen=True)
class Pod:
    """A pod whose volumes are directories below `root`. moved: what replaces addresses of the cluster, and ports."""

    objects: list[Object]
    root: Path
    secrets: Mapping[str, str]
    moved: Mapping[str, str]

    def mount(self, container: Object) -> dict[str, str]:
        """Make the volumes of a container, and return its mount paths with the directories that replace them."""
        (spec,) = [pod["spec"] for pod in pods_of(self.objects) if container in pod["spec"]["containers"]]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        places = {mount["mountPath"]: str(self.root / mount["name"]) for mount in container["volumeMounts"]}
        for mount in container["volumeMounts"]:
            directory = self.root / mount["name"]
            if directory.exists():
                continue
            directory.mkdir()
            volume = volumes.get(mount["name"], {})
            if "configMap" in volume:
                data = only(self.objects, "ConfigMap", volume["configMap"]["name"])["data"]
                for name, text in data.items():  # settings name what is mounted, too
                    (directory / name).write_text(self.rewritten(text, places))
            if "secret" in volume:
                for name, text in self.secrets.items():
                    secret, key = name.split("/")
                    if secret == volume["secret"]["secretName"]:
                        (directory / key).write_text(text)
        return places

    def rewritten(self, text: str, places: Mapping[str, str]) -> str:
        """Return a text with the directories and addresses of this machine."""
        changes = {**places, **self.moved}
        pattern = "|".join(rf"{re.escape(old)}(?![\w-])" for old in sorted(changes, key=len, reverse=True))
        return re.sub(pattern, lambda match: changes[match[0]], text)

    def command(self, name: str) -> tuple[list[str], dict[str, str]]:
        """Return the command and the variables of a container."""
        container = container_of(self.objects, name)
        places = self.mount(container)
        variables = variables_of(container, self.secrets) if "env" in container else {}
        command = [self.rewritten(expanded(part, variables), places) for part in container["command"]]
        return command, {key: self.rewritten(value, places) for key, value in variables.items()}
