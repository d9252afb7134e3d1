"""A check of the proxy alone: whether clients can reach the files of its rules without the application."""

from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import quote

from downloadview_async.check.http import ClosedError, Peer
from downloadview_async.check.site import File, Line, PlacedRule, Result, Site


async def name_of_proxy(site: Site, proxy: Peer) -> None:
    """Note the kind of the proxy: answers that it makes itself, such as refusals, name it in their Server header."""
    for target in ("/../", "/%00"):
        with suppress(ClosedError):
            site.see(await proxy.ask(target, root=True))


async def internal_locations(site: Site, proxy: Peer, rule: PlacedRule, file: File | None) -> AsyncIterator[Line]:
    """Request the internal location of a rule in several spellings. file: one that the rule covers."""
    for target in _targets(site, rule, file):
        if (await site.in_process.ask(target, method="HEAD")).status == 200:
            continue  # a page of the application itself
        result: Result = "pass"
        outcome, remedy = "refused", ""
        try:
            answer = await proxy.ask(target, root=True)
        except ClosedError:
            pass
        else:
            outcome = f"{answer.status}, refused"
            if answer.status in (200, 206):
                result, outcome = "FAIL", f"{answer.status}: every client can read it"
                remedy = site.advice("open", rule)
            elif answer.status >= 500:
                result, outcome, remedy = "FAIL", str(answer.status), site.advice("unreached", rule)
        where = rule.target or rule.source
        yield Line(result=result, step="proxy", route=where, request=f"GET {target}", outcome=outcome, remedy=remedy)


def _targets(site: Site, rule: PlacedRule, file: File | None) -> list[str]:
    """Return paths by which a client might reach the files of a rule without the application."""
    source, location = rule.source.rstrip("/"), "" if file is None else file.location or ""
    rest = quote(location.removeprefix(f"{source}/")) if location.startswith(f"{source}/") else ""
    name = quote(source.rpartition("/")[2])
    if site.kind is not None and site.kind.targets == "directory":
        return [f"{quote(source)}/{rest}", f"/{name}/{rest}", f"/{rest}"] if rest else []
    target = rule.target or ""
    return [
        target + rest,
        f"/%{ord(target[1]):02X}{target[2:]}{rest}",
        f"/{target}{rest}",
        f"{target.upper()}{rest}",
        f"{target.rstrip('/')}../{name}/{rest}",
    ]
