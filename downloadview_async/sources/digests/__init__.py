"""Digests of files: those that are known, and those that are computed in the background."""
