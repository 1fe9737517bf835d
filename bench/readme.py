"""The figures in README.md, from results files: tables, the machines, the commands, two plots.

    python bench/readme.py [RESULTS.json] [--gpu CUDA.json]

replaces what stands between two comments in README.md, once for each file, and draws the plots
again. Nothing is measured: `bench_snapshot.py` and `bench_cuda.py` do that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import coding
import peers
import plot
import training
from report import (
    Results,
    Spread,
    blocked_ratios,
    coding_kinds,
    coding_rates,
    lost_by,
    noise_seconds,
    restore_seconds,
    stored_ratios,
)

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results" / "snapshot.json"
GPU_RESULTS = HERE / "results" / "cuda.json"
BEGIN = "<!-- figures: written by `python bench/readme.py`, not by hand -->"
BEGIN_GPU = "<!-- figures of a GPU: written by `python bench/readme.py`, not by hand -->"
END = "<!-- end of the figures -->"
_UNKNOWN = "-"

# Figures of one subject, of all results; of one coder, of the results for one kind of bytes.
_Column = tuple[str, Callable[[Results, str], "list[float]"], Callable[[float], str]]


def _of_saves(figure: str) -> Callable[[Results, str], list[float]]:
    return lambda results, subject: [row[figure] for row in results["saves"][subject]["warm"]]


def _ratios(results: Results, subject: str) -> list[float]:
    return blocked_ratios(results["saves"][subject]["warm"])


def _lost(loop: str) -> Callable[[Results, str], list[float]]:
    return lambda results, subject: lost_by(results, loop, subject)


def _extra(results: Results, subject: str) -> list[float]:
    extra = results["saves"][subject]["extra_memory"]
    return [] if extra is None else [extra]


def _rates(way: str) -> Callable[[Results, str], list[float]]:
    return lambda result, coder: coding_rates(result, coder, way)


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if abs(value) < 0.1 else f"{value:.2f} s"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _gigabytes_a_second(value: float) -> str:
    return f"{value / 1e9:.2f}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}"


_COLUMNS: tuple[_Column, ...] = (
    ("blocked", _of_saves("blocked_seconds"), _seconds),
    ("/ best memcpy", _ratios, _times),
    ("lost by a save, compute-bound", _lost(training.COMPUTE), _seconds),
    ("GIL-bound", _lost(training.PYTHON), _seconds),
    ("durable", _of_saves("durable_seconds"), _seconds),
    ("on disk", _of_saves("bytes"), _gigabytes),
    ("extra memory", _extra, _gigabytes),
    ("restore", restore_seconds, _seconds),
)
_CODING_COLUMNS: tuple[_Column, ...] = (
    ("stored / raw", stored_ratios, _times),
    ("encode, GB/s", _rates("encode"), _gigabytes_a_second),
    ("decode, GB/s", _rates("decode"), _gigabytes_a_second),
)


def figures(results: Results, results_file: Path, readme: Path = README) -> str:
    """What stands between the comments, as Markdown; links are relative to `readme`."""
    state, machine = results["state"], results["machine"]
    link = partial(_link, readme=readme)
    own = sorted(
        {len(saves["warm"]) for name, saves in results["saves"].items() if name in peers.OURS}
    )
    restored = len(restore_seconds(results, peers.PYSNAP))
    restores = f", of restores of {restored}" if restored else ""
    skipped = [peers.PEERS[name].name for name in results["skipped"]]
    table = link(results_file)
    saving, trained = map(link, plot.files(results_file))
    lines = [
        f"`{results['command']}`, {results['date']}: a state of {state['bytes'] / 1e9:.2f} GB "
        f"({state['parameters'] / 1e6:.0f} M parameters with AdamW in fp32, {state['tensors']} "
        f"tensors), {machine['cores']} cores of {_article(machine['cpu'])}, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB of memory, {machine['file_system']}, "
        f"torch {machine['torch']}; medians of {results['repeats']}, of pysnap's own saves of "
        f"{' or '.join(map(str, own))}{restores}. All repetitions are in "
        f"[{table}]({table}).",
        "",
        _table(results),
        "",
        "The unnamed variant of pysnap is `save()` with default settings, which copies everything "
        "at once; `overlap` is what a snapshot costs that is due at the end of a step; "
        f"`bounded` has {results['bound'] / 2**20:.0f} MiB of staging memory. Lost: seconds of "
        f"training that one save costs in all, blocked time included{_floor(results)}."
        f"{_noise(results)} pysnap's restore checks every byte; the others check nothing.",
        *_coding(results),
    ]
    if results["note"]:
        lines += ["", results["note"]]
    if skipped:
        lines += ["", f"Not installed where this was measured: {'; '.join(skipped)}."]
    lines += [
        "",
        f"![saving and restoring, as bars]({saving})",
        f"![what a save costs training, as bars]({trained})",
    ]
    return "\n".join(lines)


def gpu_figures(results: Results, results_file: Path, readme: Path = README) -> str:
    """The same for a GPU: its bars, and the stalls of all beside each other."""
    machine, rates, side_by_side = results["machine"], results["rates"], results["peers"]
    table = _link(results_file, readme)
    lines = [
        f"`python bench/bench_cuda.py`, {machine['date']}: {machine['device']}, driver "
        f"{machine['driver']}, torch {machine['torch']}, {machine['cores']} cores of "
        f"{_article(machine['cpu'])}, {machine['memory_bytes'] / 1e9:.0f} GB of memory, "
        f"{machine['file_system']}; {_gigabytes_a_second(rates['d2h'])} GB/s to the host, "
        f"{_gigabytes_a_second(rates['h2d'])} GB/s to the device, disk "
        f"{_gigabytes_a_second(results['disk'])} GB/s. All repetitions are in [{table}]({table}).",
        "",
        "| | median | range | bar, at most |",
        "|---|---:|---:|---:|",
    ]
    for bar in results["bars"]:
        spread = Spread.of(bar["values"])
        verdict = "" if bar["passed"] else ", missed"
        lines.append(
            f"| {bar['what']} | {_times(spread.median)} | {_times(spread.low)} to "
            f"{_times(spread.high)} | {bar['limit']:g}{verdict} |"
        )
    lines += [
        "",
        f"How long a save of {_gigabytes(side_by_side['bytes'])} (a model and AdamW) keeps "
        "training from changing the state, staged completely:",
        "",
        "| | first save | later ones |",
        "|---|---:|---:|",
    ]
    for subject, rows in side_by_side["subjects"].items():
        if "warm" in rows:
            later = [row["stall_seconds"] for row in rows["warm"]]
            first = _seconds(rows["first"]["stall_seconds"])
            lines.append(f"| {subject} | {first} | {_cell(later, _seconds)} |")
    skipped = [name for name, rows in side_by_side["subjects"].items() if "skipped" in rows]
    if skipped:
        lines += ["", f"Not measured: {'; '.join(skipped)}."]
    if results["note"]:
        lines += ["", results["note"]]
    plot_of_bars = _link(results_file.with_suffix(".png"), readme)
    lines += ["", f"![what was measured on a GPU, of what is allowed]({plot_of_bars})"]
    return "\n".join(lines)


def _link(path: Path, readme: Path) -> str:
    return Path(os.path.relpath(path, readme.parent)).as_posix()


def _article(name: str) -> str:
    return f"{'an' if name[:1].upper() in 'AEIOU' else 'a'} {name}"


def _table(results: Results) -> str:
    columns = [
        column for column in _COLUMNS if any(column[1](results, name) for name in results["saves"])
    ]
    lines = _head(columns)
    for subject in results["saves"]:
        cells = [_cell(values_of(results, subject), number) for _, values_of, number in columns]
        lines.append(f"| {subject} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _floor(results: Results) -> str:
    """What copying and writing cost training; nothing where that was not measured."""
    lost = [lost_by(results, loop, peers.FLOOR) for loop in training.LOOPS]
    if not all(lost):
        return ""
    costs = " and ".join(_cell(values, _seconds) for values in lost)
    return (
        f"; a memcpy of the state and a direct write of its bytes, with nothing else, cost {costs}"
    )


def _noise(results: Results) -> str:
    """How little the segments of others tell; nothing where they were not measured."""
    loop = training.COMPUTE
    others = [name for name in results["training"].get(loop, {}) if name not in peers.OURS]
    noise = [noise_seconds(results, loop) for loop in training.LOOPS]
    if not others or not all(noise):
        return ""
    ours, theirs = (len(lost_by(results, loop, name)) for name in (peers.PYSNAP, others[0]))
    differ = " and ".join(_cell(values, _seconds) for values in noise)
    return (
        f" pysnap's are medians of {ours} saves, the others' of {theirs} in longer segments, which "
        f"differ by {differ} without any save."
    )


def _coding(results: Results) -> list[str]:
    """What coders make of a trained model; nothing where that was not measured."""
    kinds = coding_kinds(results)
    if not kinds:
        return []
    measured = results["coders"]
    names = [
        name for name in coding.COMPARED if any(name in kind["coders"] for kind in kinds.values())
    ]
    lines = [
        "",
        f"One core, chunks of a model trained for {measured['trained']['steps']} steps, by "
        f"{' / '.join(names)}; medians of {measured['repeats']}:",
        "",
        *_head(_CODING_COLUMNS),
    ]
    for kind, result in kinds.items():
        cells = [
            " / ".join(_cell(values_of(result, name), number) for name in names)
            for _, values_of, number in _CODING_COLUMNS
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def _head(columns: Sequence[_Column]) -> list[str]:
    return [
        "| | " + " | ".join(title for title, _, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]


def _cell(values: list[float], number: Callable[[float], str]) -> str:
    return number(Spread.of(values).median) if values else _UNKNOWN


def replaced(text: str, figures: str, begin: str = BEGIN) -> str:
    """`text` with `figures` between the comments `begin` and END. Raises ValueError where they are
    not there."""
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"there must be a line {begin}, and after it a line {END}")
    return f"{before}{begin}\n\n{figures}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--gpu", type=Path, default=GPU_RESULTS, help="results of bench_cuda.py")
    parser.add_argument("--readme", type=Path, default=README, help="the file that is changed")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    gpu = json.loads(options.gpu.read_text())
    text = options.readme.read_text()
    try:
        new = replaced(text, figures(results, options.results, options.readme))
        new = replaced(new, gpu_figures(gpu, options.gpu, options.readme), BEGIN_GPU)
    except ValueError as error:
        raise SystemExit(f"{options.readme}: {error}") from None
    plot.draw(results, options.results)
    options.readme.write_text(new)
    print(f"written: {options.readme} and the plots beside {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
