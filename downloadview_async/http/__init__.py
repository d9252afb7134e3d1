"""What HTTP says about a download: request headers and file metadata in, a `Plan` out. Values only, no I/O."""
