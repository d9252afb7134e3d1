"""The module names of django-downloadview below this package: a project only has to change the package's name."""

import sys

from downloadview_async.contrib.django import (
    apache,
    files,
    lighttpd,
    middleware,
    nginx,
    responses,
    testing,
    views,
)

_PACKAGE = "downloadview_async.contrib.django"
_MODULES = {
    "api": sys.modules[_PACKAGE],
    "exceptions": files,
    "middlewares": middleware,
    "response": responses,
    "shortcuts": views,
    "test": testing,
    **{
        f"{proxy}.{name}": module
        for proxy, module in (("nginx", nginx), ("apache", apache), ("lighttpd", lighttpd))
        for name in ("decorators", "middlewares", "response", "tests")
    },
    **{f"views.{name}": views for name in ("base", "http", "object", "path", "storage", "virtual")},
}

for _name, _module in _MODULES.items():
    sys.modules.setdefault(f"{_PACKAGE}.{_name}", _module)
