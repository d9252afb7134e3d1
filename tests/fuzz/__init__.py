"""Fuzz targets: see `targets` for what one is, `test_targets` for the run in CI, and `__main__` for `make fuzz`."""
