"""The import contracts of pyproject.toml, and what a bare import may do."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from api.service_settings import ServiceSettings
from trainer.hub.exporter import export_hub

ROOT = Path(__file__).parent.parent
PROGRAMS = ("trainer", "indexer", "api")
SERVING = [
    "trainer.images",
    "trainer.data.datasets",
    "trainer.model.embedder",
    "trainer.heads.heads",
    "indexer.store",
    "indexer.follower",
    "indexer.ingest.ingest",
    "api.http.app",
    "api.judge.detector",
]


def test_imports_go_one_way() -> None:
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_no_two_modules_share_a_name() -> None:
    paths = [path for program in PROGRAMS for path in (ROOT / program).rglob("*.py") if not path.stem.startswith("__")]
    assert [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1] == []


def test_importing_what_serves_starts_nothing_and_brings_no_training_library(tmp_path: Path) -> None:
    code = f"import sys, threading, {', '.join(SERVING)}; print(threading.active_count(), *sys.modules)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    threads, *loaded = result.stdout.split()
    assert threads == "1"
    assert set(SERVING) <= set(loaded)
    assert not {"torch", "timm", "sklearn", "webdataset", "torchvision", "matplotlib"}.intersection(loaded)
    assert list(tmp_path.iterdir()) == []


LEAN = """
import sys
from pathlib import Path

for name in ("torch", "timm", "sklearn", "torchvision", "webdataset", "cv2", "matplotlib", "scipy"):
    sys.modules[name] = None  # an import of it fails
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from api.__main__ import app as api
from api.http.app import create_app
from indexer.__main__ import app as indexer
from api.service_settings import ServiceSettings
from trainer.__main__ import app as trainer
from trainer.model.embedder import Embedder

folder = Path(sys.argv[1])
image = folder / "real" / "000.jpg"
for app, arguments in (
    (indexer, ["add", str(folder)]),
    (indexer, ["status"]),
    (indexer, ["check"]),
    (api, ["detect", str(image), "--json"]),
):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (arguments, done.output, done.exception)
assert '"engine":"openvino-' in done.stdout, done.stdout
for arguments, library in ((["evaluate", "--data", str(folder)], "cv2"), (["audit"], "sklearn")):
    done = CliRunner().invoke(indexer, arguments)
    assert done.exit_code == 1, (arguments, done.output, done.exception)
    expected = f'error: this command needs {library}, which is not installed: pip install "lineup[train]"'
    assert done.stderr.splitlines()[-1:] == [expected], (done.stderr, done.exception)
out, data = str(folder / "out"), ["--data", str(folder), "--split", "train"]
for arguments, library in (
    (["simulate", out], "cv2"),
    (["fit", *data, "--output", out], "cv2"),
    (["heads", *data], "cv2"),
    (["evaluate", *data], "cv2"),
    (["export", "--output", out], "torch"),
):
    done = CliRunner().invoke(trainer, arguments)
    expected = f'error: this command needs {library}, which is not installed: pip install "lineup[train]"'
    assert done.exit_code == 1, (arguments, done.output, done.exception)
    assert done.stderr.splitlines()[-1:] == [expected], (arguments, done.stderr)
done = CliRunner().invoke(trainer, ["import", sys.argv[2], "--output", "imported"])
assert done.exit_code == 0, (done.output, done.exception)
settings = ServiceSettings.read()
assert Embedder.load(Path("imported")).id == Embedder.load(settings.checkpoint_folder).id
with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000)) as client:
    from time import monotonic, sleep

    deadline, score = monotonic() + 120, None
    while score is None:  # not ready yet, or not calibrated
        answer = client.post("/v1/detect", files={"image": ("a.jpg", image.read_bytes(), "image/jpeg")})
        score = answer.json()["results"][0]["score"] if answer.status_code == 200 else None
        assert monotonic() < deadline, answer.text
        sleep(0.05)
assert sys.modules["openvino_telemetry"] is None  # it would tell of each import
assert list(Path.home().iterdir()) == []
print("served")
"""


def test_adding_detecting_and_serving_need_no_training_library(
    settings: ServiceSettings, tiny_checkpoint: Path, image_folder: Path, tmp_path: Path
) -> None:
    """And a command that does ends in one line which names the extra."""
    export_hub(tiny_checkpoint, tmp_path / "hub")
    (tmp_path / "user").mkdir()
    environment = {
        "HOME": str(tmp_path / "user"),
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "LINEUP_HOME": str(settings.home),
        "LINEUP_DATABASE_URL": str(settings.database_url),
        "LINEUP_CHECKPOINT": str(tiny_checkpoint),
        "LINEUP_OPEN": "true",
    }
    command = [sys.executable, "-c", LEAN, str(image_folder), str(tmp_path / "hub")]
    result = subprocess.run(command, cwd=settings.home.parent, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "served"


def test_the_page_on_the_architecture_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    command = [sys.executable, "-c", "import imports; print(imports.drawn(imports.PAGE.read_text()), end='')"]
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'docs'}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | path)
    assert done.stdout == page, "make docs draws the picture anew"
    words = page.partition("<!-- end of imports -->")[2]
    named = set(re.findall(rf"`((?:{'|'.join(PROGRAMS)})\.[a-z_.]+)`", words))
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for program in PROGRAMS
        for path in (ROOT / program).rglob("*.py")
    }
    assert named <= modules
    packages = {path.parent for program in PROGRAMS for path in (ROOT / program).glob("*/__init__.py")}
    assert {".".join(path.relative_to(ROOT).parts) for path in packages} <= {
        name.rpartition(".")[0] if name.count(".") == 2 else name for name in named
    }
