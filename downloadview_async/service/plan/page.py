"""A plan as text, with the formula of each number and where its costs were measured, and as values for programs."""

from collections.abc import Iterator, Sequence
from typing import Any

from downloadview_async.service.plan.costs import Costs
from downloadview_async.service.plan.model import WAYS, Load, Machine, Need, Plan, Term, keep_alive

_UNITS = {"bytes": ("B", 1.0), "bytes/s": ("bit/s", 8.0)}
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def amount_text(value: float, unit: str) -> str:
    """Return an amount with its unit: bytes as GB, and bytes per second as Gbit/s."""
    if unit not in _UNITS:
        return f"{_number(value)} {unit}"
    short, factor = _UNITS[unit]
    scale, prefix = next(((scale, prefix) for scale, prefix in _SCALES if value * factor >= scale), (1.0, ""))
    return f"{_number(value * factor / scale)} {prefix}{short}"


def _cost_text(term: Term) -> str:
    if term.unit == "core-seconds/s":
        return f"{_number(term.cost)} s" if term.of == "GiB/s" else f"{_number(term.cost * 1e6)} µs"
    if term.unit == "bytes":
        return f"{_number(term.cost / 1024)} KiB"
    return _number(term.cost)


def _formula(resource: str, terms: Sequence[Term], has: str = "") -> Iterator[str]:
    """Yield a line for each term, and one for what a machine has."""
    for term in terms:
        cost = f" x {_cost_text(term)} ({term.where})" if term.where else ""
        yield f"  {resource:<12}{amount_text(term.amount, term.of)}{cost}"
        resource = ""
    if has:
        yield f"  {'':<12}one machine has {has}"


def text_of(made: Plan, costs: Costs) -> str:
    """Return the plan for people."""
    return "\n".join(_lines(made, costs)) + "\n"


def _lines(made: Plan, costs: Costs) -> Iterator[str]:
    load, machine, first = made.load, made.machine, made.needs[0]
    yield from _inputs(load, machine)
    yield ""
    spare = f": {made.for_load} for the load, {made.spare} to spare" if made.spare else ""
    yield f"Machines: {made.machines}{spare}"
    second = made.needs[1]
    yield (
        f"First bottleneck: {first.resource} ({_machines(first)} machines), "
        f"then {second.resource} ({_machines(second)} machines)"
    )
    yield ""
    yield f"{'resource':<12}{'all machines need':>24}{'one has':>24}{'machines':>10}"
    for need in made.needs:
        unit = need.terms[0].unit
        cells = amount_text(need.amount, unit), amount_text(need.has, unit), _machines(need)
        yield f"{need.resource:<12}{cells[0]:>24}{cells[1]:>24}{cells[2]:>10}"
    yield ""
    yield from _shared(made)
    for line in made.advice:
        yield f"Note: {line}"
    yield ""
    yield "How it is computed: each is a sum of lines. Behind each cost are the row and the figure that were measured."
    for need in made.needs:
        yield from _formula(need.resource, need.terms, need.has_text)
    yield from _formula("Redis", made.shared.redis_operations)
    yield ""
    yield f"Measured: {'; '.join(f'{name} {value}' for name, value in costs.run.items())}"


def _inputs(load: Load, machine: Machine) -> Iterator[str]:
    options = [
        *(["TLS"] if load.tls else []),
        *(["signed links for one download"] if load.links else []),
        *(["limits of clients"] if load.limits else []),
        *(["completed downloads are counted"] if load.completions else []),
        *([] if load.connects_anew else ["a proxy keeps its connections"]),
        *([f"{load.hit_ratio:.0%} of the bytes from the cache"] if load.send == "cache" else []),
    ]
    yield (
        f"Load: {load.clients:,.0f} downloads at once, {amount_text(load.requests, 'requests/s')} for files of "
        f"{amount_text(load.size, 'bytes')}, {amount_text(load.bytes_per_second, 'bytes/s')}"
    )
    yield f"Sent: {'; '.join([WAYS[load.send].title, *options])}"
    yield (
        f"Each machine: {machine.cores} cores with a worker on each, {amount_text(machine.memory, 'bytes')}, "
        f"{amount_text(machine.network, 'bytes/s')}, {machine.descriptors:,} descriptors for a process; "
        f"{machine.use:.0%} of each may be used"
    )
    if load.connects_anew:
        yield f"Each download has a new connection, which stays open for {keep_alive(load):g} s afterwards"


def _machines(need: Need) -> str:
    return f"{need.machines:,.1f}" if need.machines < 100 else f"{need.machines:,.0f}"


def _shared(made: Plan) -> Iterator[str]:
    shared = made.shared
    if shared.redis_operations:
        count = sum(term.amount * term.cost for term in shared.redis_operations)
        yield (
            f"Redis: {amount_text(count, 'operations/s')}, {shared.redis_share:.0%} of one core; at most "
            f"{amount_text(shared.redis_memory, 'bytes')} if each download of a day has another link and client"
        )
    if shared.store_requests:
        yield (
            f"Store: {amount_text(shared.store_requests, 'requests/s')}, {amount_text(shared.store_bytes, 'bytes/s')}"
        )
    if shared.database_downloads:
        yield f"Database: {amount_text(shared.database_downloads, 'downloads/s')}, written in batches"


def values_of(made: Plan, costs: Costs) -> dict[str, Any]:
    """Return the plan for programs. Bytes, seconds and requests are not scaled."""
    shared = made.shared
    return {
        "machines": made.machines,
        "machines_for_load": made.for_load,
        "first_bottleneck": made.needs[0].resource,
        "clients": made.load.clients,
        "requests_per_second": made.load.requests,
        "bytes_per_second": made.load.bytes_per_second,
        "resources": {
            need.resource: {"needs": need.amount, "one_has": need.has, "machines": need.machines} for need in made.needs
        },
        "redis": {
            "operations_per_second": sum(term.amount * term.cost for term in shared.redis_operations),
            "share_of_a_core": shared.redis_share,
            "memory": shared.redis_memory,
        },
        "store": {"requests_per_second": shared.store_requests, "bytes_per_second": shared.store_bytes},
        "database": {"downloads_per_second": shared.database_downloads},
        "advice": list(made.advice),
        "measured": costs.run,
    }
