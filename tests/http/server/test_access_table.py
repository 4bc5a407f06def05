"""The table of access in `docs/security.md` is generated from the declarations of routes and methods.

`python -m tests.http.server.test_access_table` writes it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headrace.foundation.access import CREDENTIALS, Access
from headrace.foundation.limits import DEFAULT
from headrace.grpc.taskbroker.consumer_service import ACCESS as CONSUMER_ACCESS
from headrace.http.grpc_mount.broker_service import ACCESS as BROKER_ACCESS
from headrace.http.server.app import endpoints_of

PAGE = Path(__file__).parents[3] / "docs" / "security.md"
BEGIN, END = "<!-- generated: access -->\n", "<!-- end of access -->\n"


class _Service:
    """The part of a service that the list of endpoints needs."""

    limits = DEFAULT

    def __getattr__(self, name: str) -> Any:
        return None


def table() -> str:
    """Return the table."""
    service: Any = _Service()
    lines = ["| call | who | scope | largest body |", "|---|---|---|--:|"]
    lines += [row(f"{each.method} {each.path.replace(':path', '')}", each.access) for each in endpoints_of(service)]
    for name, declared in (("ConsumerService", CONSUMER_ACCESS), ("Broker", BROKER_ACCESS)):
        lines += [row(f"gRPC {name}/{method}", access) for method, access in declared.items()]
    return "\n".join(lines) + "\n"


def row(call: str, access: Access) -> str:
    """Return the row of one call."""
    scopes = " or ".join(f"`{scope}`" for scope in access.scopes)
    bound = "by its items" if access.body_bytes_max is None else f"{access.body_bytes_max:,}"
    if access.body_bytes_max is None and call.startswith("gRPC"):
        bound = "`grpc_message_bytes_max`"
    return f"| `{call}` | {CREDENTIALS[access.credential]} | {scopes} | {bound} |"


def page() -> str:
    """Return the page with the table of the code."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


def test_the_table_of_access_is_that_of_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it again: python -m tests.http.server.test_access_table"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
