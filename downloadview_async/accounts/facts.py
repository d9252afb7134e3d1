"""`Facts`: what the parts of an application know of one request, for its `Outcome`."""

from collections.abc import Mapping
from typing import Any

from downloadview_async.http.metadata import ETag

ACCOUNT = "downloadview_async.account"
"""The key of the `Facts` of a request in its ASGI scope. Without it, no outcome is made."""


class Facts:
    """The facts about one request, and the file that answers it.

    outer: the facts of another `Accounts` further out, which get each fact, too. kind: overrides what the delivery
    says. delivery, status_of_delivery: what our own answer was sent by, and its status: another answer may replace it.
    """

    # values of the class, because most of them stay as they are for most requests
    route: str | None = None
    source: str | None = None
    name: str | None = None
    user: str | None = None
    link_id: str | None = None
    kind: str | None = None
    proxy: str | None = None
    inside: Mapping[str, Any] | None = None
    """A copy of the scope, further inside, into which a router may have put its route."""
    etag: ETag | str | None = None
    size: int | None = None
    delivery: Any = None
    status_of_delivery = 0

    def __init__(self, request_id: str, outer: "Facts | None" = None) -> None:
        self.request_id = request_id
        self.outer = outer

    def know(self, other: "Facts") -> None:
        """Take over what other facts about the same request say."""
        for name in (*_NAMES, "proxy"):
            setattr(self, name, getattr(other, name))

    def deliver(self, delivery: object, status: int) -> None:
        """Note how our answer is sent."""
        self.delivery, self.status_of_delivery = delivery, status
        if self.outer is not None:
            self.outer.deliver(delivery, status)

    def describe(self, name: str | None, etag: ETag | str | None, size: int | None) -> None:
        """Note which version of a file is sent. The name stays, if it is known what the source was asked for."""
        if self.name is None:
            self.name = name
        self.etag, self.size = etag, size
        if self.outer is not None:
            self.outer.describe(name, etag, size)

    def find(self, source: str, key: object, scope: Mapping[str, Any]) -> None:
        """Note what a source is asked for, by the scope of the request there."""
        self.source, self.name, self.inside = source, str(key), scope
        if self.outer is not None:
            self.outer.find(source, key, scope)

    def enter(self, scope: Mapping[str, Any]) -> None:
        """Note a copy of the scope that is passed on."""
        self.inside = scope
        if self.outer is not None:
            self.outer.enter(scope)

    def allow(self, user: str | None, link_id: str | None) -> None:
        """Note the user and the link by which access has allowed the request."""
        self.user, self.link_id = user or self.user, link_id or self.link_id
        if self.outer is not None:
            self.outer.allow(user, link_id)


def note_facts(scope: Mapping[str, Any], **facts: str | None) -> None:
    """Note facts about a request for its `Outcome`; do nothing if no `Accounts` is around the application.

    facts: `route`, `source`, `name`, `user`, `link_id` and `kind`, as in `Outcome`. A fact that is noted again is
    replaced. Call this at any time before the answer ends, with the scope of the request or a copy of it:

        note_facts(request.scope, user="ada")

    Raises `TypeError` for another name.
    """
    if not facts.keys() <= _NAMES:
        raise TypeError(f"note_facts takes {', '.join(sorted(_NAMES))}, not {', '.join(sorted(facts.keys() - _NAMES))}")
    account: Facts | None = scope.get(ACCOUNT)
    while account is not None:
        for name, value in facts.items():
            setattr(account, name, value)
        account = account.outer


def request_id_of(scope: Mapping[str, Any]) -> str | None:
    """Return the id of a request, by its ASGI scope; None if no `Accounts` is around the application."""
    account: Facts | None = scope.get(ACCOUNT)
    return None if account is None else account.request_id


_NAMES = frozenset({"route", "source", "name", "user", "link_id", "kind"})
