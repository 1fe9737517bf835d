"""P11: manifests and trees of any form, with a digest that fits, in both readers: nothing but
errors of pysnap, and the same verdict."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_writer import manifest_bytes
from test_hostile_repositories import NASTY, agree, places, verdicts

import pysnap

HARNESS = "fuzzing: manifests and trees"

TAGS = [
    "$tensor", "$array", "$float", "$bytes", "$tuple", "$set", "$frozenset", "$dict", "$ordered",
    "$counter", "$scalar", "$dtype", "$device", "$size", "$datetime", "$date", "$time",
    "$timedelta", "$path", "$enum", "$", "$new",
]  # fmt: skip

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.sampled_from(
        ["float32", "cpu", "cuda:0", "<f8", "AAAA", "AAAAAAAA8D8=", "7ff8000000000000", "a/b",
         "2024-01-02", "2024-01-02T03:04:05", "03:04:05", "0" * 16]
    )
)  # fmt: skip
NODES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(TAGS), inner, max_size=3)
        | st.dictionaries(st.sampled_from(TAGS), inner, min_size=1, max_size=1)
        | st.dictionaries(
            st.sampled_from(["$dict", "$ordered", "$counter"]),
            st.lists(st.tuples(inner, inner).map(list), max_size=3),
            min_size=1,
            max_size=1,
        )
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = {"w": torch.arange(300.0), "a": np.arange(9), "n": [1, (2.5, {3: None})]}
    state["v"] = state["w"][3:9]
    return pysnap.save(tmp_path_factory.mktemp("fuzz") / "s", state)


@pytest.fixture(scope="module")
def valid(saved: Path) -> dict[str, Any]:
    snapshot: dict[str, Any] = json.loads((saved / "manifest.json").read_bytes())["snapshot"]
    return snapshot


def run(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    limits = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    limits(given(strategy)(check))()


def check_body(saved: Path, body: Any, count: Count) -> None:
    (saved / "manifest.json").write_bytes(manifest_bytes(body))
    # Only torch can tell a generator's state from another.
    assert agree(saved) or "$generator" in str(body), body
    count()


def test_trees_of_any_form(saved: Path, valid: dict[str, Any], count: Count, full: bool) -> None:
    def check(tree: Any) -> None:
        check_body(saved, {**valid, "tree": tree}, count)

    run(12_000 if full else 1200, NODES, check)


def mutated(valid: dict[str, Any], changes: list[tuple[str, int, int, Any]]) -> Any:
    """A manifest after some changes: values replaced, left out, repeated, moved, counted on."""
    snapshot = copy.deepcopy(valid)
    for kind, where, other, value in changes:
        paths = [path for path in places(snapshot) if path]
        if not paths:
            break
        path = paths[where % len(paths)]
        target = snapshot
        for key in path[:-1]:
            target = target[key]
        key = path[-1]
        if kind == "replace":
            # A copy: a later change may go into it, and the value is drawn again.
            target[key] = copy.deepcopy(value)
        elif kind == "delete":
            del target[key]
        elif kind == "repeat" and isinstance(target, list):
            target.insert(key, copy.deepcopy(target[key]))
        elif kind == "count" and type(target[key]) is int:
            target[key] += other % 9 - 4
        elif kind == "scale" and type(target[key]) is int:
            target[key] *= 2 ** (other % 40)
        elif kind == "move":
            source: Any = snapshot
            for step in paths[other % len(paths)]:
                source = source[step]
            target[key] = copy.deepcopy(source)
    return snapshot


def test_manifests_that_are_changed_here_and_there(
    saved: Path, valid: dict[str, Any], count: Count, full: bool
) -> None:
    change = st.tuples(
        st.sampled_from(["replace", "delete", "repeat", "count", "scale", "move"]),
        st.integers(0, 400),
        st.integers(0, 400),
        st.sampled_from(NASTY) | NODES,
    )

    def check(changes: list[tuple[str, int, int, Any]]) -> None:
        check_body(saved, mutated(valid, changes), count)

    run(12_000 if full else 1200, st.lists(change, min_size=1, max_size=3), check)


def test_bytes_that_are_changed_here_and_there(
    saved: Path, valid: dict[str, Any], count: Count, full: bool
) -> None:
    good = json.dumps(valid, separators=(",", ":")).encode()
    chance = random.Random(0)
    pieces = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\u0000", b"\\ud800", b"1e9", b"\xff"]
    for _ in range(12_000 if full else 1200):
        body = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(body))
            match chance.randrange(4):
                case 0:
                    body[at] = chance.randrange(256)
                case 1:
                    del body[at : at + chance.randrange(1, 9)]
                case 2:
                    body[at:at] = chance.choice(pieces)
                case _:
                    start = chance.randrange(len(good))
                    body[at:at] = good[start : start + chance.randrange(1, 40)]
        check_body(saved, bytes(body), count)


def test_bytes_without_any_form(saved: Path, count: Count, full: bool) -> None:
    """Also in place of the frame with the digest."""

    def check(data: bytes) -> None:
        for content in (data, manifest_bytes(data)):
            (saved / "manifest.json").write_bytes(content)
            assert verdicts(saved) == (False, False)
            count()

    run(2000 if full else 200, st.binary(max_size=200), check)
