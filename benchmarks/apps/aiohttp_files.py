"""aiohttp's FileResponse, which sends by `loop.sendfile` on asyncio's own event loop."""

import os
import sys
from pathlib import Path

from aiohttp import web

_FILES = Path(os.environ["BENCH_FILES"])


async def _file(request: web.Request) -> web.FileResponse:
    return web.FileResponse(_FILES / request.match_info["path"])


if __name__ == "__main__":
    app = web.Application()
    app.router.add_get("/files/{path:.+}", _file)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
