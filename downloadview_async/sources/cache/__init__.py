"""A cache on a local disk, over any source."""
