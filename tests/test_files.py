"""What is acknowledged is in the files that a restart finds, whoever touches them meanwhile."""

import fcntl
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sqlalchemy as sa
from conftest import (
    CONFIG,
    INTERNAL_ERROR,
    OTHER,
    Answer,
    Server,
    StartApp,
    StartServer,
    close_database,
    file_size_limit,
    flask,
    locked,
    rounds,
    stored,
)
from flask import Flask
from processes import run, serve, without_privileges

from app import create_servers
from database import DatabaseFile, StorageError, execute, transaction
from models import Credential, ProviderConfig, create_missing

FILES = ["", "-wal", "-shm"]
Fault = Callable[[Path], object]


def removed(path: Path) -> None:
    path.unlink()


def moved_away(path: Path) -> None:
    path.rename(path.with_name("away"))


def replaced_by_a_folder(path: Path) -> None:
    path.rename(path.with_name("away"))
    path.mkdir()


def replaced_by_garbage(path: Path) -> None:
    path.rename(path.with_name("away"))
    path.write_bytes(b"garbage" * 2000)


def replaced_by_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


def replaced_by_a_link(path: Path) -> None:
    path.rename(path.with_name("away"))
    path.symlink_to(path.with_name("away"))


FAULTS = [
    removed,
    moved_away,
    replaced_by_a_folder,
    replaced_by_garbage,
    replaced_by_a_copy,
    replaced_by_a_link,
]


def undo(path: Path) -> None:
    """Put back what was moved away."""
    away = path.with_name("away")
    if away.exists() and path.is_dir():
        path.rmdir()
    if away.exists():
        away.replace(path)


@pytest.mark.parametrize("suffix", FILES, ids=["database", "wal", "shm"])
@pytest.mark.parametrize("fault", FAULTS)
def test_write_is_acknowledged_only_if_a_restart_shows_it(
    start_server: StartServer, credential: str, tmp_path: Path, suffix: str, fault: Fault
) -> None:
    server = start_server()
    assert server.put(CONFIG, credential).status == 200
    path = tmp_path / f"ai-provider.db{suffix}"
    fault(path)
    answer = server.put(OTHER, credential)
    assert "Traceback" not in server.stop(signal.SIGKILL)
    if answer.status == 200:
        if path.is_dir():
            path.rmdir()
    else:
        assert answer.body["error_type"] == "GeneralException"
        undo(path)
    if answer.status == 200 or suffix or (tmp_path / "ai-provider.db").exists():
        expected = "other" if answer.status == 200 else "openai"
        shown = start_server().get(credential)
        assert shown.body["data"]["provider"] == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_wal_without_its_database_is_not_lost(
    start_server: StartServer, credential: str, tmp_path: Path, number: int
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    before = server.get(credential).body
    database, away = tmp_path / "ai-provider.db", tmp_path / "away"
    database.rename(away)
    server.stop(number)
    (tmp_path / "link.db").symlink_to(database)
    for path in (database, tmp_path / "link.db"):
        url = f"sqlite:///{path}"
        refusals = [run(serve, DATABASE_URL=url), flask("credentials", "create", DATABASE_URL=url)]
        message = f"Put the lost {database} back or, to begin anew, move {database}-wal away."
        assert refusals == [(1, "", f"Error: {message}\n")] * 2
    away.rename(database)
    assert start_server().get(credential).body == before


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """Keep the server from acting by itself, each second."""
    server.process.send_signal(signal.SIGSTOP)
    yield
    server.process.send_signal(signal.SIGCONT)


def test_stop_saves_a_removed_wal_in_the_database_that_is_away(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    before = server.get(credential).body
    database, away = tmp_path / "ai-provider.db", tmp_path / "away"
    with paused(server):
        (tmp_path / "ai-provider.db-wal").unlink()
        database.rename(away)
    server.stop()
    away.rename(database)
    assert start_server().get(credential).body == before


def test_stop_leaves_the_wal_of_a_database_that_is_away(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    with paused(server):
        before = (tmp_path / "ai-provider.db-wal").read_bytes()
        (tmp_path / "ai-provider.db").rename(tmp_path / "away")
    server.stop()
    assert (tmp_path / "ai-provider.db-wal").read_bytes() == before != b""


def test_maintenance_does_not_wait_for_a_locked_folder(
    app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    database_file = app.extensions["database_file"]
    database_file.connect()
    monkeypatch.setattr("database.sleep", naps.append)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    database_file.save()
    os.close(folder)
    assert sum(naps) < 0.1


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


def remove_files(folder: Path, *suffixes: str) -> None:
    for suffix in suffixes or ("-wal", "-shm"):
        (folder / f"ai-provider.db{suffix}").unlink()


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


def test_files_removed_twice_lose_no_write_of_another_process(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    servers = [start_server(), start_server()]
    for server in servers:
        server.put(CONFIG, credential)
    with paused(servers[0]):
        servers[1].get(credential)
        remove_files(tmp_path)
        assert servers[1].put(OTHER, credential).status == 200
    with paused(servers[1]):
        remove_files(tmp_path)
        assert servers[0].get(credential).body == INTERNAL_ERROR
    for server in reversed(servers):
        assert server.get(credential).body["data"]["provider"] == "other"


def test_removed_wal_of_a_link_to_the_database_is_noticed(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.db").symlink_to(tmp_path / "ai-provider.db")
    link = f"sqlite:///{tmp_path}/elsewhere/link.db"
    server = start_server(DATABASE_URL=link)
    server.put(CONFIG, credential)
    (tmp_path / "ai-provider.db-wal").unlink()
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    assert start_server(DATABASE_URL=link).get(credential).body["data"]["provider"] == "other"


def test_removed_wal_is_saved_beside_a_database_with_another_mode(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    before = server.get(credential).body
    (tmp_path / "ai-provider.db").chmod(0o640)
    (tmp_path / "ai-provider.db-wal").unlink()
    assert server.get(credential).body == before
    server.stop(signal.SIGKILL)
    assert start_server().get(credential).body == before


def lead_elsewhere(link: Path) -> None:
    """Have the link lead to a copy that is as old as the original."""
    copy = link.with_name("copy")
    copy.mkdir()
    for file in link.resolve().parent.glob("ai-provider.db*"):
        shutil.copy2(file, copy)
    link.unlink()
    link.symlink_to(copy / "ai-provider.db")


def test_link_that_leads_to_another_database_is_noticed(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    link = tmp_path / "links" / "link.db"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "ai-provider.db")
    server = start_server(DATABASE_URL=f"sqlite:///{link}")
    server.put(CONFIG, credential)
    lead_elsewhere(link)
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    shown = start_server(DATABASE_URL=f"sqlite:///{link}").get(credential)
    assert shown.body["data"]["provider"] == "other"


def test_link_that_leads_to_another_database_at_commit_is_an_error(
    start_app: StartApp, monkeypatch: pytest.MonkeyPatch, app: Flask, tmp_path: Path
) -> None:
    close_database(app)
    link = tmp_path / "links" / "link.db"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "ai-provider.db")
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{link}")
    other_app = start_app()
    with other_app.app_context(), pytest.raises(StorageError, match="its files were removed"):
        lead_elsewhere_in_a_transaction(link)


def lead_elsewhere_in_a_transaction(link: Path) -> None:
    with transaction():
        lead_elsewhere(link)


def test_copy_of_the_wal_is_noticed_in_a_folder_that_keeps_its_time(
    app: Flask, tmp_path: Path
) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    connection, before = app.extensions["database_file"].connect(), tmp_path.stat()
    shutil.copy(tmp_path / "ai-provider.db-wal", tmp_path / "copy")
    (tmp_path / "copy").replace(tmp_path / "ai-provider.db-wal")
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert app.extensions["database_file"].connect() is not connection


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


def test_change_is_soon_in_the_database_itself(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    [server] = create_servers(app, {})
    with closing(server):
        server.maintenance(0)
    assert b"openai" in (tmp_path / "ai-provider.db").read_bytes()


def test_files_removed_after_changes_are_written_are_saved_later(
    server: Server, app: Flask, credential: str, tmp_path: Path
) -> None:
    server.put(CONFIG, credential)
    assert stored(app)
    app.extensions["database_file"].save()
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    remove_files(tmp_path)
    with app.app_context():
        config = ProviderConfig.get()
    assert config
    assert config.provider == "other"


@pytest.mark.parametrize("change", [5, -3600], ids=["at rest", "clock set back"])
def test_wal_keeps_its_place_on_disk_while_changes_come(
    app: Flask, tmp_path: Path, change: int
) -> None:
    wal, sizes = tmp_path / "ai-provider.db-wal", []
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    for age in (0, change):
        os.utime(wal, (time.time() - age,) * 2)
        app.extensions["database_file"].save()
        sizes.append(wal.stat().st_size)
    assert sizes[0] > 0
    assert sizes[1] == 0


def test_file_copied_over_a_database_at_rest_is_not_undone(app: Flask, tmp_path: Path) -> None:
    database, backup = tmp_path / "ai-provider.db", tmp_path / "backup"
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    assert flask("backup", str(backup))[0] == 0
    with app.app_context():
        ProviderConfig.put("other", "key", "author")
    [server] = create_servers(app, {})
    os.utime(tmp_path / "ai-provider.db-wal", (time.time() - 5,) * 2)
    with closing(server):
        server.maintenance(0)
    database.write_bytes(backup.read_bytes())
    with app.app_context():
        config = ProviderConfig.get()
    assert config
    assert config.provider == "openai"


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


def test_folder_where_a_link_leads_is_locked(tmp_path: Path) -> None:
    link = tmp_path / "links" / "link.db"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "ai-provider.db")
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    refusal = pytest.raises(StorageError, match="Another program locks the folder")
    with refusal, DatabaseFile(link).alone(tries=1):
        pass
    os.close(folder)


def test_save_beside_another_process_that_opens_or_closes_waits(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    app.extensions["database_file"].save()
    assert b"openai" not in (tmp_path / "ai-provider.db").read_bytes()
    os.close(folder)
    app.extensions["database_file"].save()
    assert b"openai" in (tmp_path / "ai-provider.db").read_bytes()


def test_database_that_comes_back_from_where_a_link_led_is_noticed(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    replaced_by_a_link(tmp_path / "ai-provider.db")
    assert server.put(CONFIG, credential).status == 200
    (tmp_path / "away").replace(tmp_path / "ai-provider.db")
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    assert start_server().get(credential).body["data"]["provider"] == "other"


def test_database_that_is_moved_with_the_link_to_it_is_noticed(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    link, moved = tmp_path / "links" / "link.db", tmp_path / "links" / "moved.db"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "ai-provider.db")
    server = start_server(DATABASE_URL=f"sqlite:///{link}")
    server.put(CONFIG, credential)
    (tmp_path / "ai-provider.db").rename(moved)
    link.unlink()
    link.symlink_to(moved)
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    again = start_server(DATABASE_URL=f"sqlite:///{link}")
    assert again.get(credential).body["data"]["provider"] == "other"


def test_link_to_a_copy_with_the_same_inodes_is_noticed(
    monkeypatch: pytest.MonkeyPatch, start_app: StartApp, tmp_path: Path
) -> None:
    folder, snapshot, link = (tmp_path / name for name in ("folder", "snapshot", "link"))
    folder.mkdir()
    link.symlink_to(folder)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{link}/ai-provider.db")
    app = start_app()
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    shutil.copytree(folder, snapshot)
    stat = Path.stat

    def stat_file_system(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        status = stat(path, follow_symlinks=follow_symlinks)
        if Path(os.path.realpath(path)).parent != snapshot:
            return status
        twin = stat(folder / path.name)
        times = {"st_mtime_ns": twin.st_mtime_ns}
        return os.stat_result((status.st_mode, twin.st_ino, twin.st_dev + 1, *status[3:]), times)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat_file_system)
        link.unlink()
        link.symlink_to(snapshot)
        with app.app_context():
            ProviderConfig.put("other", "key", "author")
    with closing(sqlite3.connect(snapshot / "ai-provider.db")) as database:
        assert database.execute("SELECT provider FROM provider_config").fetchall() == [("other",)]


def test_save_waits_only_shortly_for_others(app: Flask) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    app.extensions["database_file"].save()
    connection = app.extensions["database_file"].connection
    assert connection.execute("PRAGMA busy_timeout").fetchone() == (100,)


def test_stop_leaves_no_file_beside_the_database(
    server: Server, credential: str, tmp_path: Path, key_file: Path
) -> None:
    server.put(CONFIG, credential)
    server.stop()
    assert {*tmp_path.iterdir()} == {tmp_path / "ai-provider.db", key_file}


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


def test_database_that_is_a_loop_of_links_is_one_clear_line(tmp_path: Path) -> None:
    loop = tmp_path / "loop.db"
    loop.symlink_to(loop)
    url = f"sqlite:///{loop}"
    for result in (run(serve, DATABASE_URL=url), flask("provider", "show", DATABASE_URL=url)):
        assert (result[0], result[2].count("\n")) == (1, 1)
        assert result[2].startswith("Error: ")


def test_stop_writes_changes_into_a_database_that_another_process_has_open(
    server: Server, app: Flask, credential: str, tmp_path: Path
) -> None:
    assert stored(app) is None
    server.put(CONFIG, credential)
    server.stop()
    assert b"openai" in (tmp_path / "ai-provider.db").read_bytes()
    assert (tmp_path / "ai-provider.db-wal").read_bytes() == b""


def test_removed_files_are_soon_there_again(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    for path in tmp_path.glob("*.db-*"):
        path.unlink()
    [server] = create_servers(app, {})
    with closing(server):
        server.maintenance(0)
    assert flask("provider", "show")[0] == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_maintenance_beside_postgresql_is_no_error(app: Flask) -> None:
    [server] = create_servers(app, {})
    with closing(server):
        server.maintenance(0)


def replaced_by_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("fault", [removed, replaced_by_a_loop])
def test_maintenance_does_not_end_a_service_without_its_database(
    app: Flask, tmp_path: Path, fault: Fault
) -> None:
    fault(tmp_path / "ai-provider.db")
    [server] = create_servers(app, {})
    with closing(server):
        server.maintenance(0)
    (tmp_path / "ai-provider.db").unlink(missing_ok=True)


def test_own_checkpoint_reopens_nothing(app: Flask) -> None:
    connection = app.extensions["database_file"].connect()
    connection.execute("PRAGMA wal_autocheckpoint = 1")
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    assert app.extensions["database_file"].connect() is connection


def test_folder_that_is_moved_and_copied_is_noticed(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    folder.mkdir()
    (tmp_path / "ai-provider.db").rename(folder / "ai-provider.db")
    url = f"sqlite:///{folder}/ai-provider.db"
    server = start_server(DATABASE_URL=url)
    server.put(CONFIG, credential)
    long_ago = (0, 0)
    os.utime(folder, long_ago)
    server.put(CONFIG, credential)
    subprocess.run(["cp", "-a", folder, copy], check=True)
    folder.rename(tmp_path / "old")
    folder.symlink_to(copy)
    assert server.put(OTHER, credential).status == 200
    server.stop(signal.SIGKILL)
    assert start_server(DATABASE_URL=url).get(credential).body["data"]["provider"] == "other"


def test_stop_leaves_a_file_in_the_place_of_the_database_alone(app: Flask, tmp_path: Path) -> None:
    database, wal = tmp_path / "ai-provider.db", tmp_path / "ai-provider.db-wal"
    close_database(app)
    older = database.read_bytes()
    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="a")
    before = wal.read_bytes()
    assert before
    (tmp_path / "backup").write_bytes(older)
    (tmp_path / "backup").replace(database)
    close_database(app)
    assert (database.read_bytes(), wal.read_bytes()) == (older, before)


def test_stop_that_cannot_save_a_removed_wal_is_one_clear_line(
    server: Server, credential: str, tmp_path: Path
) -> None:
    server.put(CONFIG, credential)
    with closing(sqlite3.connect(tmp_path / "ai-provider.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM provider_config").fetchall()
        server.put(OTHER, credential)
        (tmp_path / "ai-provider.db-wal").unlink()
        lines = server.stop().splitlines()
    fault = f"{tmp_path}/ai-provider.db-wal is not saved: others read it"
    assert lines[-1].startswith(f"Error: Database error: {fault}. ")
    assert lines[-2].endswith(f" on http://127.0.0.1:{server.port}")
    assert server.process.poll() == 1


def test_stop_that_cannot_save_the_wal_leaves_it_to_the_next_start(
    app: Flask, tmp_path: Path
) -> None:
    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="author")
    before = stored(app)
    with file_size_limit(0):
        close_database(app)
    assert (tmp_path / "ai-provider.db-wal").stat().st_size
    assert before
    assert stored(app) == before


def test_wal_removed_after_a_part_was_saved_is_saved(app: Flask, tmp_path: Path) -> None:
    database = tmp_path / "ai-provider.db"
    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="author")
        app.extensions["database_file"].save()
        ProviderConfig.put("other", "x" * 4096, "author")
    before = database.stat()
    with file_size_limit(before.st_size):
        app.extensions["database_file"].save()
    assert database.stat().st_ctime_ns != before.st_ctime_ns
    (tmp_path / "ai-provider.db-wal").unlink()
    config = stored(app)
    assert config
    assert config.provider == "other"


def test_commit_of_many_pages_leaves_the_database_alone(app: Flask, tmp_path: Path) -> None:
    database = tmp_path / "ai-provider.db"
    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="author")
        before = database.stat().st_mtime_ns
        Credential.issue("x" * 5_000_000)  # after 1000 pages, SQLite would write by itself
    assert database.stat().st_mtime_ns == before


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


def test_database_that_is_away_at_the_end_of_a_save_is_still_its_own(
    app: Flask, tmp_path: Path
) -> None:
    paths = [tmp_path / f"ai-provider.db{suffix}" for suffix in FILES]
    away = tmp_path / "away"
    away.mkdir()

    def move(statement: str) -> None:
        if "wal_checkpoint" in statement:
            for path in paths:
                path.rename(away / path.name)

    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="author")
    database_file = app.extensions["database_file"]
    with closing(sqlite3.connect(paths[0])) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM provider_config").fetchall()
        with app.app_context():
            ProviderConfig.put("other", "key", "author")
        database_file.connection.set_trace_callback(move)
        database_file.save()
        database_file.connection.set_trace_callback(None)
    (away / paths[0].name).rename(paths[0])
    config = stored(app)
    assert config
    assert config.provider == "other"


def test_wal_that_returns_after_an_opening_has_failed_is_kept(app: Flask, tmp_path: Path) -> None:
    database, wal, shm = (tmp_path / f"ai-provider.db{suffix}" for suffix in FILES)
    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="author")
        app.extensions["database_file"].save()
        ProviderConfig.put("other", "key", "author")
    contents = database.read_bytes(), wal.read_bytes()
    for path in (database, wal, shm):
        path.unlink()
    database.write_bytes(contents[0][:5000])
    with app.app_context(), pytest.raises(StorageError):
        ProviderConfig.get()
    wal.write_bytes(contents[1])
    app.extensions["database_file"].save()
    database.write_bytes(contents[0])
    config = stored(app)
    assert config
    assert config.provider == "other"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("suffix", FILES, ids=["database", "wal", "shm"])
def test_service_recovers_without_a_restart(
    server: Server, credential: str, tmp_path: Path, suffix: str, fault: Fault
) -> None:
    server.put(CONFIG, credential)
    path = tmp_path / f"ai-provider.db{suffix}"
    shutil.copy(path, tmp_path / "kept")
    fault(path)
    server.put(OTHER, credential)
    if path.is_dir():
        path.rmdir()
    undo(path)
    if not suffix and not path.exists():
        (tmp_path / "kept").rename(path)
    assert server.put(OTHER, credential).status == 200
    assert server.request("GET", "/health").status == 200
    assert "Traceback" not in server.stop()


def overwrite(database: Path, content: bytes) -> None:
    """Do what the restoration of version 1.0 did, but without a stop."""
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    database.write_bytes(content)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_file_copied_over_the_database_is_not_undone(
    start_server: StartServer, credential: str, tmp_path: Path, number: int
) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    server.stop()
    content = (tmp_path / "ai-provider.db").read_bytes()
    server = start_server()
    server.put(OTHER, credential)
    overwrite(tmp_path / "ai-provider.db", content)
    server.stop(number)
    shown = start_server().get(credential)
    assert shown.body["data"]["provider"] == "openai"


def test_file_copied_over_the_database_is_served_at_once(
    server: Server, credential: str, tmp_path: Path
) -> None:
    server.put(CONFIG, credential)
    with closing(sqlite3.connect(tmp_path / "ai-provider.db")) as database:
        database.execute("VACUUM INTO ?", [str(tmp_path / "backup")])
    server.put(OTHER, credential)
    overwrite(tmp_path / "ai-provider.db", (tmp_path / "backup").read_bytes())
    shown = server.get(credential)
    assert shown.body["data"]["provider"] == "openai"


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
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    servers = [start_server(), start_server()]
    for server in servers:
        server.put(CONFIG, credential)
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
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    servers = [start_server(), start_server()]
    for server in servers:
        server.put(CONFIG, credential)
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


def test_change_within_the_resolution_of_the_clock_is_noticed(app: Flask, tmp_path: Path) -> None:
    assert stored(app) is None
    time = tmp_path.stat().st_mtime_ns
    (tmp_path / "ai-provider.db-wal").unlink()
    os.utime(tmp_path, ns=(time, time))
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    assert (tmp_path / "ai-provider.db-wal").exists()


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
            removed(Path(f"{path}-wal"))
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


def test_replaced_files_are_closed(server: Server, credential: str, tmp_path: Path) -> None:
    def descriptors() -> int:
        links = map(os.path.realpath, Path(f"/proc/{server.process.pid}/fd").iterdir())
        return len([link for link in links if str(tmp_path) in link])

    server.put(CONFIG, credential)
    before = descriptors()
    for suffix in FILES * 5:
        replaced_by_a_copy(tmp_path / f"ai-provider.db{suffix}")
        server.put(CONFIG, credential)
    assert descriptors() <= before


# The start of an SQLite database in WAL mode, with pages of 4096 bytes.
HEADER = b"SQLite format 3\0\x10\0\2\2\0@  "


@pytest.mark.parametrize(
    "other",
    [b"", HEADER[:16] + b"garbage" * 2000, HEADER[:16] + bytes(14000), HEADER + b"garbage" * 2000],
    ids=["empty", "garbage", "zeros", "garbage after the header"],
)
def test_no_database_in_the_place_of_the_database_takes_no_change(
    start_server: StartServer, credential: str, tmp_path: Path, other: bytes
) -> None:
    database = tmp_path / "ai-provider.db"
    server = start_server()
    server.put(CONFIG, credential)
    before = server.get(credential).body
    database.rename(tmp_path / "away")
    database.write_bytes(other)
    if not other:  # as SQLite's own shell does
        remove_files(tmp_path, "-wal")
    for _ in range(3):
        assert server.get(credential).status == 500
    assert database.read_bytes() == other
    (tmp_path / "away").replace(database)
    assert server.get(credential).body == before
    server.stop(signal.SIGKILL)
    assert start_server().get(credential).body == before


def test_other_file_beside_the_wal_of_a_killed_service_is_left_alone(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    database = tmp_path / "ai-provider.db"
    server = start_server()
    large = {"provider": "openai", "api_key": "x" * 4096}  # so that the -wal has the first page
    server.put(large, credential)
    server.stop(signal.SIGKILL)
    replaced_by_garbage(database)
    refusal = f"Error: DATABASE_URL: {database} is unusable. See Back up in README.\n"
    assert flask("provider", "show") == (1, "", refusal)
    assert database.read_bytes() == b"garbage" * 2000
    undo(database)
    assert start_server().get(credential).body["data"]["provider"] == "openai"


def test_database_that_cannot_be_opened_is_closed(app: Flask, tmp_path: Path) -> None:
    close_database(app)
    (tmp_path / "ai-provider.db").write_bytes(b"SQLite format 3\0" + b"garbage" * 2000)
    with app.app_context(), pytest.raises(StorageError) as error:
        ProviderConfig.get()
    assert str(error.value).startswith("Database error: file is not a database. ")
    close_database(app)
    open_files = map(os.path.realpath, Path("/proc/self/fd").iterdir())
    assert str(tmp_path / "ai-provider.db") not in open_files


def test_removed_files_at_random_lose_no_acknowledged_write(
    start_server: StartServer, credential: str, tmp_path: Path
) -> None:
    seed = random.Random(3)
    server = start_server()
    for number in range(rounds()):
        acknowledged = None
        for attempt in range(seed.randint(1, 5)):
            if seed.random() < 0.5:
                suffix = seed.choice(["-wal", "-shm"])
                (tmp_path / f"ai-provider.db{suffix}").unlink(missing_ok=True)
            body = {"provider": f"p{number}-{attempt}", "api_key": "k"}
            if server.put(body, credential).status == 200:
                acknowledged = body["provider"]
        server.stop(signal.SIGKILL)
        server = start_server()
        if acknowledged:
            shown = server.get(credential).body["data"]["provider"]
            assert shown == acknowledged


def test_write_to_a_file_that_is_removed_meanwhile_is_an_error(app: Flask, tmp_path: Path) -> None:
    def write() -> None:
        with transaction():
            execute(sa.delete(ProviderConfig))
            (tmp_path / "ai-provider.db-wal").unlink()

    with app.app_context(), pytest.raises(StorageError, match="replaced"):
        write()


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
