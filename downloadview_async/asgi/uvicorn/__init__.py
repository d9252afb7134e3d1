"""`DownloadProtocol` for uvicorn. It is in `protocol`; each other module has one part of it."""
