"""What is wrong with a manifest, by the types of Kubernetes' own API, as the package lightkube has them from its
OpenAPI description. An unknown key is wrong, as are a missing one and one of another type.
"""

import types
from datetime import datetime
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def problems(value: Any, kind: Any, where: str = "") -> list[str]:
    """One line for each thing that is wrong with `value`, which is to be of type `kind`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        found = [problems(value, one, where) for one in inner if one is not types.NoneType]
        return min(found, key=len)
    if origin is Literal:
        return [] if value in inner else [f"{where}: {value!r} is none of {inner}"]
    if kind is Any:
        return []
    if origin is list or kind is list:
        return _of_list(value, inner[0], where)
    if origin is dict or kind is dict:
        return _of_dict(value, inner[1] if inner else str | int, where)
    if kind in (str, int, float, bool, datetime):
        is_right = type(value) is kind or (kind is float and type(value) is int)
        return [] if is_right else [f"{where}: {value!r} is no {kind.__name__}"]
    return _of_object(value, kind, where)


def _of_list(value: Any, kind: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        return [f"{where}: {value!r} is no list"]
    return [line for index, item in enumerate(value) for line in problems(item, kind, f"{where}[{index}]")]


def _of_dict(value: Any, kind: Any, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no mapping"]
    return [line for key, item in value.items() for line in problems(item, kind, f"{where}.{key}")]


def _of_object(value: Any, kind: Any, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no mapping"]
    # Names that are Python's own, such as `from`, end in an underscore there.
    fields = {name.rstrip("_"): hint for name, hint in get_type_hints(kind).items() if not name.startswith("_")}
    found = [f"{where}: there is no {key!r} in {kind.__name__}" for key in value if key not in fields]
    for name, hint in fields.items():
        if name in value:
            found += problems(value[name], hint, f"{where}.{name}")
        elif types.NoneType not in get_args(hint):
            found.append(f"{where}: {name!r} is missing in {kind.__name__}")
    return found
