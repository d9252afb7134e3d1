"""The standalone service: settings in, an ASGI application out. It uses the library as any application would."""
