"""Settings come from the environment, are documented, and refuse bad values with one line."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli import app
from api.service_settings import ELSEWHERE, ServiceSettings
from indexer.settings import Settings, SettingsError

ROOT = Path(__file__).parents[2]

NAMES = (
    "home database_url checkpoint device host port k max_false_alarm max_miss prior unknown max_upload_bytes "
    "max_pixels record"
)


def test_every_setting_of_the_design_exists_and_is_documented() -> None:
    assert set(NAMES.split()) <= set(ServiceSettings.model_fields)
    assert [name for name, field in ServiceSettings.model_fields.items() if not field.description] == []


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServiceSettings.model_fields:
        monkeypatch.delenv(f"LINEUP_{name.upper()}", raising=False)
    settings = ServiceSettings.read()
    assert settings.home == Path("lineup-data")
    assert settings.checkpoint_folder == Path("lineup-data/checkpoint")
    assert (settings.host, settings.port, settings.k) == ("127.0.0.1", 8000, 10)
    assert (settings.max_false_alarm, settings.max_miss, settings.unknown, settings.prior) == (0.05, 0.05, 0.05, 0.5)
    assert (settings.max_upload_bytes, settings.max_pixels) == (20 * 1024 * 1024, 50_000_000)


def test_environment_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEUP_K", "25")
    monkeypatch.setenv("LINEUP_CHECKPOINT", "")  # as compose files write what is not set
    monkeypatch.setenv("LINEUP_RECORD", "false")
    assert ServiceSettings.read().k == 25
    assert ServiceSettings.read().checkpoint is None
    assert ServiceSettings.read().record is False
    assert ServiceSettings.read(k=3, device=None).k == 3


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("PORT", "99999", "65535"),
        ("PORT", "tcp://10.0.0.1:8000", "is 'tcp://10.0.0.1:8000': no port, 0..65535; Kubernetes sets it so"),
        ("PORT", "tcp://10.0.0.1:8000", "rename the Service, or set enableServiceLinks: false"),
        ("K", "0", "greater than or equal to 1"),
        ("DEVICE", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("PRIOR", "1", "less than 1"),
        ("MAX_PIXELS", "many", "valid integer"),
        ("MAX_INFLIGHT_BYTES", "1000", "LINEUP_MAX_REQUEST_BYTES (268435456)"),
        ("DATABASE_URL", "mysql://me:secret@host/db", "postgresql://"),
        ("TOKEN", "secret", "is wrong"),
        ("CORS_ORIGINS", "foo", "https://a.example"),
        ("CORS_ORIGINS", "https://a.example, https://b.example/", "'https://b.example/' is no origin"),
        ("THUMBNAILS_FROM", "file:///a/,s3://bucket", "'s3://bucket' is no place"),
        ("THUMBNAILS_FROM", "https://", "'https://' is no place"),
    ],
)
def test_bad_values_are_one_line_with_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, part: str
) -> None:
    monkeypatch.setenv(f"LINEUP_{name}", value)
    with pytest.raises(SettingsError) as caught:
        ServiceSettings.read()
    message = str(caught.value)
    assert message.startswith(f"LINEUP_{name} ")
    assert part in message
    assert "\n" not in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("LINEUP_CHEKPOINT", "LINEUP_CHECKPOINT"),
        ("LINEUP_DATABASE", "LINEUP_DATABASE_URL"),
        ("lineup_prt", "LINEUP_PORT"),
    ],
)
def test_a_misspelt_variable_is_one_line_with_the_nearest_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=f"^{name} is no setting; the nearest is {nearest}: .*$"):
        ServiceSettings.read()


def test_foreign_variables_are_one_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    address = "tcp://10.0.0.1:8000"
    foreign = {"SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "8000", "SERVICE_PORT_HTTP": "8000", "API_PORT": address}
    for start in ("PORT_1_TCP", "PORT_80_TCP", "PORT_8000_TCP", "API_PORT_8000_TCP"):
        foreign |= {start: address, f"{start}_PROTO": "tcp", f"{start}_PORT": "8000", f"{start}_ADDR": "10.0.0.1"}
    for name, value in foreign.items():
        monkeypatch.setenv(f"LINEUP_{name}", value)
    assert ServiceSettings.read().port == ServiceSettings.read().port == 8000
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert {f"LINEUP_{name}" for name in foreign} == set(re.findall(r"LINEUP_\w+", line))


def test_a_misspelt_variable_stops_training_too() -> None:
    done = CliRunner().invoke(app, ["train", "heads", "--data", "x"], env={"LINEUP_CHEKPOINT": "x"})
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "LINEUP_CHEKPOINT is no setting; the nearest is LINEUP_CHECKPOINT" in done.stderr


def test_every_variable_that_something_reads_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [path.read_text() for path in (ROOT / "docker").rglob("*") if path.is_file()]
    texts += [path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != Path(__file__).name]
    named = set(re.findall(r"LINEUP_[A-Z_]*[A-Z]", "".join(texts)))
    assert set(ELSEWHERE) <= named
    for name in named:
        monkeypatch.setenv(name, "")
    assert ServiceSettings.read() is not None
    assert Settings.read() is not None


def test_a_password_is_not_shown() -> None:
    settings = ServiceSettings(database_url="postgresql://me:secret@host/db")
    assert "secret" not in repr(settings)


def test_every_start_has_a_token_of_its_own_that_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ServiceSettings.read(), ServiceSettings.read()
    assert first.token != second.token
    assert min(len(first.token), len(second.token)) >= 40
    assert first.token not in repr(first)
    monkeypatch.setenv("LINEUP_TOKEN", "chosen-for-scripts")
    assert ServiceSettings.read().token == "chosen-for-scripts"
