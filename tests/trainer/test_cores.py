"""Pools are as large as the container allows, not as the machine is."""

import os
from pathlib import Path

import psutil
import pytest

from api.monitoring import Metrics
from api.service import Service
from api.service_settings import ServiceSettings
from trainer import cores
from trainer.cores import usable_cores, usable_memory

ROOT = Path(__file__).parents[2]


def v1(group: str, quota: int) -> dict[str, str]:
    """The files of a control group of version 1."""
    return {f"cpu/{group}/cpu.cfs_quota_us": f"{quota}\n", f"cpu/{group}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores_are_those_of_the_affinity_within_the_quota(
    files: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert usable_cores() == count


@pytest.mark.parametrize(
    ("membership", "files", "count"),
    [
        ("0::/a.slice/b.service", {"a.slice/b.service/cpu.max": "200000 100000\n"}, 2),
        ("0::/a.slice/b.service", {"a.slice/b.service/cpu.max": "max 100000\n"}, 8),
        ("0::/a.slice/b.service", {"a.slice/cpu.max": "300000 100000\n", "a.slice/b.service/cpu.max": "max 1\n"}, 3),
        ("0::/a/b", {"cpu.max": "400000 100000\n", "a/b/cpu.max": "600000 100000\n"}, 4),
        ("0::/a/b", {"c/cpu.max": "100000 100000\n"}, 8),
        ("0::/out/of/sight", {"cpu.max": "400000 100000\n"}, 4),
        ("3:cpu,cpuacct:/docker/f00\n0::/", v1("docker/f00", 200_000) | v1("docker", -1), 2),
        ("3:cpu,cpuacct:/docker/f00\n0::/", v1("docker/f00", -1) | v1("docker", 500_000), 5),
        ("4:cpuset:/docker\n3:cpu:/", v1("docker", 100_000), 8),
        ("3:cpu:/out/of/sight", v1(".", 200_000), 2),
        ("nonsense", {"cpu.max": "400000 100000\n"}, 4),
    ],
)
def test_the_least_quota_on_the_way_to_the_root_counts(
    membership: str, files: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "membership").write_text(f"{membership}\n")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert usable_cores() == count


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({}, None),
        ({"memory.max": "max\n"}, None),
        ({"memory.max": "1000000\n"}, 1_000_000),
        ({"memory.max": "2000000\n", "a/memory.max": "1000000\n"}, 1_000_000),
        ({"memory/a/memory.limit_in_bytes": "1000000\n"}, 1_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_memory_is_the_machines_within_the_limits(
    files: dict[str, str], size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "membership").write_text("9:memory:/a\n0::/a\n")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "membership")
    assert usable_memory() == (size or psutil.virtual_memory().total)


def test_pools_keep_to_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("500000 100000\n")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    service = Service(ServiceSettings(), Metrics())
    assert (service._decoders._max_workers, service._askers._max_workers) == (5, 10)
    service.close()
    modules = [path for name in ("api", "indexer", "trainer") for path in (ROOT / name).rglob("*.py")]
    assert [path.name for path in modules if "cpu_count" in path.read_text()] == ["cores.py"]
