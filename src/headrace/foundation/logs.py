"""Logs: Headrace's own loggers, the ids of the current run, and the format of a process's log lines.

Headrace logs through the standard library, so an application's own configuration of `logging` decides about its lines.
Commands configure `logging`, structlog, warnings and unhandled errors alike: one format on every line.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Protocol

import structlog

from headrace.foundation.escaping import escaped

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
FIELDS: Final = "headrace_fields"
"""Attribute of a log record that holds its event and its fields."""


class RunIds(Protocol):
    """The current run of a thread or task. Its ids are made when a line is logged, never before."""

    def run_ids(self) -> Mapping[str, object]:
        """Return `run`, `batch`, `task` and `attempt`; empty if there is no run."""
        ...


CURRENT_RUN: ContextVar[RunIds | None] = ContextVar("headrace_current_run", default=None)


def run_ids() -> Mapping[str, object]:
    """Return the ids of the run whose code is running, empty outside runs."""
    current = CURRENT_RUN.get()
    return {} if current is None else current.run_ids()


def get_logger(name: str) -> Any:
    """Return a logger of Headrace: `LOG.warning("lease.lost", span_id=…)`. It writes to the logger of that name."""
    return structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, structlog.contextvars.merge_contextvars, _to_standard_library],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=False,
    )


def printable(text: str) -> str:
    """Return a text as one line that every encoding can hold, its control characters escaped."""
    return escaped(text).replace("\n", "\\n")


def _to_standard_library(
    _logger: Any, _method: str, fields: MutableMapping[str, Any]
) -> tuple[tuple[str], dict[str, Any]]:
    """Return the arguments of a call of the standard library's logger."""
    options: dict[str, Any] = {"exc_info": fields.pop("exc_info", None)}
    options["extra"] = {FIELDS: fields}
    return (
        " ".join([str(fields["event"]), *(f"{k}={printable(str(v))}" for k, v in fields.items() if k != "event")]),
    ), options


class RunIdFilter(logging.Filter):
    """A filter that gives each log record the attributes `run`, `batch`, `task` and `attempt`, empty outside runs.

    `handler.addFilter(RunIdFilter())`, then a format such as `"%(levelname)s %(run)s %(message)s"`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes; every record passes."""
        ids = run_ids()
        for name in ("run", "batch", "task", "attempt"):
            if not hasattr(record, name):
                setattr(record, name, ids.get(name, ""))
        return True


def add_run_ids(_logger: Any, _method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the ids of the current run to a line of structlog: a processor."""
    for name, value in run_ids().items():
        fields.setdefault(name, value)
    return fields


class LineFormatter(logging.Formatter):
    """Format of the log lines of commands: for people, or one JSON object a line."""

    def __init__(self, *, is_json: bool) -> None:
        super().__init__()
        self._is_json = is_json
        self._render: Any = renderer_of(is_json=is_json)

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line; a traceback follows it, or is a field of the JSON object."""
        fields: dict[str, Any] = dict(getattr(record, FIELDS, None) or {"event": record.getMessage()})
        fields = {"event": fields.pop("event"), **fields}
        add_run_ids(None, "", fields)
        fields |= {"level": record.levelname.lower(), "logger": record.name}
        fields["timestamp"] = datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z")
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        line: str = self._render(None, record.levelname.lower(), fields)
        return line.encode("utf-8", "backslashreplace").decode()


def renderer_of(*, is_json: bool) -> Any:
    """Return structlog's renderer of log lines. In lines for people control characters are escaped."""
    if is_json:
        return structlog.processors.JSONRenderer()
    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )

    def render(logger: Any, method: str, fields: MutableMapping[str, Any]) -> Any:
        return renderer(logger, method, {escaped(k): _escaped_value(v) for k, v in fields.items()})

    return render


def _escaped_value(value: Any) -> Any:
    """Return a field of a line; objects that are no numbers are shown by their `repr`, which may hold anything."""
    if isinstance(value, str):
        return escaped(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    shown = repr(value)
    return value if shown.isprintable() else escaped(shown)


class _StderrHandler(logging.StreamHandler[Any]):
    """A handler that writes to the present standard error, also after that was replaced."""

    root_level: int = logging.WARNING
    """The level of the root logger that `configure` set last."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """The present standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _stream: Any) -> None:
        raise NotImplementedError


def configure(*, is_json: bool, level: str) -> None:
    """Write the log lines of this process to standard error: standard output is for results.

    Lines of `logging` and structlog have the same format; with `is_json`, warnings and unhandled errors too. An
    application that has configured the root logger keeps its handlers; then only Headrace's own lines get this format.
    A handler that Python added by itself, at a `logging.warning(…)` without any configuration, is replaced.
    """
    reset()
    _remove_implicit_handler()
    handler = _StderrHandler()
    handler.setFormatter(LineFormatter(is_json=is_json))
    root, ours = logging.getLogger(), logging.getLogger("headrace")
    if root.handlers:
        ours.addHandler(handler)
        ours.setLevel(LEVELS[level])
        ours.propagate = False
    else:
        root.addHandler(handler)
        root.setLevel(LEVELS[level])
        _StderrHandler.root_level = root.level
    logging.captureWarnings(capture=is_json)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            add_run_ids,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer_of(is_json=is_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
    if is_json:
        sys.excepthook = _uncaught
        sys.unraisablehook = _unraisable
        threading.excepthook = _uncaught_in_thread


def _remove_implicit_handler() -> None:
    """Remove the root logger's only handler if an implicit `logging.basicConfig()` added it."""
    root = logging.getLogger()
    if len(root.handlers) != 1 or root.level not in (logging.WARNING, _StderrHandler.root_level):
        return
    handler, formatter = root.handlers[0], root.handlers[0].formatter
    if (
        type(handler) is logging.StreamHandler
        and handler.stream in (sys.stderr, sys.__stderr__)
        and not handler.level
        and not handler.filters
        and type(formatter) is logging.Formatter
        and vars(formatter).get("_fmt") == logging.BASIC_FORMAT
        and formatter.datefmt is None
    ):
        root.removeHandler(handler)


def is_configured() -> bool:
    """True if `configure` was called in this process: a command runs."""
    loggers = (logging.getLogger(), logging.getLogger("headrace"))
    return any(isinstance(handler, _StderrHandler) for logger in loggers for handler in logger.handlers)


def reset() -> None:
    """Undo `configure`."""
    for logger in (logging.getLogger(), logging.getLogger("headrace")):
        for handler in [handler for handler in logger.handlers if isinstance(handler, _StderrHandler)]:
            logger.removeHandler(handler)
    logging.getLogger("headrace").setLevel(logging.NOTSET)
    logging.getLogger("headrace.attempts").setLevel(logging.NOTSET)
    logging.getLogger("headrace").propagate = True
    logging.captureWarnings(capture=False)
    if sys.excepthook is _uncaught:
        sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
        threading.excepthook = threading.__excepthook__
    structlog.reset_defaults()


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("headrace.process").critical("error.uncaught", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: Any) -> None:
    if args.exc_type is not SystemExit:
        logging.getLogger("headrace.process").critical(
            "error.uncaught in thread %s", args.thread and args.thread.name, exc_info=(*args[:3],)
        )


def _unraisable(args: Any) -> None:
    logging.getLogger("headrace.process").error(
        "%s: %r",
        args.err_msg or "error.ignored",
        args.object,
        exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
    )
