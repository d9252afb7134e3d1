"""Where files come from: a name (or a request) in, an `AsyncFile` out."""
