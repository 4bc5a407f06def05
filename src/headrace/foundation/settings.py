"""Effective settings, each with its source.

For each setting by itself, flags override environment variables, which override `Headrace(…)` in code, which overrides
`headrace.toml`, which overrides the defaults. Every value is checked, also one that another overrides: an invalid
setting is never ignored. An unknown name is refused with the name that was probably meant.

Rule 1: secrets never appear in `shown`, in `repr` or in an error. Rule 2: this module does not know which stores exist;
of a store URL only the form is checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

from headrace.foundation.errors import InvalidSetting
from headrace.foundation.limits import MIB, TABLE, Limit, Limits, check
from headrace.foundation.suggestions import check_names, near_name
from headrace.foundation.targets import PushTarget, push_targets

FILE_NAME: Final = "headrace.toml"
FILE_BYTES_MAX: Final = MIB
TEXT_CHARS_MAX: Final = 4_096
PREFIX: Final = "HEADRACE_"
CONFIG_VARIABLE: Final = f"{PREFIX}CONFIG"
TEST_PREFIX: Final = f"{PREFIX}TEST_"
HIDDEN: Final = "***"
SHOWN_CHARS: Final = 80
SETTINGS_PLACE: Final = "docs/settings.md describes all settings, `headrace config show` lists them"
STORE_URLS: Final = (
    "sqlite:///relative/file.db, sqlite:////absolute/file.db, postgresql://user@host/database, "
    "https://server or memory://"
)

LATER_VARIABLES: Final = frozenset({"HEADRACE_LISTEN"})
"""Names that a later version reads: when they are set for many processes, older ones must still start."""

_NAMED_SOURCES: Final = ("flag --", "environment ")
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://")
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,20}")
_SECRETS_HINT: Final = 'write a,b or ["a","b"]; `openssl rand -hex 32` makes a secret'
_HOST: Final = re.compile(r"[a-z0-9_.-]{1,253}|\[[0-9a-f:.]{2,45}\]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
# Greedy up to the last @: a password that contains an @ is hidden whole.
_URL_PASSWORD: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^:@/?#]*):.*@")
_QUERY_SECRET: Final = re.compile(r"(?i)([?&][^=&#]*(?:pass|secret|key|token|credential)[^=&#]*=)[^&#]*")
_SECRET_NAME: Final = re.compile(r"(?i)(?:^|_)(?:secrets?|key|password|token)$")


D = TypeVar("D", bound=str)


class Option(NamedTuple):
    """One setting that is not a limit; `checked` returns the value to use, or raises `InvalidSetting`."""

    name: str
    default: str | int | None
    form: str
    meaning: str
    checked: Callable[[object], str | int]


class Shown(NamedTuple):
    """One line of `headrace config show`."""

    name: str
    value: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Effective settings of one process. `sources` names the source of each setting, limits included."""

    store: str = field(repr=False)
    direct_dsn: str | None = field(repr=False)
    migrate: Literal["auto", "never"]
    objects: str | None = field(repr=False)
    objects_shared: bool
    environment: str
    log_format: Literal["console", "json"]
    log_level: str
    concurrency: int
    processes: int
    host: str
    port: int
    allowed_hosts: tuple[str, ...]
    api_key: str | None = field(repr=False)
    tls_cert: str | None
    tls_key: str | None
    grpc_secrets: tuple[str, ...] = field(repr=False)
    delivery: Literal["pull", "push", "both"] | None
    ack: Literal["committed", "received"]
    delivery_ids: Literal["same", "fenced"]
    push: tuple[PushTarget, ...]
    limits: Limits
    sources: Mapping[str, str]

    @property
    def given(self) -> dict[str, str | int]:
        """The settings that have a value, by name, as `load` takes them."""
        values = ((name, self.value(name)) for name in self.sources)
        return {name: value for name, value in values if value is not None}

    def value(self, name: str) -> str | int | None:
        """Return the value of a setting or limit by its name."""
        if name in ("allowed_hosts", "grpc_secrets", "push"):
            return ", ".join(self._words(name)) or None
        value: str | int | bool | None = getattr(self.limits if name in TABLE else self, name)
        return str(value).lower() if isinstance(value, bool) else value

    def _words(self, name: str) -> list[str]:
        if name != "push":
            return list(getattr(self, name))
        return [f"{target.application}=http{'s' if target.is_tls else ''}://{target.authority}" for target in self.push]

    def shown(self) -> list[Shown]:
        """Return every setting in the order of the settings page, with secrets hidden."""
        return [
            Shown(name, "" if value is None else hidden(name, str(value)), source)
            for name, source in self.sources.items()
            for value in (self.value(name),)
        ]


def load(
    flags: Mapping[str, object | None],
    environ: Mapping[str, str],
    directory: Path,
    *,
    code: Mapping[str, object | None] | None = None,
) -> Settings:
    """Load the effective settings of a process started in `directory`.

    `flags` are by setting name (`flush_size`, not `--flush-size`), and so are the arguments of `Headrace(…)` in `code`;
    `None` means that one was not given. Raises `InvalidSetting` that names the setting, its source and its bounds.
    """
    given: dict[str, tuple[str | int, str]] = {}
    layers = (
        _from_file(environ, directory),
        _from_code(code or {}),
        _from_environment(environ),
        _from_flags(flags),
    )
    for layer in layers:
        for name, value, source in layer:
            given[name] = (_checked(name, value, source), source)
    numbers: dict[str, int] = {}
    texts: dict[str, str] = {}
    for name in NAMES:
        effective = given[name][0] if name in given else _default(name)
        if isinstance(effective, int):
            numbers[name] = effective
        elif effective is not None:
            texts[name] = effective
    return Settings(
        store=texts["store"],
        direct_dsn=texts.get("direct_dsn"),
        migrate="never" if texts["migrate"] == "never" else "auto",
        objects=texts.get("objects"),
        objects_shared=texts["objects_shared"] == "true",
        environment=texts["environment"],
        log_format="json" if texts["log_format"] == "json" else "console",
        log_level=texts["log_level"],
        concurrency=numbers["concurrency"],
        processes=numbers["processes"],
        host=texts["host"],
        port=numbers["port"],
        allowed_hosts=tuple(hosts_of(texts["allowed_hosts"])) if "allowed_hosts" in texts else (),
        api_key=texts.get("api_key"),
        tls_cert=texts.get("tls_cert"),
        tls_key=texts.get("tls_key"),
        grpc_secrets=secrets_of(texts["grpc_secrets"]) if "grpc_secrets" in texts else (),
        delivery=_of_choice(texts.get("delivery"), DELIVERIES),
        ack="received" if texts["ack"] == "received" else "committed",
        delivery_ids="fenced" if texts["delivery_ids"] == "fenced" else "same",
        push=push_targets(texts["push"]) if "push" in texts else (),
        limits=Limits(**{name: numbers[name] for name in TABLE}),
        sources={name: given[name][1] if name in given else "default" for name in NAMES},
    )


def check_overrides(call: str, overrides: Mapping[str, object | None]) -> None:
    """Check settings given in code, by name. Raises `InvalidSetting` that names the call and the setting."""
    check_names(call, overrides, NAMES, "setting", SETTINGS_PLACE)
    for name, value in overrides.items():
        if value is not None:
            _checked(name, _read(name, value), call)


def hidden(name: str, value: str) -> str:
    """Return `value` without secrets: nothing of a secret setting, no password or key inside a URL."""
    if _SECRET_NAME.search(name):
        return HIDDEN
    return _QUERY_SECRET.sub(rf"\1{HIDDEN}", _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", value))


def _from_flags(flags: Mapping[str, object | None]) -> Iterator[tuple[str, object, str]]:
    for name, value in flags.items():
        source = f"flag --{name.replace('_', '-')}"
        if name not in NAMES:
            raise _unknown(source, name, NAMES, lambda meant: f"--{meant.replace('_', '-')}")
        if value is not None:
            yield name, _read(name, value), source


def _from_code(arguments: Mapping[str, object | None]) -> Iterator[tuple[str, object, str]]:
    for name, value in arguments.items():
        if value is not None:
            yield name, _read(name, value), f"Headrace({name}=…)"


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE or variable in LATER_VARIABLES:
            continue
        if variable.startswith(TEST_PREFIX):
            continue
        name = variable.removeprefix(PREFIX).lower()
        source = f"environment {variable}"
        if name not in NAMES or variable != variable.upper():
            raise _unknown(source, name, (*NAMES, "config"), lambda meant: f"{PREFIX}{meant.upper()}", "unset it")
        yield name, _read(name, environ[variable]), source


def _from_file(environ: Mapping[str, str], directory: Path) -> Iterator[tuple[str, object, str]]:
    named = environ.get(CONFIG_VARIABLE)
    if named == "":
        raise InvalidSetting(
            f"{CONFIG_VARIABLE}: expected the path of a file, got an empty text",
            hint="unset it, or set it to the path of a file",
        )
    path, source = directory / (named or FILE_NAME), named or FILE_NAME
    if named is None and not path.exists():
        return
    for name, value in _parsed(path, source).items():
        if name == "limits":
            if not isinstance(value, dict):
                raise InvalidSetting(f"{source}: expected limits to be a table, got {value!r}", hint="write [limits]")
            for limit_name, limit_value in value.items():
                if limit_name not in TABLE:
                    raise _unknown(f"{source} [limits]", limit_name, TABLE, str)
                yield limit_name, limit_value, source
        elif name in TABLE:
            raise InvalidSetting(
                f"{source}: {name} is a limit, expected under [limits]", hint=f"write it under [limits] in {source}"
            )
        elif name not in OPTIONS:
            raise _unknown(source, name, (*OPTIONS, "limits"), str)
        else:
            yield name, value, source


def _parsed(path: Path, source: str) -> dict[str, object]:
    import tomllib  # only here: most processes have no file, and a start is measured in milliseconds

    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidSetting(
            f"{source} can't be read: {error.strerror or error}",
            hint=f"make it a readable file, or unset {CONFIG_VARIABLE}",
        ) from error
    if len(data) > FILE_BYTES_MAX:
        raise InvalidSetting(
            f"{source}: expected at most {FILE_BYTES_MAX} bytes, got more", hint="is it the right file?"
        )
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidSetting(
            f"{source}: expected UTF-8, got an invalid byte at {error.start}", hint="save it as UTF-8"
        ) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidSetting(f"{source}: expected TOML: {error}", hint='write lines like store = "…"') from error


def _read(name: str, value: object) -> object:
    """Return a flag or variable as its setting's type: digits become an integer where one is expected."""
    if name in NUMBERS and isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    return value


def _checked(name: str, value: object, source: str) -> str | int:
    try:
        return check(TABLE[name], value) if name in TABLE else OPTIONS[name].checked(value)
    except InvalidSetting as error:
        # A flag or variable is named after its setting: the name is not repeated.
        message = error.message.removeprefix(f"{name}: ") if source.startswith(_NAMED_SOURCES) else error.message
        raise InvalidSetting(f"{source}: {message}", hint=error.hint) from None


def _default(name: str) -> str | int | None:
    return TABLE[name].default if name in TABLE else OPTIONS[name].default


def _unknown(
    source: str, name: str, names: Iterable[str], spelled: Callable[[str], str], remedy: str = "remove it"
) -> InvalidSetting:
    near = near_name(name, names)
    hint = f"did you mean {spelled(near)}?" if near else f"{remedy}, or see `headrace config show`"
    return InvalidSetting(f"{source}: unknown setting {name}", hint=hint)


def _text(name: str, value: object, form: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > TEXT_CHARS_MAX or _CONTROL.search(value):
        shown = repr(hidden(name, value[:80])) if isinstance(value, str) else repr(value)
        raise InvalidSetting(f"{name}: expected {form}, got {shown}")
    return value


def _url(name: str, hint: str) -> Callable[[object], str]:
    def checked(value: object) -> str:
        if isinstance(value, Path):
            raise InvalidSetting(f"{name}: expected a URL, got {value!r}", hint=f'write {name}="sqlite:///{value}"')
        text = _text(name, value, "a URL")
        if not _URL.match(text):
            # Text with an @ or a colon is not repeated: it may be a mistyped URL with a password in it.
            got = "" if re.search("[@:]", text) else f", got {text[:SHOWN_CHARS]!r}"
            raise InvalidSetting(f"{name}: expected a URL{got}", hint=hint)
        return text

    return checked


def _objects(value: object) -> str:
    return _text("objects", value, "a URL or a directory")


def _flag(name: str) -> Callable[[object], str]:
    def checked(value: object) -> str:
        text = str(value).lower() if isinstance(value, bool | str) else ""
        if text not in ("true", "false"):
            raise InvalidSetting(f"{name}: expected true or false, got {value!r}")
        return text

    return checked


def _host(value: object) -> str:
    return _text("host", value, "an address")


def _allowed_hosts(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else _text("allowed_hosts", value, "host names")
    for name in hosts_of(text):
        if not _HOST.fullmatch(name):
            raise InvalidSetting(
                f"allowed_hosts: expected host names without a port, separated by commas, got {name[:SHOWN_CHARS]!r}",
                hint="write batches.internal, 10.0.0.7 or [fd00::7]",
            )
    return text


def hosts_of(text: str) -> list[str]:
    """Return the host names of a text, in lower case."""
    return [name.strip().lower() for name in text.split(",")]


def _api_key(value: object) -> str:
    if not isinstance(value, str) or not KEY_CHARS_MIN <= len(value) <= TEXT_CHARS_MAX or not value.isprintable():
        # The value is not repeated: it may be a mistyped key.
        raise InvalidSetting(
            f"api_key: expected {KEY_CHARS_MIN} to {TEXT_CHARS_MAX} printable characters, got {_kind_of_secret(value)}"
        )
    return value


def _kind_of_secret(value: object) -> str:
    """Describe a secret that is not accepted, without any part of it."""
    if not isinstance(value, str):
        return f"a value of type {type(value).__name__}"
    return f"{len(value)}" if value.isprintable() else f"{len(value)}, some of them not printable"


def _environment(value: object) -> str:
    text = _text("environment", value, "a name")
    if len(text) > ENVIRONMENT_CHARS_MAX:
        raise InvalidSetting(f"environment: expected at most {ENVIRONMENT_CHARS_MAX} characters, got {len(text)}")
    return text


def _path(name: str) -> Callable[[object], str]:
    return lambda value: _text(name, value, "the path of a file")


def _push(value: object) -> str:
    text = _text("push", value, "applications with their endpoints")
    push_targets(text)
    return text


def _grpc_secrets(value: object) -> str:
    if isinstance(value, list):
        from json import dumps  # only here and below: most starts have no secrets

        value = dumps(value)
    if not isinstance(value, str):
        raise InvalidSetting("grpc_secrets: expected a list of secrets", hint=_SECRETS_HINT)
    secrets_of(value)
    return value


def secrets_of(text: str) -> tuple[str, ...]:
    """Return the secrets of a text: separated by commas, or a JSON list. Raises `InvalidSetting`.

    No error repeats the text: it may be a mistyped secret.
    """
    if text.lstrip().startswith("["):
        from json import loads

        try:
            words = loads(text)
        except (ValueError, RecursionError):
            raise InvalidSetting("grpc_secrets: expected a JSON list", hint=_SECRETS_HINT) from None
    else:
        words = [word.strip() for word in text.split(",")]
    if not words or len(words) > SECRETS_MAX:
        raise InvalidSetting(f"grpc_secrets: expected 1 to {SECRETS_MAX} secrets", hint=_SECRETS_HINT)
    for number, word in enumerate(words, 1):
        if (
            not isinstance(word, str)
            or not word.isprintable()
            or not SECRET_BYTES_MIN <= len(word.encode()) <= TEXT_CHARS_MAX
        ):
            raise InvalidSetting(
                f"grpc_secrets: expected {SECRET_BYTES_MIN} to {TEXT_CHARS_MAX} printable bytes in secret {number}",
                hint=_SECRETS_HINT,
            )
    return tuple(words)


def _number(limit: Limit) -> Option:
    return Option(
        name=limit.name,
        default=limit.default,
        form=f"{limit.least:,} to {limit.most:,} {limit.unit}",
        meaning=limit.meaning,
        checked=lambda value: check(limit, value),
    )


def _of_choice(text: str | None, choices: tuple[D, ...]) -> D | None:
    return next((choice for choice in choices if choice == text), None)


def _choice(name: str, default: str | None, choices: tuple[str, ...], meaning: str) -> Option:
    def checked(value: object) -> str:
        if not isinstance(value, str) or value.lower() not in choices:
            raise InvalidSetting(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        return value.lower()

    return Option(name, default, ", ".join(choices), meaning, checked)


DELIVERIES: Final[tuple[Literal["pull"], Literal["push"], Literal["both"]]] = ("pull", "push", "both")
ACKS: Final = ("committed", "received")
DELIVERY_IDS: Final = ("same", "fenced")
SECRETS_MAX: Final = 16
SECRET_BYTES_MIN: Final = 12
ENVIRONMENT_CHARS_MAX: Final = 200
KEY_CHARS_MIN: Final = 8
MIGRATE: Final = ("auto", "never")
LOG_FORMATS: Final = ("console", "json")
LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")

OPTIONS: Final[Mapping[str, Option]] = {
    option.name: option
    for option in (
        Option(
            "store",
            "sqlite:///headrace.db",
            "a URL",
            "The store of batches.",
            _url("store", f"write {STORE_URLS}"),
        ),
        Option(
            "direct_dsn",
            None,
            "a URL",
            "The same database without the pooler, for migrations and notifications; default: `store`.",
            _url("direct_dsn", "postgresql://user@host/database"),
        ),
        _choice(
            "migrate",
            "auto",
            MIGRATE,
            "Create or upgrade the schema when a worker, server or app opens the store, or never: then "
            "`headrace migrate` does it.",
        ),
        Option(
            "objects",
            None,
            "a URL or a directory",
            "The object store, for payloads of inline_bytes_max or more; default: beside a SQLite file, or in a "
            "PostgreSQL database itself.",
            _objects,
        ),
        Option(
            "objects_shared",
            "false",
            "true, false",
            "The directory that `objects` names is one for all machines, as on a network share.",
            _flag("objects_shared"),
        ),
        Option("environment", "default", "a name", "The tenant of batches, queues and keys.", _environment),
        _choice("log_format", "console", LOG_FORMATS, "The format of log lines."),
        _choice("log_level", "info", LOG_LEVELS, "The lowest level of log lines that are written."),
        _number(Limit("concurrency", "runs", 100, 1, 100_000, "Runs that one worker process runs at a time.")),
        _number(
            Limit(
                "processes",
                "processes",
                0,
                0,
                1_024,
                "Worker processes of `headrace worker`, child processes of `headrace map`; 0: this process.",
            )
        ),
        Option("host", "127.0.0.1", "an address", "The address that `headrace serve` listens on.", _host),
        _number(
            Limit("port", "port", 8_000, 0, 65_535, "The port that `headrace serve` listens on; 0 takes a free one.")
        ),
        Option(
            "allowed_hosts",
            None,
            "host names, …",
            "Host names that a server with --no-auth answers to, beside its address and those of this machine.",
            _allowed_hosts,
        ),
        Option(
            "api_key",
            None,
            "a secret",
            "A server: a key with all rights in its environment, beside the keys in its store. "
            "A client: the key it sends.",
            _api_key,
        ),
        Option("tls_cert", None, "a path", "The server's certificate with its chain, PEM.", _path("tls_cert")),
        Option("tls_key", None, "a path", "The certificate's private key, PEM.", _path("tls_key")),
        Option(
            "grpc_secrets",
            None,
            "secrets separated by commas, or a JSON list",
            "Secrets that sign calls of the task broker: each of them verifies, the first signs pushed calls.",
            _grpc_secrets,
        ),
        _choice(
            "delivery",
            None,
            DELIVERIES,
            "How gRPC workers get activations; default: pull, on loopback addresses or with grpc_secrets.",
        ),
        _choice(
            "ack",
            "committed",
            ACKS,
            "Answer a gRPC report after its commit, or when it is received.",
        ),
        _choice(
            "delivery_ids",
            "same",
            DELIVERY_IDS,
            "The id that a gRPC worker sees: the activation's own on every delivery, or one that names the delivery.",
        ),
        Option(
            "push",
            None,
            "application=http://host:port, …",
            "Endpoints that activations are pushed to, by application; one may have several.",
            _push,
        ),
    )
}
NAMES: Final = (*OPTIONS, *TABLE)
NUMBERS: Final = frozenset(TABLE) | {name for name, option in OPTIONS.items() if isinstance(option.default, int)}
