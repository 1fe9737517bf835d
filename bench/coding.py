"""How small and how fast one core makes a trained model, beside zstd at level 1 and ZipNN."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import coders
from coders import Coder, UnavailableCoderError
from memory import keep_freed_memory
from payloads import Payload, payloads
from trained import train

KINDS = ("bf16 weights", "fp32 weights", "exp_avg", "exp_avg_sq")
COMPARED = (coders.PYSNAP, coders.ZSTD, coders.ZIPNN)


class WrongBytesError(Exception):
    """A coder that does not give back what it was given: its times mean nothing."""


def measure(
    *, steps: int, repeats: int, directory: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Train for `steps`, then `compare`; nothing is written to `directory`."""
    keep_freed_memory()
    model = train(steps, lambda step: tell(f"training, step {step} of {steps}"))
    made = payloads(model)
    facts = {"steps": steps, "loss": model.loss, "parameters": model.weights.numel()}
    return {"trained": facts} | compare({kind: made[kind] for kind in KINDS}, repeats, tell)


def compare(
    data: Mapping[str, Payload], repeats: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Every repetition of every coder on every kind, after one repetition that is not counted.

    Each repetition has all coders beside each other; their order changes from one to the next.
    Raises WrongBytesError.
    """
    missing: dict[str, str] = {}
    opened = {kind: _open(payload, missing) for kind, payload in data.items()}
    kinds: dict[str, Any] = {
        kind: {"raw_bytes": len(payload.bytes), "coders": {name: [] for name in opened[kind]}}
        for kind, payload in data.items()
    }
    for repetition in range(1 + repeats):
        order = -1 if repetition % 2 else 1
        tell(f"repetition {repetition} of {repeats}" if repetition else "first repetition")
        for kind, payload in data.items():
            for name in [*opened[kind]][::order]:
                try:
                    row = measure_once(opened[kind][name], payload.bytes)
                except WrongBytesError as error:
                    raise WrongBytesError(f"{name}, {kind}: {error}") from None
                if repetition:
                    kinds[kind]["coders"][name].append(row)
    return {
        "chunk_bytes": coders.CHUNK_SIZE,
        "repeats": repeats,
        "kinds": kinds,
        "missing": missing,
    }


def _open(payload: Payload, missing: dict[str, str]) -> dict[str, Coder]:
    """Those of COMPARED that there are; why not, for the others, goes to `missing`."""
    found = {}
    for name in COMPARED:
        try:
            found[name] = coders.open_coder(name, payload)
        except UnavailableCoderError as error:
            missing[name] = str(error)
    return found


def measure_once(coder: Coder, data: memoryview) -> dict[str, Any]:
    """Seconds to encode and to decode all chunks, bytes stored, and pages that were touched for the
    first time meanwhile. Raises WrongBytesError."""
    pages = _new_pages()
    copies = coders.chunk_copies(data)
    start = time.perf_counter()
    coders.encode_all(coder, copies)
    encode_seconds = time.perf_counter() - start
    stored = [bytes(coder.encode(chunk)) for chunk in coders.chunk_copies(data)]
    decode_seconds = 0.0
    for number, (kept, expected) in enumerate(zip(stored, coders.chunk_copies(data), strict=True)):
        start = time.perf_counter()
        decoded = coder.decode(kept, len(expected))
        decode_seconds += time.perf_counter() - start
        if bytes(decoded) != expected:
            raise WrongBytesError(f"chunk {number} is decoded to other bytes than were encoded")
    return {
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "stored_bytes": sum(map(len, stored)),
        "new_pages": _new_pages() - pages,
    }


def _new_pages() -> int:
    """Pages that this process has touched first so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
