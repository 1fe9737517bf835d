"""Random states: every generator of NumPy that may be the global one, and the draws after."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pysnap import rng, tree
from pysnap.errors import CorruptError


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    bits = np.random.get_bit_generator()
    state = rng.capture()
    yield
    np.random.set_bit_generator(bits)
    rng.restore(state)


def draws() -> tuple[float, ...]:
    numbers = [random.random(), random.gauss(0, 1), float(np.random.standard_normal())]
    return (*numbers, float(np.random.random()), float(torch.rand(())), float(torch.randn(())))


@pytest.mark.parametrize("name", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_draws_after_a_restore_are_the_same(name: str) -> None:
    np.random.set_bit_generator(getattr(np.random, name)(5))
    # An odd number of normal draws: half of a pair is kept back by Python and NumPy.
    draws()
    state = tree.decode(tree.encode(rng.capture(), lambda *_: 0), lambda _: torch.empty(0))
    expected = draws()
    draws()
    assert isinstance(state, dict)
    rng.restore(state)
    assert draws() == expected


def test_random_states_hold_no_tensors() -> None:
    """Tensors that are made for each snapshot would make the plan of each snapshot anew."""
    found: list[str] = []
    tree.encode(rng.capture(), lambda path, _: found.append(path) or 0)  # type: ignore[func-returns-value]  # append
    assert found == []


def test_a_damaged_state_is_refused() -> None:
    state = rng.capture()
    del state["python"]["words"]
    with pytest.raises(CorruptError, match="random states"):
        rng.restore(state)


def test_states_of_devices_that_are_gone_are_named(caplog: pytest.LogCaptureFixture) -> None:
    present = torch.cuda.device_count()
    state = rng.capture()
    gone = state["torch"]
    state["cuda"] = [*state["cuda"], *[gone] * (present + 2 - len(state["cuda"]))]
    expected = draws()
    rng.restore(state)
    assert draws() == expected
    assert f"random state of cuda:{present}, cuda:{present + 1}, which" in caplog.text
