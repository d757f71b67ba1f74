"""How many CPU cores there are to share, and how much memory."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
"""Lines of `number:controllers:path`; version 2 names no controllers."""


def usable_cores() -> int:
    """CPU cores that this process may use, at least 1: by its affinity, and by the quotas of its control groups.

    `os.cpu_count` tells those of the machine, whatever a container or a unit of systemd is allowed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([cores, *map(_quota, _groups("cpu"))])))


def usable_memory() -> int:
    """Bytes of memory that this process and its children may use: the machine's, within the limits of groups."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min([machine, *map(_memory_limit, _groups("memory"))]))


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, by version 2 and 1, each with those above it up to the root.

    Each of them limits what is in it. Some may be out of sight, and are no folders then.
    """
    paths = {"": "/", controller: "/"}
    with suppress(OSError, ValueError):  # no control groups
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)
    for root, path in ((CGROUPS, paths[""]), (CGROUPS / controller, paths[controller])):
        group = PurePosixPath(path.lstrip("/"))
        yield from (root / folder for folder in (group, *group.parents))


def _quota(group: Path) -> float:
    """CPU seconds per second that this control group allows; infinite where it sets no limit."""
    try:
        if (two := group / "cpu.max").exists():
            quota, period = two.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return math.inf


def _memory_limit(group: Path) -> float:
    """Bytes of memory that this control group allows; infinite where it sets no limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such group or file, or no limit ("max")
            return int((group / name).read_text())
    return math.inf
