"""`DownloadProtocol` for uvicorn: `protocol` has it, the other modules have one part of it each."""
