"""How much staging memory may be taken: what the machine and the process's cgroups leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from pysnap import memory

MIB = 1 << 20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1000 MiB free; its /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    write(tmp_path / "proc", meminfo="MemTotal: 9 kB\nMemAvailable: 1024000 kB\n")
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_without_groups_the_machine_counts(system: Path) -> None:
    assert memory.available_memory() == 1000 * MIB


def test_a_group_without_a_limit_does_not_count(system: Path) -> None:
    write(system / "proc/self", cgroup="0::/")
    write(system / "cgroup", memory__max="max", memory__current=5)
    assert memory.available_memory() == 1000 * MIB


@pytest.mark.parametrize("limited", ["", "slurm", "slurm/job_1/step_0"])
def test_the_limit_of_any_group_above_counts(system: Path, limited: str) -> None:
    """A job's limit was not seen where its group is not the root, and the staging memory got it
    killed."""
    write(system / "proc/self", cgroup="0::/slurm/job_1/step_0")
    for name in ("", "slurm", "slurm/job_1", "slurm/job_1/step_0"):
        bound = 300 * MIB if name == limited else "max"
        write(system / "cgroup" / name, memory__max=bound, memory__current=100 * MIB)
    assert memory.available_memory() == 200 * MIB


def test_the_first_version_of_cgroups(system: Path) -> None:
    write(system / "proc/self", cgroup="7:cpu:/x\n4:memory,hugetlb:/job\n0::/")
    write(
        system / "cgroup/memory/job",
        memory__limit_in_bytes=300 * MIB,
        memory__usage_in_bytes=100 * MIB,
    )
    assert memory.available_memory() == 200 * MIB


def test_a_container_sees_its_own_group_as_the_root(system: Path) -> None:
    write(system / "proc/self", cgroup="0::/docker/abc")
    write(system / "cgroup", memory__max=300 * MIB, memory__current=100 * MIB)
    assert memory.available_memory() == 200 * MIB


def test_cached_files_are_free(system: Path) -> None:
    """Their cache fills every group in the end, and hardly any staging memory was left."""
    write(system / "proc/self", cgroup="0::/")
    write(
        system / "cgroup",
        memory__max=300 * MIB,
        memory__current=300 * MIB,
        memory__stat=f"anon 1\ninactive_file {250 * MIB}\nactive_file 7",
    )
    assert memory.available_memory() == 250 * MIB


def test_a_group_that_uses_more_than_it_may_has_nothing_left(system: Path) -> None:
    write(system / "proc/self", cgroup="0::/")
    write(system / "cgroup", memory__max=1, memory__current=2)
    assert memory.available_memory() == 0
