"""`python -m pysnap demo`: train, kill, resume, and compare with a run that was never killed.

The training program (`pysnap.demo.train`) runs three times, each time as a process of its own:
uninterrupted; with a SIGKILL at a random step; and resumed from what the killed process left. The
resumed process starts from another seed, so whatever the snapshot fails to bring back shows.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysnap.cadence import Cadence
from pysnap.demo import overhead
from pysnap.errors import ConfigError, Error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.progress import Progress

EPOCHS = 2
MIN_STEPS = 10
TRAINING_SEED = 20_240_229
THREADS = 2
POLL_SECONDS = 0.1
NAMED_DIFFERENCES = 3
ERROR_LINES = 15

MARKER = ".pysnap-demo"
UNINTERRUPTED, INTERRUPTED = "uninterrupted", "interrupted"
PLOT, REPORT = "report.png", "report.json"
OUTPUTS = (UNINTERRUPTED, INTERRUPTED, PLOT, REPORT)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the demo trains, and how often it takes a snapshot."""

    steps: int
    every: str
    source: str = "default"
    """Where `every` came from."""
    layers: int
    width: int
    batch_size: int = 4
    device: str = "cpu"

    @property
    def steps_per_epoch(self) -> int:
        return self.steps // EPOCHS

    def arguments(self) -> list[str]:
        """The plan in the words of the training program's command line."""
        return [
            f"--epochs={EPOCHS}",
            f"--steps-per-epoch={self.steps_per_epoch}",
            f"--batch-size={self.batch_size}",
            f"--layers={self.layers}",
            f"--width={self.width}",
            f"--every={self.every}",
            f"--device={self.device}",
        ]


FULL = Plan(steps=300, every="20 steps", layers=6, width=192)
QUICK = Plan(steps=120, every="10 steps", layers=4, width=128)


@dataclass(frozen=True)
class Step:
    """One step as the training program logged it; floats as hex, `batch` as a digest."""

    step: int
    loss: str
    learning_rate: str
    batch: str
    seconds: float
    at: float
    """When it ended, by the clock of its process."""


@dataclass(frozen=True)
class Snapshot:
    """One durable snapshot as the training program logged it."""

    step: int
    stall_seconds: float
    durable_seconds: float
    raw_bytes: int
    stored_bytes: int
    name: str
    at: float
    """When it was durable, by the clock of its process."""


@dataclass
class Attempt:
    """What is known of one process of the training program, as its log grows."""

    start_step: int = 0
    start: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)

    def add(self, line: bytes) -> None:
        """Takes in one line of the log."""
        record = json.loads(line)
        event = record.pop("event")
        if event == "step":
            self.steps.append(Step(**record))
        elif event == "snapshot":
            self.snapshots.append(Snapshot(**record))
        else:
            self.start_step = record["step"]
            self.start = record

    @property
    def last_step(self) -> int:
        return self.steps[-1].step if self.steps else self.start_step

    @property
    def losses(self) -> list[float]:
        return [float.fromhex(step.loss) for step in self.steps]

    def plain_step_seconds(self) -> float:
        """Median duration of a step after which no snapshot was taken; 0 where there is none."""
        busy = {snapshot.step for snapshot in self.snapshots}
        plain = [step.seconds for step in self.steps if step.step not in busy]
        return statistics.median(plain) if plain else 0.0

    def overhead(self) -> overhead.Overhead | None:
        """What the snapshots of a process that began at step 0 cost it."""
        return overhead.measure(
            [step.at for step in self.steps],
            [
                overhead.Flight(snapshot.step, snapshot.stall_seconds, snapshot.at)
                for snapshot in self.snapshots
            ],
        )


class LogReader:
    """Reads a growing file of lines; a line without its end is left for the next call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> Iterator[bytes]:
        """The lines that were completed since the last call; none while there is no file."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield line


def run_attempt(
    command: Sequence[str],
    *,
    folder: Path,
    name: str,
    on_change: Callable[[Attempt], None],
    device: str = "cpu",
) -> tuple[Attempt, int]:
    """Runs one process to its end while following its log, `folder/name.jsonl`.

    Returns what it logged and its exit status; its own output goes to `folder/name.txt`. Should
    this process be interrupted, the child is killed.
    """
    attempt = Attempt()
    reader = LogReader(folder / f"{name}.jsonl")
    with (folder / f"{name}.txt").open("xb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(device),
        )
    try:
        running = True
        while running:
            try:
                process.wait(POLL_SECONDS)
                running = False
            except subprocess.TimeoutExpired:
                pass
            for line in reader.lines():
                attempt.add(line)
            on_change(attempt)
    finally:
        process.kill()
        process.wait()
    return attempt, process.returncode


def child_environment(device: str = "cpu") -> dict[str, str]:
    """This process's environment, less what would change the arithmetic or the resume."""
    environment = {key: value for key, value in os.environ.items() if key != "PYSNAP_RESUME"}
    threads = str(THREADS)
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    # A math library that picks its number of threads by load would change the order of its sums.
    environment |= {"OMP_DYNAMIC": "FALSE", "MKL_DYNAMIC": "FALSE"}
    # A thread that spins at a barrier keeps its partner off the core when another process is busy.
    environment |= {"GOMP_SPINCOUNT": "1000"}
    if device == "cpu":
        return environment | {"CUDA_VISIBLE_DEVICES": ""}
    # torch refuses cuBLAS without it where results must be deterministic.
    return environment | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def check_status(status: int, expected: int, *, what: str, output: Path) -> None:
    """Raises with the end of the child's output unless it ended as it should."""
    if status == expected:
        return
    text = output.read_text(errors="replace").strip()
    tail = "\n".join(text.splitlines()[-ERROR_LINES:]) or "(no output)"
    raise Error(
        f"the {what} run ended with status {status} instead of {expected}; its output "
        f"({output}) ends with:\n{tail}"
    )


def choose_kill(
    chance: random.Random, *, steps: int, steps_per_epoch: int, snapshots: Sequence[int]
) -> int:
    """A random step in mid-epoch, if possible after two of the `snapshots` (their steps), else one.

    Raises `ConfigError` where no step before the last follows a snapshot.
    """
    for after in reversed(sorted(set(snapshots))[:2]):
        candidates = [step for step in range(after + 1, steps) if step % steps_per_epoch != 0]
        if candidates:
            return chance.choice(candidates)
    raise ConfigError(
        f"no snapshot was taken early enough to be resumed from within {steps} steps: choose a "
        f"shorter --every (or PYSNAP_EVERY, where it is set) or more --steps"
    )


@dataclass(frozen=True)
class Row:
    """One kind of thing that was compared: how many, and each difference as a sentence."""

    what: str
    compared: int
    differences: list[str]


def compare_maps(what: str, expected: dict[str, str], found: dict[str, str]) -> Row:
    """Compares by key; a key that only one side has is a difference."""
    keys = list(expected | found)
    differences = [
        f"{key}: {brief(found.get(key))} instead of {brief(expected.get(key))}"
        for key in keys
        if expected.get(key) != found.get(key)
    ]
    return Row(what, len(keys), differences)


def brief(text: str | None) -> str:
    """`text` in at most 48 characters."""
    if text is None:
        return "nothing"
    return text if len(text) <= 48 else f"{text[:45]}..."


@dataclass(frozen=True)
class Story:
    """The three processes, and the end states of the two that reached the end."""

    plan: Plan
    kill_at: int
    uninterrupted: Attempt
    killed: Attempt
    resumed: Attempt
    uninterrupted_end: dict[str, Any]
    resumed_end: dict[str, Any]

    def compare(self) -> list[Row]:
        """Everything that must be the same, bit for bit."""
        rows = [self._compare_sequence()]
        for what, column in (
            ("losses, per step", "loss"),
            ("learning rates, per step", "learning_rate"),
            ("batches, per step", "batch"),
        ):
            rows.append(self._compare_steps(what, column))
        for what, section in (
            ("tensors of model and optimizer", "tensors"),
            ("other values of the state", "values"),
            ("random number generators", "rngs"),
        ):
            expected, found = self.uninterrupted_end[section], self.resumed_end[section]
            rows.append(compare_maps(what, expected, found))
        rows.append(
            compare_maps(
                "first batch of the next epoch",
                {"next batch": self.uninterrupted_end["next_batch"]},
                {"next batch": self.resumed_end["next_batch"]},
            )
        )
        return rows

    def _attempts(self) -> list[tuple[str, Attempt, int]]:
        """The name of each process, what it logged, and the step that it had to reach."""
        return [
            ("uninterrupted", self.uninterrupted, self.plan.steps),
            ("killed", self.killed, self.kill_at),
            ("resumed", self.resumed, self.plan.steps),
        ]

    def _compare_sequence(self) -> Row:
        """Each process logs each of its steps once and in order, and nothing durable is lost."""
        differences = []
        for name, attempt, last in self._attempts():
            first = attempt.start_step + 1
            if [step.step for step in attempt.steps] != list(range(first, last + 1)):
                differences.append(
                    f"the {name} run did not log each step from {first} to {last} once, in order"
                )
        resumed_from = self.resumed.start_step
        durable = max((snapshot.step for snapshot in self.killed.snapshots), default=0)
        if not 1 <= resumed_from <= self.kill_at:
            differences.append(
                f"the resumed run went on from step {resumed_from}, which is no snapshot of the "
                f"run that was killed after step {self.kill_at}"
            )
        elif resumed_from < durable:
            differences.append(
                f"the resumed run went on from step {resumed_from}, although the snapshot of step "
                f"{durable} had been reported durable"
            )
        return Row("processes with every step in order", len(self._attempts()), differences)

    def _compare_steps(self, what: str, column: str) -> Row:
        expected: dict[str, str] = {}
        found: dict[str, str] = {}
        reference = {step.step: getattr(step, column) for step in self.uninterrupted.steps}
        for name, attempt, last in self._attempts()[1:]:
            for number in range(attempt.start_step + 1, last + 1):
                expected[f"step {number} ({name})"] = reference.get(number, "nothing")
            for step in attempt.steps:
                found[f"step {step.step} ({name})"] = getattr(step, column)
        return compare_maps(what, expected, found)


def tell_story(
    plan: Plan, *, out: Path, chance: random.Random, console: Console, progress: Progress
) -> Story:
    """Runs the three processes, with a progress bar for each."""

    def attempt(
        folder: str, name: str, *options: str, expected: int = 0, label: str = ""
    ) -> Attempt:
        task = progress.add_task(label or name, total=plan.steps, detail="starting")

        def show(so_far: Attempt) -> None:
            if so_far.start:
                loss = f"loss {so_far.losses[-1]:.3f}" if so_far.steps else "starting"
                durable = f"{len(so_far.snapshots)} snapshots durable"
                progress.update(task, completed=so_far.last_step, detail=f"{loss}, {durable}")

        command = [sys.executable, "-m", "pysnap.demo.train", f"--dir={out / folder}"]
        command += [f"--attempt={name}", *plan.arguments(), *options]
        result, status = run_attempt(
            command, folder=out / folder, name=name, on_change=show, device=plan.device
        )
        check_status(status, expected, what=name, output=out / folder / f"{name}.txt")
        progress.stop_task(task)
        return result

    uninterrupted = attempt(UNINTERRUPTED, "uninterrupted", f"--seed={TRAINING_SEED}")
    kill_at = choose_kill(
        chance,
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        snapshots=[snapshot.step for snapshot in uninterrupted.snapshots],
    )
    killed = attempt(
        INTERRUPTED,
        "killed",
        f"--seed={TRAINING_SEED}",
        f"--kill-at={kill_at}",
        expected=-signal.SIGKILL,
        label=f"killed at step {kill_at}",
    )
    if any((out / INTERRUPTED / "repository").glob(".partial-*")):
        console.print("The SIGKILL struck while a snapshot was being written.")
    resumed = attempt(INTERRUPTED, "resumed", f"--seed={TRAINING_SEED + 1}")
    return Story(
        plan=plan,
        kill_at=kill_at,
        uninterrupted=uninterrupted,
        killed=killed,
        resumed=resumed,
        uninterrupted_end=json.loads((out / UNINTERRUPTED / "uninterrupted.json").read_bytes()),
        resumed_end=json.loads((out / INTERRUPTED / "resumed.json").read_bytes()),
    )


def prepare_folder(out: Path) -> None:
    """Makes `out` an empty demo folder; refuses one that holds anything but an earlier demo."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / MARKER).is_file():
            raise ConfigError(
                f"{out} is not empty and not the folder of an earlier demo: name another with --out"
            )
        (out / MARKER).touch()
        for name in OUTPUTS:
            path = out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for name in (UNINTERRUPTED, INTERRUPTED):
            (out / name).mkdir()
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be the demo's folder ({error}): name another with --out"
        ) from error


def print_report(console: Console, story: Story, rows: Sequence[Row]) -> None:
    """Two tables, then the verdict."""
    from rich.table import Table

    table = Table(title="Resumed against uninterrupted, bit for bit", title_justify="left")
    table.add_column("compared")
    table.add_column("number", justify="right")
    table.add_column("different", justify="right")
    for row in rows:
        count = len(row.differences)
        table.add_row(row.what, str(row.compared), f"[red]{count}[/]" if count else "[green]0[/]")
    console.print(table)

    table = Table(title="Snapshots of the uninterrupted run", title_justify="left")
    table.add_column("figure")
    table.add_column("median", justify="right")
    table.add_column("largest", justify="right")
    snapshots = story.uninterrupted.snapshots
    step = story.uninterrupted.plain_step_seconds()
    stalls = [snapshot.stall_seconds for snapshot in snapshots]
    durable = [snapshot.durable_seconds for snapshot in snapshots]
    raw = [float(snapshot.raw_bytes) for snapshot in snapshots]
    stored = [float(snapshot.stored_bytes) for snapshot in snapshots]

    def add(name: str, values: list[float], text: Callable[[float], str]) -> None:
        table.add_row(name, text(statistics.median(values)), text(max(values)))

    add("stall", stalls, milliseconds)
    add("stall, share of a step", stalls, lambda value: percent(value, step))
    add("time to durable", durable, milliseconds)
    add("size of the state", raw, megabytes)
    add("size stored", stored, megabytes)
    console.print(table)

    print_overhead(console, story.uninterrupted)
    console.print(
        f"Killed after step {story.kill_at}, resumed from step {story.resumed.start_step} in "
        f"{milliseconds(story.resumed.start['resume_seconds'])}."
    )
    if any(row.differences for row in rows):
        console.print("[bold red]DIFFERENT[/]: the resumed run is not the run that was not killed.")
        for row in rows:
            for difference in row.differences[:NAMED_DIFFERENCES]:
                console.print(f"  {row.what}: {difference}", markup=False, soft_wrap=True)
    else:
        console.print(
            "[bold green]THE SAME[/]: the resumed run is bit for bit the run that was never killed."
        )


def print_overhead(console: Console, attempt: Attempt) -> None:
    """What the snapshots cost, as shares of the training time."""
    from rich.table import Table

    found = attempt.overhead()
    if found is None:
        console.print("Overhead unknown: no steps with and without a snapshot to compare.")
        return
    table = Table(
        title=f"Overhead of {found.snapshots} snapshots in {found.seconds:.1f} s of training",
        title_justify="left",
    )
    table.add_column("cost")
    table.add_column("share of training", justify="right")
    table.add_row("training stood still", f"{found.stall_share:.2%}")
    table.add_row("steps beside a snapshot took longer", f"{found.inflation_share:.2%}")
    error = "" if found.error is None else f" ± {found.error:.2%}"
    table.add_row("together", f"{found.share:.2%}{error}")
    console.print(table)


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %" if whole else "unknown"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def megabytes(number: float) -> str:
    return f"{number / 1e6:.1f} MB"


def plot(path: Path, story: Story, rows: Sequence[Row]) -> None:
    """Draws the loss, and the stall, time to durable and size of each snapshot, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    differences = sum(len(row.differences) for row in rows)
    figure.suptitle(
        f"DIFFERENT: the resumed run differs {differences} times from the uninterrupted run"
        if differences
        else f"Killed after step {story.kill_at}, resumed from step {story.resumed.start_step}: "
        f"bit for bit the uninterrupted run"
    )
    (loss, stall), (durable, size) = figure.subplots(2, 2)
    plot_loss(loss, story)
    series = [
        ("uninterrupted", story.uninterrupted, "#9ecae1", 70),
        ("killed", story.killed, "#d94801", 22),
        ("resumed", story.resumed, "#08306b", 22),
    ]
    for name, attempt, color, area in series:
        at = [snapshot.step for snapshot in attempt.snapshots]
        stalls = [snapshot.stall_seconds * 1e3 for snapshot in attempt.snapshots]
        seconds = [snapshot.durable_seconds * 1e3 for snapshot in attempt.snapshots]
        stall.scatter(at, stalls, s=area, color=color, label=name)
        durable.scatter(at, seconds, s=area, color=color, label=name)
    stall.set(title="Stall of each snapshot", ylabel="milliseconds")
    durable.set(title="Time to durable", ylabel="milliseconds")
    step = story.uninterrupted.plain_step_seconds() * 1e3
    if step:
        share = stall.secondary_yaxis(
            "right", functions=(lambda y: y * 100 / step, lambda y: y * step / 100)
        )
        share.set_ylabel(f"% of a step ({step:.0f} ms)")

    snapshots = story.uninterrupted.snapshots
    at = [snapshot.step for snapshot in snapshots]
    width = 0.6 * min((b - a for a, b in itertools.pairwise(at)), default=1)
    raw = [snapshot.raw_bytes / 1e6 for snapshot in snapshots]
    stored = [snapshot.stored_bytes / 1e6 for snapshot in snapshots]
    size.bar(at, raw, width, color="#deebf7", edgecolor="#9ecae1", label="state")
    size.bar(at, stored, width * 0.7, color="#08519c", label="stored")
    size.set(title="Size, uninterrupted run", ylabel="MB")

    for axes in (loss, stall, durable, size):
        axes.set_xlabel("step")
        axes.set_xlim(0, story.plan.steps * 1.04)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (stall, durable, size):
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.2)
        axes.legend(frameon=False, ncols=3, loc="upper left")
    figure.savefig(path)


def plot_loss(axes: Axes, story: Story) -> None:
    """The loss of all three processes, which lie on each other; the kill and the resume marked."""
    for attempt, name, color, width in (
        (story.uninterrupted, "uninterrupted", "#9ecae1", 5.0),
        (story.killed, "killed", "#d94801", 1.0),
        (story.resumed, "resumed", "#08306b", 1.0),
    ):
        numbers = [step.step for step in attempt.steps]
        axes.plot(numbers, attempt.losses, color=color, linewidth=width, label=name)
    kill_at, resumed_from = story.kill_at, story.resumed.start_step
    axes.axvspan(resumed_from, kill_at, color="#fdd0a2", alpha=0.5, label="trained twice")
    axes.axvline(resumed_from, color="#08306b", linestyle=":", label=f"resumed from {resumed_from}")
    axes.axvline(kill_at, color="#d94801", linestyle="--", label=f"SIGKILL after {kill_at}")
    axes.set(title="Training loss", ylabel="nats per byte")
    axes.legend(loc="upper right", ncols=2, framealpha=1, edgecolor="none")


def write_report(path: Path, story: Story, rows: Sequence[Row], *, seed: int) -> None:
    """Everything that the report shows, as JSON."""
    report = {
        "same": not any(row.differences for row in rows),
        "seed": seed,
        "plan": asdict(story.plan),
        "torch": story.uninterrupted.start["torch"],
        "parameters": story.uninterrupted.start["parameters"],
        "kill_at": story.kill_at,
        "resumed_from": story.resumed.start_step,
        "resume_seconds": story.resumed.start["resume_seconds"],
        "step_seconds": story.uninterrupted.plain_step_seconds(),
        "compared": [asdict(row) for row in rows],
        "overhead": overhead_report(story.uninterrupted),
        "snapshots": [asdict(snapshot) for snapshot in story.uninterrupted.snapshots],
    }
    path.write_text(json.dumps(report, indent=1))


def overhead_report(attempt: Attempt) -> dict[str, Any] | None:
    found = attempt.overhead()
    return None if found is None else asdict(found) | {"share": found.share}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options of `python -m pysnap demo`; exits with status 2 where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m pysnap demo",
        description="Trains a small GPT, kills it, resumes it, and compares every bit with a run "
        "that was never killed. PYSNAP_EVERY, where it is set, wins over --every. "
        "Exit status: 0 the same, 1 different or failed, 2 cannot start.",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model, about 30 seconds")
    parser.add_argument("--steps", type=int, help=f"steps of training (default {FULL.steps})")
    parser.add_argument("--every", help=f"cadence of the snapshots (default {FULL.every!r})")
    parser.add_argument("--seed", type=int, help="chooses the step of the kill (default: random)")
    parser.add_argument("--out", type=Path, default=Path("pysnap-demo"), help="folder to write to")
    parser.add_argument("--device", default="cpu", help="what trains: cpu (default), cuda, cuda:1")
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < MIN_STEPS:
        parser.error(f"--steps is {options.steps}, but must be at least {MIN_STEPS}")
    return options


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan that the options, and `PYSNAP_EVERY`, ask for; the steps are rounded up to whole
    epochs. Raises ConfigError for what is no cadence."""
    base = QUICK if options.quick else FULL
    steps = base.steps if options.steps is None else options.steps
    every, source = base.every, "default"
    for given, name in (
        (options.every, "--every"),
        (os.environ.get("PYSNAP_EVERY"), "PYSNAP_EVERY"),
    ):
        if given is not None:
            every, source = given, name
            Cadence.parse(every, source)
    return Plan(
        steps=-(-steps // EPOCHS) * EPOCHS,
        every=every,
        source=source,
        layers=base.layers,
        width=base.width,
        device=options.device,
    )


def device_refusal(name: str) -> str | None:
    """Why the demo cannot train on the device of this name; None where it can."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"--device is {name!r}, which cannot be used: {first}"
    return None


def main(argv: list[str]) -> int:
    """Runs the demo; returns 0 if the resumed run is the same, 1 if not, 2 if it cannot start."""
    options = parse_arguments(argv)
    missing = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"The demo needs {' and '.join(missing)}: pip install 'pysnap[demo]'", file=sys.stderr
        )
        return 2
    if options.device != "cpu" and (why := device_refusal(options.device)) is not None:
        print(why, file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    out = options.out.absolute()
    console = Console(highlight=False)
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    try:
        plan = make_plan(options)
        prepare_folder(out)
        console.print(
            f"A GPT of {plan.layers} layers x {plan.width} learns Python's standard library: "
            f"{EPOCHS} epochs of {plan.steps_per_epoch} steps, cadence {plan.every!r} (from "
            f"{plan.source}), seed {seed}."
        )
        with Progress(*columns, console=console) as progress:
            story = tell_story(
                plan, out=out, chance=random.Random(seed), console=console, progress=progress
            )
        rows = story.compare()
        write_report(out / REPORT, story, rows, seed=seed)
        plot(out / PLOT, story, rows)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (Error, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    print_report(console, story, rows)
    console.print(f"Plot: {out / PLOT}\nFigures: {out / REPORT}", markup=False, soft_wrap=True)
    return 1 if any(row.differences for row in rows) else 0
