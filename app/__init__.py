"""The deployed service: the entry point `app.main:app`, its settings, and the demo's content."""
