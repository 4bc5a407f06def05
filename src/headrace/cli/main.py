"""Entry point of all commands; turns errors into one message and an exit code.

Exit codes: 0 success, 1 internal or store error, 2 usage or input error, 3 some runs of a map failed, 4 a ledger does
not balance, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import traceback
from typing import Annotated, Any, Final

import typer
from typer.main import get_command

from headrace.cli.administration import config, doctor, key, migrate, prune, verify
from headrace.cli.administration import move as move_command
from headrace.cli.inspection import activations as activation_commands
from headrace.cli.inspection import batch, dead, killswitch, queue
from headrace.cli.inspection import run as run_commands
from headrace.cli.inspection import schedule as schedule_commands
from headrace.cli.inspection.run_enqueue import enqueue
from headrace.cli.invocation.printing import error_lines, note, notes_are_json, notes_are_logged, silence_stdout
from headrace.cli.maps import map  # noqa: A004 - a command's name
from headrace.cli.processes import bench, demo, serve, worker
from headrace.cli.processes import index as index_command
from headrace.foundation.errors import HeadraceError

INTERRUPTED: Final = 130
USAGE_ERROR: Final[Any] = typer.BadParameter.__base__
"""The class of Typer's usage errors, such as an unknown option."""
BROKEN_PIPE: Final = 141
"""Exit code by convention of a process whose reader closed the pipe: 128 and the signal's number."""

app = typer.Typer(
    name="headrace",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # so that paragraphs of help texts wrap
    help="Durable batches: stream a million items in, run every one, know when it is done.",
)


def show_version(is_asked: bool) -> None:
    """Show the version and exit."""
    if is_asked:
        from headrace import __version__

        typer.echo(f"headrace {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version and exit.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Durable batches: stream a million items in, run every one, know when it is done."""


app.command("map")(map.command)
app.command("worker")(worker.command)
app.command("serve")(serve.command)
app.add_typer(key.app, name="key")
app.add_typer(batch.app, name="batch")
run_commands.app.command("enqueue")(enqueue)
app.add_typer(run_commands.app, name="run")
app.add_typer(queue.app, name="queue")
app.add_typer(activation_commands.app, name="activations")
app.add_typer(dead.app, name="dead")
app.add_typer(killswitch.app, name="killswitch")
app.add_typer(schedule_commands.app, name="schedule")
app.add_typer(index_command.app, name="index")
app.command("verify")(verify.command)
app.command("prune")(prune.command)
app.command("migrate")(migrate.command)
app.command("move")(move_command.command)
app.command("doctor")(doctor.command)
app.add_typer(config.app, name="config")
app.command("demo")(demo.command)
app.command("bench")(bench.command)


def _hide_types_of_flags(command: Any) -> None:
    """Give every flag an empty type in help texts: `<bool>` reads as if it took a value."""
    context = command.context_class(command)
    for parameter in command.get_params(context):
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    for subcommand in getattr(command, "commands", {}).values():
        _hide_types_of_flags(subcommand)


def _log_json() -> None:
    """Write notes and errors as JSON before the settings are loaded; then the settings decide."""
    from headrace.foundation import logs

    logs.configure(is_json=True, level="info")
    notes_are_logged(are_logged=True)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    is_json = os.environ.get("HEADRACE_LOG_FORMAT", "").lower() == "json"
    if is_json:
        _log_json()
    try:
        command = get_command(app)
        _hide_types_of_flags(command)
        code = command(args=arguments, prog_name="headrace", standalone_mode=not is_json)
        return code if isinstance(code, int) else 0
    except USAGE_ERROR as usage_error:  # only raised here in JSON mode; else Typer prints it and exits
        return _usage_code(usage_error)
    except typer.Abort:
        note("error: aborted")
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except HeadraceError as error:
        if notes_are_json():
            logging.getLogger("headrace.command").debug("command.failed", exc_info=error)
        elif os.environ.get("HEADRACE_LOG_LEVEL", "").lower() == "debug":
            traceback.print_exc()
        note(error_lines(error))
        return error.exit_code
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        return BROKEN_PIPE


def _usage_code(error: Any) -> int:
    """Write a usage error as one line, and return its exit code. An error without a text has printed the help."""
    text = error.format_message()
    if text:
        note(f"error: {text}")
    return int(error.exit_code)
