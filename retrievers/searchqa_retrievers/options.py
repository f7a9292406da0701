"""The options of a configuration, checked against the signature of the function that takes them."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from searchqa_retrievers.types import RetrieverError


def check_options(name: str, make: Callable[..., object], options: Mapping[str, Any], common: Sequence[str] = ()) -> None:
    """Raise :class:`RetrieverError` for an option that is unknown, missing, or of another type than ``make`` says.

    A whole number counts as ``float``, a path as ``str``, a boolean as neither number.

    Parameters
    ----------
    name
        Of the retriever.
    make
        Takes the corpus, then the options. Every parameter has an annotation.
    options
    common
        Further options that every retriever has, for the message.
    """
    parameters = {key: parameter for key, parameter in inspect.signature(make).parameters.items() if key != "corpus"}
    unknown = sorted(map(str, set(options) - set(parameters)))
    if unknown:
        raise RetrieverError(f"retriever {name!r} has no option {', '.join(unknown)}; it has {', '.join([*parameters, *common])}")
    missing = [key for key, parameter in parameters.items() if parameter.default is parameter.empty and key not in options]
    if missing:
        raise RetrieverError(f"retriever {name!r} needs the option {', '.join(missing)}")
    hints = get_type_hints(make)
    for key, value in options.items():
        if not _fits(value, hints[key]):
            raise RetrieverError(f"option {key!r} of retriever {name!r} must be {_said(hints[key])}, got {value!r:.200}")


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items())
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(_fits(one, arguments[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | os.PathLike)
    return isinstance(value, origin or hint)


def _said(hint: Any) -> str:
    """The type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_said, arguments)))
    if origin is not None and issubclass(origin, Mapping):
        return "a mapping"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list (each {_said(arguments[0])})"
    words = {types.NoneType: "null", None: "null", str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
