"""When a snapshot is due by what snapshots cost: runs on a clock of our own."""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_retention import snapshot as snapshot_of

import pysnap
from pysnap import repository, snapshotter
from pysnap.best import Best
from pysnap.cadence import Cadence
from pysnap.measure import Amount, parse_seconds, shown_seconds, shown_size
from pysnap.repository import Snapshot
from pysnap.retention import Keep, plan
from pysnap.schedule import Costs, Schedule

GOLDEN = Path(__file__).parent / "golden" / "days"


@dataclass
class Cost:
    """What one snapshot costs: how long it blocks training, how many times longer steps take beside
    it, and after how long it is durable; `fails`: it never is."""

    stall: float
    longer: float
    durable: float
    fails: bool = False


class Flight:
    """A snapshot on that clock."""

    def __init__(self, training: Training, cost: Cost) -> None:
        self._training = training
        self._end = training.now + cost.durable
        self.cost = cost

    @property
    def stall_seconds(self) -> float:
        return self.cost.stall

    @property
    def durable_seconds(self) -> float | None:
        return self.cost.durable if self.done() and not self.cost.fails else None

    def done(self) -> bool:
        return self._training.now >= self._end


class Training:
    """A loop that does what Snapshotter does: asks after every step whether one is due."""

    def __init__(
        self,
        rule: str,
        *,
        step: Callable[[int], float],
        cost: Callable[[int], Cost],
        mtbf: float = 6 * 3600,
    ) -> None:
        self.now = 1000.0
        self.step = 0
        self.epochs = 0
        self.schedule = Schedule(Cadence.parse(rule, "every"), mtbf=mtbf, now=self.now)
        self._step_seconds = step
        self._cost = cost
        self._flight: Flight | None = None
        self._pending = False
        self.taken: list[tuple[float, int]] = []
        self.late = 0
        self.lost = 0.0
        """Seconds by which snapshots made the run longer."""

    def busy(self) -> bool:
        return self._flight is not None and not self._flight.done()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.one_step()

    def one_step(self) -> bool:
        """Whether a snapshot was taken behind it."""
        plain = self._step_seconds(self.step)
        longer = self._flight.cost.longer if self.busy() and self._flight else 1.0
        self.lost += plain * (longer - 1)
        self.now += plain * longer
        self.step += 1
        return self._take_if(self.schedule.after_step(self.step, self.now))

    def end_epoch(self) -> bool:
        """Whether a snapshot is taken where an epoch ends."""
        self.epochs += 1
        self.schedule.pause()
        return self._take_if(self.schedule.after_epoch(self.epochs))

    def _take_if(self, due: bool) -> bool:
        if self.busy():
            self.late += due and not self._pending
            self._pending |= due
            return False
        if due or self._pending:
            self.take()
            return True
        return False

    def take(self) -> None:
        cost = self._cost(len(self.taken))
        self.taken.append((self.now, self.step))
        flight = Flight(self, cost)
        self.schedule.taken(flight, self.now)
        self._flight, self._pending = flight, False
        self.now += cost.stall
        self.lost += cost.stall

    def intervals(self) -> list[float]:
        moments = [moment for moment, _ in self.taken]
        return [after - before for before, after in itertools.pairwise(moments)]


def steady(seconds: float) -> Callable[[int], float]:
    return lambda _: seconds


def noisy(seconds: float, spread: float, seed: int = 0) -> Callable[[int], float]:
    draw = random.Random(seed)
    return lambda _: seconds * math.exp(draw.gauss(0, spread))


# A share of training time


@pytest.mark.parametrize("share", [0.5, 1.0, 5.0])
@pytest.mark.parametrize(
    ("step", "cost"),
    [
        (0.02, Cost(0.05, 1.0, 0.5)),
        (0.3, Cost(0.01, 1.4, 1.7)),
        (12.0, Cost(0.4, 1.1, 40.0)),
    ],
    ids=["it waits", "steps take longer", "long steps"],
)
def test_snapshots_cost_the_share_that_the_rule_allows(
    share: float, step: float, cost: Cost
) -> None:
    training = Training(f"{share:g}%", step=noisy(step, 0.1), cost=lambda _: cost)
    training.run(4000 * step)
    training.lost = 0.0
    begin = training.now
    training.run(40_000 * step)
    spent = 100 * training.lost / (training.now - begin)
    assert 0.6 * share < spent < 1.05 * share


def test_steps_that_nearly_stand_beside_a_snapshot_are_what_it_costs() -> None:
    """They were all taken for pauses of the loop: at 1%, half of the time went into snapshots."""
    training = Training("5%", step=noisy(0.02, 0.1), cost=lambda _: Cost(0.001, 15.0, 10.0))
    training.run(400)
    training.lost = 0.0
    begin = training.now
    training.run(4000)
    assert 0.03 < training.lost / (training.now - begin) < 0.0525


def test_the_first_snapshot_comes_as_soon_as_steps_are_known_and_counts_while_it_is_alone() -> None:
    def cost(number: int) -> Cost:
        return Cost(10.0 if number == 0 else 0.1, 1.0, 0.5)

    training = Training("1%", step=steady(0.1), cost=cost)
    training.run(12_000)
    assert training.taken[0][1] == 16
    assert training.intervals()[0] == pytest.approx(1000 / 0.9, rel=0.01)
    rest = training.intervals()[1:]
    assert rest == pytest.approx([10 / 0.9] * len(rest), rel=0.03)


def test_costs_that_change_change_the_interval() -> None:
    def cost(number: int) -> Cost:
        return Cost(0.1 if number < 50 else 0.4, 1.0, 0.5)

    training = Training("1%", step=steady(0.1), cost=cost)
    training.run(8000)
    assert training.intervals()[40] == pytest.approx(10 / 0.9, rel=0.03)
    assert training.intervals()[-1] == pytest.approx(40 / 0.9, rel=0.03)
    assert training.schedule.interval == pytest.approx(40 / 0.9, rel=0.03)


def test_one_hiccup_is_no_rule() -> None:
    def cost(number: int) -> Cost:
        return Cost(600.0 if number == 20 else 0.1, 1.0, 0.5)

    training = Training("1%", step=steady(0.1), cost=cost)
    training.run(3000)
    assert max(training.intervals()[1:20]) < 12
    # Of sixteen, one counts ten times.
    assert max(training.intervals()[21:]) < 18


def test_a_validation_between_steps_is_no_cost_of_the_snapshot_beside_it() -> None:
    told = Training("1%", step=steady(0.1), cost=lambda _: Cost(0.1, 1.0, 0.5))
    untold = Training("1%", step=steady(0.1), cost=lambda _: Cost(0.1, 1.0, 0.5))
    for training in (told, untold):
        for _ in range(5000):
            if training.one_step():
                # Less than ten steps, which only a loop that tells it can be known by.
                training.now += 0.7 if training is told else 3.0
                if training is told:
                    training.schedule.pause()
    assert told.schedule.interval == pytest.approx(10 / 0.9, rel=0.03)
    assert untold.schedule.interval == pytest.approx(10 / 0.9, rel=0.03)


def test_a_few_pauses_are_pauses_and_eight_in_a_row_are_longer_steps() -> None:
    costs = Costs()
    for _ in range(5 + 10):
        costs.step(0.1, in_flight=False)
    assert costs.ready
    for _ in range(3):
        for _ in range(7):
            costs.step(1.1, in_flight=False)
        assert costs.ready
        costs.step(0.1, in_flight=False)
    for _ in range(7):
        costs.step(1.1, in_flight=False)
    assert costs.ready
    costs.step(1.1, in_flight=False)
    assert not costs.ready
    for _ in range(9):
        costs.step(1.1, in_flight=False)
    assert costs.ready
    costs.step(1.4, in_flight=True)
    costs.snapshot(stall=0.2, durable=1.0)
    assert costs.each == pytest.approx(0.5)


def test_steps_that_become_longer_are_the_new_usual() -> None:
    training = Training(
        "1%", step=lambda n: 0.1 if n < 3000 else 2.0, cost=lambda _: Cost(0.1, 1.5, 5.0)
    )
    training.run(300)
    training.run(6000)
    before = len(training.taken)
    training.lost = 0.0
    training.run(20_000)
    assert len(training.taken) - before > 30
    assert training.lost / 20_000 < 0.011


def test_snapshots_that_cost_nothing_leave_half_of_the_steps_alone() -> None:
    training = Training("1%", step=steady(0.1), cost=lambda _: Cost(0.0, 1.0, 4.0))
    training.run(1000)
    assert min(training.intervals()) >= 8


def test_an_interval_of_hours_is_told_once_with_the_way_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = Training("1%", step=steady(1.0), cost=lambda _: Cost(60.0, 1.0, 90.0))
    training.run(86_400)
    (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert '"1%, 1h"' in warning.getMessage() and "every 111.1m" in warning.getMessage()
    caplog.clear()
    training = Training("1%, 1h", step=steady(1.0), cost=lambda _: Cost(60.0, 1.0, 90.0))
    training.run(86_400)
    rest = training.intervals()[1:]
    assert rest == pytest.approx([3600.0] * len(rest), abs=61)
    assert not [one for one in caplog.records if one.levelno == logging.WARNING]


def test_failed_snapshots_count_what_they_blocked() -> None:
    training = Training("1%", step=steady(0.1), cost=lambda _: Cost(0.5, 1.0, 0.5, fails=True))
    training.run(1000)
    assert training.intervals()[3] == pytest.approx(50 / 0.9, rel=0.03)


def test_a_change_is_told_when_it_is_notable(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pysnap")

    def cost(number: int) -> Cost:
        return Cost(0.1 if number < 30 else 0.3, 1.0, 0.5)

    Training("1%", step=steady(0.1), cost=cost).run(3000)
    lines = [one.getMessage() for one in caplog.records]
    assert "a snapshot every 11s from now on: one costs 0.1s of training" in lines[0]
    assert 2 <= len(lines) <= 4
    assert {one.levelno for one in caplog.records} == {logging.INFO}


# What is a cost


def costs(*steps: float) -> Costs:
    """Costs that have seen the first steps of a process, and then these."""
    found = Costs()
    for seconds in (*[9.0] * 5, *steps):
        found.step(seconds, in_flight=False)
    return found


def cost_of(found: Costs, *beside: float) -> float:
    """What one costs that blocks nothing, with these steps beside it."""
    for seconds in beside:
        found.step(seconds, in_flight=True)
    found.snapshot(stall=0.0, durable=1.0)
    return found.each


def test_pauses_that_come_now_and_then_are_never_taken_for_longer_steps() -> None:
    found = costs(*[0.1] * 20)
    for _ in range(20):
        found.step(5.0, in_flight=False)
        found.step(0.1, in_flight=False)
    assert cost_of(found, 0.3) == pytest.approx(0.2)


def test_eight_long_steps_in_a_row_are_the_new_length_and_seven_are_a_pause() -> None:
    seven, eight = costs(*[0.1] * 20, *[5.0] * 7), costs(*[0.1] * 20, *[5.0] * 8)
    assert seven.ready and cost_of(seven, 0.3) == pytest.approx(0.2)
    assert not eight.ready
    for _ in range(9):
        eight.step(5.0, in_flight=False)
    assert eight.ready and cost_of(eight, 6.0) == pytest.approx(1.0)


def test_beside_a_snapshot_a_pause_is_longer_than_it_was_in_flight() -> None:
    found = costs(*[0.1] * 20)
    # In 8 s, two steps that take 3.1 s each are the snapshot's doing, three are not.
    for beside, cost in (([8.05], 7.95), ([3.1] * 2, 6.0), ([0.3, *[3.1] * 3], 0.2)):
        for seconds in beside:
            found.step(seconds, in_flight=True)
        found.snapshot(stall=0.0, durable=8.0)
        assert found._costs[-1] == pytest.approx(cost)
    # Nor is it known to be where it failed.
    found.step(3.1, in_flight=True)
    found.snapshot(stall=0.0, durable=None)
    assert found._costs[-1] == 0.0


def test_what_is_a_pause_follows_steps_that_became_longer() -> None:
    # Thirty times the first steps, and six times those before it.
    assert cost_of(costs(*[0.1] * 10, *[0.5] * 64), 3.0) == pytest.approx(2.5)


def test_the_first_snapshot_says_nothing_of_how_long_the_others_take() -> None:
    found = costs(*[0.1] * 20)
    for durable in (100.0, 1.0):
        found.snapshot(stall=0.0, durable=durable)
    assert found.durable == 1.0
    for durable in (9.0, 9.0, None):
        found.snapshot(stall=0.0, durable=durable)
    assert found.durable == 9.0


@dataclass
class Taken:
    """A snapshot that somebody else took, and that is durable."""

    stall_seconds: float
    durable_seconds: float | None = 1.0

    def done(self) -> bool:
        return True


def after_steps(rule: str, *, mtbf: float = 6 * 3600) -> tuple[Schedule, float]:
    """A schedule that has seen 30 steps of 0.1 s, and the time."""
    schedule, now = Schedule(Cadence.parse(rule, "every"), mtbf=mtbf, now=1000.0), 1000.0
    for step in range(30):
        now += 0.1
        schedule.after_step(step, now)
    return schedule, now


def test_one_that_is_saved_between_two_steps_counts() -> None:
    """As by two calls of save() without a step: the first is durable before anybody looks."""
    schedule, now = after_steps("1%")
    schedule.taken(Taken(0.5), now)
    assert schedule.interval is None
    schedule.taken(Taken(0.5), now + 0.5)
    assert schedule.interval == pytest.approx(50 / 0.9)


def test_each_snapshot_is_counted_with_its_own_stall() -> None:
    schedule, now = after_steps("1%")
    for stall in (0.5, 0.2, 0.2, 0.2, 0.2):
        schedule.taken(Taken(stall), now)
        now += stall + 0.1
        schedule.after_step(99, now)
    assert schedule.interval == pytest.approx(20 / 0.9)


@pytest.mark.parametrize("rule", ["1%, auto", "auto, 1%"])
@pytest.mark.parametrize(
    ("mtbf", "interval"), [(600.0, math.sqrt(2 * 0.5 * 600)), (86_400.0, 50 / 0.9)]
)
def test_of_two_measured_rules_the_shorter_interval_holds(
    rule: str, mtbf: float, interval: float
) -> None:
    schedule, now = after_steps(rule, mtbf=mtbf)
    schedule.taken(Taken(0.5), now)
    schedule.after_step(99, now + 0.6)
    assert schedule.interval == pytest.approx(interval)


def test_the_way_out_of_hours_between_snapshots_keeps_the_rule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for rule in ("2%", "auto"):
        schedule, now = after_steps(rule, mtbf=30 * 86_400.0)
        schedule.taken(Taken(200.0), now)
        schedule.after_step(99, now + 200.1)
    assert ['"2%, 1h"' in caplog.messages[0], '"auto, 1h"' in caplog.messages[1]] == [True] * 2


# Least loss


@pytest.mark.parametrize("mtbf", [600.0, 6 * 3600.0, 86_400.0])
@pytest.mark.parametrize("stall", [0.05, 2.0])
def test_auto_is_the_root_of_twice_the_cost_times_the_time_between_failures(
    mtbf: float, stall: float
) -> None:
    training = Training("auto", step=steady(0.1), cost=lambda _: Cost(stall, 1.0, 1.0), mtbf=mtbf)
    training.run(20 * math.sqrt(2 * stall * mtbf) + 100)
    assert training.intervals()[-1] == pytest.approx(math.sqrt(2 * stall * mtbf), abs=0.2)


def test_auto_is_never_shorter_than_the_time_until_one_is_durable() -> None:
    training = Training("auto", step=steady(0.1), cost=lambda _: Cost(0.001, 1.0, 30.0), mtbf=60)
    training.run(3000)
    assert min(training.intervals()) >= 30
    assert training.late == 0


@pytest.mark.parametrize(("mtbf", "interval"), [(6 * 3600.0, 1 / 0.009), (600.0, 1200**0.5)])
def test_of_a_share_and_the_least_loss_the_shorter_interval_counts(
    mtbf: float, interval: float
) -> None:
    training = Training("1%, auto", step=steady(0.1), cost=lambda _: Cost(1.0, 1.0, 1.0), mtbf=mtbf)
    training.run(1000)
    assert training.intervals()[-1] == pytest.approx(interval, abs=0.3)


def test_whichever_comes_first() -> None:
    training = Training("auto, 100 steps", step=steady(0.1), cost=lambda _: Cost(1.0, 1.0, 1.0))
    training.run(500)
    assert [step for _, step in training.taken][1:6] == [100, 200, 300, 400, 500]


def test_a_snapshot_is_never_due_by_cost_while_the_first_is_in_flight() -> None:
    training = Training("1%", step=steady(0.1), cost=lambda _: Cost(0.1, 1.0, 100.0))
    training.run(90)
    assert len(training.taken) == 1 and training.late == 0


# A day


@dataclass
class Day:
    """What a run is asked for. A snapshot is durable after `durable` to 1.25 times as many seconds,
    and the first one behind `tagged` seconds gets a tag."""

    rule: str
    keep: Keep
    best: str
    durable: float = 20.0
    tagged: float = math.inf
    by_epochs: bool = False


DAYS = {
    "ten minutes": Day("10m", Keep(last=2, best=2, every="6h"), "min loss"),
    "one percent": Day("1%", Keep(last=3, best=1, every="4h", for_="12h"), "min loss by 0.05"),
    "auto": Day("auto", Keep(last=1, for_="30m", every=None, best=3), "min loss"),
    "steps, off and on": Day("5000 steps", Keep(last=1, every="20000 steps"), "max loss"),
    "a slow disk": Day("15m", Keep(last=2, best=1, for_="50m"), "min loss", 1000.0, 6 * 3600.0),
    "epochs": Day("1 epoch, 90m", Keep(last=2, every="4 epochs"), "max loss", by_epochs=True),
}
EPOCH_STEPS = 6000


def day(asked: Day) -> str:
    """24 hours of steps of 1 to 1.2 s with a validation every 30 minutes; the process dies at 09:40
    and goes on from the newest durable snapshot."""
    keep, best = asked.keep, Best.parse(asked.best)
    draw = random.Random(5)

    training = Training(
        asked.rule,
        step=noisy(1.1, 0.05, seed=3),
        cost=lambda _: Cost(1.5 + draw.random(), 1.3, asked.durable * (1 + draw.random() / 4)),
    )
    there: list[Snapshot] = []
    held: dict[Path, str] = {}
    lines = [f"{asked.rule}, {keep}, {asked.best}"]
    in_flight: tuple[str, Snapshot] | None = None
    record: float | None = None
    sequence = 0
    died = False
    start = training.now
    base = 0.0  # seconds of training before this process
    next_validation = 1800.0

    def clock() -> float:
        return base + training.now - start

    def taken(why: str, loss: float | None) -> None:
        nonlocal in_flight, sequence
        land()
        sequence += 1
        new = snapshot_of(
            training.step,
            sequence,
            seconds=clock(),
            epoch=training.step // EPOCH_STEPS,
            loss=loss,
        )
        in_flight = why, new

    def land() -> None:
        """What was in flight is durable: retention acts."""
        nonlocal in_flight, there
        if in_flight is None:
            return
        (why, new), in_flight = in_flight, None
        seconds = new.manifest.metadata["progress"]["seconds"]
        if seconds > asked.tagged and not held:
            held[new.path] = "tagged noon"
        verdicts = plan([new, *there], keep, best=best, held=held)
        gone = [str(one.snapshot.step) for one in verdicts if not one.kept]
        there = [one.snapshot for one in verdicts if one.kept]
        tail = f", removed {' '.join(gone)}" if gone else ""
        hours, minutes = divmod(int(seconds) // 60, 60)
        lines.append(f"{hours:02}:{minutes:02} step {new.step}: {why}{tail}")

    while clock() < 86_400:
        if training.one_step():
            taken("due", None)
        elif asked.by_epochs and training.step % EPOCH_STEPS == 0 and training.end_epoch():
            taken("epoch", None)
        if not training.busy():
            land()
        if clock() >= next_validation:
            next_validation += 1800
            loss = round(3 / (1 + clock() / 7200) + 0.2 * draw.random(), 3)
            training.schedule.pause()
            training.now += 60
            if best.improves(loss, record):
                record = loss
                while training.busy():
                    training.now += 0.5
                training.take()
                taken(f"loss {loss}", loss)
        if not died and clock() > 9 * 3600 + 2400:
            died = True
            newest = there[0]
            lost = f", without {in_flight[1].step}" if in_flight else ""
            in_flight = None
            lines.append(f"killed at step {training.step}, goes on at step {newest.step}{lost}")
            base = newest.manifest.metadata["progress"]["seconds"]
            step = newest.step
            late = training.late
            training = Training(
                asked.rule,
                step=training._step_seconds,
                cost=lambda _: Cost(1.5 + draw.random(), 1.3, asked.durable),
            )
            training.step, training.late, start = step, late, training.now
    lines.append(f"late: {training.late}")
    lines += [
        f"left: step {one.snapshot.step} at "
        f"{shown_seconds(60 * (one.snapshot.manifest.metadata['progress']['seconds'] // 60))}: "
        f"{one.reason}"
        for one in plan(there, keep, best=best, held=held)
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", DAYS)
def test_a_day_of_training_is_the_golden_one(name: str) -> None:
    assert day(DAYS[name]) == (GOLDEN / f"{name.replace(',', '')}.txt").read_text()


# Snapshotter


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the Snapshotter, to be set."""
    moment = [1000.0]
    monkeypatch.setattr(snapshotter.time, "monotonic", lambda: moment[0])
    return moment


def slow_copies(training: pysnap.Snapshotter, now: list[float], seconds: float) -> None:
    """Every capture blocks for so long."""
    begin = training._stager.begin

    def slow(*arguments: object, **named: object) -> object:
        now[0] += seconds
        return begin(*arguments, **named)  # type: ignore[arg-type]  # passed through

    training._stager.begin = slow  # type: ignore[method-assign,assignment]  # a slow copy


def test_snapshotter_asks_the_schedule_with_what_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: list[float]
) -> None:
    """On a clock of our own: steps of 1 s, captures of 2 s; at 10% there is one every 22 s."""
    monkeypatch.setenv("PYSNAP_EVERY", "10%")
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every=3, keep=Keep(last=None)) as training:
        slow_copies(training, now, 2.0)
        for step in training.steps(100):
            with training.step():
                now[0] += 1.0
            training._committer.wait_idle()
            if step % 10 == 5:
                now[0] += 500.0
                training.report(loss=1.0)
        assert training.stats().interval_seconds == pytest.approx(20 / 0.9)
    steps = sorted(one.step for one in repository.list_snapshots(tmp_path).snapshots)
    assert steps[0] == 18  # five to warm up, ten to know; two hold a validation
    # A validation of 500 s is time, too: one is due behind each.
    assert steps[1:4] == [27, 37, 47]


@pytest.mark.parametrize(("mtbf", "seconds"), [(None, 6 * 3600), ("800s", 800)])
def test_auto_asks_for_the_time_between_failures(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    now: list[float],
    mtbf: str | None,
    seconds: float,
) -> None:
    if mtbf is not None:
        monkeypatch.setenv("PYSNAP_MTBF", mtbf)
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every="auto") as training:
        slow_copies(training, now, 2.0)
        for _ in training.steps(30):
            with training.step():
                now[0] += 1.0
            training._committer.wait_idle()
        assert training.stats().interval_seconds == pytest.approx(math.sqrt(2 * 2.0 * seconds))


@pytest.mark.parametrize("how", ["epochs", "save", "report"])
def test_a_validation_that_the_snapshotter_can_know_of_is_no_step(
    tmp_path: Path, now: list[float], how: str
) -> None:
    """It takes nine times as long as a step, so that nothing else tells it from one."""
    with pysnap.Snapshotter(tmp_path, values={"a": 1}, every="1%") as training:
        for _ in training.epochs(5) if how == "epochs" else range(5):
            for _ in range(10):
                with training.step():
                    now[0] += 1.0
                training._committer.wait_idle()
            now[0] += 8.0
            if how == "save":
                training.save().wait()
            elif how == "report":
                training.report(loss=1.0)
        with training.step():
            now[0] += 1.0
        assert set(training._schedule._costs._plain) == {1.0}
        assert set(training._schedule._costs._costs) == {0.0}


# Amounts


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.3123, "0.31s"), (47.4, "47s"), (150.0, "150s"), (200.0, "3.3m"), (5400.0, "90m")],
)
def test_durations_are_shown_in_few_digits(seconds: float, shown: str) -> None:
    assert shown_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [(312, "312 B"), (999.7, "1 kB"), (4.72e6, "4.72 MB"), (123.4e9, "123 GB"), (5e15, "5000 TB")],
)
def test_sizes_are_shown_in_few_digits(size: float, shown: str) -> None:
    assert shown_size(size) == shown


def test_a_bare_number_is_seconds_for_a_time_and_steps_for_an_amount() -> None:
    assert parse_seconds("30") == 30 and parse_seconds("1.5m") == 90
    assert Amount.parse("30") == Amount("steps", 30)
    with pytest.raises(ValueError, match="expected an amount"):
        Amount.parse(True)
