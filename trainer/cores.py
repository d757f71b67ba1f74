"""How many CPU cores there are to share."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """CPU cores that this process may use, at least 1: by its affinity, and by the quota of its container.

    `os.cpu_count` tells those of the machine, whatever a container is allowed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def _quota() -> float:
    """CPU seconds per second that the control group allows, by version 2 or 1; infinite where it sets no limit."""
    two, one = CGROUPS / "cpu.max", CGROUPS / "cpu"
    try:
        if two.exists():
            quota, period = two.read_text().split()
        else:
            quota, period = ((one / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no control groups, or no limit ("max")
        return math.inf
