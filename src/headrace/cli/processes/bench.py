"""`headrace bench`: measure this machine, each figure beside the same work without Headrace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.invocation.opening import JsonOption, StoreOption
from headrace.foundation import interpreter

if TYPE_CHECKING:
    from headrace.benchmarks import Figure


def command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Scenarios to run. Default: all.")
    ] = None,
    store: StoreOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do a tenth of the work, measured twice.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure append, run and memory figures, each beside a baseline: the same work without Headrace.

    --store selects a disk (sqlite:///directory/any.db) or a server (postgresql://…); a fresh file or schema is used.
    """
    import msgspec

    from headrace import benchmarks

    target = benchmarks.target_of(store)
    scenarios = benchmarks.select(names or [], target.kind)
    interpreter.tune()
    figures = []
    for figure in benchmarks.measure_all(scenarios, target, quick=quick):
        figures.append(figure)
        if not json:
            typer.echo(_line(figure))
    if json:
        report = benchmarks.BenchReport(machine=benchmarks.machine(), versions=benchmarks.versions(), scenarios=figures)
        typer.echo(msgspec.json.encode(report).decode())


def _line(figure: Figure) -> str:
    text = f"{figure['name']:16} {figure['value']:>12,.0f} {figure['unit']:8}"
    if figure["baseline"] is None:
        return text
    return f"{text} baseline {figure['baseline']:>10,.0f}   ratio {figure['ratio']:.2f}   median of {figure['runs']}"
