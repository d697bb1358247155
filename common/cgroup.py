"""Limits that control groups set on this process: CPU quota and memory, of cgroup v1 and v2.

A limit may be set on any ancestor of the process's group, so all of them are read, and the lowest limit counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs that the process may use, as a fraction; None without a quota. root: of the file system, for tests."""
    quotas: list[float] = []
    for folder in _folders(root, "cpu"):
        words = (_read(folder / "cpu.max") or "").split()  # v2: "QUOTA PERIOD" or "max PERIOD"
        if not words:
            words = [_read(folder / name) or "-1" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
        quota, period = (_number(word) for word in (*words, "-1")[:2])
        if quota is not None and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_left(root: Path = _ROOT) -> int | None:
    """Bytes that the process may still take; None without a limit. Cached files that can be dropped count as free."""
    left: list[int] = []
    for folder in _folders(root, "memory"):
        for limit_name, usage_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _number(_read(folder / limit_name)), _number(_read(folder / usage_name))
            # v1 writes "no limit" as the largest multiple of a page.
            if limit is not None and limit < 1 << 60:
                left.append(max(0, limit - (usage or 0) + _statistic(folder, cache_name)))
    return min(left, default=None)


def _statistic(folder: Path, name: str) -> int:
    lines = (line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's group and of its ancestors, in every hierarchy with this controller."""
    groups: dict[str, str] = {}  # controllers, "" for v2: path of the group
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        mounted, mount_point = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            group = groups.get("")
        elif kind == "cgroup" and controller in options.split(","):
            group = groups.get(controller)
        else:
            continue
        if group is None:
            continue
        # In a container the mount shows the group itself as its root, under a path of the host.
        inside = PurePosixPath(group)
        below = inside.relative_to(mounted) if inside.is_relative_to(mounted) else PurePosixPath(*inside.parts[1:])
        if ".." in below.parts:  # outside of what is mounted
            below = PurePosixPath()
        top = root / mount_point.lstrip("/")
        folder = top / below
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    """None for a missing file, ``max`` and v1's -1."""
    return int(text) if text is not None and text.isdecimal() else None
