"""`grant_store_from_url`: the store that a URL names."""

from downloadview_async.errors import ConfigurationError, wrong_type
from downloadview_async.policy.stores.base import GrantStore
from downloadview_async.policy.stores.memory import MemoryGrantStore
from downloadview_async.policy.stores.redis import RedisGrantStore
from downloadview_async.policy.stores.sqlite import SQLiteGrantStore


def grant_store_from_url(url: str, *, prefix: str = "downloadview", guards_loss: bool = False) -> GrantStore:
    """Return a store of uses and revocations: `sqlite:` and a path, `redis://127.0.0.1:6379/0` or `memory:`.

    prefix, guards_loss: as in `RedisGrantStore`; the others have no such options.

    Raises `ConfigurationError` for another URL, and if the package that the store needs is missing.
    """
    if not isinstance(url, str):
        raise wrong_type("grant_store_from_url takes a URL, such as 'sqlite:links.db'", url)
    scheme, _, rest = url.partition(":")
    if url == "memory:":
        return MemoryGrantStore()
    # For SQLAlchemy, three slashes are before a relative path: such a URL would be misread here.
    if scheme == "sqlite" and rest.strip("/") and not rest.startswith("//"):
        return SQLiteGrantStore(rest)
    if scheme in ("redis", "rediss", "unix"):
        return RedisGrantStore(url, prefix=prefix, guards_loss=guards_loss)
    # the URL may have a password, so it is not shown
    raise ConfigurationError("there is no such store: give sqlite:PATH, redis://HOST:PORT/NUMBER or memory:")
