"""The library as ASGI: an endpoint, the response it sends, and the middleware that lets a proxy send instead."""
