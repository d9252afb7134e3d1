"""The process that starts several worker processes, and listens for them."""

import logging
import os

from uvicorn.supervisors.multiprocess import Multiprocess

from downloadview_async.service.shutdown import HANGUP

_logger = logging.getLogger("downloadview_async")


class Workers(Multiprocess):
    """uvicorn's supervisor, changed: it stops listening when it tells the workers to end, and ignores SIGHUP.

    The kernel accepts connections as long as any process holds the socket. Closing it refuses new connections while
    the workers drain; otherwise those would wait for an answer that never comes.
    """

    def terminate_all(self) -> None:
        """Stop listening in this process, and tell the workers to end."""
        for listener in self.sockets:
            listener.close()
        if self.config.fd is not None:  # the socket is a duplicate of it
            os.close(self.config.fd)
        super().terminate_all()

    def handle_hup(self) -> None:
        """Log that SIGHUP is ignored: uvicorn would restart the workers, and cut downloads that take longer."""
        _logger.warning(HANGUP)
