"""CPU quota and memory limit of control groups, read from file trees like those of kernels and container runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimode.common import machine
from trimode.common.cgroup import cpu_quota, memory_left

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
V1_GROUPS = "4:memory:{group}\n2:cpu,cpuacct:{group}\n1:name=systemd:/\n0::/\n"
UNLIMITED = str(9223372036854771712)  # what v1 writes


def tree(root: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    for path, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def v1(root: Path, group: str, files: dict[str, str], mounted: str = "/") -> Path:
    below = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    return tree(root, V1.format(root=mounted), V1_GROUPS.format(group=group), below)


def v2(root: Path, group: str, files: dict[str, str]) -> Path:
    return tree(root, V2, f"0::{group}\n", {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def test_no_groups_no_limits(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert memory_left(tmp_path) is None
    assert cpu_quota(v2(tmp_path, "/", {})) is None


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"a/b/cpu.max": "150000 100000"}, 1.5),
        ({"a/b/cpu.max": "max 100000"}, None),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ({"a/b/cpu.max": "200000 100000", "a/cpu.max": "800000 100000"}, 2.0),
    ],
)
def test_cpu_quota_of_v2(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(v2(tmp_path, "/a/b", files)) == quota


@pytest.mark.parametrize("mounted", ["/", "/docker/c1"])
def test_cpu_quota_of_v1(tmp_path: Path, mounted: str) -> None:
    """In a container the mount shows the group itself."""
    folder = "cpu,cpuacct" + ("/docker/c1" if mounted == "/" else "")
    files = {f"{folder}/cpu.cfs_quota_us": "250000\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(v1(tmp_path, "/docker/c1", files, mounted)) == 2.5


def test_a_group_outside_of_the_mount(tmp_path: Path) -> None:
    """The view of a process that was moved out of its namespace."""
    assert cpu_quota(v2(tmp_path, "/../other", {"cpu.max": "300000 100000"})) == 3


def test_no_quota_in_v1_is_minus_one(tmp_path: Path) -> None:
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    assert cpu_quota(v1(tmp_path, "/", files)) is None


def test_memory_of_v2_counts_dropped_files_as_free(tmp_path: Path) -> None:
    files = {
        "a/memory.max": "1000000",
        "a/memory.current": "600000",
        "a/memory.stat": "anon 100000\nfile 500000\ninactive_file 450000\n",
        "memory.max": "max",
    }
    assert memory_left(v2(tmp_path, "/a", files)) == 1000000 - 600000 + 450000


def test_memory_of_v1_is_that_of_the_tightest_ancestor(tmp_path: Path) -> None:
    files = {
        "memory/a/b/memory.limit_in_bytes": UNLIMITED,
        "memory/a/b/memory.usage_in_bytes": "1000",
        "memory/a/memory.limit_in_bytes": "5000",
        "memory/a/memory.usage_in_bytes": "4000",
        "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
    }
    assert memory_left(v1(tmp_path, "/a/b", files)) == 1500
    assert memory_left(v1(tmp_path / "full", "/a", {**files, "memory/a/memory.usage_in_bytes": "7000"})) == 0


@pytest.mark.parametrize(("quota", "cpus"), [(None, 4), (8.0, 4), (2.0, 2), (1.5, 2), (0.1, 1)])
def test_threads_follow_affinity_and_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, cpus: int) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.usable_cpus() == cpus


def test_available_memory_is_the_lower_of_the_machines_and_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_left", lambda: None)
    whole = machine.available_memory()
    assert whole > 0
    monkeypatch.setattr(machine, "memory_left", lambda: 1000)
    assert machine.available_memory() == 1000
    monkeypatch.setattr(machine, "memory_left", lambda: 1 << 60)
    assert machine.available_memory() < 1 << 60
