"""The library as ASGI: an endpoint, the response that it sends, and the middleware that has a proxy send the file."""
