"""The standalone service: an ASGI application built from settings. It uses only the public names of the library."""
