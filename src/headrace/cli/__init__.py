"""The command line. Commands import what they need when they run, since a start is measured in milliseconds."""

from __future__ import annotations

import sys


def main() -> None:
    """The `headrace` command."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from headrace import __version__

        sys.stdout.write(f"headrace {__version__}\n")
        return
    from headrace.cli.main import run

    sys.exit(run(sys.argv[1:]))
