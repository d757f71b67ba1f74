"""The embedded server survives kills and bad neighbours; every failure to connect is one line."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import GeneratorType
from typing import Any, cast
from unittest.mock import Mock

import psutil
import psycopg
import pytest
from served import clock_stepped
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from indexer.database.connection import DatabaseBehind, DatabaseUnreachable, connect, migrate, stop
from indexer.database.embedded import EmbeddedFailure, EmbeddedServer, exit_on_termination
from indexer.settings import Settings, SettingsError

ROOT = Path(__file__).parents[3]
USER = """
import os, sys
from pathlib import Path
from indexer.database.connection import connect
from indexer.settings import Settings, SettingsError
from indexer.store import Store
print(Store(connect(Settings(home=Path(sys.argv[1])))).id(), flush=True)
if sys.argv[2] == "line":
    sys.stdin.readline()
else:
    import uvicorn
    async def app(scope, receive, send):
        print("serving", flush=True)
        await send({"type": "lifespan.startup.complete"})
    uvicorn.run(app, port=0, log_level="error")
"""


def use(home: Path, until: str = "line") -> "subprocess.Popen[str]":
    """A process that starts or joins the server, prints the store's id, and waits for a line, or serves HTTP."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LINEUP_HOME": str(home)}
    environment.pop("LINEUP_DATABASE_URL", None)
    return subprocess.Popen(
        [sys.executable, "-c", USER, str(home), until],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, process.wait()
    return line


def end(process: "subprocess.Popen[str]") -> None:
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def kill_group(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def postmaster(home: Path) -> int | None:
    """The server's process id, while it runs."""
    try:
        pid = int((home / "postgres/postmaster.pid").read_text().split()[0])
        return pid if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else None
    except (FileNotFoundError, IndexError, psutil.NoSuchProcess):
        return None


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server still runs"
        time.sleep(0.05)


@pytest.fixture
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="lineup-"))
    yield folder
    EmbeddedServer(folder).stop()
    shutil.rmtree(folder, ignore_errors=True)


def test_two_first_starts_at_once_share_one_server_until_the_last_leaves(home: Path) -> None:
    first, second = use(home), use(home)
    assert said(first) == said(second)
    pid = postmaster(home)
    assert pid is not None
    end(first)
    assert postmaster(home) == pid
    third = use(home)
    said(third)
    kill_group(third)  # never says goodbye, and must not be waited for
    end(second)
    wait_until_gone(pid)
    assert json.loads((home / "postgres.users.json").read_text()) == []


def test_termination_leaves_the_server_also_where_uvicorn_has_handled_it(home: Path) -> None:
    processes = [use(home, "signal"), use(home)]
    assert said(processes[0]) == said(processes[1])
    assert said(processes[0]) == "serving"
    pid = postmaster(home)
    assert pid is not None
    for process in processes:
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
    assert postmaster(home) is None


def test_termination_ends_the_process_also_where_python_drops_what_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        exit_on_termination()
        targets = [Mock()]
        reference = weakref.ref(targets[0], lambda _: os.kill(os.getpid(), signal.SIGTERM))

        def forget_and_wait() -> None:
            targets.clear()
            time.sleep(5)

        with pytest.raises(SystemExit) as ended:
            forget_and_wait()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert reference() is None
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_copy_of_a_home_has_a_server_of_its_own(home: Path) -> None:
    """In the copy, postmaster.pid names the original's server, which still answers."""
    first = use(home)
    said(first)
    pid = postmaster(home)
    copy = home / "copy"
    copy.mkdir()
    for name in ("postgres", "postgres.users.json"):
        subprocess.run(["cp", "-a", str(home / name), str(copy / name)], check=True)
    assert not EmbeddedServer(copy).stop()
    second = use(copy)
    said(second)
    own = postmaster(copy)
    assert own is not None
    assert own != pid
    end(second)  # its last user: the original's are not its own
    wait_until_gone(own)
    assert postmaster(home) == pid
    end(first)


def test_a_home_moved_while_its_server_runs_is_joined_where_it_is(home: Path) -> None:
    first = use(home)
    its = said(first)
    pid = postmaster(home)
    moved = home / "moved"
    moved.mkdir()
    for name in ("postgres", "postgres.users.json"):
        (home / name).rename(moved / name)
    second, third = use(home), use(moved)
    assert said(second) != its
    assert said(third) == its
    assert postmaster(moved) == pid
    for process in (first, second, third):
        kill_group(process)
    assert EmbeddedServer(moved).stop()


def test_a_server_that_cannot_be_looked_at_is_told_by_its_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(process: psutil.Process) -> str:
        raise psutil.AccessDenied(process.pid)

    first = use(home)
    said(first)
    pid = postmaster(home)
    monkeypatch.setattr(psutil.Process, "cwd", denied)
    server = EmbeddedServer(home)
    server.start()
    assert postmaster(home) == pid
    server.leave()
    end(first)
    assert postmaster(home) is None


def test_a_moved_home_keeps_to_its_own_rows(home: Path) -> None:
    """A server that was killed leaves its old address behind, where the next home's server answers by now."""
    first = use(home)
    its = said(first)
    pid = postmaster(home)
    assert pid is not None
    kill_group(first)
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)
    moved = home / "moved"
    moved.mkdir()
    (home / "postgres").rename(moved / "postgres")
    second, third = use(home), use(moved)
    assert said(second) != its
    assert said(third) == its
    end(second)
    end(third)


def test_a_killed_first_start_is_started_again(home: Path) -> None:
    """The kill falls into initdb or near it (`test_kills` tries other moments); the next start works."""
    process = use(home)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)
    kill_group(process)
    again = use(home)
    store = said(again)
    end(again)
    third = use(home)
    assert said(third) == store
    end(third)
    assert list(home.glob("postgres.new-*")) == []


def test_a_killed_server_recovers_even_if_its_pid_is_taken(home: Path) -> None:
    settings = Settings(home=home, database_url=None)
    engine = connect(settings)
    with engine.begin() as connection:
        connection.execute(text("create table kept (n int)"))
    pid = postmaster(home)
    assert pid is not None
    children = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)
    for child in children:
        wait_until_gone(child.pid)
    # Linux gives process ids again: now it is another process, which answers to no connection.
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        lines = (home / "postgres" / name).read_text().split("\n")
        (home / "postgres" / name).write_text("\n".join([str(os.getpid()), *lines[1:]]))
    engine.dispose()
    assert not EmbeddedServer(home).was_stopped()
    engine = connect(settings)
    with engine.connect() as connection:
        assert connection.scalar(text("select count(*) from kept")) == 0
    engine.dispose()
    assert stop(settings)
    assert not stop(settings)
    assert EmbeddedServer(home).was_stopped()


def test_users_that_are_gone_or_whose_pid_is_anothers_do_not_count(home: Path) -> None:
    server = EmbeddedServer(home)
    server.start()
    pid = postmaster(home)
    assert pid is not None
    users = json.loads((home / "postgres.users.json").read_text())
    users += [[2**22 + 1, users[0][1]], [os.getppid(), "another start"]]
    (home / "postgres.users.json").write_text(json.dumps(users))
    server.leave()
    wait_until_gone(pid)


def test_the_server_is_not_stopped_under_a_user_of_an_earlier_version(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halt = Mock()
    monkeypatch.setattr(EmbeddedServer, "_halt", halt)
    users, server = home / "postgres.users.json", EmbeddedServer(home)
    users.write_text(json.dumps([[os.getppid(), 1.5e9], [2**22 + 1, 1.5e9]]))
    server.leave()
    assert json.loads(users.read_text()) == [[os.getppid(), 1.5e9]]
    halt.assert_not_called()


def test_a_home_is_left_once_however_often_its_server_was_started(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register = Mock()
    monkeypatch.setattr("atexit.register", register)
    monkeypatch.setattr(EmbeddedServer, "_initialise", lambda server: None)
    monkeypatch.setattr(EmbeddedServer, "_run", lambda server: None)
    for _ in range(2):
        EmbeddedServer(home).start()
    assert register.call_count == 1


def test_a_list_of_users_that_the_disk_does_not_take_stays_as_it_was(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, limits, users = EmbeddedServer(home), resource.getrlimit(resource.RLIMIT_FSIZE), '[[1, "a start"]]'
    (home / "postgres.users.json").write_text(users)
    monkeypatch.setattr(EmbeddedServer, "_initialise", lambda server: None)
    monkeypatch.setattr(EmbeddedServer, "_run", lambda server: None)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with pytest.raises(EmbeddedFailure, match="File too large"):
            server.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (home / "postgres.users.json").read_text() == users


def test_a_step_of_the_clock_takes_the_server_from_nobody(home: Path) -> None:
    first = use(home)
    said(first)
    pid = postmaster(home)
    with clock_stepped(3600):
        server = EmbeddedServer(home)
        server.start()
        server.leave()
    assert postmaster(home) == pid
    end(first)
    assert postmaster(home) is None


def test_a_path_too_long_for_a_socket_works_and_is_closed_to_others(home: Path) -> None:
    long = home / ("long" * 25)
    server = EmbeddedServer(long)
    url = server.start()
    socket = Path(str(url.query["host"]))
    assert socket != long / "postgres"
    assert socket.stat().st_mode & 0o777 == 0o700
    server.leave()
    shutil.rmtree(socket, ignore_errors=True)


@pytest.mark.parametrize("name", ["with space", "it's", "a$b", "a;b"])
def test_paths_that_postgres_cannot_take_are_refused_up_front(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatabaseUnreachable, match="LINEUP_HOME") as caught:
        connect(Settings(home=tmp_path / name, database_url=None))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_something_else_is_left_alone(home: Path) -> None:
    (home / "postgres").mkdir()
    (home / "postgres/mine.txt").write_text("keep")
    with pytest.raises(EmbeddedFailure, match="LINEUP_HOME") as caught:
        EmbeddedServer(home).start()
    assert "\n" not in str(caught.value)
    assert (home / "postgres/mine.txt").read_text() == "keep"


def test_a_server_that_has_no_room_to_recover_is_given_up_soon(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recovering(server: EmbeddedServer) -> None:
        raise psycopg.OperationalError("the database system is in recovery mode")

    (home / "postgres").mkdir()
    (home / "postgres/PG_VERSION").write_text("18")
    monkeypatch.setattr(EmbeddedServer, "_run", recovering)
    monkeypatch.setattr("indexer.database.embedded.FAILURE_SECONDS", 0)
    usage = shutil.disk_usage(home)._replace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(EmbeddedFailure, match="its disk is full"):
        EmbeddedServer(home).start()


@pytest.mark.skipif(os.getuid() != 0, reason="only root's copies belong to root")
def test_a_home_that_root_copied_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.database.embedded.FAILURE_SECONDS", 0)
    EmbeddedServer(home).start()
    EmbeddedServer(home).stop()
    for path in [home / "postgres", *(home / "postgres").rglob("*")]:
        shutil.chown(path, "root")
    with pytest.raises(EmbeddedFailure, match="chown"):
        EmbeddedServer(home).start()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@127.0.0.1:1/db",
        "postgresql://me:secret@no-such-host.invalid/db",
        "postgresql://@/x?host=/",
        "postgresql://me@127.0.0.1:1/db?password=secret&sslpassword=secret",
        "postgresql://me:secret@127.0.0.1:nonsense/db",
        "postgresql://me:very@secret@127.0.0.1:1/db",
    ],
)
def test_an_unreachable_database_is_one_line_without_the_password(url: str) -> None:
    with pytest.raises((DatabaseUnreachable, SettingsError), match="LINEUP_DATABASE_URL") as caught:
        connect(Settings(database_url=url))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_place_of_a_database_is_told_also_where_parameters_say_it() -> None:
    with pytest.raises(DatabaseUnreachable) as caught:
        connect(Settings(database_url="postgresql:///db?host=/no/such/place&port=77&sslpassword=secret"))
    assert "no database at postgresql+psycopg:///db?host=%2Fno%2Fsuch%2Fplace&port=77 (" in str(caught.value)


def test_the_connection_limits_how_long_it_waits(settings: Settings) -> None:
    url = make_url(str(settings.database_url)).update_query_dict({"connect_timeout": "7"})
    shown = settings.model_copy(update={"database_url": url.render_as_string(hide_password=False)})
    engine = connect(shown, statement_seconds=1)
    with engine.connect() as connection:
        driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
        parameters = driver.info.get_parameters()
        assert {name: parameters[name] for name in ("connect_timeout", "tcp_user_timeout", "keepalives_idle")} == {
            "connect_timeout": "7",
            "tcp_user_timeout": "30000",
            "keepalives_idle": "15",
        }
        with pytest.raises(OperationalError, match="statement timeout"):
            connection.execute(text("select pg_sleep(60)"))
    engine.dispose()
    engine = connect(settings)
    with engine.connect() as connection:
        assert connection.scalar(text("show statement_timeout")) == "0"  # exports and rebuilds take their time
    engine.dispose()


def test_termination_amid_an_answer_is_no_failure_of_the_database(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the pool asks whether a connection still answers, whose mode it would then set back."""
    engine, wait = connect(settings), psycopg.Connection.wait

    def ended(connection: psycopg.Connection[Any], gen: "GeneratorType[Any, Any, Any]", *limits: Any) -> Any:
        if gen.__name__ != "_execute_gen":
            return wait(connection, gen, *limits)
        next(gen)
        raise SystemExit(128 + signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Connection, "wait", ended)
        with pytest.raises(SystemExit):
            engine.connect()
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    engine.dispose()


def test_a_process_opens_so_many_connections_and_no_more(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.database.connection.POOL_SECONDS", 0.1)
    engine = connect(settings.model_copy(update={"database_connections": 6}))
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(engine.connect())
        with pytest.raises(PoolTimeout):
            engine.connect()
    engine.dispose()


def test_another_schema_is_refused_with_the_command(settings: Settings) -> None:
    assert settings.database_url is not None
    engine = create_engine(settings.database_url.replace("postgresql:", "postgresql+psycopg:"))
    migrate(engine, "base")
    with pytest.raises(DatabaseBehind, match="lineup index migrate"):
        connect(settings)
    connect(settings, check=False).dispose()
    migrate(engine)
    connect(settings).dispose()
    with engine.begin() as connection:
        connection.execute(text("update alembic_version set version_num = 'future'"))
    with pytest.raises(DatabaseBehind, match="future, which this version does not know: update Lineup"):
        connect(settings)
    engine.dispose()


def test_a_database_of_another_encoding_is_refused(settings: Settings) -> None:
    engine = connect(settings).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("create database ascii encoding 'SQL_ASCII' locale 'C' template template0"))
    url = make_url(str(settings.database_url)).set(database="ascii").render_as_string(hide_password=False)
    with pytest.raises(DatabaseUnreachable, match=r"encoding SQL_ASCII.*--encoding=UTF8"):
        connect(settings.model_copy(update={"database_url": url}), check=False)
    with engine.connect() as connection:
        connection.execute(text("drop database ascii"))
    engine.dispose()


def test_leaving_a_deleted_home_does_not_bring_it_back(tmp_path: Path) -> None:
    EmbeddedServer(tmp_path / "gone").leave()
    assert not EmbeddedServer(tmp_path / "gone").stop()
    assert list(tmp_path.iterdir()) == []
