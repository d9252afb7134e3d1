"""The signatures of stores and CDNs, without I/O: one module for each."""
