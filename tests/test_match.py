"""A snapshot and live objects that differ: what is compared, and the deliberate ways past it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_same, bits, flip
from torch import nn

import pysnap
from pysnap import reader


class Net(nn.Module):
    """An encoder and a head."""

    def __init__(self, *, width: int = 4, head: int = 3, seed: int = 0, encoder: str = "encoder"):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        setattr(self, encoder, nn.Linear(5, width))
        self.head = nn.Linear(width, head)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self.head(torch.tanh(self.encoder(x)))
        return encoded


def trained(net: nn.Module, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
    return optimizer


def saved(path: Path, step: int = 7, **parts: object) -> None:
    with pysnap.Snapshotter(path, **parts) as snapshotter:
        snapshotter.progress.step = step
        snapshotter.save().wait()


def resumed(path: Path, parts: dict[str, object], **terms: Any) -> pysnap.Progress:
    with pysnap.Snapshotter(path, **parts) as snapshotter:
        assert snapshotter.resume(**terms) is not None
        return snapshotter.progress


def refused(path: Path, parts: dict[str, object], **terms: Any) -> str:
    with (
        pysnap.Snapshotter(path, **parts) as snapshotter,
        pytest.raises(pysnap.MismatchError) as caught,
    ):
        snapshotter.resume(**terms)
    return str(caught.value)


def values(net: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in net.state_dict().items()}


# Everything that differs is told at once


def test_one_table_names_what_is_missing_unexpected_and_of_another_shape(tmp_path: Path) -> None:
    net = Net()
    saved(tmp_path, model=net, optimizer=trained(net), old={"a": 1})
    other = Net(head=2)
    other.extra = nn.Parameter(torch.zeros(2))
    before = values(other)
    message = refused(tmp_path, {"model": other, "optimizer": trained(other), "new": {}})
    for words in (
        "old",
        "not registered",
        "new",
        "missing",
        "model/head.weight",
        "float32[2, 4]",
        "float32[3, 4]",
        "model/extra",
        "groups of [5] parameters",
        "nothing was changed",
    ):
        assert words in message
    assert before.keys() == values(other).keys()


def test_state_of_an_optimizer_of_another_shape_is_refused(tmp_path: Path) -> None:
    net, other = Net(), Net(head=2)
    saved(tmp_path, optimizer=trained(net))
    optimizer = trained(other)
    before = copy.deepcopy(optimizer.state_dict())
    assert "optimizer/state/2/exp_avg" in refused(tmp_path, {"optimizer": optimizer})
    assert_same(optimizer.state_dict(), before)


def test_parameters_in_another_order_are_refused_where_the_optimizer_has_names(
    tmp_path: Path,
) -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    pairs = list(net.named_parameters())
    try:
        optimizer = torch.optim.SGD(pairs, lr=0.1)
    except TypeError:
        pytest.skip("this torch has no named parameters")
    saved(tmp_path, optimizer=optimizer)
    message = refused(tmp_path, {"optimizer": torch.optim.SGD(pairs[::-1], lr=0.1)})
    assert "1.weight" in message and "0.weight" in message


def test_a_tensor_that_is_a_part_must_fit(tmp_path: Path) -> None:
    saved(tmp_path, x=torch.ones(3))
    live = torch.zeros(2, 3)
    message = refused(tmp_path, {"x": live})
    assert "float32[2, 3]" in message and "float32[3]" in message and not live.any()


# strict=False


def test_what_does_not_fit_stays_live_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net, other = Net(), Net(head=2, seed=1)
    saved(tmp_path, model=net, old={"a": 1})
    head = bits(other.head.weight)
    progress = resumed(tmp_path, {"model": other, "new": {"b": 2}}, strict=False)
    assert progress.step == 7
    assert bits(other.encoder.weight) == bits(net.encoder.weight)
    assert bits(other.head.weight) == head
    warning = next(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    for words in ("model/head.weight", "old", "new", "stays as it is live"):
        assert words in warning


def test_the_optimizer_forgets_a_parameter_that_stays_live(tmp_path: Path) -> None:
    """A fresh optimizer took the state of a head of another shape, and failed at its next step."""
    net, other = Net(), Net(head=2)
    optimizer = trained(net)
    saved(tmp_path, model=net, optimizer=optimizer)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    resumed(tmp_path, {"model": other, "optimizer": fresh}, strict=False)
    assert set(fresh.state_dict()["state"]) == {0, 1}
    assert_same(fresh.state_dict()["state"][0], optimizer.state_dict()["state"][0])
    other(torch.randn(6, 5)).sum().backward()
    fresh.step()


def test_an_optimizer_of_other_groups_stays_live_as_a_whole(tmp_path: Path) -> None:
    net, other = Net(), Net(seed=1)
    saved(tmp_path, model=net, optimizer=trained(net))
    groups = [{"params": [parameter]} for parameter in other.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    resumed(tmp_path, {"model": other, "optimizer": optimizer}, strict=False)
    assert values(other) == values(net) and not optimizer.state_dict()["state"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 4


# only


def test_only_the_weights(tmp_path: Path) -> None:
    net, other = Net(), Net(seed=1)
    saved(tmp_path, model=net, optimizer=trained(net), extra={"a": 1})
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    progress = resumed(tmp_path, {"model": other}, only=["model"])
    assert values(other) == values(net)
    assert progress.step == 0 and torch.equal(torch.get_rng_state(), rng)


def test_only_a_module_of_a_model_whose_other_modules_differ(tmp_path: Path) -> None:
    net, other = Net(), Net(head=2, seed=1)
    optimizer = trained(other)
    saved(tmp_path, model=net, optimizer=trained(net))
    head, state = bits(other.head.weight), copy.deepcopy(optimizer.state_dict())
    progress = resumed(
        tmp_path, {"model": other, "optimizer": optimizer}, only=["model/encoder", "progress"]
    )
    assert bits(other.encoder.weight) == bits(net.encoder.weight)
    assert bits(other.head.weight) == head and progress.step == 7
    assert_same(optimizer.state_dict(), state)


def test_only_reads_only_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSNAP_CHUNK_SIZE", "4KiB")
    a, b = torch.arange(2048.0), torch.arange(2048.0)
    saved(tmp_path, a=a, b=b)
    snapshot = tmp_path / "step-000000007"
    # The workers put the four chunks into the pack in any order; the last two are those of b.
    offset = reader.read_snapshot(snapshot).manifest["chunks"][3][1]
    flip(snapshot / "0.pack", offset + 5)
    a.zero_()
    resumed(tmp_path, {"a": a, "b": b}, only=["a"])
    assert torch.equal(a, b)
    with (
        pysnap.Snapshotter(tmp_path, a=a, b=b) as snapshotter,
        pytest.raises(pysnap.CorruptError),
    ):
        snapshotter.resume(only=["b"])


def test_only_an_entry_of_a_plain_value(tmp_path: Path) -> None:
    values = {"lr": 0.1, "nested": {"a": torch.ones(2), "b": [1, 2]}}
    saved(tmp_path, values=values)
    values["lr"] = 5.0
    nested: Any = values["nested"]
    nested["a"].zero_()
    nested["b"].append(3)
    resumed(tmp_path, {"values": values}, only=["values/nested/a"])
    assert values["lr"] == 5.0 and nested["a"].tolist() == [1, 1] and nested["b"] == [1, 2, 3]


@pytest.mark.parametrize("only", [["modell"], ["model/enc"], ["model", "optimizer"]])
def test_only_what_is_not_there_is_refused(tmp_path: Path, only: list[str]) -> None:
    net = Net()
    saved(tmp_path, model=net)
    assert only[-1] in refused(tmp_path, {"model": net}, only=only)


# rename


def test_a_module_with_a_new_name(tmp_path: Path) -> None:
    net, other = Net(encoder="backbone"), Net(seed=1)
    saved(tmp_path, net=net)
    names = {"net/backbone": "model/encoder", "net": "model"}
    message = refused(tmp_path, {"model": other}, rename={"net/backbone": "model/encoder"})
    assert "container" in message
    names = {"net": "model"}
    assert "model/backbone.weight" in refused(tmp_path, {"model": other}, rename=names)
    other = Net(seed=1)
    saved(tmp_path, step=8, model=net)
    resumed(tmp_path, {"model": other}, rename={"model/backbone": "model/encoder"})
    assert bits(other.encoder.weight) == bits(net.backbone.weight)
    assert bits(other.head.weight) == bits(net.head.weight)


def test_a_part_with_a_new_name(tmp_path: Path) -> None:
    net, other = Net(), Net(seed=1)
    saved(tmp_path, net=net)
    resumed(tmp_path, {"model": other}, rename={"net": "model"})
    assert values(other) == values(net)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"nothing": "model"}, "holds no nothing"),
        ({"model/encoder": "model/head"}, "two entries"),
        ({"model/encoder": "encoder"}, "container"),
    ],
)
def test_names_that_cannot_be_changed_so(
    tmp_path: Path, names: dict[str, str], message: str
) -> None:
    net = Net()
    saved(tmp_path, model=net)
    assert message in refused(tmp_path, {"model": net}, rename=names)


# convert


def test_another_dtype_is_refused_or_converted(tmp_path: Path) -> None:
    net, other = Net(), Net(seed=1).bfloat16()
    saved(tmp_path, model=net)
    message = refused(tmp_path, {"model": other})
    assert "bfloat16[4, 5]" in message and "float32[4, 5]" in message
    address = other.head.weight.data_ptr()
    resumed(tmp_path, {"model": other}, convert=True)
    assert values(other) == values(copy.deepcopy(net).bfloat16())
    assert other.head.weight.data_ptr() == address


# PART="restart"


def test_a_loader_that_changed_may_be_restarted(tmp_path: Path) -> None:
    def loader(length: int) -> pysnap.loader.ResumableLoader:
        return pysnap.resumable(torch.utils.data.DataLoader(range(length), batch_size=2))  # type: ignore[arg-type]  # a range is a dataset

    first = loader(10)
    with pysnap.Snapshotter(tmp_path, loader=first) as snapshotter:
        for _ in snapshotter.epochs(1):
            for _ in first:
                with snapshotter.step():
                    pass
                if snapshotter.progress.step == 3:
                    break
            break
        snapshotter.save().wait()
    second = loader(12)
    assert "dataset length was 10, is 12" in refused(tmp_path, {"loader": second})
    with pysnap.Snapshotter(tmp_path, loader=second) as snapshotter:
        snapshotter.resume(loader="restart")
        progress = snapshotter.progress
        assert (progress.step, progress.epoch, progress.batch) == (3, 0, 0)
        batches = [batch.tolist() for _ in snapshotter.epochs(1) for batch in second]
    assert batches == [[i, i + 1] for i in range(0, 12, 2)]


def test_a_part_that_is_restarted_stays_as_it_is_live(tmp_path: Path) -> None:
    net, other = Net(), Net(seed=1)
    saved(tmp_path, model=net, optimizer=trained(net))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
    resumed(tmp_path, {"model": other, "optimizer": optimizer}, optimizer="restart")
    assert values(other) == values(net) and optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"loader": "restart"}, "no part of that name"),
        ({"model": "again"}, "restart"),
        ({"only": "model"}, "list of names"),
        ({"step": 1, "tag": "a"}, "one of"),
        ({"which": "newst"}, "newst"),
        ({"tag": "a/b"}, "no tag"),
    ],
)
def test_terms_that_cannot_be_are_refused(
    tmp_path: Path, terms: dict[str, Any], message: str
) -> None:
    with (
        pysnap.Snapshotter(tmp_path, model=Net()) as snapshotter,
        pytest.raises(pysnap.ConfigError, match=message),
    ):
        snapshotter.resume(**terms)


# Wrapped modules


WRAPPERS = {
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DataParallel of torch.compile": lambda net: nn.DataParallel(
        torch.compile(net, backend="eager")  # type: ignore[arg-type]  # it is a module
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("inner", [False, True], ids=["whole", "a module of it"])
def test_a_wrapped_module_has_the_keys_of_the_plain_one(
    tmp_path: Path, name: str, inner: bool
) -> None:
    def wrapped(net: Net) -> nn.Module:
        if not inner:
            return WRAPPERS[name](net)  # type: ignore[no-any-return, operator]  # a module
        net.encoder = WRAPPERS[name](net.encoder)  # type: ignore[operator]  # a module
        return net

    net = Net()
    expected = values(net)
    saved(tmp_path, model=wrapped(Net()))
    plain = Net(seed=1)
    resumed(tmp_path, {"model": plain})
    assert values(plain) == expected

    live = Net(seed=2)
    model = wrapped(live)
    resumed(tmp_path, {"model": model})
    assert list(values(model).values()) == list(expected.values())


def test_a_module_may_be_resumed_with_another_wrapping(tmp_path: Path) -> None:
    net = Net()
    saved(tmp_path, model=nn.DataParallel(net))
    live = Net(seed=1)
    resumed(tmp_path, {"model": torch.compile(live, backend="eager")})
    assert values(live) == values(net)


# What a reading found


def test_only_a_part_that_is_not_registered_is_refused(tmp_path: Path) -> None:
    """Nothing was loaded, and the run went on from fresh weights."""
    net = Net()
    saved(tmp_path, model=net)
    assert "registered" in refused(tmp_path, {"net": Net()}, only=["model"])
    with (
        pysnap.Snapshotter(tmp_path, model=net) as snapshotter,
        pytest.raises(pysnap.ConfigError, match="empty"),
    ):
        snapshotter.resume(only=[])


def test_only_values_that_are_no_tensors(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    saved(tmp_path, optimizer=optimizer, values={"a": 1, "b": 2})
    optimizer.param_groups[0]["lr"] = 0.1
    values = {"a": 5, "b": 5}
    parts: dict[str, object] = {"optimizer": optimizer, "values": values}
    resumed(tmp_path, parts, only=["optimizer/param_groups", "values/a"])
    assert optimizer.param_groups[0]["lr"] == 0.5 and values == {"a": 1, "b": 5}


def test_a_scheduler_that_fits_is_the_same_without_strict(tmp_path: Path) -> None:
    """Its Counter of milestones became a dict, with those of the live one."""

    def schedule(milestones: list[int]) -> Any:
        optimizer = torch.optim.SGD(Net().parameters(), lr=0.5)
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)

    first, second = schedule([30, 80]), schedule([30, 50, 80])
    saved(tmp_path, schedule=first)
    resumed(tmp_path, {"schedule": second}, strict=False)
    assert_same(second.state_dict(), first.state_dict())


class Extra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "live", [None, [torch.ones(3)], torch.ones(1), {"a": 1}], ids=["none", "list", "tensor", "dict"]
)
def test_the_extra_state_of_a_module_may_have_any_form(
    tmp_path: Path, live: Any, strict: bool
) -> None:
    module = Extra([torch.ones(3), torch.arange(5.0)])
    saved(tmp_path, model=module)
    fresh = Extra(live)
    resumed(tmp_path, {"model": fresh}, strict=strict)
    assert_same(fresh.extra, module.extra)


def test_tied_weights_that_are_converted_must_be_tied_in_the_snapshot(tmp_path: Path) -> None:
    """The last of the two won."""

    class Two(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(3))
            self.b = self.a if tied else nn.Parameter(torch.zeros(3))

    saved(tmp_path, model=Two(tied=False))
    live = Two(tied=True).bfloat16()
    assert "tied" in refused(tmp_path, {"model": live}, convert=True)


def test_an_optimizer_that_has_run_forgets_only_what_stays_live(tmp_path: Path) -> None:
    net, other = Net(), Net(head=2)
    first, second = trained(net), trained(other)
    saved(tmp_path, model=net, optimizer=first)
    resumed(tmp_path, {"model": other, "optimizer": second}, strict=False)
    states = second.state_dict()["state"]
    assert_same(states[0], first.state_dict()["state"][0])
    assert states[2]["exp_avg"].shape == other.head.weight.shape


def test_a_loader_that_is_not_taken_begins_its_epoch_anew(tmp_path: Path) -> None:
    loader = pysnap.resumable(torch.utils.data.DataLoader(range(8), batch_size=2))  # type: ignore[arg-type]  # a range is a dataset
    with pysnap.Snapshotter(tmp_path, loader=loader, value=[1]) as snapshotter:
        for _ in snapshotter.epochs(1):
            for _ in loader:
                with snapshotter.step():
                    pass
                if snapshotter.progress.batch == 2:
                    break
            break
        snapshotter.save().wait()
    again = pysnap.resumable(torch.utils.data.DataLoader(range(8), batch_size=2))  # type: ignore[arg-type]  # a range is a dataset
    with pysnap.Snapshotter(tmp_path, loader=again, value=[1]) as snapshotter:
        snapshotter.resume(only=["value", "progress"])
        assert (snapshotter.progress.step, snapshotter.progress.batch) == (2, 0)
        assert sum(1 for _ in snapshotter.epochs(1) for _ in again) == 4


def test_a_part_that_refuses_late_says_what_was_overwritten(tmp_path: Path) -> None:
    class Late:
        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise pysnap.MismatchError("it does not fit")

    saved(tmp_path, x=torch.ones(2), late=Late())
    message = refused(tmp_path, {"x": torch.zeros(2), "late": Late()})
    assert "it does not fit" in message and "x, late are overwritten" in message


def test_a_loader_may_be_restarted_without_taking_progress(tmp_path: Path) -> None:
    loader = pysnap.resumable(torch.utils.data.DataLoader(range(8), batch_size=2))  # type: ignore[arg-type]  # a range is a dataset
    with pysnap.Snapshotter(tmp_path, loader=loader, value=[1]) as snapshotter:
        snapshotter.save().wait()
        batches = iter(loader)
        next(batches)
        snapshotter.resume(only=["value"], loader="restart")
        assert loader.state_dict()["phase"] == "idle"
