"""The tree codec: what is stored comes back in type and bits, and everything else is refused."""

from __future__ import annotations

import contextlib
import datetime
import enum
import functools
import importlib.util
import json
import math
import pathlib
import string
import struct
import sys
import types
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pysnap import paths, tree
from pysnap.errors import CorruptError, MismatchError, NotFoundError, StateError

# What torch says of its rarer dtypes and layouts.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}:UserWarning")
    for text in ("ComplexHalf", "torch.quantize", "The PyTorch API of nested tensors")
]


class Color(enum.Enum):
    RED = 1
    GREEN = "green"
    CRIMSON = 1


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Outer:
    class Inner(enum.Enum):
        ONLY = (1, 2)


class Store:
    """A table of tensors and arrays, as a layout keeps it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.values: list[Any] = []

    def put(self, path: str, value: Any) -> int:
        self.paths.append(path)
        self.values.append(value)
        return len(self.values) - 1

    def get(self, index: int) -> Any:
        return self.values[index]


def encoded(value: object) -> tree.Json:
    return tree.encode(value, Store().put)


def decoded(node: Any) -> object:
    def get(index: int) -> torch.Tensor:
        raise IndexError(index)

    return tree.decode(node, get)


def round_trip(value: object) -> object:
    store = Store()
    text = json.dumps(tree.encode(value, store.put), allow_nan=False)
    return tree.decode(json.loads(text), store.get)


def identity(value: Any) -> object:
    """Something that is equal for two values if and only if they agree in type and in bits."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return "tensor", value.dtype, tuple(value.shape), data
    if isinstance(value, np.ndarray):
        return kind, value.dtype, value.shape, value.tobytes()
    if isinstance(value, np.generic):
        return kind, value.dtype, value.tobytes()
    if type(value) is float:
        return kind, struct.pack(">d", value)
    if isinstance(value, torch.Generator):
        return kind, str(value.device), identity(value.get_state())
    if isinstance(value, dict):
        return kind, [(identity(key), identity(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return kind, [identity(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(repr(identity(item)) for item in value)
    if isinstance(value, (datetime.datetime, datetime.time)):
        return kind, value, repr(value.tzinfo)
    return kind, value


TENSOR_DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype) and "q" not in str(d)}, key=str
)
ARRAY_DTYPES = [
    *("|b1", "|i1", "|u1", "<i2", ">i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", ">f4"),
    *("<f8", "<c8", "<c16", "<M8[ns]", "<M8[25s]", "<m8[us]", "|S3", "<U2", "|V5"),
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(TENSOR_DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    if not data:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)
    if dtype.is_floating_point and dtype.itemsize > 1 and draw(st.booleans()):
        return torch.nn.Parameter(tensor)
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, np.dtype[Any]]:
    dtype = np.dtype(draw(st.sampled_from(ARRAY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = math.prod(shape) * dtype.itemsize
    data = bytes(byte & 1 for byte in draw(st.binary(min_size=size, max_size=size)))
    array: np.ndarray[Any, np.dtype[Any]] = np.ndarray(shape, dtype, data)
    return array


@st.composite
def scalars(draw: st.DrawFn) -> np.generic:
    dtype = np.dtype(draw(st.sampled_from([d for d in ARRAY_DTYPES if d[1] not in "SUV"])))
    data = draw(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize))
    if dtype.kind == "b":
        data = bytes([data[0] & 1])
    scalar: np.generic = np.frombuffer(data, dtype)[0]
    return scalar


def has_hash(value: object) -> bool:
    """From NumPy 2.5 on, times far away in a coarse unit have none."""
    try:
        hash(value)
    except OverflowError:
        return False
    return True


def generators(seed: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(seed)
    return generator


UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLOATS = st.one_of(
    st.floats(),
    st.binary(min_size=8, max_size=8).map(lambda data: struct.unpack("<d", data)[0]),
    st.sampled_from([-0.0, math.inf, -math.inf, 5e-324, 1e16]),
)
INTS = st.integers() | st.integers(-(2**700), 2**700)
ENUMS = st.sampled_from([*Color, *Level, *Access, *Outer.Inner])
ZONES = st.none() | st.integers(-86399, 86399).map(
    lambda seconds: datetime.timezone(datetime.timedelta(seconds=seconds))
)
PATHS = st.lists(st.text(string.ascii_letters + ". ~$é", min_size=1), max_size=3).map(
    lambda parts: pathlib.Path(*parts)
)
PLAIN_KEYS = st.none() | st.booleans() | INTS | FLOATS | UNICODE | st.binary(max_size=9) | ENUMS
KEYS = st.recursive(PLAIN_KEYS, lambda keys: st.lists(keys, max_size=3).map(tuple), max_leaves=4)
HASHABLE = st.one_of(
    KEYS,
    scalars().filter(has_hash),
    UNICODE.map(np.str_),
    st.binary(max_size=5).map(np.bytes_),
    st.sampled_from(TENSOR_DTYPES),
    st.sampled_from(["cpu", "meta", "cuda", "cuda:0", "cuda:7"]).map(torch.device),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(torch.Size),
    st.datetimes(timezones=ZONES).map(lambda moment: moment.replace(fold=0)),
    st.dates(),
    st.times(timezones=ZONES).map(lambda moment: moment.replace(fold=0)),
    st.timedeltas(),
    PATHS,
)
LEAVES = st.one_of(HASHABLE, tensors(), arrays(), st.integers(0, 2**64 - 1).map(generators))


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(UNICODE, children, max_size=4),
        st.dictionaries(UNICODE.map("$".__add__), children, max_size=2),
        st.dictionaries(KEYS, children, max_size=4),
        st.dictionaries(KEYS, children, max_size=4).map(OrderedDict),
        st.dictionaries(KEYS, children, max_size=4).map(Counter),
        st.sets(HASHABLE, max_size=4),
        st.frozensets(HASHABLE, max_size=4),
    )


STATES = st.recursive(LEAVES, containers, max_leaves=15)


@st.composite
def states(draw: st.DrawFn) -> object:
    """One of STATES, under a name that is short enough for hypothesis to print."""
    return draw(STATES)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(states())
def test_every_state_comes_back_in_type_and_bits(state: object) -> None:
    assert identity(round_trip(state)) == identity(state)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(states())
def test_leaves_repeat_the_unique_paths_of_put(state: object) -> None:
    store = Store()
    node = tree.encode(state, store.put)
    assert list(tree.leaves(node)) == list(zip(store.paths, range(len(store.paths)), strict=True))
    assert len(set(store.paths)) == len(store.paths)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["a", *tree._DECODERS, *tree._PAIRS, "$tuple", "$set", "$frozenset", "$tensor"]
            ),
            children,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(JSON_VALUES)
def test_decode_of_any_json_returns_or_raises_its_own_errors(node: Any) -> None:
    try:
        value = decoded(node)
    except (CorruptError, MismatchError):
        return
    assert identity(decoded(encoded(value))) == identity(value)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(JSON_VALUES)
def test_leaves_of_any_json_returns_or_raises_its_own_error(node: Any) -> None:
    try:
        for path, index in tree.leaves(node):
            assert isinstance(path, str)
            assert index >= 0
    except CorruptError:
        pass


# What is written: the forms of docs/format.md, section 3.

FORMS: dict[str, tuple[object, str]] = {
    "none": (None, "null"),
    "bool": ([True, False], "[true, false]"),
    "int": (-(2**70), "-1180591620717411303424"),
    "float": ([1.0, -0.0, 1e16, 0.1], "[1.0, -0.0, 1e+16, 0.1]"),
    "nan": (math.nan, '{"$float": "7ff8000000000000"}'),
    "infinity": (-math.inf, '{"$float": "fff0000000000000"}'),
    "str": ("é", '"\\u00e9"'),
    "bytes": (b"\0ab", '{"$bytes": "AGFi"}'),
    "tuple": ((1, (2,)), '{"$tuple": [1, {"$tuple": [2]}]}'),
    "set": ({3}, '{"$set": [3]}'),
    "frozenset": (frozenset({3}), '{"$frozenset": [3]}'),
    "dict": ({"b": 1, "a": 2, "": 3}, '{"b": 1, "a": 2, "": 3}'),
    "dict with other keys": (
        {1: "a", None: 2, (b"", "x"): 3},
        '{"$dict": [[1, "a"], [null, 2], [{"$tuple": [{"$bytes": ""}, "x"]}, 3]]}',
    ),
    "dict with a dollar": ({"$tensor": 0}, '{"$dict": [["$tensor", 0]]}'),
    "OrderedDict": (OrderedDict(b=1, a=2), '{"$ordered": [["b", 1], ["a", 2]]}'),
    "Counter": (Counter("aab"), '{"$counter": [["a", 2], ["b", 1]]}'),
    "NumPy scalar": (np.float64(1), '{"$scalar": ["<f8", "AAAAAAAA8D8="]}'),
    "NumPy time without a unit": (
        np.array([1]).view("m8")[0],
        '{"$scalar": ["<m8", "AQAAAAAAAAA="]}',
    ),
    "NumPy str": (np.str_("a"), '{"$scalar": ["<U1", "YQAAAA=="]}'),
    "dtype": (torch.bfloat16, '{"$dtype": "bfloat16"}'),
    "device": (torch.device("cuda", 0), '{"$device": "cuda:0"}'),
    "size": (torch.Size([2, 3]), '{"$size": [2, 3]}'),
    "datetime": (
        datetime.datetime(2025, 1, 2, 3, 4, 5, 6, datetime.timezone.utc),
        '{"$datetime": "2025-01-02T03:04:05.000006+00:00"}',
    ),
    "date": (datetime.date(2025, 1, 2), '{"$date": "2025-01-02"}'),
    "time": (datetime.time(1, 2), '{"$time": "01:02:00"}'),
    "timedelta": (datetime.timedelta(seconds=-1), '{"$timedelta": [-1, 86399, 0]}'),
    "path": (pathlib.Path("runs", "a"), '{"$path": "runs/a"}'),
    "enum": (Outer.Inner.ONLY, f'{{"$enum": ["{__name__}", "Outer.Inner", "ONLY"]}}'),
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str) -> None:
    value, text = FORMS[name]
    assert json.dumps(encoded(value), allow_nan=False) == text
    assert identity(decoded(json.loads(text))) == identity(value)


def test_tensors_arrays_and_parameters_are_references() -> None:
    store = Store()
    tensor, array = torch.ones(2), np.ones(3)
    state = {"a": tensor, "b": [array, torch.nn.Parameter(tensor)], "c": tensor}
    node = tree.encode(state, store.put)
    expected = {"a": {"$tensor": 0}, "b": [{"$array": 1}, {"$tensor": 2}], "c": {"$tensor": 3}}
    assert node == expected
    assert store.paths == ["a", "b/0", "b/1", "c"]


def test_generator_goes_on_where_it_was() -> None:
    generator = torch.Generator()
    generator.manual_seed(7)
    torch.rand(5, generator=generator)
    restored = round_trip({"generator": generator})
    assert isinstance(restored, dict)
    expected = torch.rand(9, generator=generator)
    assert torch.equal(torch.rand(9, generator=restored["generator"]), expected)


def test_nan_keeps_its_payload_and_sign() -> None:
    for bits in (0x7FF8000000000001, 0xFFF8DEADBEEF0001, 0x7FF0000000000001):
        value = struct.unpack(">d", bits.to_bytes(8, "big"))[0]
        assert identity(round_trip(value)) == ("float", bits.to_bytes(8, "big"))


def test_strings_of_numpy_keep_trailing_zeros() -> None:
    for value in (np.str_("a\0"), np.bytes_(b"a\0"), np.str_(""), np.bytes_(b"")):
        assert identity(round_trip(value)) == identity(value)
        assert type(round_trip(value)) is type(value)


def test_an_alias_of_an_enum_comes_back_as_its_member() -> None:
    assert round_trip(Color.CRIMSON) is Color.RED


def test_the_longest_int_comes_back() -> None:
    longest = 2**tree._MAX_INT_BITS - 1
    assert len(str(longest)) == 4300
    assert round_trip([longest, -longest]) == [longest, -longest]


def test_order_of_keys_is_kept() -> None:
    keys = [f"k{number * 7919 % 1000}" for number in range(1000)]
    restored = round_trip(dict.fromkeys(keys))
    assert isinstance(restored, dict)
    assert list(restored) == keys


def nested(depth: int, wrap: Callable[[object], object]) -> object:
    value: object = None
    for _ in range(depth):
        value = wrap(value)
    return value


WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda value: [value],
    "tuple": lambda value: (value,),
    "dict": lambda value: {"a": value},
    "dict with other keys": lambda value: {0: value},
    "OrderedDict": lambda value: OrderedDict(a=value),
    "frozenset": lambda value: frozenset({value}),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_nesting_of_64_is_stored_and_65_is_refused(wrap: str) -> None:
    deepest = nested(64, WRAPS[wrap])
    assert round_trip(deepest) == deepest
    with pytest.raises(StateError, match=r"nested deeper than 64 at .*; flatten the state"):
        encoded(nested(65, WRAPS[wrap]))


def test_nesting_in_a_key_counts() -> None:
    deepest: object = {nested(63, WRAPS["tuple"]): 0}
    assert round_trip(deepest) == deepest
    with pytest.raises(StateError, match="nested deeper than 64"):
        encoded({nested(64, WRAPS["tuple"]): 0})


def test_a_container_held_twice_is_no_cycle() -> None:
    shared = [1]
    assert round_trip([shared, shared, {"a": shared}]) == [[1], [1], {"a": [1]}]


# Paths.


def test_join() -> None:
    path = functools.reduce(tree.join, ["optimizer", "state", 0, "exp_avg"], "")
    assert path == "optimizer/state/0/exp_avg"


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (None, "None"),
        (True, "True"),
        (-3, "-3"),
        (1.5, "1.5"),
        (math.nan, "nan"),
        ("a b", "a b"),
        (b"\0", r"b'\x00'"),
        (Color.RED, "Color.RED"),
        (Level.LOW, "Level.LOW"),
        (Outer.Inner.ONLY, "Outer.Inner.ONLY"),
        ((1, ("a", Color.RED)), "(1, (a, Color.RED))"),
    ],
)
def test_part_of_a_path(key: object, part: str) -> None:
    assert tree.join("", key) == part
    store = Store()
    node = tree.encode({"x": {key: torch.ones(1)}}, store.put)
    assert store.paths == [f"x/{part}"]
    assert [path for path, _ in tree.leaves(node)] == [f"x/{part}"]


def test_paths_that_read_the_same_get_a_number() -> None:
    one = torch.ones(1)
    store = Store()
    state = {"a": {0: one, "0": one, "0#2": one}, "a/0": one, "": {"a/0": one}}
    node = tree.encode(state, store.put)
    assert store.paths == ["a/0", "a/0#2", "a/0#2#2", "a/0#3", "a/0#4"]
    assert [path for path, _ in tree.leaves(node)] == store.paths


# Parts of a tree.

PRUNED_STATE: dict[Any, Any] = {
    "model": {"encoder.weight": np.ones(1), "encoder.bias": np.ones(2), "encoders": np.ones(3)},
    "optimizer": OrderedDict(
        state={0: {"step": 3, "exp_avg": np.ones(4)}, 1: {"step": 4, "exp_avg": np.ones(5)}},
        param_groups=[{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}],
    ),
    "progress": {"step": 7},
    "pair": ({"a": 1}, {"b": {2}}),
    "empty": {},
    ("key", Color.RED): Counter(a=1, b=2),
}
MODEL = PRUNED_STATE["model"]
OPTIMIZER = PRUNED_STATE["optimizer"]

PRUNED: dict[str, tuple[list[str], object]] = {
    "a part": (["model"], {"model": MODEL}),
    "the root": ([""], PRUNED_STATE),
    "a tensor": (["model/encoders"], {"model": {"encoders": MODEL["encoders"]}}),
    "up to a dot": (
        ["model/encoder"],
        {"model": {key: MODEL[key] for key in ("encoder.weight", "encoder.bias")}},
    ),
    "several, in the order of the tree": (
        ["progress/step", "model/encoders"],
        {"model": {"encoders": MODEL["encoders"]}, "progress": {"step": 7}},
    ),
    "one within another": (["progress/step", "progress"], {"progress": {"step": 7}}),
    "under integer keys": (
        ["optimizer/state/1"],
        {"optimizer": OrderedDict(state={1: OPTIMIZER["state"][1]})},
    ),
    "through a list": (
        ["optimizer/param_groups/1/lr"],
        {"optimizer": OrderedDict(param_groups=OPTIMIZER["param_groups"])},
    ),
    "an element of a list": (
        ["optimizer/param_groups/0"],
        {"optimizer": OrderedDict(param_groups=OPTIMIZER["param_groups"])},
    ),
    "through a tuple": (["pair/0/a"], {"pair": PRUNED_STATE["pair"]}),
    "an empty container": (["empty"], {"empty": {}}),
    "under a tuple as a key": (["(key, Color.RED)/b"], {("key", Color.RED): Counter(b=2)}),
}


@pytest.mark.parametrize("name", PRUNED)
def test_prune(name: str) -> None:
    names, expected = PRUNED[name]
    store = Store()
    node = tree.encode(PRUNED_STATE, store.put)
    before = json.dumps(node)
    assert identity(tree.decode(tree.prune(node, names), store.get)) == identity(expected)
    assert json.dumps(node) == before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["modle"], r'named "modle" \(did you mean "model"\?\); pysnap\.open'),
        (["model/encoder.wieght"], 'did you mean "model/encoder.weight"'),
        (["model", "x", "y"], 'named "x", "y";'),
        (["mode"], 'named "mode" '),
        (["model/encoder.weight/0"], "named"),
        (["pair/2"], 'named "pair/2"'),
        (["pair/1/b/0"], "named"),
        (["model/"], "named"),
        (list("stuvwxyz"), "and 3 more;"),
    ],
)
def test_prune_names_what_selects_nothing(names: list[str], message: str) -> None:
    with pytest.raises(NotFoundError, match=message):
        tree.prune(encoded(PRUNED_STATE), names)


def test_prune_tells_paths_that_read_the_same_apart() -> None:
    state = {"a": {0: np.ones(1), "0": np.ones(2)}, "b": {0: {"x": np.ones(3)}, "0": np.ones(4)}}
    store = Store()
    node = tree.encode(state, store.put)
    assert store.paths == ["a/0", "a/0#2", "b/0/x", "b/0"]
    for index, path in enumerate(store.paths[:3]):
        assert [kept for _, kept in tree.leaves(tree.prune(node, [path]))] == [index]


MAPPINGS = st.recursive(
    st.builds(np.ones, st.just(1)) | st.integers(),
    lambda children: (
        st.dictionaries(KEYS, children, max_size=4)
        | st.dictionaries(UNICODE, children, max_size=4).map(OrderedDict)
    ),
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(states() | MAPPINGS, st.data())
def test_prune_keeps_the_tensors_that_are_selected(state: object, data: st.DataObject) -> None:
    store = Store()
    node = tree.encode(state, store.put)
    if not store.paths:
        return
    names = data.draw(st.sets(st.sampled_from(store.paths), min_size=1))
    pruned = tree.prune(node, names)
    selected = [
        index
        for index, path in enumerate(store.paths)
        if any(tree.covers(name, path) for name in names)
    ]
    kept = [index for _, index in tree.leaves(pruned)]
    assert set(selected) <= set(kept) and kept == sorted(kept)
    tree.decode(pruned, store.get)
    # "" is the path of the root, too.
    if not holds_a_list(state) and "" not in names:
        assert kept == selected


def holds_a_list(state: object) -> bool:
    if isinstance(state, dict):
        return any(map(holds_a_list, state.values()))
    return isinstance(state, (list, tuple))


@given(st.text("ab/."), st.text("ab/."))
def test_prune_selects_what_a_name_covers(name: str, path: str) -> None:
    assert (name in paths._covering(path)) == tree.covers(name, path)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(JSON_VALUES, st.text("a/", max_size=3))
def test_prune_of_any_json_returns_or_raises_its_own_errors(node: Any, name: str) -> None:
    with contextlib.suppress(CorruptError, NotFoundError):
        tree.prune(node, [name])


# What encode refuses.


class Foo:
    pass


class SubDict(dict[str, int]):
    pass


class SubStr(str):
    pass


class SubInt(int):
    pass


class SubFloat64(np.float64):
    pass


class SubTensor(torch.Tensor):
    pass


class SubArray(np.ndarray[Any, np.dtype[Any]]):
    pass


Point = namedtuple("Point", "x y")


def local_enum() -> enum.Enum:
    class Local(enum.Enum):
        ONE = 1

    return Local.ONE


def cycle_of_lists() -> object:
    outer: list[object] = []
    outer.append({"a": (outer,)})
    return outer


class Zone(datetime.tzinfo):
    def utcoffset(self, when: datetime.datetime | None) -> datetime.timedelta:
        return datetime.timedelta(hours=1)

    def dst(self, when: datetime.datetime | None) -> None:
        return None

    def tzname(self, when: datetime.datetime | None) -> str:
        return "zone"


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "object": (Foo, "a Foo at .*; store plain values"),
    "function": (lambda: len, "a builtin_function_or_method at"),
    "module": (lambda: torch.nn.Linear(1, 1), "a Linear at .*state_dict"),
    "complex": (lambda: 1j, r"a complex at .*; store it as numpy\.complex128"),
    "bytearray": (lambda: bytearray(b"a"), "a bytearray at"),
    "range": (lambda: range(3), "a range at"),
    "subclass of dict": (SubDict, "a SubDict at .*; convert it to a plain dict"),
    "defaultdict": (lambda: defaultdict(int), "a defaultdict at .*; convert it to a plain dict"),
    "subclass of str": (lambda: SubStr("a"), "a SubStr at .*; convert it to a plain str"),
    "subclass of int": (lambda: SubInt(1), "a SubInt at .*; convert it to a plain int"),
    "namedtuple": (lambda: Point(1, 2), "a Point at .*; convert it to a plain tuple"),
    "pure path": (lambda: pathlib.PurePosixPath("a"), "a PurePosixPath at .* pathlib.Path"),
    "windows path": (lambda: pathlib.PureWindowsPath("a"), "a PureWindowsPath at .*"),
    "surrogate": (lambda: "a\ud800", "a str with unpaired surrogates at .*; store it as bytes"),
    "surrogate in a path": (lambda: pathlib.Path("\udcff"), "a str with unpaired surrogates"),
    "surrogate in a NumPy str": (lambda: np.str_("\udcff"), "a str with unpaired surrogates"),
    "surrogate in a key": (lambda: {"\udcff": 1}, "a str with unpaired surrogates"),
    "long int": (lambda: 2**tree._MAX_INT_BITS, "an int of more than 4300 digits at"),
    "cycle": (cycle_of_lists, "that contains itself at .*; break the cycle"),
    "enum in a function": (local_enum, "a Local at .*; define this enum at the top"),
    "combined flag": (lambda: Access.READ | Access.WRITE, "several members at .*; store its"),
    "key": (lambda: {Foo(): 1}, "a dict that has a Foo as key at .*; use None, bool"),
    "NumPy key": (lambda: {np.int64(1): 1}, "a dict that has a int64 as key at"),
    "key in a tuple": (lambda: {(1, frozenset()): 1}, "a dict that has a frozenset as key"),
    "subclass as key": (lambda: {SubStr("a"): 1}, "a dict that has a SubStr as key"),
    "tzinfo": (lambda: datetime.time(tzinfo=Zone()), "time zone .*; convert it to UTC"),
    "microseconds of a time zone": (
        lambda: datetime.time(tzinfo=datetime.timezone(datetime.timedelta(microseconds=1))),
        "a time with the time zone",
    ),
    "named time zone": (
        lambda: datetime.datetime(2025, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(), "X")),
        "a datetime with the time zone X",
    ),
    "subclass of Tensor": (lambda: torch.ones(1).as_subclass(SubTensor), "a SubTensor at"),
    "sparse tensor": (lambda: torch.eye(2).to_sparse(), r"layout torch\.sparse_coo at .*to_dense"),
    "quantized tensor": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "a quantized tensor at .*int_repr",
    ),
    "meta tensor": (lambda: torch.empty(2, device="meta"), "the meta device at .*to_empty"),
    "nested tensor": (lambda: torch.nested.nested_tensor([torch.ones(1)]), "a nested tensor at"),
    "tensor in a set": (lambda: {torch.ones(1)}, "a Tensor in a set at .*; use a list"),
    "tensor in a tuple in a set": (lambda: {(torch.ones(1),)}, "a Tensor in a set at"),
    "generator in a set": (lambda: {torch.Generator()}, "a Generator in a set at"),
    "subclass of ndarray": (lambda: np.ones(1).view(SubArray), "a SubArray at .*plain ndarray"),
    "array of objects": (lambda: np.array([None]), "an array of dtype object at"),
    "array with fields": (lambda: np.zeros(2, "f4,i4"), "an array of dtype .*f0.* at"),
    "array of long doubles": (lambda: np.zeros(2, np.longdouble), "an array of dtype float128 at"),
    "array of nothing": (lambda: np.zeros(2, "V0"), "an array of dtype .*V"),
    "NumPy long double": (lambda: np.longdouble(1), "a (longdouble|float128) at"),
    "NumPy void": (lambda: np.void(b"ab"), "a void at .*; convert it"),
    "NumPy record": (lambda: np.zeros(1, "f4,i4")[0], "a void at"),
    "subclass of a NumPy scalar": (lambda: SubFloat64(1), "a SubFloat64 at .*plain"),
    "NumPy dtype": (lambda: np.dtype("f4"), "a .* at .*"),
    "NumPy generator": (np.random.default_rng, "a Generator at .*state_dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_encode_refuses(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(StateError, match=message):
        encoded(make())
    with pytest.raises(StateError, match='at "extra/hook'):
        encoded({"ok": [1], "extra": {"hook": make()}})


def test_the_whole_message() -> None:
    with pytest.raises(StateError) as caught:
        encoded({"extra": {"hook": Foo()}})
    assert str(caught.value) == (
        'cannot store a Foo at "extra/hook"; '
        "store plain values and tensors, such as a state_dict() returns"
    )


def test_messages_are_short_and_printable() -> None:
    with pytest.raises(StateError) as caught:
        encoded({"\x1b[31m" + "é" * 1000: Foo()})
    assert str(caught.value).isprintable()
    assert r"\x1b[31mééé" in str(caught.value)
    assert len(str(caught.value)) < 400


# What decode refuses.

DAMAGED: dict[str, tuple[object, str]] = {
    "unknown tag": ({"$pickle": "AA=="}, r"unknown tag .*\$pickle"),
    "empty tag": ({"$": 1}, "unknown tag"),
    "key beside a tag": ({"$tuple": [], "a": 1}, r"other keys beside \$tuple"),
    "tag behind a key": ({"a": 1, "$tuple": []}, r"other keys beside \$tuple"),
    "two tags": ({"$set": [], "$tuple": []}, "other keys beside"),
    "not JSON": (object(), "no object of this kind"),
    "bytes": (b"", "no bytes of this kind"),
    "nan": (math.nan, "no float of this kind"),
    "infinity": (json.loads("1e999"), "no float of this kind"),
    "long int": (2**tree._MAX_INT_BITS, "no int of this kind"),
    "surrogate": (json.loads('"\\ud800"'), "no str of this kind"),
    "surrogate in a key": (json.loads('{"\\ud800": 1}'), "a key is not text"),
    "float that is finite": ({"$float": "3ff0000000000000"}, r"\$float is finite"),
    "float in capitals": ({"$float": "7FF8000000000000"}, "16 hexadecimal digits"),
    "float too short": ({"$float": "7ff8"}, "16 hexadecimal digits"),
    "float with a line end": ({"$float": "7ff8000000000000\n"}, "16 hexadecimal digits"),
    "float as a number": ({"$float": 1}, "text is missing"),
    "bytes not base64": ({"$bytes": "a*=="}, "base64"),
    "bytes not ASCII": ({"$bytes": "é"}, "ASCII"),
    "bytes not canonical": ({"$bytes": "AB=="}, "canonical"),
    "bytes without padding": ({"$bytes": "AA"}, "padding"),
    "bytes as a list": ({"$bytes": [1]}, "text is missing"),
    "tuple as text": ({"$tuple": "ab"}, "a list is missing"),
    "tuple as a dict": ({"$tuple": {}}, "a list is missing"),
    "set as a dict": ({"$set": {}}, "a list is missing"),
    "set of lists": ({"$set": [[1]]}, "unhashable"),
    "set of generic times": ({"$set": [{"$scalar": ["<m8", "AQAAAAAAAAA="]}]}, "unhashable"),
    "set with an element twice": ({"$set": [1, 1.0]}, "twice"),
    "frozenset with an element twice": ({"$frozenset": ["a", "a"]}, "twice"),
    "dict as a dict": ({"$dict": {"a": 1}}, "a list is missing"),
    "dict of triples": ({"$dict": [[1, 2, 3]]}, "not a pair"),
    "dict of strings": ({"$dict": ["ab"]}, "not a pair"),
    "dict with a key twice": ({"$dict": [[1, 0], [True, 0]]}, "a key twice"),
    "OrderedDict with a key twice": ({"$ordered": [["a", 0], ["a", 1]]}, "a key twice"),
    "Counter with a key twice": ({"$counter": [["a", 0], ["a", 1]]}, "a key twice"),
    "list as a key": ({"$dict": [[[], 0]]}, "a list cannot be a key"),
    "dict as a key": ({"$dict": [[{}, 0]]}, "a dict cannot be a key"),
    "list in a tuple as a key": ({"$dict": [[{"$tuple": [[]]}, 0]]}, "a list cannot be a key"),
    "tensor as a key": ({"$dict": [[{"$tensor": 0}, 0]]}, r"a \$tensor cannot be a key"),
    "path as a key": ({"$dict": [[{"$path": "a"}, 0]]}, r"a \$path cannot be a key"),
    "unknown tag as a key": ({"$dict": [[{"$x": "a"}, 0]]}, r"a \$x cannot be a key"),
    "nan as a key": ({"$dict": [[math.nan, 0]]}, "no float of this kind"),
    "tensor by name": ({"$tensor": "0"}, "an index is not"),
    "tensor by bool": ({"$tensor": True}, "an index is not"),
    "tensor by float": ({"$tensor": 0.0}, "an index is not"),
    "negative tensor": ({"$tensor": -1}, "an index is not"),
    "tensor that does not exist": ({"$tensor": 9}, r"\$tensor 9 does not exist"),
    "array that does not exist": ({"$array": 10**30}, r"\$array 10+ does not exist"),
    "scalar of objects": ({"$scalar": ["|O", "AAAAAAAAAAA="]}, "not a plain dtype"),
    "scalar with fields": ({"$scalar": ["<f4,<f4", "AAAAAAAAAAA="]}, "plain dtype"),
    "scalar of another length": ({"$scalar": ["<f8", "AAAA"]}, "not 3 bytes"),
    "scalar of another order": ({"$scalar": [">f4", "AAAAAA=="]}, "plain dtype"),
    "scalar by another name": ({"$scalar": ["f4", "AAAAAA=="]}, "plain dtype"),
    "scalar of extended precision": ({"$scalar": ["<f16", "A" * 22 + "=="]}, "plain dtype"),
    "scalar of no type": ({"$scalar": ["<f3", "AAAA"]}, "not understood|invalid|plain"),
    "scalar with a long name": (
        {"$scalar": ["<f" + "0" * 99 + "4", "AAAAAA=="]},
        "not a plain dtype",
    ),
    "scalar without bytes": ({"$scalar": ["<f8"]}, "not a plain dtype and bytes"),
    "scalar bool of 2": ({"$scalar": ["|b1", "Ag=="]}, "no bool"),
    "scalar of raw bytes": ({"$scalar": ["|V1", "AA=="]}, "plain dtype"),
    "scalar text of no character": ({"$scalar": ["<U1", "/////w=="]}, "decode"),
    "scalar text of a surrogate": ({"$scalar": ["<U1", "ANgAAA=="]}, "decode"),
    "dtype as a number": ({"$dtype": 1}, "text is missing"),
    "device with a path": ({"$device": "cpu/../x"}, "not a device"),
    "device not canonical": ({"$device": "cuda:00"}, "not a device"),
    "device of a large index": ({"$device": "cuda:300"}, "not a device"),
    "size of floats": ({"$size": [1.0]}, "not an integer"),
    "size of bools": ({"$size": [True]}, "not an integer"),
    "size too large": ({"$size": [2**63]}, "too large"),
    "generator as text": ({"$generator": "cpu"}, "not a device and a state"),
    "generator without a state": ({"$generator": {"device": "cpu"}}, "not a device and a state"),
    "generator with more": (
        {"$generator": {"device": "cpu", "state": "", "x": 1}},
        "not a device and a state",
    ),
    "generator of no state": ({"$generator": {"device": "cpu", "state": ""}}, "no valid state"),
    "generator of zeros": (
        {"$generator": {"device": "cpu", "state": paths.base64_of(bytes(5056))}},
        "no valid state",
    ),
    "generator of ones": (
        {"$generator": {"device": "cpu", "state": paths.base64_of(b"\xff" * 5056)}},
        "no valid state",
    ),
    "datetime of no form": ({"$datetime": "yesterday"}, "isoformat"),
    "datetime with a blank": ({"$datetime": "2025-01-02 03:04:05"}, "canonical"),
    "date of no day": ({"$date": "2025-02-30"}, "day is out of range|day 30"),
    "time not canonical": ({"$time": "01:02"}, "canonical"),
    "timedelta not canonical": ({"$timedelta": [0, 86400, 0]}, "not days, seconds"),
    "timedelta too long": ({"$timedelta": [10**9, 0, 0]}, "days"),
    "timedelta of a huge number": ({"$timedelta": [2**62, 0, 0]}, "too large"),
    "timedelta of two": ({"$timedelta": [1, 2]}, "not days, seconds"),
    "path as a list": ({"$path": ["a"]}, "text is missing"),
    "enum as text": ({"$enum": "Color.RED"}, "not a module"),
    "enum of two": ({"$enum": ["enum", "Enum"]}, "not a module"),
    "enum by number": ({"$enum": [__name__, "Color", 1]}, "not a module"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_decode_refuses(name: str) -> None:
    node, message = DAMAGED[name]
    with pytest.raises(CorruptError, match=f"damaged at the root: .*({message}).*; verify"):
        decoded(node)
    with pytest.raises(CorruptError, match=f'damaged at "a/0.*({message}).*'):
        decoded({"a": [node]})


@pytest.mark.parametrize("tag", ["$tensor", "$array"])
def test_a_reference_in_a_set_is_refused(tag: str) -> None:
    with pytest.raises(CorruptError, match=rf'damaged at "0": a \{tag} in a set'):
        decoded({"$set": [{tag: 0}]})
    with pytest.raises(CorruptError, match=rf'damaged at "0/1": a \{tag} in a set'):
        decoded({"$frozenset": [{"$tuple": [1, {tag: 0}]}]})


@pytest.mark.parametrize("tag", ["$tensor", "$array"])
def test_a_reference_to_the_other_kind_is_refused(tag: str) -> None:
    values: list[Any] = [np.ones(1), torch.ones(1)]
    value = values[tag == "$array"]
    with pytest.raises(CorruptError, match=rf"\{tag} 0 is a {type(value).__name__}"):
        tree.decode({tag: 0}, lambda index: value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda node: [node],
        lambda node: {"a": node},
        lambda node: {"$tuple": [node]},
        lambda node: {"$dict": [[0, node]]},
        lambda node: {"$frozenset": [node]},
    ],
)
def test_decode_refuses_deep_nesting(wrap: Callable[[object], object]) -> None:
    decoded(nested(64, wrap))
    for depth in (65, 5000):
        with pytest.raises(CorruptError, match="nested deeper than 64"):
            decoded(nested(depth, wrap))


def test_decode_refuses_deep_keys() -> None:
    key = nested(5000, lambda node: {"$tuple": [node]})
    with pytest.raises(CorruptError, match="nested deeper than 64"):
        decoded({"$dict": [[key, 0]]})


@pytest.mark.parametrize(
    "node",
    [
        nested(5000, lambda node: [node]),
        {"$dict": [[nested(5000, lambda node: {"$tuple": [node]}), {"$tensor": 0}]]},
        {"$dict": [[[], {"$tensor": 0}]]},
        {"$dict": [{"$tensor": 0}]},
        {"$dict": {"$tensor": 0}},
        {"$tuple": 0},
        {"$tensor": True},
        {"$tensor": -1},
        {"$tensor": 0, "a": {"$tensor": 1}},
    ],
)
def test_leaves_and_prune_refuse(node: Any) -> None:
    with pytest.raises(CorruptError):
        list(tree.leaves(node))
    with pytest.raises(CorruptError):
        tree.prune(node, [""])


def test_errors_of_get_are_not_hidden() -> None:
    def get(index: int) -> torch.Tensor:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        tree.decode({"$tuple": [{"$tensor": 0}]}, get)


# What decode does not have.

MISSING: dict[str, tuple[object, str]] = {
    "dtype": ({"$dtype": "float9"}, "no dtype .*float9"),
    "dtype by another name": ({"$dtype": "float"}, "no dtype"),
    "dtype that is a function": ({"$dtype": "load"}, "no dtype"),
    "device": ({"$device": "abacus"}, "no device .*abacus"),
    "generator": ({"$generator": {"device": "meta", "state": ""}}, "not usable here"),
    "module": ({"$enum": ["nowhere", "Color", "RED"]}, "import its module first"),
    "module of no name": ({"$enum": ["", "", ""]}, "import its module first"),
    "class": ({"$enum": [__name__, "Colour", "RED"]}, "import its module first"),
    "class in a class": ({"$enum": [__name__, "Outer.Other", "RED"]}, "import its module first"),
    "class that is no enum": ({"$enum": [__name__, "Foo", "RED"]}, "not an enum"),
    "function": ({"$enum": ["os", "system", "true"]}, "not an enum"),
    "function of a class": ({"$enum": ["enum", "Enum.__new__", "x"]}, "not an enum"),
    "member": ({"$enum": [__name__, "Color", "BLUE"]}, "Color.* has no member .*BLUE"),
    "attribute": ({"$enum": [__name__, "Color", "__class__"]}, "has no member"),
}


@pytest.mark.parametrize("name", MISSING)
def test_decode_names_what_is_missing(name: str) -> None:
    node, message = MISSING[name]
    with pytest.raises(MismatchError, match=f'cannot restore "a": .*{message}'):
        decoded({"a": node})


def test_decode_imports_nothing() -> None:
    assert "antigravity" not in sys.modules
    before = set(sys.modules)
    with pytest.raises(MismatchError):
        decoded({"$enum": ["antigravity", "A", "B"]})
    assert set(sys.modules) == before


def test_decode_does_not_load_a_lazy_module(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "lazy_module.py"
    source.write_text(f"open({str(tmp_path / 'loaded')!r}, 'w').close()")
    spec = importlib.util.spec_from_file_location("lazy_module", source)
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lazy_module", module)
    spec.loader.exec_module(module)
    with pytest.raises(MismatchError):
        decoded({"$enum": ["lazy_module", "A", "B"]})
    assert not (tmp_path / "loaded").exists()


def test_decode_does_not_call_getattr_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("greedy")
    module.__dict__["__getattr__"] = lambda name: Color
    monkeypatch.setitem(sys.modules, "greedy", module)
    with pytest.raises(MismatchError):
        decoded({"$enum": ["greedy", "A", "RED"]})
