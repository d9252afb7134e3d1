"""Reads objects of django-storages' `S3Storage` in pieces. Its own files read a whole object into memory first."""

import os
from contextlib import suppress
from typing import Any


def streamed(file: Any) -> Any:
    """Return a file that a storage has opened. For an `S3File`, return a reader that streams the same object.

    An object that the storage decompresses with gzip stays an `S3File`.
    """
    if not type(file).__module__.startswith("storages.backends.s3"):
        return file
    storage = file._storage  # noqa: SLF001 - there is no public name for it
    if storage.gzip and file.obj.content_encoding == "gzip":
        return file
    from boto3.s3.transfer import S3Transfer

    parameters = storage.get_object_parameters(file.name)
    allowed = {name: value for name, value in parameters.items() if name in S3Transfer.ALLOWED_DOWNLOAD_ARGS}
    return S3Reader(file.obj, allowed)


class S3Reader:
    """Reads one version of an object. Sequential reads cost one request; a read after `seek` costs another one.

    `read` raises botocore's errors, and `OSError` if the object has been replaced since it was opened.
    """

    def __init__(self, obj: Any, parameters: dict[str, Any]) -> None:
        self._object = obj
        self._parameters = parameters
        self._size, self._tag = int(obj.content_length), obj.e_tag  # read them now: boto3 may request them again later
        self._position = 0
        self._body: Any = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position, from the beginning or from the end, and return it."""
        position = offset + (self._size if whence == os.SEEK_END else 0)
        if position != self._position:
            self._close_body()
            self._position = position
        return position

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes, none at the end."""
        from botocore.exceptions import BotoCoreError

        if self._position >= self._size:
            return b""
        try:
            chunk = self._read(size)
        except BotoCoreError:
            # The store may have closed the connection because the client was slow: try once more from this position.
            self._close_body()
            chunk = self._read(size)
        self._position += len(chunk)
        return chunk

    def close(self) -> None:
        """Return the connection to its pool."""
        self._close_body()

    def _read(self, size: int) -> bytes:
        if self._body is None:
            answer = self._object.get(Range=f"bytes={self._position}-", IfMatch=self._tag, **self._parameters)
            self._body = answer["Body"]
            if answer["ETag"] != self._tag:  # not every store knows If-Match
                raise OSError(f"{self._object.key!r} has been replaced")
        return bytes(self._body.read(size))

    def _close_body(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            with suppress(Exception):
                body.close()
