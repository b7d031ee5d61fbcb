import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import pytest
from conftest import (
    CONFIG,
    KEY_REMEDY,
    OTHER,
    OTHER_ENCRYPTION_KEY,
    REMEDY,
    Server,
    close_database,
    file_size_limit,
    flask,
    issue_credential,
    locked,
    reported,
    stored,
)
from flask import Flask
from flask.testing import FlaskCliRunner
from processes import ROOT, without_privileges

from models import ProviderConfig


def put(app: Flask, provider: str) -> None:
    with app.app_context():
        ProviderConfig.put(provider, "key", "author")


def restored(tmp_path: Path, file: object, state: str = "") -> str:
    state = state or "The present encryption key decrypts what was restored."
    return restored_alone(tmp_path, file) + f"{state}\n"


def restored_alone(tmp_path: Path, file: object) -> str:
    places = f"{tmp_path}/ai-provider.db from {file}"
    return reported(f"Restored {places}. Revoke again what was revoked since.")


@pytest.fixture
def backup(app: Flask, runner: FlaskCliRunner, tmp_path: Path) -> Path:
    """Back up a database in which the first provider and a credential are set."""
    put(app, "first")
    issue_credential(app)
    runner.invoke(args=["backup", str(tmp_path / "backup")])
    return tmp_path / "backup"


def test_backup_is_a_private_file_that_is_restored(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path
) -> None:
    backup = tmp_path / "backup"
    put(app, "first")
    result = runner.invoke(args=["backup", str(backup)])
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"Backed up {tmp_path}/ai-provider.db to {backup}.\n"
    assert backup.stat().st_mode == 0o100600
    put(app, "second")
    result = runner.invoke(args=["restore", str(backup)])
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == restored(tmp_path, backup)
    config = stored(app)
    assert config
    assert config.provider == "first"


def back_up_to(stdout: BinaryIO) -> tuple[int, str]:
    """Back up in a new interpreter with an unbuffered standard output, in the current folder."""
    command = [sys.executable, "-u", "-m", "flask", "--app", f"{ROOT}/app.py", "backup", "-"]
    result = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    return result.returncode, result.stderr


def test_backup_goes_through_pipes(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-", "--wal"):
        Path(name).write_bytes(b"another file")
    put(app, "first")
    with Path("backup").open("wb") as stdout:
        assert back_up_to(stdout) == (0, f"Backed up {tmp_path}/ai-provider.db to -.\n")
    put(app, "second")
    with Path("backup").open("rb") as stdin:
        result = runner.invoke(args=["restore", "-"], input=stdin)
    assert result.stderr == restored(tmp_path, "backup")
    config = stored(app)
    assert config
    assert config.provider == "first"


def test_backup_that_is_cut_short_is_an_error(backup: Path) -> None:
    with backup.open("ab") as stdout, file_size_limit(2**17):
        stdout.truncate(2**17 - 4096)
        assert back_up_to(stdout) == (1, "Error: File too large.\n")


def test_database_that_was_not_closed_is_restored_with_its_wal(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path
) -> None:
    put(app, "first")
    runner.invoke(args=["backup", str(tmp_path / "copy")])
    with closing(sqlite3.connect(tmp_path / "copy")) as database, database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("UPDATE provider_config SET provider = 'second'")
        database.commit()
        for suffix in ("", "-wal"):
            shutil.copy(f"{tmp_path}/copy{suffix}", f"{tmp_path}/crashed{suffix}")
    (tmp_path / "link").symlink_to(tmp_path / "crashed")
    assert runner.invoke(args=["restore", str(tmp_path / "link")]).exit_code == 0
    config = stored(app)
    assert config
    assert config.provider == "second"


UNUSABLE = "damaged, or not of this service: nothing has changed. See Back up in README."


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def numbered(path: Path) -> None:
    """Put a line feed into its header."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 10")


@pytest.mark.parametrize("change", [emptied, Path.touch, numbered])
def test_backup_replaces_an_older_one_or_an_empty_file(
    app: Flask,
    runner: FlaskCliRunner,
    backup: Path,
    tmp_path: Path,
    change: Callable[[Path], object],
) -> None:
    change(backup)
    put(app, "second")
    assert runner.invoke(args=["backup", str(backup)]).exit_code == 0
    with closing(sqlite3.connect(backup)) as database:
        assert database.execute("SELECT provider FROM provider_config").fetchall() == [("second",)]
    assert [*tmp_path.glob("backup?*")] == []


def test_backup_of_another_user_names_its_owner(runner: FlaskCliRunner) -> None:
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        backup = Path(folder, "backup")
        backup.touch(0)
        with without_privileges():
            result = runner.invoke(args=["backup", str(backup)])
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"Error: {backup}: Permission denied. {backup} belongs to user {os.geteuid()}, mode 0;"
    )


def test_backup_that_fails_leaves_the_older_one(
    runner: FlaskCliRunner, backup: Path, tmp_path: Path
) -> None:
    older = backup.read_bytes()
    (tmp_path / "ai-provider.db").write_bytes(b"garbage" * 2000)
    result = runner.invoke(args=["backup", str(backup)])
    assert (result.exit_code, backup.read_bytes()) == (1, older)
    assert [*tmp_path.glob("backup?*")] == []


@pytest.mark.parametrize(
    ("name", "fault"),
    [("missing", "No such file or directory"), ("loop", "Too many levels of symbolic links")],
    ids=["missing", "loop"],
)
def test_backup_into_a_folder_that_is_none_is_one_clear_line(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path, name: str, fault: str
) -> None:
    put(app, "first")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    result = runner.invoke(args=["backup", str(tmp_path / name / "backup")])
    assert (result.exit_code, result.stderr) == (1, f"Error: {tmp_path / name}: {fault}.\n")


def garbled(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def overwritten(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"x" * 4096 + content[8192:])


def with_another_key_in_the_index(path: Path) -> None:
    content = path.read_bytes()
    [key, *_] = re.findall(rb"[0-9a-f]{32}", content)
    path.write_bytes(content.replace(key, key[::-1], 1))


def without_a_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE credential")


def of_another_service(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE credential (id)")


@pytest.mark.parametrize(
    "damage",
    [
        emptied,
        garbled,
        cut,
        overwritten,
        with_another_key_in_the_index,
        without_a_table,
        of_another_service,
    ],
)
def test_damaged_backup_changes_nothing(
    app: Flask, runner: FlaskCliRunner, backup: Path, damage: object
) -> None:
    assert callable(damage)
    damage(backup)
    put(app, "second")
    before = stored(app)
    result = runner.invoke(args=["restore", str(backup)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {backup} is {UNUSABLE}\n"
    assert stored(app) == before


@pytest.mark.parametrize(
    ("name", "fault"),
    [("none", "No such file or directory"), ("", "Is a directory")],
    ids=["missing", "folder"],
)
def test_backup_that_cannot_be_read_is_one_clear_line(
    runner: FlaskCliRunner, tmp_path: Path, name: str, fault: str
) -> None:
    result = runner.invoke(args=["restore", str(tmp_path / name)])
    assert (result.exit_code, result.stderr) == (1, f"Error: {tmp_path / name}: {fault}.\n")


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize("command", ["backup", "restore"])
def test_database_is_not_its_own_backup(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path, command: str, suffix: str
) -> None:
    put(app, "first")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / f"ai-provider.db{suffix}")
    result = runner.invoke(args=[command, str(link)])
    refusal = f"Error: {link} belongs to the database. Name another file.\n"
    assert (result.exit_code, result.stderr) == (1, refusal)


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_database_that_a_link_leads_to_is_not_its_own_backup(
    app: Flask, tmp_path: Path, command: str
) -> None:
    put(app, "first")
    database, link = tmp_path / "ai-provider.db", tmp_path / "link.db"
    link.symlink_to(database)
    refusal = f"Error: {database} belongs to the database. Name another file.\n"
    result = flask(command, str(database), DATABASE_URL=f"sqlite:///{link}")
    assert result == (1, "", refusal)


def damage_page(path: Path) -> None:
    """Damage what is stored, and leave the list of tables as it is."""
    with closing(sqlite3.connect(path)) as database:
        find = "SELECT rootpage FROM sqlite_master WHERE name = 'provider_config'"
        [(page,)] = database.execute(find)
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"garbage" * 500)


def test_damaged_database_does_not_replace_an_older_backup(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path, backup: Path
) -> None:
    before = backup.read_bytes()
    close_database(app)
    damage_page(tmp_path / "ai-provider.db")
    refusal = f"Error: {tmp_path}/ai-provider.db is {UNUSABLE}\n"
    result = runner.invoke(args=["backup", str(backup)])
    assert (result.exit_code, result.output) == (1, refusal)
    with backup.open("ab") as stdout:
        assert back_up_to(stdout) == (1, refusal)
    assert backup.read_bytes() == before


def test_restore_replaces_a_damaged_page(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path, backup: Path
) -> None:
    close_database(app)
    damage_page(tmp_path / "ai-provider.db")
    assert runner.invoke(args=["restore", str(backup)]).exit_code == 0
    config = stored(app)
    assert config
    assert config.provider == "first"


@pytest.mark.parametrize(
    "loss",
    ["DROP TABLE credential", "ALTER TABLE credential RENAME last_used_at TO gone"],
)
def test_restore_replaces_a_database_that_is_not_whole(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path, backup: Path, loss: str
) -> None:
    close_database(app)
    with closing(sqlite3.connect(tmp_path / "ai-provider.db")) as database:
        database.execute(loss)
    assert runner.invoke(args=["restore", str(backup)]).exit_code == 0
    config = stored(app)
    assert config
    assert config.provider == "first"


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        ("backup", f"{{database}} is {UNUSABLE}"),
        ("restore", f"Database error: no such table: provider_config. {REMEDY}"),
    ],
)
def test_database_of_another_program_is_neither_backed_up_nor_replaced(
    runner: FlaskCliRunner, tmp_path: Path, backup: Path, command: str, refusal: str
) -> None:
    database = tmp_path / "ai-provider.db"
    make_other_database(database)
    before = backup.read_bytes()
    result = runner.invoke(args=[command, str(backup)])
    message = refusal.format(database=database)
    assert (result.exit_code, result.output) == (1, f"Error: {message}\n")
    assert backup.read_bytes() == before
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("note",)]


def test_link_to_itself_is_replaced_by_a_backup(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path
) -> None:
    put(app, "first")
    link = tmp_path / "link"
    link.symlink_to(link)
    assert runner.invoke(args=["backup", str(link)]).exit_code == 0
    assert not link.is_symlink()


def test_copy_that_has_a_wal_is_not_replaced_by_a_backup(
    app: Flask, runner: FlaskCliRunner, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    put(app, "first")
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"ai-provider.db{suffix}", f"{copy}{suffix}")
    put(app, "second")
    result = runner.invoke(args=["backup", str(copy)])
    refusal = f"Error: {copy} has a -wal: not replaced. Name another file.\n"
    assert (result.exit_code, result.output) == (1, refusal)
    shutil.copy(copy, tmp_path / "looked-at")
    (tmp_path / "looked-at-wal").touch()  # as SQLite does to read
    assert runner.invoke(args=["backup", str(tmp_path / "looked-at")]).exit_code == 0
    assert runner.invoke(args=["restore", str(copy)]).exit_code == 0
    config = stored(app)
    assert config
    assert config.provider == "first"


def test_backup_goes_where_a_link_leads(app: Flask, runner: FlaskCliRunner, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other" / "backup")
    put(app, "first")
    for _ in range(2):
        assert runner.invoke(args=["backup", str(tmp_path / "link")]).exit_code == 0
    assert (tmp_path / "link").is_symlink()
    assert [*(tmp_path / "other").iterdir()] == [tmp_path / "other" / "backup"]


def test_name_of_a_backup_is_on_disk(
    runner: FlaskCliRunner, tmp_path: Path, synced: list[str]
) -> None:
    (tmp_path / "other").mkdir()
    assert runner.invoke(args=["backup", str(tmp_path / "other" / "backup")]).exit_code == 0
    assert synced == ["other"]


@pytest.mark.usefixtures("app")
def test_restore_without_a_provider_needs_no_key(
    runner: FlaskCliRunner, tmp_path: Path, key_file: Path
) -> None:
    backup = str(tmp_path / "backup")
    assert runner.invoke(args=["backup", backup]).exit_code == 0
    key_file.unlink()
    result = runner.invoke(args=["restore", backup])
    assert result.exit_code == 0
    assert result.stderr == restored_alone(tmp_path, backup)


def test_restore_tells_when_the_key_is_another(
    runner: FlaskCliRunner, backup: Path, key_file: Path, tmp_path: Path
) -> None:
    key_file.write_bytes(OTHER_ENCRYPTION_KEY)
    result = runner.invoke(args=["restore", str(backup)])
    assert result.exit_code == 0
    cause = f"ENCRYPTION_KEY_FILE: {key_file}: no key in it decrypts what is stored."
    assert result.stderr == restored(tmp_path, backup, f"Warning: {cause} {KEY_REMEDY}")


def test_restore_is_told_apart_from_the_fault_that_follows(
    runner: FlaskCliRunner, backup: Path, key_file: Path, tmp_path: Path
) -> None:
    key_file.unlink()
    key_file.mkdir()
    result = runner.invoke(args=["restore", str(backup)])
    assert result.exit_code == 0
    rule = f"Warning: ENCRYPTION_KEY_FILE must name a regular file, not {key_file}."
    assert result.stderr == restored(tmp_path, backup, rule)


def test_restore_into_files_that_are_replaced_meanwhile_is_an_error(
    runner: FlaskCliRunner, backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*_: int) -> None:
        Path(shutil.copy(backup, f"{backup}-2")).replace(tmp_path / "ai-provider.db")

    monkeypatch.setattr("models._refuse_lock", replace)
    result = runner.invoke(args=["restore", str(backup)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Database error: its files were removed or replaced. ")


def test_restore_waits_for_the_lock(backup: Path, database_url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        with locked(database_url):
            restore = pool.submit(flask, "restore", str(backup))
            wait([restore], timeout=0.8)
        assert restore.result()[0] == 0


def test_restore_into_a_locked_database_is_an_error_after_a_bounded_wait(
    app: Flask, runner: FlaskCliRunner, backup: Path, database_url: str
) -> None:
    put(app, "second")
    before = stored(app)
    with locked(database_url):
        result = runner.invoke(args=["restore", str(backup)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: Database error: database is locked. ")
    assert stored(app) == before


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_other_database(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE note (text)")


def make_note(path: Path) -> None:
    path.write_text("SELECT * FROM provider_config")


@pytest.mark.parametrize(
    "change", [Path.touch, make_pipe, make_folder, make_other_database, make_note]
)
def test_what_is_no_backup_is_not_replaced_by_one(
    app: Flask, runner: FlaskCliRunner, key_file: Path, change: Callable[[Path], object]
) -> None:
    put(app, "first")
    change(key_file)
    before = key_file.stat()
    result = runner.invoke(args=["backup", str(key_file)])
    assert result.exit_code == 1
    assert result.stderr == f"Error: {key_file} is not a backup of this service: not replaced.\n"
    assert key_file.stat().st_ino == before.st_ino


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("command", ["backup", "restore"])
def test_postgresql_has_tools_of_its_own(runner: FlaskCliRunner, command: str) -> None:
    result = runner.invoke(args=[command, "-"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: Use pg_dump and pg_restore for a PostgreSQL database.\n"


def test_restore_under_load_is_served_at_once_and_without_an_error(
    server: Server, credential: str, tmp_path: Path
) -> None:
    backup = str(tmp_path / "backup")
    ended = threading.Event()

    def write() -> set[int]:
        statuses = set()
        while not ended.is_set():
            statuses.add(server.put(OTHER, credential).status)
        return statuses

    server.put(CONFIG, credential)
    before = server.get(credential).body
    assert flask("backup", backup)[0] == 0
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(write) for _ in range(4)]
        try:
            for _ in range(5):
                assert flask("restore", backup)[0] == 0
        finally:
            ended.set()
        assert [client.result() for client in clients] == [{200}] * 4
    assert flask("restore", backup)[0] == 0
    assert server.get(credential).body == before


def test_credential_of_a_backup_is_valid_again(runner: FlaskCliRunner, tmp_path: Path) -> None:
    credential = runner.invoke(args=["credentials", "create"]).stdout.strip()
    runner.invoke(args=["backup", str(tmp_path / "backup")])
    runner.invoke(args=["credentials", "revoke", credential])
    runner.invoke(args=["restore", str(tmp_path / "backup")])
    assert credential[:32] in runner.invoke(args=["credentials", "list"]).stdout
