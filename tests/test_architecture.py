"""The import contracts of pyproject.toml, and what a bare import may do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVING = [
    "trainer.images",
    "trainer.datasets",
    "trainer.embedder",
    "trainer.heads",
    "indexer.store",
    "indexer.follower",
    "indexer.ingest",
    "api.app",
    "api.detector",
]


def test_imports_go_one_way() -> None:
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("module", SERVING)
def test_serving_modules_import_no_training_library(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(result.stdout))
    assert module in loaded
    assert not loaded & {"torch", "timm", "sklearn", "webdataset", "torchvision", "matplotlib"}


def test_importing_starts_nothing(tmp_path: Path) -> None:
    modules = ", ".join(SERVING)
    code = f"import threading, {modules}; print(threading.active_count())"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == "1"
    assert list(tmp_path.iterdir()) == []
