"""The module names of django-downloadview below this package: a project only has to change the package's name."""

import sys
from types import ModuleType

from downloadview_async.contrib.django import (
    apache,
    files,
    lighttpd,
    middleware,
    nginx,
    responses,
    storage,
    testing,
    views,
)

_PACKAGE = "downloadview_async.contrib.django"
_decorators = ModuleType(f"{_PACKAGE}.decorators", "Decorators of views.")
vars(_decorators).update(
    DownloadDecorator=middleware.DownloadDecorator,
    signature_required=storage.signature_required,
    _signature_is_valid=storage._signature_is_valid,  # noqa: SLF001 - tests of projects may use it
)
_MODULES = {
    "api": sys.modules[_PACKAGE],
    "decorators": _decorators,
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
