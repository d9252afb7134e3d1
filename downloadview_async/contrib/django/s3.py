"""Objects of django-storages' `S3Storage`, read in pieces: its own files take all of an object into memory first."""

import os
from contextlib import suppress
from typing import Any


def streamed(file: Any) -> Any:
    """Return a file that a storage has opened, or one that streams the same object if it is an `S3File`.

    A gzip object that the storage would decompress is left to it.
    """
    if not type(file).__module__.startswith("storages.backends.s3"):
        return file
    storage = file._storage  # noqa: SLF001 - which nothing else leads to
    if storage.gzip and file.obj.content_encoding == "gzip":
        return file
    from boto3.s3.transfer import S3Transfer

    parameters = storage.get_object_parameters(file.name)
    allowed = {name: value for name, value in parameters.items() if name in S3Transfer.ALLOWED_DOWNLOAD_ARGS}
    return S3Reader(file.obj, allowed)


class S3Reader:
    """A version of an object, for reading: `seek` costs nothing, and reading on costs one request until the next.

    `read` raises botocore's errors, and `OSError` where the object has been replaced since it was opened.
    """

    def __init__(self, obj: Any, parameters: dict[str, Any]) -> None:
        self._object = obj
        self._parameters = parameters
        self._size, self._tag = int(obj.content_length), obj.e_tag  # now: boto3 may ask for them again
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
            # A client who was slow has let the store's patience run out: once more, from here on.
            self._close_body()
            chunk = self._read(size)
        self._position += len(chunk)
        return chunk

    def close(self) -> None:
        """Give the connection back."""
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
