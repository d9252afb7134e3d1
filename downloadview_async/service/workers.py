"""Several worker processes, and the process that starts them and listens for them."""

import logging
import os

from uvicorn.supervisors.multiprocess import Multiprocess

from downloadview_async.service.shutdown import HANGUP

_logger = logging.getLogger("downloadview_async")


class Workers(Multiprocess):
    """uvicorn's own, but its socket is closed when the workers are told to end, and SIGHUP ends no download.

    The kernel accepts connections as long as any process has the socket. So those that come while the last downloads
    are sent are refused at once: no worker would ever answer them.
    """

    def terminate_all(self) -> None:
        """Stop listening in this process, and tell the workers to end."""
        for listener in self.sockets:
            listener.close()
        if self.config.fd is not None:  # the socket is a copy of it
            os.close(self.config.fd)
        super().terminate_all()

    def handle_hup(self) -> None:
        """Say that nothing happens: uvicorn would end each worker after `timeout_graceful_shutdown`."""
        _logger.warning(HANGUP)
