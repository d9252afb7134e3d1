"""The rules of HTTP for a download: request headers and file metadata in, a `Plan` out. Values only, no I/O."""
