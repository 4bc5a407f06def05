"""The settings page is generated from the tables in the code.

`python tests/foundation/test_settings_page.py` writes it again.
"""

from __future__ import annotations

from pathlib import Path

from headrace.foundation.limits import TABLE
from headrace.foundation.settings import OPTIONS, PREFIX

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

HEAD = """\
# Settings

For each setting by itself, the first of these sources that has a value wins:

1. a command's flag, such as `--store`;
2. an environment variable, such as `HEADRACE_STORE`;
3. the code: `Headrace("app", store=…, flush_size=…)`. Commands that name an app, a task or an indexer read it too;
4. `headrace.toml` in the current directory; `HEADRACE_CONFIG` names another file;
5. the default.

`headrace config show` prints the effective values and the source of each, with secrets hidden; `headrace config show
jobs.py:app` prints those of an app. With an unknown name, or a value out of its bounds, a process does not start.

```toml
store = "sqlite:///headrace.db"
concurrency = 100

[limits]
flush_size = 500
```

The URL of `store` is one of `sqlite:///relative/file.db`, `sqlite:////absolute/file.db`, `postgresql://user@host/database`
([PostgreSQL](postgres.md)), `https://server` ([a Headrace server](http.md#the-python-client)) and `memory://`
([for trials](testing.md#the-store-memory)).
"""


def page() -> str:
    """Return the content of `docs/settings.md`."""
    lines = [HEAD, "## General\n", "| name | variable | default | values | |", "|---|---|---|---|---|"]
    lines += [
        row(option.name, f"`{option.default}`" if option.default is not None else "unset", option.form)
        + f" {option.meaning} |"
        for option in OPTIONS.values()
    ]
    lines += [
        "\n## Limits (`[limits]` in the file)\n",
        "| name | variable | default | least | most | unit | |",
        "|---|---|--:|--:|--:|---|---|",
    ]
    lines += [
        row(limit.name, f"{limit.default:,}", f"{limit.least:,}", f"{limit.most:,}", limit.unit) + f" {limit.meaning} |"
        for limit in TABLE.values()
    ]
    return "\n".join(lines) + "\n"


def row(name: str, *cells: str) -> str:
    """Return the start of a table row: the name, its variable and more cells."""
    return " | ".join([f"| `{name}`", f"`{PREFIX}{name.upper()}`", *cells]) + " |"


def test_the_settings_page_says_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python tests/foundation/test_settings_page.py`"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
