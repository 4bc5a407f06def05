"""Errors about misspelt names: they name what was given, the near name, and every name there is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Final, ParamSpec, TypeVar

from headrace.foundation.errors import InvalidSetting

P = ParamSpec("P")
R = TypeVar("R")

NAMES_SHOWN: Final = 40
"""Most names that are listed. Of more, only near ones are, and `place` says where all of them are described."""
NEAR_NAMES_SHOWN: Final = 3


def near_name(name: str, names: Iterable[str]) -> str | None:
    """Return the name that `name` was probably meant to be, or None."""
    near = _near_names(name, names, cutoff=0.6)
    return near[0] if near else None


def _near_names(name: str, names: Iterable[str], *, cutoff: float) -> list[str]:
    import difflib  # only here: most starts make no mistake

    return difflib.get_close_matches(name.lower().replace("-", "_"), list(names), n=NEAR_NAMES_SHOWN, cutoff=cutoff)


def hint_of(name: str, names: Collection[str], plural: str, place: str = "") -> str:
    """Return a hint for an unknown name: the near one, and all names, or of many `place`."""
    near = near_name(name, names)
    question = f"did you mean {near}? " if near else ""
    if len(names) <= NAMES_SHOWN:
        return f"{question}{plural}: {', '.join(names) or 'none'}"
    if near:
        return question.rstrip()
    similar = _near_names(name, names, cutoff=0.4)
    some = f"{plural} with a similar name: {', '.join(similar)}; " if similar else ""
    return f"{some}{place or f'there are {len(names)}'}"


def check_names(call: str, given: Iterable[str], names: Collection[str], noun: str, place: str = "") -> None:
    """Raise `InvalidSetting` for the first name that is not one of `names`."""
    for name in given:
        if name not in names:
            raise InvalidSetting(f"{call} has no {noun} {name!r}", hint=hint_of(name, names, f"its {noun}s", place))


def names_checked(call: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function raise `InvalidSetting` for an unknown option, with the near name, instead of a `TypeError`.

    A correct call costs nothing more. `call` is the function as users write it: `task.options()`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*arguments: P.args, **options: P.kwargs) -> R:
            try:
                return function(*arguments, **options)
            except TypeError:
                _check_call(call, inspect.signature(function), arguments, options)
                raise

        return checked

    return decorate


def _check_call(
    call: str, signature: inspect.Signature, arguments: tuple[object, ...], options: dict[str, object]
) -> None:
    """Raise `InvalidSetting` if a call does not fit a signature, whose options are its keyword-only parameters."""
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items() if name != "self"}
    names = [name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY]
    try:
        check_names(call, (name for name in options if name in names or name not in kinds), names, "option")
    except InvalidSetting as error:
        raise error from None
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        hint = f"give options by name: {', '.join(f'{name}=…' for name in names)}"
        raise InvalidSetting(f"{call}: {error}", hint=hint) from None
