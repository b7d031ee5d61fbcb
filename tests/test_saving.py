"""What only the -wal has is saved in the database: each second, at a stop, and at rest."""

import fcntl
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import (
    CONFIG,
    FILES,
    OTHER,
    Server,
    close_database,
    file_size_limit,
    flask,
    remove_files,
    stored,
)
from flask import Flask

from app import create_servers
from models import Credential, ProviderConfig


def test_change_is_soon_in_the_database_itself(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    [server] = create_servers(app, {})
    with closing(server):
        server.maintenance(0)
    assert b"openai" in (tmp_path / "ai-provider.db").read_bytes()


def test_save_gives_the_database_the_time_of_the_clock(
    app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "ai-provider.db"
    close_database(app)
    os.utime(database, (0, 0))
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    monkeypatch.setattr("database.time_ns", lambda: 1234567891)
    app.extensions["database_file"].save()
    assert database.stat().st_mtime_ns == 1234567891


def test_save_gives_a_database_that_was_just_written_another_time(
    app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "ai-provider.db"
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    app.extensions["database_file"].save()
    # Before Linux 6.13, what is written now may get the same time from the kernel.
    now = database.stat().st_mtime_ns + 1
    monkeypatch.setattr("database.time_ns", lambda: now)
    app.extensions["database_file"].save()
    assert database.stat().st_mtime_ns == now


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


def test_save_waits_only_shortly_for_others(app: Flask) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    app.extensions["database_file"].save()
    connection = app.extensions["database_file"].connection
    assert connection.execute("PRAGMA busy_timeout").fetchone() == (100,)


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


def test_stop_leaves_no_file_beside_the_database(
    server: Server, credential: str, tmp_path: Path, key_file: Path
) -> None:
    server.put(CONFIG, credential)
    server.stop()
    assert {*tmp_path.iterdir()} == {tmp_path / "ai-provider.db", key_file}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_maintenance_beside_postgresql_is_no_error(app: Flask) -> None:
    [server] = create_servers(app, {})
    with closing(server):
        server.maintenance(0)


def test_own_checkpoint_reopens_nothing(app: Flask) -> None:
    connection = app.extensions["database_file"].connect()
    connection.execute("PRAGMA wal_autocheckpoint = 1")
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    assert app.extensions["database_file"].connect() is connection


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
    before = database.read_bytes()
    with file_size_limit(len(before)):
        app.extensions["database_file"].save()
    assert database.read_bytes() != before
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


def test_stop_writes_changes_into_a_database_that_another_process_has_open(
    server: Server, app: Flask, credential: str, tmp_path: Path
) -> None:
    assert stored(app) is None
    server.put(CONFIG, credential)
    server.stop()
    assert b"openai" in (tmp_path / "ai-provider.db").read_bytes()
    assert (tmp_path / "ai-provider.db-wal").read_bytes() == b""


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
