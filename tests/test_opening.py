"""The files of the database while a process opens them: removed, replaced, of another kind."""

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import (
    CONFIG,
    OTHER,
    Server,
    StartApp,
    StartServer,
    close_database,
    flask,
    locked,
    paused,
    remove_files,
    stored,
)
from flask import Flask
from processes import without_privileges

from database import DatabaseFile, StorageError
from models import Credential, ProviderConfig, create_missing


def remove_what_is_beside_the_database(folder: Path) -> None:
    for path in folder.glob("*.db-*"):
        path.unlink()


def lose_files_before_the_opening(monkeypatch: pytest.MonkeyPatch, *suffixes: str) -> None:
    require_wal = DatabaseFile._require_wal

    def require_and_lose_wal(file: DatabaseFile) -> list[int]:
        inodes = require_wal(file)
        remove_files(file.path.parent, *suffixes)
        return inodes

    monkeypatch.setattr(DatabaseFile, "_require_wal", require_and_lose_wal)


@pytest.mark.parametrize("suffixes", [["-wal"], ["-shm"], ["-wal", "-shm"]])
@pytest.mark.parametrize("command", [create_missing, partial(Credential.revoke, "0" * 32)])
def test_command_is_refused_if_files_are_removed_while_it_opens_them(
    server: Server,
    app: Flask,
    credential: str,
    monkeypatch: pytest.MonkeyPatch,
    suffixes: list[str],
    command: Callable[[], object],
) -> None:
    server.put(CONFIG, credential)
    lose_files_before_the_opening(monkeypatch, *suffixes)
    refusal = pytest.raises(StorageError, match="in use without -wal or -shm")
    with paused(server), app.app_context(), refusal:
        command()
    assert server.get(credential).body["data"]["provider"] == "openai"


def test_refused_command_leaves_the_wal_of_the_service(
    start_server: StartServer, app: Flask, credential: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    lose_files_before_the_opening(monkeypatch, "-shm")
    refusal = pytest.raises(StorageError, match="in use without -wal or -shm")
    with paused(server), app.app_context(), refusal:
        Credential.revoke(credential[:32])
    server.stop(signal.SIGKILL)
    assert start_server().get(credential).body["data"]["provider"] == "openai"


def lose_files_before_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    look = DatabaseFile._state

    def lose_files_and_look(file: DatabaseFile) -> list[int]:
        remove_what_is_beside_the_database(file.path.parent)
        return look(file)

    monkeypatch.setattr(DatabaseFile, "_state", lose_files_and_look)


def test_files_removed_twice_while_a_command_opens_them_lose_no_write_of_the_service(
    server: Server, app: Flask, credential: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put(CONFIG, credential)
    lose_files_before_the_opening(monkeypatch, "-wal", "-shm")
    lose_files_before_a_look(monkeypatch)
    refusal = pytest.raises(StorageError, match="in use without -wal or -shm")
    with paused(server), app.app_context(), refusal:
        ProviderConfig.get()
    assert server.get(credential).body["data"]["provider"] == "openai"


def test_removal_after_the_opening_is_noticed(
    app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_database(app)
    with monkeypatch.context() as patch, app.app_context():
        lose_files_before_a_look(patch)
        with pytest.raises(StorageError, match="its files were removed"):
            ProviderConfig.put("openai", "key", "author")
    with app.app_context():
        ProviderConfig.put("other", "key", "author")
    assert (tmp_path / "ai-provider.db-wal").stat().st_size


def test_command_beside_a_service_that_stops_is_not_refused(
    server: Server, app: Flask, credential: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put(CONFIG, credential)
    require_wal = DatabaseFile._require_wal

    def require_and_stop(file: DatabaseFile) -> list[int]:
        inodes = require_wal(file)
        wait([pool.submit(server.stop)], timeout=0.5)
        return inodes

    with ThreadPoolExecutor() as pool, monkeypatch.context() as patch, app.app_context():
        patch.setattr(DatabaseFile, "_require_wal", require_and_stop)
        assert Credential.revoke(credential[:32])


def replace_database(folder: Path) -> None:
    shutil.copy2(folder / "ai-provider.db", folder / "same.db")
    (folder / "same.db").replace(folder / "ai-provider.db")


@pytest.mark.parametrize("act", [remove_what_is_beside_the_database, replace_database])
@pytest.mark.parametrize("lost", [[], ["-shm"]], ids=["nothing", "shm"])
@pytest.mark.parametrize("step", range(6))
def test_act_at_any_step_of_the_opening_loses_no_later_write(
    start_server: StartServer,
    app: Flask,
    credential: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    lost: list[str],
    act: Callable[[Path], None],
) -> None:
    connect, steps = DatabaseFile._connect, count()

    def act_in_time(_statement: str = "") -> None:
        if next(steps) == step:
            act(tmp_path)

    def connect_and_act(file: DatabaseFile, mode: str) -> sqlite3.Connection:
        act_in_time()
        connection = connect(file, mode)
        connection.set_trace_callback(act_in_time)
        return connection

    close_database(app)
    server = start_server()
    server.put(CONFIG, credential)
    server.stop(signal.SIGKILL)
    for suffix in lost:
        (tmp_path / f"ai-provider.db{suffix}").unlink()
    monkeypatch.setattr(DatabaseFile, "_connect", connect_and_act)
    with app.app_context(), suppress(StorageError):
        ProviderConfig.get()
    assert next(steps) > step
    with app.app_context():
        ProviderConfig.put("other", "key", "author")
    copy = tmp_path / "copy"
    copy.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"ai-provider.db{suffix}", copy)
    close_database(app)
    for folder in (copy, tmp_path):
        shown = start_server(DATABASE_URL=f"sqlite:///{folder}/ai-provider.db").get(credential)
        assert shown.body["data"]["provider"] == "other"


def test_database_replaced_during_its_opening_leaves_the_wal_alone(
    server: Server, app: Flask, credential: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connect = tmp_path / "ai-provider.db", DatabaseFile._connect

    def replace_and_connect(file: DatabaseFile, mode: str) -> sqlite3.Connection:
        if mode == "rw":
            monkeypatch.undo()
            database.rename(tmp_path / "away")
            shutil.copy(tmp_path / "older", database)
        return connect(file, mode)

    close_database(app)
    shutil.copy(database, tmp_path / "older")
    server.put(CONFIG, credential)
    server.stop(signal.SIGKILL)
    monkeypatch.setattr(DatabaseFile, "_connect", replace_and_connect)
    with app.app_context(), pytest.raises(StorageError, match="its files were removed"):
        ProviderConfig.get()
    (tmp_path / "away").replace(database)
    config = stored(app)
    assert config
    assert config.provider == CONFIG["provider"]


def test_connection_that_can_only_read_is_not_kept(
    server: Server, app: Flask, credential: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put(CONFIG, credential)
    connect = DatabaseFile._connect
    with monkeypatch.context() as patch, app.app_context():
        patch.setattr(DatabaseFile, "_connect", lambda file, _: connect(file, "ro"))
        with pytest.raises(StorageError, match="attempt to write a readonly database"):
            ProviderConfig.put(**OTHER, updated_by="author")
        assert ProviderConfig.get()
    with app.app_context():
        ProviderConfig.put(**OTHER, updated_by="author")
    assert server.get(credential).body["data"]["provider"] == "other"


def test_files_of_a_database_that_denies_writing_are_not_made(
    monkeypatch: pytest.MonkeyPatch, start_app: StartApp
) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        path = Path(folder, "ai-provider.db")
        monkeypatch.setenv("DATABASE_URL", f"sqlite:///{path}")
        monkeypatch.setenv("ENCRYPTION_KEY_FILE", f"{folder}/encryption.key")
        with without_privileges():
            app = start_app()
            with app.app_context():
                ProviderConfig.put("openai", "key", "author")
            path.chmod(0o400)
            Path(f"{path}-wal").unlink()
            with app.app_context(), pytest.raises(StorageError, match="Permission denied"):
                ProviderConfig.get()
            assert not Path(f"{path}-wal").exists()
            path.chmod(0o600)
            with app.app_context():
                ProviderConfig.put("other", "key", "author")
            close_database(app)


def test_connection_that_is_opened_while_another_process_writes_is_kept(
    app: Flask, database_url: str
) -> None:
    close_database(app)
    database_file = app.extensions["database_file"]
    with locked(database_url):
        connection = database_file.connect()
        assert database_file.connect() is connection
    assert connection.execute("PRAGMA busy_timeout").fetchone() == (100,)


def test_first_change_of_a_database_in_another_mode_is_no_error(app: Flask, tmp_path: Path) -> None:
    close_database(app)
    with closing(sqlite3.connect(tmp_path / "ai-provider.db")) as database:
        database.execute("PRAGMA journal_mode = DELETE")
    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="author")
    config = stored(app)
    assert config
    assert config.provider == CONFIG["provider"]


def test_copy_in_another_mode_beside_an_empty_wal_is_served_in_wal_mode(
    app: Flask, tmp_path: Path
) -> None:
    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="author")
    os.utime(tmp_path / "ai-provider.db-wal", (0, 0))
    app.extensions["database_file"].save()
    with closing(sqlite3.connect(tmp_path / "ai-provider.db")) as database:
        database.execute("VACUUM INTO ?", [str(tmp_path / "copy")])
    (tmp_path / "copy").replace(tmp_path / "ai-provider.db")
    assert (tmp_path / "ai-provider.db-wal").stat().st_size == 0
    with app.app_context():
        ProviderConfig.put(**OTHER, updated_by="author")
    connection = app.extensions["database_file"].connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert (tmp_path / "ai-provider.db-wal").stat().st_size > 0


def test_journal_of_a_killed_writer_is_rolled_back(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="author")
    close_database(app)
    database, copy = tmp_path / "ai-provider.db", tmp_path / "copy"
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.executescript("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 1; BEGIN")
        writer.execute(
            "UPDATE provider_config SET provider = 'other', updated_by = ?", ["x" * 9999]
        )
        writer.execute("UPDATE credential SET name = ?", ["x" * 99999])
        journal = (tmp_path / "ai-provider.db-journal").read_bytes()
        copy.write_bytes(database.read_bytes())
    copy.replace(database)
    (tmp_path / "ai-provider.db-journal").write_bytes(journal)
    config = stored(app)
    assert config
    assert config.provider == CONFIG["provider"]
    assert not (tmp_path / "ai-provider.db-journal").exists()


def test_database_that_cannot_be_opened_is_closed(app: Flask, tmp_path: Path) -> None:
    close_database(app)
    (tmp_path / "ai-provider.db").write_bytes(b"SQLite format 3\0" + b"garbage" * 2000)
    with app.app_context(), pytest.raises(StorageError) as error:
        ProviderConfig.get()
    assert str(error.value).startswith("Database error: file is not a database. ")
    close_database(app)
    open_files = map(os.path.realpath, Path("/proc/self/fd").iterdir())
    assert str(tmp_path / "ai-provider.db") not in open_files


@pytest.mark.parametrize(
    "command",
    ["provider show", "credentials create", "backup -", "restore -"],
)
def test_database_of_another_program_is_left_as_it_is(tmp_path: Path, command: str) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    database = folder / "other.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE other (name)")
    before = database.read_bytes()
    status, shown, error = flask(*command.split(), DATABASE_URL=f"sqlite:///{database}")
    assert (status, shown) == (1, "")
    assert error.startswith("Error: Database error: no such table: ")
    assert database.read_bytes() == before
    assert [*folder.iterdir()] == [database]
