"""The tree codec: nested Python state as tagged JSON, and back, over a closed set of types.

The JSON forms are those of docs/format.md, section 3. Types are matched exactly: a subclass of a
stored type is refused, because it would come back as something else. What comes back equals what
went in, in type and in bits, with these exceptions:

- a Parameter comes back as a plain tensor, and a lazily conjugated or negated one with its values
  worked out; `requires_grad` and attributes, such as the `_metadata` of a module's state dict, are
  not kept;
- a list, dict or other container that is held twice comes back as two;
- `fold` of a datetime or time is not kept, and a time zone may only be a `datetime.timezone`
  without a name of its own;
- NumPy's `longlong` comes back as the integer type of the same width.

Refused, although near to the set: strings with unpaired surrogates (JSON joins two of them to
another string), integers of more than 4300 digits (Python does not print them), pure paths (only
`pathlib.Path` is stored, with `/` between its parts), flags that combine several members, enums
that are not found by their qualified name, floats of extended precision (their bits differ between
machines), and tensors, arrays or generators in a set.
"""

from __future__ import annotations

import datetime
import math
import pathlib
import re
import struct
import sys
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from enum import Enum
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from pysnap.errors import CorruptError, MismatchError, StateError
from pysnap.paths import (
    MAX_DEPTH,
    Json,
    Names,
    base64_of,
    bytes_of,
    corrupt,
    covers,
    float_of,
    index_of,
    is_unicode,
    join,
    leaves,
    list_of,
    pairs_of,
    prune,
    quoted,
    tag_of,
    text_of,
)

__all__ = ["MAX_DEPTH", "Json", "covers", "decode", "encode", "join", "leaves", "prune"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_In = TypeVar("_In")
_Out = TypeVar("_Out")

# An integer of so many bits has at most 4300 digits, Python's limit for reading and printing.
_MAX_INT_BITS = 14284
# The `dtype.str` of a scalar: order of bytes, kind, size and unit of time.
_SCALAR = re.compile(r"[<|][biufcmMSU][0-9]{0,9}(\[[0-9]{0,9}[A-Za-z]{1,2}\])?")


def encode(value: object, put: Callable[[str, torch.Tensor | Array], int]) -> Json:
    """`value` as JSON.

    `put` gets path and value of every tensor and array, in order, and returns its index; paths are
    unique, as `leaves` says. A tensor that is held twice is put twice, under two paths. Raises
    `StateError` for whatever is outside the closed set.
    """
    return _Encoder(put).node(value)


def decode(node: Json, get: Callable[[int], torch.Tensor | Array]) -> object:
    """The value that `encode` turned into `node`; `get` returns the tensor or array of an index.

    Trusts nothing and imports nothing. Raises `CorruptError` where `node` is not what `encode`
    writes or `get` raises a `LookupError`, and `MismatchError` where `node` names an enum, a dtype
    or a device that this process does not have.
    """
    return _Decoder(get).node(node)


def _is_portable(dtype: np.dtype[Any]) -> bool:
    """Whether `dtype.str` says everything about `dtype`, on every machine."""
    if dtype.kind not in "biufcmMSUV" or np.dtype(dtype.str) != dtype:
        return False
    return dtype.itemsize <= {"f": 8, "c": 16}.get(dtype.kind, sys.maxsize)


def _find_enum(module: str, qualname: str) -> type[Enum] | None:
    """The enum class of that name, if its module is loaded; a lazy module is not made to load."""
    found: object = sys.modules.get(module)
    if not isinstance(found, types.ModuleType):
        return None
    names = types.ModuleType.__getattribute__(found, "__dict__")
    for name in qualname.split("."):
        found = names.get(name)
        if not isinstance(found, type):
            return None
        names = vars(found)
    return found if isinstance(found, type) and issubclass(found, Enum) else None


class _Encoder:
    """One run of `encode`: a method for each type of the closed set."""

    def __init__(self, put: Callable[[str, torch.Tensor | Array], int]) -> None:
        self._put = put
        self._names = Names()
        self._open: list[object] = []  # the containers around the value at hand, outermost first
        self._trail: list[object] = []  # its key in each of them
        self._around = ""  # the path of the innermost
        self._sets = 0  # how many of them are sets

    def node(self, value: object) -> Json:
        encoder = _ENCODERS.get(type(value))
        if encoder is not None:
            return encoder(self, value)
        if isinstance(value, Enum):
            return self._enum(value)
        if isinstance(value, np.generic):
            return self._scalar(value)
        raise self._refused(f"a {type(value).__name__}", _advice(value))

    def _same(self, value: bool | None) -> Json:
        return value

    def _int(self, value: int) -> Json:
        if value.bit_length() > _MAX_INT_BITS:
            raise self._refused("an int of more than 4300 digits", "store it as bytes")
        return value

    def _float(self, value: float) -> Json:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}

    def _str(self, value: str) -> str:
        if not is_unicode(value):
            raise self._refused(
                "a str with unpaired surrogates", "store it as bytes (a file name: os.fsencode)"
            )
        return value

    def _bytes(self, value: bytes) -> Json:
        return {"$bytes": base64_of(value)}

    def _list(self, value: list[object]) -> Json:
        return self._children(value, range(len(value)), value)

    def _tuple(self, value: tuple[object, ...]) -> Json:
        return {"$tuple": self._children(value, range(len(value)), value)}

    def _dict(self, value: dict[Any, object]) -> Json:
        if not all(type(key) is str and key[:1] != "$" for key in value):
            return {"$dict": self._pairs(value)}
        names = [self._str(key) for key in value]
        return dict(zip(names, self._children(value, names, value.values()), strict=True))

    def _ordered(self, value: OrderedDict[Any, object]) -> Json:
        return {"$ordered": self._pairs(value)}

    def _counter(self, value: Counter[Any]) -> Json:
        return {"$counter": self._pairs(value)}

    def _set(self, value: set[object] | frozenset[object]) -> Json:
        self._sets += 1
        nodes = self._children(value, range(len(value)), value)
        self._sets -= 1
        return {"$set" if type(value) is set else "$frozenset": nodes}

    def _tensor(self, value: torch.Tensor) -> Json:
        if value.layout is not torch.strided:
            raise self._refused(f"a tensor of layout {value.layout}", "store its .to_dense()")
        if value.is_nested:
            raise self._refused("a nested tensor", "store its .unbind()")
        if value.is_quantized:
            raise self._refused("a quantized tensor", "store its .int_repr(), scale and zero point")
        if value.is_meta:
            raise self._refused(
                "a tensor on the meta device",
                "give it memory first, with .to_empty() of its module",
            )
        if not (value.is_cpu or value.is_cuda):
            raise self._refused(f"a tensor on the device {value.device}", "store its .cpu()")
        return {"$tensor": self._store(value)}

    def _array(self, value: Array) -> Json:
        if not _is_portable(value.dtype) or value.dtype.itemsize == 0:
            raise self._refused(
                f"an array of dtype {value.dtype}",
                "store arrays of plain numbers, times, text or bytes",
            )
        return {"$array": self._store(value)}

    def _scalar(self, value: np.generic) -> Json:
        dtype = value.dtype
        if type(value) is not dtype.type or dtype.kind == "V" or not _is_portable(dtype):
            raise self._refused(f"a {type(value).__name__}", "convert it to a plain number")
        if isinstance(value, np.str_):
            self._str(value)
            data = value.encode("utf-32-le")
        else:
            data = bytes(value) if isinstance(value, np.bytes_) else value.tobytes()
        return {"$scalar": [dtype.str, base64_of(data)]}

    def _dtype(self, value: torch.dtype) -> Json:
        return {"$dtype": str(value).removeprefix("torch.")}

    def _device(self, value: torch.device) -> Json:
        return {"$device": str(value)}

    def _size(self, value: torch.Size) -> Json:
        return {"$size": list(value)}

    def _generator(self, value: torch.Generator) -> Json:
        if self._sets:
            raise self._refused("a Generator in a set", "use a list")
        state = value.get_state().numpy().tobytes()
        return {"$generator": {"device": str(value.device), "state": base64_of(state)}}

    def _datetime(self, value: datetime.datetime) -> Json:
        self._check_zone(value)
        return {"$datetime": value.isoformat()}

    def _date(self, value: datetime.date) -> Json:
        return {"$date": value.isoformat()}

    def _time(self, value: datetime.time) -> Json:
        self._check_zone(value)
        return {"$time": value.isoformat()}

    def _timedelta(self, value: datetime.timedelta) -> Json:
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}

    def _path(self, value: pathlib.Path) -> Json:
        return {"$path": self._str(value.as_posix())}

    def _enum(self, value: Enum) -> Json:
        kind = type(value)
        if _find_enum(kind.__module__, kind.__qualname__) is not kind:
            raise self._refused(
                f"a {kind.__name__}",
                "define this enum at the top of a module, where loading can find it",
            )
        if kind.__members__.get(value.name) is not value:
            raise self._refused(f"a {kind.__name__} of several members", "store its .value")
        return {"$enum": [kind.__module__, kind.__qualname__, self._str(value.name)]}

    def _children(
        self, container: object, keys: Iterable[object], values: Iterable[object]
    ) -> list[Json]:
        if len(self._open) == MAX_DEPTH:
            raise self._too_deep(container)
        around = self._around
        self._around = self._here()
        self._open.append(container)
        self._trail.append(None)
        nodes = []
        for key, value in zip(keys, values, strict=True):
            self._trail[-1] = key
            nodes.append(self.node(value))
        self._trail.pop()
        self._open.pop()
        self._around = around
        return nodes

    def _pairs(self, value: dict[Any, Any]) -> list[Json]:
        keys = [self._key(key, len(self._open) + 1) for key in value]
        return [
            [key, node]
            for key, node in zip(keys, self._children(value, value, value.values()), strict=True)
        ]

    def _key(self, key: object, depth: int) -> Json:
        if type(key) is tuple:
            if depth == MAX_DEPTH:
                raise self._too_deep(key)
            return {"$tuple": [self._key(item, depth + 1) for item in key]}
        if type(key) in _PLAIN_KEYS or isinstance(key, Enum):
            return self.node(key)
        what = f"a dict that has a {type(key).__name__} as key"
        raise self._refused(
            what, "use None, bool, int, float, str, bytes, enum members, or tuples of them"
        )

    def _store(self, value: torch.Tensor | Array) -> int:
        if self._sets:
            raise self._refused(f"a {type(value).__name__} in a set", "use a list")
        return self._put(self._names.unique(self._here()), value)

    def _check_zone(self, value: datetime.datetime | datetime.time) -> None:
        zone = value.tzinfo
        if zone is None:
            return
        offset = zone.utcoffset(None) if type(zone) is datetime.timezone else None
        # fromisoformat() drops an offset of microseconds, and a name is not in the text at all.
        if (
            offset is None
            or offset.microseconds
            or zone.tzname(None) != datetime.timezone(offset).tzname(None)
        ):
            what = f"a {type(value).__name__} with the time zone {zone}"
            raise self._refused(what, "convert it to UTC, with .astimezone(datetime.timezone.utc)")

    def _here(self) -> str:
        return join(self._around, self._trail[-1]) if self._trail else ""

    def _too_deep(self, container: object) -> StateError:
        if any(outer is container for outer in self._open):
            return self._refused(
                f"a {type(container).__name__} that contains itself", "break the cycle"
            )
        return self._refused(f"what is nested deeper than {MAX_DEPTH}", "flatten the state")

    def _refused(self, what: str, advice: str) -> StateError:
        return StateError(f"cannot store {what} at {quoted(self._here())}; {advice}")


_PLAIN_KEYS = frozenset({type(None), bool, int, float, str, bytes})

_ENCODERS: dict[type, Callable[[_Encoder, Any], Json]] = {
    type(None): _Encoder._same,
    bool: _Encoder._same,
    int: _Encoder._int,
    float: _Encoder._float,
    str: _Encoder._str,
    bytes: _Encoder._bytes,
    list: _Encoder._list,
    torch.Size: _Encoder._size,
    tuple: _Encoder._tuple,
    OrderedDict: _Encoder._ordered,
    Counter: _Encoder._counter,
    dict: _Encoder._dict,
    set: _Encoder._set,
    frozenset: _Encoder._set,
    torch.Tensor: _Encoder._tensor,
    torch.nn.Parameter: _Encoder._tensor,
    np.ndarray: _Encoder._array,
    torch.dtype: _Encoder._dtype,
    torch.device: _Encoder._device,
    torch.Generator: _Encoder._generator,
    datetime.datetime: _Encoder._datetime,
    datetime.date: _Encoder._date,
    datetime.time: _Encoder._time,
    datetime.timedelta: _Encoder._timedelta,
    type(pathlib.Path()): _Encoder._path,
}


def _advice(value: object) -> str:
    if isinstance(value, complex):
        return "store it as numpy.complex128(value)"
    if isinstance(value, pathlib.PurePath):
        return "store it as a pathlib.Path or a str"
    for kind in _ENCODERS:
        if isinstance(value, kind):
            return f"convert it to a plain {kind.__name__}"
    return "store plain values and tensors, such as a state_dict() returns"


class _Missing(Exception):
    """The tree is sound, but names what this process does not have."""


class _Decoder:
    """One run of `decode`: the containers; values without parts are left to the functions below."""

    def __init__(self, get: Callable[[int], torch.Tensor | Array]) -> None:
        self._get = get
        self._trail: list[object] = []  # the keys in the containers around the node at hand
        self._sets = 0  # how many of these containers are sets

    def node(self, node: Json) -> object:
        if type(node) is list:
            return self._children(range(len(node)), node)
        if type(node) is not dict:
            return self._checked(_decode_plain, node)
        tag = self._checked(tag_of, node)
        if tag is None:
            return dict(zip(node, self._children(node, node.values()), strict=True))
        content = node[tag]
        if tag in ("$tensor", "$array"):
            return self._stored(tag, content)
        if tag == "$tuple":
            items = self._checked(list_of, content)
            return tuple(self._children(range(len(items)), items))
        if tag in ("$set", "$frozenset"):
            return self._set(tag, content)
        if tag in _PAIRS:
            return self._dict(tag, content)
        if tag in _DECODERS:
            return self._checked(_DECODERS[tag], content)
        raise self._corrupt(f"unknown tag {quoted(tag)}")

    def _children(self, keys: Iterable[object], nodes: Iterable[Json]) -> list[object]:
        if len(self._trail) == MAX_DEPTH:
            raise self._corrupt(f"it is nested deeper than {MAX_DEPTH}")
        self._trail.append(None)
        values = []
        for key, node in zip(keys, nodes, strict=True):
            self._trail[-1] = key
            values.append(self.node(node))
        self._trail.pop()
        return values

    def _stored(self, tag: str, content: Json) -> torch.Tensor | Array:
        index = self._checked(index_of, content)
        if self._sets:
            raise self._corrupt(f"a {tag} in a set")
        try:
            value = self._get(index)
        except LookupError as error:
            raise self._corrupt(f"{tag} {index} does not exist") from error
        if not isinstance(value, torch.Tensor if tag == "$tensor" else np.ndarray):
            raise self._corrupt(f"{tag} {index} is a {type(value).__name__}")
        return value

    def _set(self, tag: str, content: Json) -> set[object] | frozenset[object]:
        items = self._checked(list_of, content)
        self._sets += 1
        values = self._children(range(len(items)), items)
        self._sets -= 1
        try:
            decoded = frozenset(values) if tag == "$frozenset" else set(values)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise self._corrupt(f"a {tag} has an unhashable element") from error
        if len(decoded) != len(values):
            raise self._corrupt(f"a {tag} has an element twice")
        return decoded

    def _dict(self, tag: str, content: Json) -> dict[Any, object]:
        pairs = self._checked(pairs_of, content)
        keys = [self._key(key, len(self._trail) + 1) for key, _ in pairs]
        values = self._children(keys, [value for _, value in pairs])
        decoded = dict(zip(keys, values, strict=True))
        if len(decoded) != len(keys):
            raise self._corrupt(f"a {tag} has a key twice")
        return _PAIRS[tag](decoded)

    def _key(self, node: Json, depth: int) -> Hashable:
        if type(node) is list:
            raise self._corrupt("a list cannot be a key")
        if type(node) is not dict:
            return self._checked(_decode_plain, node)
        tag = self._checked(tag_of, node)
        if tag == "$tuple":
            if depth == MAX_DEPTH:
                raise self._corrupt(f"it is nested deeper than {MAX_DEPTH}")
            return tuple(self._key(item, depth + 1) for item in self._checked(list_of, node[tag]))
        if tag in ("$float", "$bytes", "$enum"):
            key: Hashable = self._checked(_DECODERS[tag], node[tag])
            return key
        raise self._corrupt(f"a {'dict' if tag is None else tag} cannot be a key")

    def _checked(self, decoder: Callable[[_In], _Out], content: _In) -> _Out:
        try:
            return decoder(content)
        except _Missing as error:
            raise MismatchError(f"cannot restore {quoted(self._here())}: {error}") from error
        except (ValueError, TypeError, OverflowError) as error:
            raise self._corrupt(str(error)) from error

    def _here(self) -> str:
        path = ""
        for key in self._trail:
            path = join(path, key)
        return path

    def _corrupt(self, what: str) -> CorruptError:
        return corrupt(self._here(), what)


def _integers(content: Json) -> list[int]:
    integers = []
    for value in list_of(content):
        if type(value) is not int or not -(2**63) <= value < 2**63:
            raise ValueError("an element is not an integer, or too large")
        integers.append(value)
    return integers


def _decode_plain(content: Json) -> bool | int | float | str | None:
    if content is None or type(content) is bool:
        return content
    if type(content) is int and content.bit_length() <= _MAX_INT_BITS:
        return content
    if type(content) is float and math.isfinite(content):
        return content
    if type(content) is str and is_unicode(content):
        return content
    raise ValueError(f"no {type(content).__name__} of this kind can be stored")


def _decode_scalar(content: Json) -> np.generic:
    match content:
        case [str(name), str(text)] if re.fullmatch(_SCALAR, name):
            data = bytes_of(text)
            dtype = np.dtype(name)
        case _:
            raise ValueError("$scalar is not a plain dtype and bytes")
    if dtype.str != name or not _is_portable(dtype) or dtype.itemsize != len(data):
        raise ValueError(f"$scalar is not {len(data)} bytes of a plain dtype")
    scalar: np.generic
    if dtype.kind == "U":
        scalar = np.str_(data.decode("utf-32-le"))
    elif dtype.kind == "S":
        scalar = np.bytes_(data)
    elif dtype.kind == "b" and data not in (b"\0", b"\1"):
        raise ValueError("$scalar is no bool")
    else:
        scalar = np.frombuffer(data, dtype)[0]
    return scalar


def _decode_dtype(content: Json) -> torch.dtype:
    name = text_of(content)
    dtype = vars(torch).get(name)
    if isinstance(dtype, torch.dtype) and str(dtype) == f"torch.{name}":
        return dtype
    raise _Missing(
        f"there is no dtype {quoted(name)}; use the version of torch that took the snapshot"
    )


def _decode_device(content: Json) -> torch.device:
    name = text_of(content)
    if not re.fullmatch("[a-z]+(:(0|[1-9][0-9]*))?", name):
        raise ValueError("$device is not a device")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _Missing(
            f"there is no device {quoted(name)}; use the version of torch that took the snapshot"
        ) from error
    if str(device) != name:
        raise ValueError("$device is not a device")
    return device


def _decode_size(content: Json) -> torch.Size:
    return torch.Size(_integers(content))


def _decode_generator(content: Json) -> torch.Generator:
    match content:
        case {"device": str(name), "state": str(text), **others} if not others:
            state = np.frombuffer(bytearray(bytes_of(text)), np.uint8)
        case _:
            raise ValueError("$generator is not a device and a state")
    try:
        generator = torch.Generator(_decode_device(name))
    except RuntimeError as error:
        raise _Missing(
            f"the device {quoted(name)} is not usable here; load on a machine that has it"
        ) from error
    try:
        generator.set_state(torch.from_numpy(state))
    except RuntimeError as error:
        raise ValueError("$generator has no valid state") from error
    return generator


def _decode_datetime(content: Json) -> datetime.datetime:
    value = datetime.datetime.fromisoformat(text_of(content))
    if value.isoformat() != content:
        raise ValueError("$datetime is not in its canonical form")
    return value


def _decode_date(content: Json) -> datetime.date:
    value = datetime.date.fromisoformat(text_of(content))
    if value.isoformat() != content:
        raise ValueError("$date is not in its canonical form")
    return value


def _decode_time(content: Json) -> datetime.time:
    value = datetime.time.fromisoformat(text_of(content))
    if value.isoformat() != content:
        raise ValueError("$time is not in its canonical form")
    return value


def _decode_timedelta(content: Json) -> datetime.timedelta:
    parts = _integers(content)
    if len(parts) == 3:
        value = datetime.timedelta(*parts)
        if [value.days, value.seconds, value.microseconds] == parts:
            return value
    raise ValueError("$timedelta is not days, seconds and microseconds")


def _decode_path(content: Json) -> pathlib.Path:
    return pathlib.Path(text_of(content))


def _decode_enum(content: Json) -> Enum:
    match content:
        case [str(module), str(qualname), str(member)]:
            kind = _find_enum(module, qualname)
        case _:
            raise ValueError("$enum is not a module, a class and a member")
    name = quoted(f"{module}.{qualname}")
    if kind is None:
        raise _Missing(f"{name} is not an enum of a loaded module; import its module first")
    if member not in kind.__members__:
        raise _Missing(f"the enum {name} has no member {quoted(member)}; add it")
    return kind.__members__[member]


_PAIRS: dict[str, Callable[[dict[Any, object]], dict[Any, Any]]] = {
    "$dict": dict,
    "$ordered": OrderedDict,
    "$counter": Counter,
}

_DECODERS: dict[str, Callable[[Json], Any]] = {
    "$float": float_of,
    "$bytes": bytes_of,
    "$scalar": _decode_scalar,
    "$dtype": _decode_dtype,
    "$device": _decode_device,
    "$size": _decode_size,
    "$generator": _decode_generator,
    "$datetime": _decode_datetime,
    "$date": _decode_date,
    "$time": _decode_time,
    "$timedelta": _decode_timedelta,
    "$path": _decode_path,
    "$enum": _decode_enum,
}
