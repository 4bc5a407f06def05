"""Loader of the task, app or indexer that a command line names: `module:attribute` or `path/file.py:attribute`.

A file is imported as a script would be: its directory comes first on the module path, so that modules beside it can be
imported, also by child processes.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

from headrace.cli.invocation.opening import log_before_import
from headrace.foundation.errors import InvalidInput
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec

_TASK_FORM: Final = "MODULE:TASK or path/to/file.py:TASK"
_INDEXER_FORM: Final = "MODULE:INDEXER or path/to/file.py:INDEXER"
_APP_FORM: Final = "MODULE:APP or path/to/file.py:APP"


class Loaded(NamedTuple):
    """A loaded target. `handle` is the task of an app, None for a plain function."""

    handle: Any
    function: Any


def load_target(target: str) -> Loaded:
    """Import the task that `target` names. Raises `InvalidInput`, also when the import fails."""
    target_object = _attribute(target, _TASK_FORM, tasks_of, "tasks")
    if isinstance(getattr(target_object, "spec", None), TaskSpec):
        return Loaded(target_object, target_object.spec.function)
    if isinstance(target_object, type) or not callable(target_object):
        raise InvalidInput(
            f"expected a task at {target}, got {_kind_of(target_object)}",
            hint="name a function, with or without @app.task",
        )
    return Loaded(None, target_object)


def load_app(target: str) -> Any:
    """Import the app that `target` names. Raises `InvalidInput`."""
    target_object = _attribute(target, _APP_FORM, _apps_of, "apps")
    if not isinstance(getattr(target_object, "registry", None), Registry):
        place = target.rpartition(":")[0]
        apps = _apps_of(_module_at(place))
        raise InvalidInput(
            f"expected an app at {target}, got {_kind_of(target_object)}",
            hint=f"write {' or '.join(f'{place}:{name}' for name in apps)}" if apps else f"{place} has no Headrace(…)",
        )
    return target_object


def load_indexer(target: str) -> Any:
    """Import the indexer that `target` names. Raises `InvalidInput`."""
    from headrace.runtime.indexing.definition import (
        IndexerDefinition,  # only here: child processes of workers need none of it
    )

    target_object = _attribute(target, _INDEXER_FORM, _indexers_of, "indexers")
    if not isinstance(getattr(target_object, "definition", None), IndexerDefinition):
        raise InvalidInput(
            f"expected an indexer at {target}, got {_kind_of(target_object)}",
            hint="name an app.indexer(…) of the module",
        )
    return target_object


def _attribute(target: str, form: str, names_of: Callable[[ModuleType], list[str]], plural: str) -> Any:
    """Import the module or file of a target and return the named attribute. `names_of` lists what it may be.

    Raises `InvalidInput`, and `InvalidSetting` for settings of the environment or of headrace.toml.
    """
    log_before_import()
    place, colon, attribute = target.rpartition(":")
    if not colon or not place or not attribute:
        raise InvalidInput(f"expected {form}, got {target!r}", hint=_hint_at(place or attribute, names_of, plural))
    module = _module_at(place)
    target_object: Any = module
    for part in attribute.split("."):
        target_object = getattr(target_object, part, None)
    if target_object is None:
        raise InvalidInput(f"{place} has no {attribute!r}", hint=_hint(module, names_of(module), plural))
    return target_object


def _module_at(place: str) -> ModuleType:
    is_file = place.endswith(".py") or "/" in place or os.sep in place
    return _from_file(place) if is_file else _from_name(place)


def _hint_at(place: str, names_of: Callable[[ModuleType], list[str]], plural: str) -> str:
    """Return what the module or file of an incomplete target has, or nothing if it can't be imported."""
    try:
        module = _module_at(place)
        return _hint(module, names_of(module), plural)
    except InvalidInput:
        return ""


def tasks_of(module: ModuleType) -> list[str]:
    """Return the names under which a module holds tasks."""
    return [
        name
        for name, target_object in vars(module).items()
        if isinstance(getattr(target_object, "spec", None), TaskSpec) and not isinstance(target_object, type)
    ]


def _from_file(place: str) -> ModuleType:
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        what = "a directory" if path.is_dir() else "missing"
        raise InvalidInput(f"{place} is {what}", hint="name a Python file: path/to/file.py:TASK")
    directory = str(path.parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and _is_at(loaded, path):
        return loaded
    if loaded is None and name.isidentifier() and path.suffix == ".py":
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin) == path:
            return _imported(place, lambda: importlib.import_module(name))
    name = f"headrace_tasks_{name}"  # another module has that name already, or it is no identifier
    if name in sys.modules and _is_at(sys.modules[name], path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{place} is not a Python file", hint=f"write {_TASK_FORM}")
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
        hint = (
            f"did you mean {place}.py:…?"
            if Path(f"{place}.py").is_file()
            else "check its spelling, and that it is installed"
        )
        raise InvalidInput(f"no module is named {place!r}", hint=hint)
    return _imported(place, lambda: importlib.import_module(place))


def _imported(place: str, load: Any) -> ModuleType:
    try:
        module: ModuleType = load()
    except SyntaxError as error:
        raise InvalidInput(
            f"{place} is not valid Python: {error.msg} (line {error.lineno} of {error.filename})",
            hint="run it with python to see where",
        ) from error
    except (Exception, SystemExit) as error:
        raise InvalidInput(
            f"{place} failed to import: {type(error).__name__}: {error}{_where(error)}",
            hint="Python must be able to import it; HEADRACE_LOG_LEVEL=debug shows the traceback",
        ) from error
    return module


def _where(error: BaseException) -> str:
    """Return the last line of the user's own code that was running."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    return f" (line {frames[-1].lineno} of {frames[-1].filename})" if frames else ""


def _is_at(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).absolute() == path


def _indexers_of(module: ModuleType) -> list[str]:
    from headrace.runtime.indexing.definition import IndexerDefinition

    return [
        name
        for name, value in vars(module).items()
        if isinstance(getattr(value, "definition", None), IndexerDefinition)
    ]


def _apps_of(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(getattr(value, "registry", None), Registry)]


def _hint(module: ModuleType, names: list[str], plural: str) -> str:
    if names:
        return f"its {plural}: {', '.join(names)}"
    if plural != "tasks":
        return f"it has no {plural}"
    functions = [
        name
        for name, target_object in vars(module).items()
        if callable(target_object)
        and getattr(target_object, "__module__", None) == module.__name__
        and not name.startswith("_")
    ]
    return f"its functions: {', '.join(functions[:10])}" if functions else "it has no task and no function"


def _kind_of(target_object: object) -> str:
    spec = getattr(target_object, "spec", None)
    if isinstance(spec, TaskSpec) and not isinstance(target_object, type):
        return f"the task {spec.name}"
    article = "an" if type(target_object).__name__[0].lower() in "aeiou" else "a"
    return "a class" if isinstance(target_object, type) else f"{article} {type(target_object).__name__}"
