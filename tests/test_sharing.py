"""Several processes have the same database open: none loses what another has written."""

import fcntl
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import (
    CONFIG,
    INTERNAL_ERROR,
    OTHER,
    Answer,
    Server,
    StartServer,
    close_database,
    file_size_limit,
    flask,
    paused,
    remove_files,
    stored,
)
from flask import Flask

from database import DatabaseFile, StorageError, execute, transaction
from models import Credential, ProviderConfig


@pytest.mark.parametrize(
    ("suffixes", "command"),
    [
        (["-wal"], "credentials revoke"),
        (["-shm"], "credentials revoke"),
        (["-wal", "-shm"], "credentials revoke"),
        (["-wal", "-shm"], "credentials create"),
        (["-wal", "-shm"], "provider show"),
    ],
)
def test_command_is_refused_while_the_service_writes_to_a_removed_file(
    start_server: StartServer, credential: str, tmp_path: Path, suffixes: list[str], command: str
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    before = server.get(credential).body
    database = tmp_path / "ai-provider.db"
    arguments = [*command.split(), credential][: 3 if "revoke" in command else 2]
    cause = f"{database} is in use without -wal or -shm."
    refusal = f"Error: {cause} Try again in 2 seconds.\n"
    with paused(server):
        for suffix in suffixes:
            database.with_name(f"ai-provider.db{suffix}").unlink()
        assert flask(*arguments) == (1, "", refusal)
    assert server.request("GET", "/health").status == 200
    assert server.get(credential).body == before
    assert flask(*arguments)[0] == 0


def meanwhile(pool: Executor, request: Callable[[], Answer]) -> Future[Answer]:
    """Begin the request, and let it end now if nothing holds it up."""
    answer = pool.submit(request)
    wait([answer], timeout=0.3)
    return answer


def test_request_waits_until_a_refused_command_has_removed_what_it_made(
    server: Server, app: Flask, credential: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put(CONFIG, credential)
    answers: list[Future[Answer]] = []
    connect = DatabaseFile._connect

    def lose_files_and_connect(file: DatabaseFile, mode: str) -> sqlite3.Connection:
        if not answers:
            remove_files(tmp_path)
        connection = connect(file, mode)
        answers.append(meanwhile(pool, partial(server.get, credential)))
        return connection

    monkeypatch.setattr(DatabaseFile, "_connect", lose_files_and_connect)
    with ThreadPoolExecutor() as pool, app.app_context(), suppress(StorageError):
        Credential.revoke("0" * 32)
    assert {answer.result().body["data"]["provider"] for answer in answers} == {"openai"}


def test_two_processes_do_not_save_the_same_wal_at_once(
    start_server: StartServer,
    app: Flask,
    credential: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    assert stored(app)
    remove_files(tmp_path)
    answers = []
    checkpoint = DatabaseFile._checkpoint

    def write_and_save(file: DatabaseFile, mode: str) -> str:
        answers.append(meanwhile(pool, partial(server.put, OTHER, credential)))
        return checkpoint(file, mode)

    monkeypatch.setattr(DatabaseFile, "_checkpoint", write_and_save)
    with ThreadPoolExecutor() as pool:
        close_database(app)
        assert [answer.result().status for answer in answers] == [200]
    server.stop(signal.SIGKILL)
    assert start_server().get(credential).body["data"]["provider"] == "other"


def test_files_removed_before_a_save_lose_no_write_of_another_process(
    start_server: StartServer,
    app: Flask,
    credential: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    assert stored(app)
    connect = DatabaseFile.connect

    def connect_and_lose_files(file: DatabaseFile) -> sqlite3.Connection:
        connection = connect(file)
        remove_files(tmp_path)
        server.put(OTHER, credential)
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(DatabaseFile, "connect", connect_and_lose_files)
        app.extensions["database_file"].save()
    close_database(app)
    server.stop(signal.SIGKILL)
    assert start_server().get(credential).body["data"]["provider"] == "other"


@pytest.fixture
def servers(start_server: StartServer, credential: str) -> list[Server]:
    """Start two, through each of which the provider has been set."""
    servers = [start_server(), start_server()]
    for server in servers:
        server.put(CONFIG, credential)
    return servers


def test_files_removed_twice_lose_no_write_of_another_process(
    servers: list[Server], credential: str, tmp_path: Path
) -> None:
    with paused(servers[0]):
        servers[1].get(credential)
        remove_files(tmp_path)
        assert servers[1].put(OTHER, credential).status == 200
    with paused(servers[1]):
        remove_files(tmp_path)
        assert servers[0].get(credential).body == INTERNAL_ERROR
    for server in reversed(servers):
        assert server.get(credential).body["data"]["provider"] == "other"


def test_lock_of_another_program_is_an_error_after_a_bounded_wait(
    app: Flask, tmp_path: Path
) -> None:
    close_database(app)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with app.app_context(), pytest.raises(StorageError, match="Another program locks the folder"):
        ProviderConfig.get()
    assert flask("provider", "--help")[0] == 0
    os.close(folder)
    with app.app_context():
        assert ProviderConfig.get() is None


def test_database_is_locked_until_it_is_closed(
    app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, held = tmp_path / "ai-provider.db", []
    close = DatabaseFile._close
    lock = rf"POSIX .* {os.getpid()} \S+:{database.stat().st_ino} "  # proc_locks(5)

    def look_and_close(file: DatabaseFile) -> bool:
        held.append(re.findall(lock, Path("/proc/locks").read_text()))
        return close(file)

    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    os.utime(database, (1, 1))
    with monkeypatch.context() as patch, app.app_context():
        patch.setattr(DatabaseFile, "_close", look_and_close)
        assert ProviderConfig.get()
    assert len(held) == 1
    assert held[0]


def test_wal_removed_after_a_command_saved_a_part_is_saved(
    server: Server, app: Flask, credential: str, tmp_path: Path
) -> None:
    database = tmp_path / "ai-provider.db"
    assert stored(app) is None
    server.put({"provider": "other", "api_key": "x" * 4096}, credential)
    with paused(server):
        with file_size_limit(database.stat().st_size):
            close_database(app)
        (tmp_path / "ai-provider.db-wal").unlink()
    assert server.get(credential).body["data"]["provider"] == "other"


def test_older_copy_of_the_wal_does_not_undo_a_write(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    server, other = start_server(), start_server()
    wal = tmp_path / "ai-provider.db-wal"
    server.put(CONFIG, credential)
    shutil.copy(wal, tmp_path / "copy")
    server.put(OTHER, credential)
    (tmp_path / "copy").replace(wal)
    assert server.get(credential).body["data"]["provider"] == "other"
    assert other.get(credential).body["data"]["provider"] == "other"
    server.stop(signal.SIGKILL)
    other.stop(signal.SIGKILL)
    assert start_server().get(credential).body["data"]["provider"] == "other"


def test_removed_wal_is_saved_while_another_process_has_it_open(
    start_server: StartServer, servers: list[Server], credential: str, tmp_path: Path
) -> None:
    with paused(servers[1]):
        servers[0].get(credential)
        (tmp_path / "ai-provider.db-wal").unlink()
        assert servers[0].get(credential).status == 200
    assert servers[1].get(credential).status == 200
    for number, server in enumerate(servers * 3):
        body = {"provider": f"p{number}", "api_key": "k"}
        assert server.put(body, credential).status == 200
    for server in servers:
        assert server.get(credential).body["data"]["provider"] == "p5"
        server.stop(signal.SIGKILL)
    assert start_server().get(credential).body["data"]["provider"] == "p5"


def test_removed_shm_loses_no_write_of_another_process(
    servers: list[Server], credential: str, tmp_path: Path
) -> None:
    with paused(servers[1]):
        servers[0].get(credential)
        (tmp_path / "ai-provider.db-shm").unlink()
        assert servers[0].put(OTHER, credential).status == 200
    servers[0].stop(signal.SIGKILL)
    assert servers[1].get(credential).body["data"]["provider"] == "other"


def test_removed_wal_is_saved_once_another_process_lets_it(
    server: Server, credential: str, tmp_path: Path
) -> None:
    server.put(CONFIG, credential)
    with closing(sqlite3.connect(tmp_path / "ai-provider.db")) as database:
        database.execute("BEGIN")
        database.execute("SELECT * FROM provider_config").fetchall()
        server.put(OTHER, credential)
        (tmp_path / "ai-provider.db-wal").unlink()
        answer = server.get(credential)
        assert (answer.status, answer.body) == (500, INTERNAL_ERROR)
    assert server.get(credential).body["data"]["provider"] == "other"


def test_removed_wal_is_saved_once_another_process_has_saved_its_own(
    server: Server, credential: str, tmp_path: Path
) -> None:
    server.put(CONFIG, credential)
    with (tmp_path / "ai-provider.db-shm").open("r+b") as shm:
        fcntl.lockf(shm, fcntl.LOCK_EX, 1, 121)  # WAL_CKPT_LOCK of SQLite
        server.put(OTHER, credential)
        (tmp_path / "ai-provider.db-wal").unlink()
        answer = server.get(credential)
        assert (answer.status, answer.body) == (500, INTERNAL_ERROR)
    assert server.get(credential).body["data"]["provider"] == "other"


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_removed_file_of_a_transaction_in_work_is_left_to_it(
    start_server: StartServer, app: Flask, credential: str, tmp_path: Path, suffix: str
) -> None:
    server = start_server()
    server.put(CONFIG, credential)

    def write() -> None:
        with transaction():
            execute(sa.delete(ProviderConfig))
            (tmp_path / f"ai-provider.db{suffix}").unlink()
            assert server.put(CONFIG, credential).status == 200

    with app.app_context(), pytest.raises(StorageError, match="replaced"):
        write()
    close_database(app)
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    assert start_server().get(credential).body["data"]["provider"] == "other"


def test_wal_that_another_process_made_is_left(
    start_server: StartServer, app: Flask, credential: str, tmp_path: Path
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    with closing(sqlite3.connect(tmp_path / "ai-provider.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    server.get(credential)
    assert stored(app)
    (tmp_path / "ai-provider.db-wal").unlink()
    assert server.put(OTHER, credential).status == 200
    assert stored(app)
    server.stop(signal.SIGKILL)
    shown = start_server().get(credential)
    assert shown.body["data"]["provider"] == "other"
