"""A training state as named data sets and one JSON text, in a form that says what it means without this program."""

import base64
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from hpc_train.train.run.checkpoint.shares import UnusableCheckpoint

_DTYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


class Encoded(NamedTuple):
    """tensors: by the names of their data sets. rows: names of what the elements of a data set belong to.

    links: further names of data sets.
    """

    structure: Any
    tensors: dict[str, torch.Tensor]
    rows: dict[str, list[str]]
    links: dict[str, str]


def encode(state: dict[str, Any]) -> Encoded:
    """`structure` is the nesting with {"tensor": NAME} for each tensor. Raises TypeError for what no JSON holds.

    The optimizer's tensors are named by what they are, then by parameter: `optimizer/exp_avg/0.weight`. Its numbers of
    one kind, such as every parameter's count of steps, are one vector. A tensor that the state holds twice, such as a
    tied embedding, is one data set with two names.
    """
    tensors: dict[str, torch.Tensor] = {}
    links: dict[str, str] = {}
    first_name: dict[int, str] = {}
    vectors = _vectors(state.get("optimizer"))

    def named(parts: tuple[Any, ...], tensor: torch.Tensor) -> dict[str, Any]:
        if parts[0] == "optimizer" and len(parts) == 3:
            _, parameter, key = parts
            if key in vectors:
                return {"tensor": f"optimizer/{_segment(key)}", "index": vectors[key].index(parameter)}
            parts = ("optimizer", key, parameter)
        name = data_set_name(*parts)
        if name in tensors or name in links:
            raise TypeError(f"two keys of the state are both written as {name}")
        if id(tensor) in first_name:
            links[name] = first_name[id(tensor)]
            return {"tensor": links[name]}
        first_name[id(tensor)] = name
        tensors[name] = _plain(tensor, name)
        return {"tensor": name}

    structure = _encoded(state, (), named)
    rows = {}
    for key, parameters in vectors.items():
        name = f"optimizer/{_segment(key)}"
        tensors[name] = torch.stack([_plain(state["optimizer"][each][key], name) for each in parameters])
        rows[name] = [str(each) for each in parameters]
    return Encoded(structure, tensors, rows, links)


def _vectors(optimizer: Any) -> dict[str, list[Any]]:
    """Keys under which every parameter that has one keeps a single number of the same dtype, with these parameters."""
    found: dict[str, list[Any]] = {}
    kinds: dict[str, set[Any]] = {}
    for parameter, kept in optimizer.items() if isinstance(optimizer, dict) else ():
        for key, value in kept.items() if isinstance(kept, dict) else ():
            found.setdefault(key, []).append(parameter)
            is_number = isinstance(value, torch.Tensor) and value.ndim == 0 and value.layout == torch.strided
            kinds.setdefault(key, set()).add(value.dtype if is_number else None)
    return {key: found[key] for key, kind in kinds.items() if len(kind) == 1 and None not in kind}


def _encoded(value: Any, parts: tuple[Any, ...], named: Callable[[tuple[Any, ...], torch.Tensor], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return named(parts, value)
    if isinstance(value, dict):
        items = {key: _encoded(item, (*parts, key), named) for key, item in value.items()}
        if all(type(key) is str for key in items):
            return {"dict": items}
        return {"items": [[_encoded(key, parts, named), item] for key, item in items.items()]}
    if isinstance(value, list | tuple):
        items_of = [_encoded(item, (*parts, index), named) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items_of}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{'/'.join(map(str, parts))} is of type {type(value).__name__}, which no checkpoint holds")


def decode(structure: Any, tensor: Callable[[str], Any], number: Callable[[str, int], Any]) -> Any:
    """The state of a structure. tensor: by name of a data set. number: by name of a vector and index in it.

    Raises `UnusableCheckpoint`.
    """

    def decoded(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        match node:
            case {"tensor": str(name), "index": int(index)}:
                return number(name, index)
            case {"tensor": str(name)}:
                return tensor(name)
            case {"dict": dict(items)}:
                return {key: decoded(item) for key, item in items.items()}
            case {"items": list(pairs)}:
                return {decoded(key): decoded(item) for key, item in pairs}
            case {"list": list(members)}:
                return [decoded(item) for item in members]
            case {"tuple": list(members)}:
                return tuple(decoded(item) for item in members)
            case {"bytes": str(text)}:
                return base64.b64decode(text)
        raise UnusableCheckpoint(f"its structure holds {node!s:.60}")

    return decoded(structure)


def data_set_name(*keys: Any) -> str:
    """Where a tensor under these keys of the state lies: ("model", "0.weight") in model/0.weight."""
    return "/".join(map(_segment, keys))


def _segment(key: Any) -> str:
    """A key as one part of an HDF5 path: dots stay, what HDF5 takes for itself is written as in a URL."""
    text = str(key).replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return {"": "%", ".": "%2E"}.get(text, text)


def _plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{name} is no plain tensor")
    return tensor.detach() if tensor.is_meta else tensor.detach().cpu().contiguous()


# ------------------------------------------------------------------------------------------------ dtypes


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stored_dtype(name: str) -> tuple[torch.dtype, np.dtype[Any]]:
    """(torch's, the file's) dtype of this name. What HDF5 does not know, such as bfloat16, is stored as integers.

    Raises `UnusableCheckpoint` if torch has none of this name.
    """
    if name not in _DTYPES:
        raise UnusableCheckpoint(f"dtype {name!r:.40} is unknown")
    dtype = _DTYPES[name]
    try:
        return dtype, torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        return dtype, np.dtype(f"u{dtype.itemsize}")
