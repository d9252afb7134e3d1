"""Applications that use the library. The tests run each of them."""
