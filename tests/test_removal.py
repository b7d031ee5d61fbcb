"""A file of the database is removed or replaced while the service runs: nothing is lost."""

import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import (
    CONFIG,
    FILES,
    OTHER,
    Server,
    StartServer,
    close_database,
    flask,
    paused,
    remove_files,
    rounds,
    stored,
)
from flask import Flask
from processes import run, serve

from app import create_servers
from database import StorageError, execute, transaction
from models import ProviderConfig

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


def test_change_within_the_resolution_of_the_clock_is_noticed(app: Flask, tmp_path: Path) -> None:
    assert stored(app) is None
    time = tmp_path.stat().st_mtime_ns
    (tmp_path / "ai-provider.db-wal").unlink()
    os.utime(tmp_path, ns=(time, time))
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    assert (tmp_path / "ai-provider.db-wal").exists()


def test_write_to_a_file_that_is_removed_meanwhile_is_an_error(app: Flask, tmp_path: Path) -> None:
    def write() -> None:
        with transaction():
            execute(sa.delete(ProviderConfig))
            (tmp_path / "ai-provider.db-wal").unlink()

    with app.app_context(), pytest.raises(StorageError, match="replaced"):
        write()


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


def test_removed_files_are_soon_there_again(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        ProviderConfig.put("openai", "key", "author")
    for path in tmp_path.glob("*.db-*"):
        path.unlink()
    [server] = create_servers(app, {})
    with closing(server):
        server.maintenance(0)
    assert flask("provider", "show")[0] == 0


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
    os.utime(database, (0, 0))  # before Linux 6.13, it could have the time of the one before
    config = stored(app)
    assert config
    assert config.provider == "other"


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
