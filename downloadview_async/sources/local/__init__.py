"""Files of a local disk, opened beneath a root."""
