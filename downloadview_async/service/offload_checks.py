"""The rules by which the settings tell a proxy where files are: completed, and checked against sources and routes."""

import os
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from downloadview_async import ProxyKind, proxy_kinds
from downloadview_async.service.origin import Origin
from downloadview_async.service.settings import (
    PROXY_OPTIONS,
    OffloadSettings,
    RouteSettings,
    RuleSettings,
    Settings,
    options_of,
)
from downloadview_async.service.source_settings import (
    SourceSettings,
    StorageSettings,
    edge_of,
    overlap,
    places_of,
    source_of_files,
)


def checked_offload(origin: Origin, offload: OffloadSettings, sources: Mapping[str, SourceSettings]) -> OffloadSettings:
    """Return the table with complete rules: without any, one for each directory. Raises `ConfigurationError`."""
    rules = []
    kind = None if offload.backend is None else proxy_kinds()[offload.backend]
    places = [place for source in sources.values() for place in places_of(source)]
    for index, rule in enumerate(offload.rules):
        key = f"offload.rules[{index}]"
        if rule.source in sources:
            rule = _rule_of_source(origin, key, rule, sources[rule.source], kind)
        source = rule.source if "://" in rule.source else origin.absolute(f"{key}.source", rule.source)
        if not any(overlap(place, source) for place in places):
            raise origin.error(
                f"{key}.source",
                f"no source has files below {source!r}: give a directory or URL of a source "
                f"({', '.join(dict.fromkeys(places)) or 'there is none'}), or remove the rule",
            )
        if rule.target is None and kind is not None and kind.targets == "uri":
            problem = f"missing: {kind.name} needs an internal location, such as /_files/"
            raise origin.error(f"{key}.target", problem, because="offload.backend")
        rules.append(RuleSettings(source=source, target=rule.target))
    if kind is not None:
        _check_options(origin, kind, options_of(offload))
        if kind.folds_case:
            _check_folded_targets(origin, kind, rules)
    if kind is not None and not rules:
        rules = _rules_for_all(kind, sources)
    if kind is not None and not rules:
        raise origin.error(
            "offload.rules",
            "no source is local, so the proxy sends nothing: add a rule, or remove the backend",
            because="offload.backend",
        )
    return msgspec.structs.replace(offload, rules=rules)


def check_sending(key: str, route: RouteSettings, settings: Settings) -> None:
    """Refuse a `send` that the source or the proxy in the settings does not support."""
    name, source = source_of_files(route.source, settings.sources)
    has_presign = isinstance(source, StorageSettings) and source.presign is not None
    if route.send == "redirect" and not has_presign and edge_of(source) is None:
        raise settings.error(
            key,
            f"{name!r} has no presigned URLs to redirect to: add [sources.{name}.presign] to an s3:// storage, or "
            f"[sources.{name}.edge] for another store or CDN, or choose proxy or stream",
        )
    if route.send == "proxy":
        if settings.offload.backend is None:
            raise settings.error(key, "no proxy is configured: set offload.backend, or choose stream")
        places = places_of(source)
        fetches = proxy_kinds()[settings.offload.backend].fetches_urls
        if not fetches and any("://" in place for place in places):
            raise settings.error(
                key,
                f"{settings.offload.backend} sends only local files, and those of {name!r} are not local: add "
                f"[sources.{name}.cache] and a rule whose source is the path of the cache, or choose stream",
                because="offload.backend",
            )
        if not any(overlap(place, rule.source) for place in places for rule in settings.offload.rules):
            raise settings.error(
                key,
                f"no rule tells the proxy where the files of {name!r} are: add one to [[offload.rules]]"
                + (f" with the source {places[0]!r}" if places else "")
                + ", or choose stream",
            )


def _rule_of_source(
    origin: Origin, key: str, rule: RuleSettings, source: SourceSettings, kind: ProxyKind | None
) -> RuleSettings:
    """Return a rule whose `source` is the name of a source with the place of the source's files."""
    places = places_of(source)
    if not places:
        return rule
    directory = origin.absolute(f"{key}.source", rule.source)
    if places[0] != directory and os.path.isdir(directory):
        raise origin.error(
            f"{key}.source",
            f"{rule.source!r} is a directory, and a source with files in {places[0]!r}: write './{rule.source}' "
            "for the directory, or rename one of them",
        )
    return RuleSettings(source=places[0], target=rule.target or _target_for(rule.source, kind))


def _check_options(origin: Origin, kind: ProxyKind, given: Iterable[str]) -> None:
    for name in given:
        if name not in kind.options:
            problem = f"{kind.name} has {PROXY_OPTIONS[name].lacking}: remove it"
            raise origin.error(f"offload.{name}", problem, because="offload.backend")


def _check_folded_targets(origin: Origin, kind: ProxyKind, rules: Sequence[RuleSettings]) -> None:
    """Refuse targets that differ only in case."""
    first: dict[str, str] = {}
    for index, rule in enumerate(rules):
        target = rule.target or ""
        if first.setdefault(target.lower(), target) != target:
            raise origin.error(
                f"offload.rules[{index}].target",
                f"{kind.title} ignores case, so {target!r} is the same as {first[target.lower()]!r}: choose "
                "another target",
            )


def _rules_for_all(kind: ProxyKind, sources: Mapping[str, SourceSettings]) -> list[RuleSettings]:
    """Return a rule for each directory from which a source sends files."""
    names: dict[str, str] = {}
    for name, source in sources.items():
        for place in places_of(source):
            if "://" not in place:
                names.setdefault(place, name)
    return [RuleSettings(source=place, target=_target_for(name, kind)) for place, name in names.items()]


def _target_for(name: str, kind: ProxyKind | None) -> str | None:
    """Return the target of a rule for a source that gives none. None: the proxy finds the files at the same path."""
    return f"/_offload/{name}/" if kind is not None and kind.targets == "uri" else None
