"""The service as it is deployed: the entry point `app.main:app`, its settings and the content of the demo."""
