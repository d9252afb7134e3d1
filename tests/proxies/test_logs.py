"""What the proxies log: never a link, whose query is a secret, whatever fails."""

from pathlib import Path

import pytest

from tests.live import ask
from tests.proxies.servers import EACH_KIND, KINDS, proxy, readable_directory
from tests.servers import free_port

LINK = "/files/a.txt?k=2026a&i=abcdefghijkl&s=a-secret-signature"


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", EACH_KIND)
async def test_a_link_is_not_in_the_log_of_a_proxy_whose_service_is_down(kind: str, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def with_its_remedy(text: str) -> str:
        return text.replace("#server.errorlog", "server.errorlog").replace("/var/log/lighttpd/error.log", str(log))

    with (
        readable_directory() as checkout,
        proxy(KINDS[kind], checkout, free_port(), edit=with_its_remedy, log=log) as port,
    ):
        answer = await ask(port, LINK, headers={"Referer": f"http://127.0.0.1:{port}{LINK}"})
    assert answer.status in (502, 503)
    assert "secret" not in log.read_text()
