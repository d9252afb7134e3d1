"""Applications that use the library, each run by the tests."""
