"""Finding the task that a command line names: `module:attribute` or `path/file.py:attribute`.

A file is imported as a script would be: its directory comes first on the module path, so that what lies beside it
can be imported, by it and by child processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

from headrace.foundation.errors import InvalidInput
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec

_FORM: Final = "write MODULE:TASK or path/to/file.py:TASK"
_INDEXER_FORM: Final = "write MODULE:INDEXER or path/to/file.py:INDEXER"
_APP_FORM: Final = "write MODULE:APP or path/to/file.py:APP"


class Loaded(NamedTuple):
    """What a target names. `handle` is the task of an app, None for a plain function."""

    handle: Any
    function: Any


def load_target(target: str) -> Loaded:
    """Import the task that `target` names. Raises `InvalidInput` that says what is missing, or what broke on import."""
    found = _found(target, "a task", _FORM)
    if isinstance(getattr(found, "spec", None), TaskSpec):
        return Loaded(found, found.spec.function)
    if isinstance(found, type) or not callable(found):
        raise InvalidInput(
            f"{target} is not a task but {_kind_of(found)}", hint="name a function, with or without @app.task"
        )
    return Loaded(None, found)


def load_app(target: str) -> Any:
    """Import the app that `target` names. Raises `InvalidInput`."""
    found = _found(target, "an app", _APP_FORM)
    if not isinstance(getattr(found, "registry", None), Registry):
        raise InvalidInput(f"{target} is not an app but {_kind_of(found)}", hint="name a Headrace(…) of the module")
    return found


def load_indexer(target: str) -> Any:
    """Import the indexer that `target` names. Raises `InvalidInput`."""
    from headrace.runtime.indexing.pipeline import Definition  # only here: child processes of workers need none of it

    found = _found(target, "an indexer", _INDEXER_FORM)
    if not isinstance(getattr(found, "definition", None), Definition):
        raise InvalidInput(
            f"{target} is not an indexer but {_kind_of(found)}", hint="name an app.indexer(…) of the module"
        )
    return found


def _found(target: str, what: str, form: str) -> Any:
    place, colon, attribute = target.rpartition(":")
    if not colon or not place or not attribute:
        raise InvalidInput(f"{target!r} does not name {what}", hint=form)
    is_file = place.endswith(".py") or "/" in place or os.sep in place
    module = _from_file(place) if is_file else _from_name(place)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise InvalidInput(f"{place} has no {attribute!r}", hint=_hint(module))
    return found


def tasks_of(module: ModuleType) -> list[str]:
    """The names under which a module holds tasks."""
    return [
        name
        for name, found in vars(module).items()
        if isinstance(getattr(found, "spec", None), TaskSpec) and not isinstance(found, type)
    ]


def _from_file(place: str) -> ModuleType:
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        what = "a directory" if path.is_dir() else "not there"
        raise InvalidInput(f"{place} is {what}", hint="name a Python file: path/to/file.py:TASK")
    directory = str(path.parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and _is_at(known, path):
        return known
    if known is None and name.isidentifier() and path.suffix == ".py":
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin) == path:
            return _imported(place, lambda: importlib.import_module(name))
    name = f"headrace_tasks_{name}"  # another module has that name already, or nothing can
    if name in sys.modules and _is_at(sys.modules[name], path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{place} is not a Python file", hint=_FORM)
    module, loader = importlib.util.module_from_spec(spec), spec.loader

    def load() -> ModuleType:
        sys.modules[name] = module
        try:
            loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        return module

    return _imported(place, load)


def _from_name(place: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        is_there = importlib.util.find_spec(place) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not place.startswith(error.name):
            return _imported(place, lambda: importlib.import_module(place))
        is_there = False
    except (ValueError, ImportError):
        is_there = False
    except Exception:  # noqa: BLE001 - a package above it may raise anything; the import below says what
        is_there = True
    if not is_there:
        hint = f"did you mean {place}.py:…?" if Path(f"{place}.py").is_file() else "is it installed, or spelled so?"
        raise InvalidInput(f"there is no module called {place!r}", hint=hint)
    return _imported(place, lambda: importlib.import_module(place))


def _imported(place: str, load: Any) -> ModuleType:
    try:
        module: ModuleType = load()
    except SyntaxError as error:
        raise InvalidInput(
            f"{place} is not valid Python: {error.msg} (line {error.lineno} of {error.filename})",
            hint="run it with python to see the place",
        ) from error
    except (Exception, SystemExit) as error:
        raise InvalidInput(
            f"{place} failed to import: {type(error).__name__}: {error}{_where(error)}",
            hint="python must be able to import it; HEADRACE_LOG_LEVEL=debug shows the traceback",
        ) from error
    return module


def _where(error: BaseException) -> str:
    """The last line of the user's own code that was running."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    return f" (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""


def _is_at(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).absolute() == path


def _hint(module: ModuleType) -> str:
    tasks = tasks_of(module)
    if tasks:
        return f"its tasks are: {', '.join(tasks)}"
    functions = [
        name
        for name, found in vars(module).items()
        if callable(found) and getattr(found, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    return f"it has: {', '.join(functions[:10])}" if functions else "it holds no task and no function"


def _kind_of(found: object) -> str:
    article = "an" if type(found).__name__[0].lower() in "aeiou" else "a"
    return "a class" if isinstance(found, type) else f"{article} {type(found).__name__}"
