"""A state like the one before is encoded, and planned, by what changed: always to the same result
as anew."""

from __future__ import annotations

import copy
import datetime
import operator
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Run, assert_same

import pysnap
from pysnap import _engine, tree
from pysnap.dtypes import TORCH_ELEMENTS
from pysnap.layout import Leaf, Places, tensor_places
from pysnap.repository import Snapshot
from pysnap.skeleton import Skeleton


def encode(value: object) -> tuple[tree.Json, list[Leaf]]:
    leaves: list[Leaf] = []

    def put(_: str, leaf: Leaf) -> int:
        leaves.append(leaf)
        return len(leaves) - 1

    return tree.encode(value, put), leaves


def exact(node: Any) -> Any:
    """The encoded form with what == does not see: 1 and True, 0.0 and -0.0."""
    if isinstance(node, dict):
        return [(key, exact(child)) for key, child in node.items()]
    if isinstance(node, list):
        return [exact(child) for child in node]
    return type(node).__name__, repr(node)


def check_again(first: object, second: object) -> bool:
    """Whether the skeleton of `first` knows `second`; if so, with the result of encoding it."""
    before, _ = encode(first)
    untouched = copy.deepcopy(before)
    skeleton = Skeleton(first, before)
    content = skeleton.match(second)
    if content is None:
        return False
    expected, leaves = encode(second)
    assert exact(skeleton.encode(content)) == exact(expected)
    by_index = dict(zip(skeleton.indices, content.leaves, strict=True))
    assert [id(by_index[index]) for index in range(len(leaves))] == list(map(id, leaves))
    assert exact(before) == exact(untouched), "the tree of the snapshot before was changed"
    return True


def state() -> dict[str, Any]:
    weight = torch.zeros(2)
    return {
        "model": OrderedDict(w=weight, tied=weight, scale=torch.nn.Parameter(torch.ones(3))),
        "optimizer": {
            "state": {0: {"step": torch.tensor(1.0), "m": torch.zeros(2)}, 7: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 7], "name": None}],
        },
        "array": [np.arange(3), (np.float32(0.5), b"bytes", True, 3, "text", torch.Size([2]))],
        "kind": torch.float32,
        "odd": {"deep": [[], (), {}, {"$tag": 1}, {2: {"$x": [0.0]}}]},
        "counts": Counter(a=2),
        "set": {1, 2},
    }


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a float": lambda s: s["optimizer"]["param_groups"][0].update(lr=0.2),
    "the sign of zero": lambda s: s["odd"]["deep"][4][2].update({"$x": [-0.0]}),
    "a float that is no number": lambda s: s["optimizer"]["param_groups"][0].update(
        lr=float("nan")
    ),
    "an int in a list": lambda s: s["optimizer"]["param_groups"][0]["params"].__setitem__(1, 9),
    "bytes": lambda s: s["array"].__setitem__(
        1, (np.float32(0.5), b"other", True, 3, "text", torch.Size([2]))
    ),
    "a bool": lambda s: s["array"].__setitem__(
        1, (np.float32(0.5), b"bytes", False, 3, "text", torch.Size([2]))
    ),
    "a scalar of NumPy": lambda s: s["array"].__setitem__(
        1, (np.float32(0.25), b"bytes", True, 3, "text", torch.Size([2]))
    ),
    "a size": lambda s: s["array"].__setitem__(
        1, (np.float32(0.5), b"bytes", True, 3, "text", torch.Size([2, 2]))
    ),
    "a dtype": lambda s: s.update(kind=torch.float16),
    "under a tag": lambda s: s["odd"]["deep"][3].update({"$tag": 2}),
    "a count": lambda s: s["counts"].update(b=1),
    "a set": lambda s: s["set"].add(3),
    "a tensor": lambda s: s["model"].update(w=torch.ones(2)),
    "several": lambda s: (s["set"].add(5), s["odd"]["deep"][4][2].update({"$x": [1.5]})),
}
OTHERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a key more": lambda s: s["optimizer"]["state"][7].update(step=1),
    "another key": lambda s: s["optimizer"].update(state={0: s["optimizer"]["state"][0], 8: {}}),
    "a key that equals": lambda s: s["optimizer"].update(
        state={False: s["optimizer"]["state"][0], 7: {}}
    ),
    "another order": lambda s: s["model"].move_to_end("w"),
    "a longer list": lambda s: s["optimizer"]["param_groups"][0]["params"].append(8),
    "an int where a bool was": lambda s: s["array"].__setitem__(
        1, (np.float32(0.5), b"bytes", 1, 3, "text", torch.Size([2]))
    ),
    "a tensor where none was": lambda s: s["optimizer"]["param_groups"][0].update(
        lr=torch.tensor(0.1)
    ),
    "a parameter where a tensor was": lambda s: s["model"].update(
        w=torch.nn.Parameter(torch.zeros(2))
    ),
    "another kind of mapping": lambda s: s.update(model=dict(s["model"])),
    "an empty container elsewhere": lambda s: s["odd"]["deep"].__setitem__(0, ()),
    "moved between containers": lambda s: s["optimizer"]["state"][7].update(
        m=s["optimizer"]["state"][0].pop("m")
    ),
}


def test_the_same_state_is_known() -> None:
    assert check_again(state(), state())


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_value_is_encoded(change: str) -> None:
    changed = state()
    CHANGES[change](changed)
    assert check_again(state(), changed)


@pytest.mark.parametrize("other", OTHERS)
def test_another_structure_is_not_taken_for_the_same(other: str) -> None:
    changed = state()
    OTHERS[other](changed)
    assert not check_again(state(), changed)


def test_another_kind_of_container_is_not_taken_for_the_same() -> None:
    assert not check_again([1], (1,))
    assert not check_again({"a": 1}, OrderedDict(a=1))


def test_changes_add_up() -> None:
    value = state()
    node, _ = encode(value)
    skeleton = Skeleton(value, node)
    for change in CHANGES.values():
        change(value)
        content = skeleton.match(value)
        assert content is not None
        assert exact(skeleton.encode(content)) == exact(encode(value)[0])


def test_a_value_that_cannot_be_stored_is_refused_again() -> None:
    value = {"names": ["good"]}
    node, _ = encode(value)
    skeleton = Skeleton(value, node)
    content = skeleton.match({"names": ["\ud800"]})
    assert content is not None
    with pytest.raises(pysnap.StateError, match="surrogates"):
        skeleton.encode(content)


@pytest.mark.parametrize(
    "value",
    [{1.5: 0}, {None: torch.zeros(1)}, {"c": Counter(a=torch.ones(1))}, 3, "text"],
    ids=["float keys", "None as key", "a tensor in a Counter", "a number", "a text"],
)
def test_a_state_without_a_skeleton_has_none(value: object) -> None:
    node, _ = encode(value)
    with pytest.raises(ValueError):
        Skeleton(value, node)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab$", max_size=2)
keys = st.text("ab$", max_size=2) | st.integers(-2, 2)
nested = st.recursive(
    plain | st.builds(torch.zeros, st.integers(0, 2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(keys, inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(first=nested, second=nested, seed=st.integers(0, 999))
def test_any_state_is_encoded_as_anew(first: Any, second: Any, seed: int) -> None:
    def varied(value: Any) -> Any:
        """The same with other plain values here and there."""
        if isinstance(value, dict):
            return type(value)((key, varied(item)) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return type(value)(map(varied, value))
        if type(value) in (int, float, str) and draw.random() < 0.5:
            return type(value)(draw.choice([0, 1, 2]))
        return value

    draw = random.Random(seed)
    assert check_again([first], [varied(first)])
    check_again([first], [second])


# Places

WEIGHT = torch.arange(16.0).reshape(4, 4)
MOVES: dict[str, Callable[[], torch.Tensor]] = {
    "other memory": WEIGHT.clone,
    "another shape": lambda: WEIGHT.view(2, 8),
    "more dimensions": lambda: WEIGHT[None],
    "transposed": WEIGHT.t,
    "another dtype": lambda: WEIGHT.view(torch.int32),
    "a part": lambda: WEIGHT[:2],
    "a part of each row": lambda: WEIGHT[:, :4].as_strided((4, 4), (2, 1)),
    "sparse": lambda: WEIGHT.to_sparse(),
    "without memory": lambda: WEIGHT.to("meta"),
}


@pytest.fixture(params=["read", "asked"])
def find_places(request: pytest.FixtureRequest) -> Callable[[list[torch.Tensor]], Any]:
    """By DLPack's exchange, and for a torch without it."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if request.param == "asked":
        return lambda tensors: tensor_places(tensors, None)
    if exchange is None:
        pytest.skip("this torch has no exchange of DLPack")
    return lambda tensors: tensor_places(tensors, exchange)


def are_places(places: Any, tensors: list[torch.Tensor]) -> bool:
    try:
        return bool(places.are_of(tensors))
    except (TypeError, RuntimeError):
        return False


@pytest.mark.parametrize("move", MOVES)
def test_a_tensor_that_means_something_else_is_seen(find_places: Any, move: str) -> None:
    others = [torch.zeros(2), torch.nn.Parameter(torch.tensor(1.0))]
    places = find_places([*others, WEIGHT])
    assert are_places(places, [*others, WEIGHT.detach()])
    assert not are_places(places, [*others, MOVES[move]()])
    assert not are_places(places, [*others])
    assert not are_places(places, [*others, WEIGHT, WEIGHT])


def test_other_gaps_are_seen(find_places: Any) -> None:
    base = torch.zeros(4, 4, 4)
    places = find_places([base[:, :2, :2]])
    assert are_places(places, [base[:, :2, :2]])
    assert not are_places(places, [base[:, :2, :2].transpose(0, 1)[:, :2].transpose(1, 2)])
    assert not are_places(places, [base.transpose(1, 2)[:, :2, :2]])


def test_a_conjugated_view_is_seen(find_places: Any) -> None:
    value = torch.ones(3, dtype=torch.complex64)
    assert not are_places(find_places([value]), [value.conj()])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (2, 3)])
def test_the_imaginary_part_of_a_conjugated_tensor_is_seen(
    find_places: Any, shape: tuple[int, ...]
) -> None:
    value = torch.ones(shape, dtype=torch.complex64)
    places = find_places([value.imag])
    assert are_places(places, [value.imag])
    assert not are_places(places, [value.conj().imag])


def test_every_two_types_of_elements_are_told_apart(find_places: Any) -> None:
    raw = torch.zeros(16, dtype=torch.uint8)
    types = [getattr(torch, name) for name in TORCH_ELEMENTS if hasattr(torch, name)]
    views = {dtype: raw.view(dtype)[:1] for dtype in types}
    for dtype, view in views.items():
        places = find_places([view])
        assert [other for other in views if are_places(places, [views[other]])] == [dtype]


def test_a_table_that_is_not_of_the_exchange_is_refused() -> None:
    with pytest.raises(pysnap.ConfigError, match="DLPack"):
        _engine.TensorPlaces(vars(datetime)["datetime_CAPI"], [])


@pytest.mark.parametrize(
    "other",
    [lambda a: a.copy(), lambda a: a.reshape(4, 3), lambda a: a.view(np.uint32), lambda a: a[:2]],
    ids=["other memory", "another shape", "another dtype", "a part"],
)
def test_an_array_that_means_something_else_is_seen(other: Callable[[Any], Any]) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    places = Places([array])
    assert places.are_of([array.view()])
    assert not places.are_of([other(array)])


def test_every_tensor_of_many_is_looked_at(find_places: Any) -> None:
    tensors = list(torch.zeros(1500, 2).unbind())
    places = find_places(tensors)
    assert are_places(places, tensors)
    for at in (0, 511, 512, 1023, 1024, 1499):
        assert not are_places(places, [*tensors[:at], torch.zeros(2), *tensors[at + 1 :]])


@pytest.mark.parametrize(
    "wrong", [{"lengths": [1, 1]}, {"is_mapping": [True, True]}, {"keys": []}, {"kinds": [int]}]
)
def test_a_level_of_other_lengths_is_refused(wrong: dict[str, Any]) -> None:
    level = {"lengths": [1, 2], "is_mapping": [True, False], "keys": ["a"], "kinds": [int] * 3}
    assert _engine.Level(**level).open([{"a": 1}, [2, 3]]) == [1, 2, 3]
    with pytest.raises(pysnap.ConfigError, match="lengths"):
        _engine.Level(**(level | wrong))


def test_an_ordered_dict_that_has_more_than_its_order_is_not_opened() -> None:
    level = _engine.Level(lengths=[2], is_mapping=[True], keys=["a", "b"], kinds=[int, int])
    ordered = OrderedDict(a=1)
    dict.__setitem__(ordered, "b", 2)
    assert level.open([ordered]) is None
    assert level.open([OrderedDict(a=1, b=2)]) == [1, 2]


def test_a_level_of_other_types_is_not_opened() -> None:
    level = _engine.Level(
        lengths=[1, 2], is_mapping=[True, False], keys=["a"], kinds=[int, int, int]
    )
    assert level.open([{"a": 1}, {2: 2, 3: 3}]) is None
    assert level.open([{"a": 1}]) is None
    with pytest.raises(TypeError):
        level.open([{"a": 1}, 7])
    with pytest.raises(AttributeError):
        level.open([[1], [2, 3]])


# Asking many objects


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 100])
def test_what_many_objects_answer_stands_in_their_order(count: int) -> None:
    """Whatever they are: their first fields are looked at."""
    kinds = [torch.ones(2), torch.nn.Parameter(torch.ones(2)), None, object(), 7, "text", 2**80, ()]
    objects = [kinds[at % len(kinds)] for at in range(count)]
    assert _engine.map_ahead(id, objects) == list(map(id, objects))


def test_an_exception_of_a_function_that_is_asked_comes_out() -> None:
    with pytest.raises(AttributeError, match="_version"):
        _engine.map_ahead(operator.attrgetter("_version"), [torch.ones(2), 3])


def test_a_list_that_shrinks_while_it_is_asked_was_held() -> None:
    objects = [object() for _ in range(100)]
    expected = list(map(id, objects))

    def ask(value: object) -> int:
        objects.clear()
        return id(value)

    assert _engine.map_ahead(ask, objects) == expected


# Whole snapshots


def test_snapshots_that_differ_in_values_alone_are_whole(tmp_path: Path) -> None:
    run = Run()
    with pysnap.Snapshotter(
        tmp_path / "run", every="1 step", keep=pysnap.Keep(last=None), **run.parts
    ) as s:
        expected = []
        for _ in run.train(s, epochs=2):
            s.save().wait()
            expected.append(copy.deepcopy(run.state()))
        steady = s._stager._steady
        assert steady is not None
    for step, state in enumerate(expected, 1):
        loaded = Run(seed=9)
        with pysnap.Snapshotter(tmp_path / "run", **loaded.parts) as again:
            again.resume(step=step)
            assert_same(loaded.state(), state)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.t(),
        lambda p: p.data.view(torch.int32),
        lambda p: p.data.reshape(-1),
        lambda p: p.data.clone(),
        lambda p: p.data[:1],
    ],
    ids=["transposed", "another dtype", "another shape", "other memory", "a part"],
)
def test_memory_that_means_something_else_is_stored_as_that(
    tmp_path: Path, change: Callable[[torch.nn.Parameter], torch.Tensor]
) -> None:
    weight = torch.nn.Parameter(torch.arange(9.0).reshape(3, 3), requires_grad=False)
    with pysnap.Snapshotter(tmp_path / "run", weights={"w": weight}) as snapshotter:
        snapshotter.save().wait()
        snapshotter.save().wait()
        weight.data = change(weight)
        snapshotter.save().wait()
    assert_same(pysnap.load(tmp_path / "run")["weights"]["w"], weight.detach())


@pytest.mark.parametrize(
    "others",
    [
        {"scale": torch.ones(2)},
        {"rates": {0.5: 1}},
        {"log": []},
        {"rates": {0.5: torch.ones(2)}},
    ],
    ids=["a tensor", "odd keys", "what grows", "a tensor under an odd key"],
)
def test_every_kind_of_part_is_stored_again_and_again(
    tmp_path: Path, others: dict[str, Any]
) -> None:
    state: dict[str, Any] = {"weights": {"w": torch.zeros(3)}, **others}
    with pysnap.Snapshotter(tmp_path / "run", **state) as snapshotter:
        for value in range(3):
            state["weights"]["w"].fill_(value)
            if "log" in state:
                state["log"].append({"value": value})
            snapshotter.save().wait()
            loaded = pysnap.load(tmp_path / "run")
            assert_same({name: loaded[name] for name in state}, state)
        known = snapshotter._stager._steady
    # The others do not make the plan of what is large anew.
    odd = isinstance(others.get("rates", {}).get(0.5), torch.Tensor)
    assert (known is None) == odd


def test_tensors_that_go_are_not_stored(tmp_path: Path) -> None:
    state = {"a": {"w": torch.ones(2)}, "b": {"w": torch.zeros(3)}}
    with pysnap.Snapshotter(tmp_path / "run", **state) as snapshotter:
        snapshotter.save().wait()
        del state["a"]["w"]
        path = snapshotter.save().wait().path
        # One that is still planned would be read where it is no more.
        assert len(Snapshot.open(path).manifest.tensors) == 1
        loaded = pysnap.load(tmp_path / "run")
        assert_same({"a": loaded["a"], "b": loaded["b"]}, state)
        state["a"]["v"] = torch.ones(4)
        snapshotter.save().wait()
    loaded = pysnap.load(tmp_path / "run")
    assert_same({"a": loaded["a"], "b": loaded["b"]}, state)


def test_tensors_with_gaps_are_copied_anew(tmp_path: Path) -> None:
    """Their copy of the snapshot before had been stored again."""
    table = torch.zeros(4, 4)
    column = table[:, 1]
    with pysnap.Snapshotter(tmp_path / "run", values={"column": column}) as snapshotter:
        for value in (1, 2, 3):
            table.fill_(value)
            snapshotter.save().wait()
    assert_same(pysnap.load(tmp_path / "run")["values"]["column"], torch.full((4,), 3.0))


def test_a_parameter_that_leaves_the_optimizer_is_copied_at_once(tmp_path: Path) -> None:
    """It had been copied later, when the program might change it without its optimizer."""
    model = torch.nn.Linear(256, 256, bias=False)
    other = torch.nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pysnap.Snapshotter(
        tmp_path / "run", model=model, other=other, optimizer=optimizer
    ) as snapshotter:
        snapshotter.save(overlap=True).wait()
        optimizer.param_groups[0]["params"] = [other.weight]
        handle = snapshotter.save(overlap=True)
        with torch.no_grad():
            model.weight.fill_(7)
        handle.wait()
    assert not pysnap.load(tmp_path / "run")["model"]["weight"].eq(7).any()


def test_what_waits_is_known_of_each_tensor_in_any_order(tmp_path: Path) -> None:
    """Shallow ones are found first, but the plan has them in the order of the tree."""
    model = torch.nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    table = torch.zeros(9)
    state = {"deep": {"table": table}, "weight": model.weight}
    with pysnap.Snapshotter(tmp_path / "run", state=state, optimizer=optimizer) as snapshotter:
        for value in range(3):
            handle = snapshotter.save(overlap=True)
            # It belongs to no optimizer, so it was copied at once.
            table.fill_(value + 1)
            handle.wait()
            assert pysnap.load(tmp_path / "run")["state"]["deep"]["table"].eq(value).all()
