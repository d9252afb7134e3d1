"""django-downloadview's own modules below this package, for projects that change the name of the package alone."""

import sys

from downloadview_async.contrib.django import files, middleware, responses, storage, testing, views

_PACKAGE = "downloadview_async.contrib.django"
_MODULES = {
    "api": views,
    "decorators": storage,
    "exceptions": files,
    "io": files,
    "middlewares": middleware,
    "response": responses,
    "shortcuts": views,
    "test": testing,
    **{f"views.{name}": views for name in ("base", "http", "object", "path", "storage", "virtual")},
}

for _name, _module in _MODULES.items():
    sys.modules.setdefault(f"{_PACKAGE}.{_name}", _module)
