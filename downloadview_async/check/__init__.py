"""Checks of a running installation: an application, and the proxy in front of it.

`downloadview check` and Django's `downloadview_check` make them: `application.check_application` for any ASGI
application, and `service.check` for the standalone service, which knows more from its settings.
"""
