"""Decides whether a request may have a file."""
