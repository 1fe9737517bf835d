"""The bytes of a manifest, of which some are made before the others are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pysnap import _engine
from pysnap.manifest import Manifest, Record

CHUNK = (0, 24, 24, 5, 0, 0, 1, 2)


def manifest(chunks: list[tuple[int, ...]], packs: list[tuple[str, int]]) -> Manifest:
    return Manifest(
        id="an id",
        step=1,
        sequence=2,
        created="now" if chunks else "",
        tree={"ü": {"$tensor": 0}},
        tensors=[Record("float32", (2, 3), 0, (1, 2))],
        chunk_size=4096,
        packs=packs,
        chunks=np.array(chunks, dtype=_engine.CHUNK),
        metadata={"a": 1.5, '"': None},
    )


@pytest.mark.parametrize("prepared", [False, True])
def test_the_bytes_do_not_depend_on_when_they_are_made(prepared: bool) -> None:
    draft = manifest([], [])
    if prepared:
        draft.prepare()
    whole = draft.completed("now", [("0.pack", 4096)], np.array([CHUNK], dtype=_engine.CHUNK))
    body = (
        '{"format":1,"id":"an id","step":1,"sequence":2,"created":"now","stream":24,'
        '"chunk_size":4096,"packs":[{"name":"0.pack","size":4096}],'
        '"metadata":{"a":1.5,"\\"":null},"tree":{"ü":{"$tensor":0}},'
        '"tensors":[{"dtype":"float32","shape":[2,3],"at":0,"strides":[1,2]}],'
        '"chunks":[[0,0,24,24,"f32","raw","00000000000000010000000000000002"]]}'
    ).encode()
    expected = b'{"digest":"%s","snapshot":%s}' % (_engine.digest(body).encode(), body)
    assert whole.to_bytes() == expected
    assert whole.to_bytes() == manifest([CHUNK], [("0.pack", 4096)]).to_bytes()
    assert json.loads(expected)


def test_manifests_do_not_keep_their_bytes() -> None:
    draft = manifest([], [])
    draft.prepare()
    whole = draft.completed("now", [("0.pack", 4096)], np.array([CHUNK], dtype=_engine.CHUNK))
    whole.to_bytes()
    assert vars(draft).keys() == vars(whole).keys() == vars(manifest([], [])).keys()


def test_what_json_does_not_know_is_refused() -> None:
    draft = manifest([], [])
    draft.metadata["nan"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        draft.prepare()
