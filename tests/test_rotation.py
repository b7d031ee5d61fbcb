import errno
import itertools
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path

import killer
import pytest
from conftest import (
    API_KEY,
    CONFIG,
    OTHER_ENCRYPTION_KEY,
    URL,
    Server,
    StartServer,
    create_credential,
    file_size_limit,
    flask,
    forget_last_use,
    locked,
    on_both,
    reported,
    rounds,
    stored,
)
from cryptography.fernet import MultiFernet
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from hypothesis import settings
from processes import run

from database import StorageError
from encryption import KeyFile, sync
from models import ProviderConfig


@on_both
def test_rotation_puts_a_new_key_first_and_encrypts_with_it(
    client: FlaskClient, runner: FlaskCliRunner, auth_headers: dict[str, str], key_file: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    before = client.get(URL, headers=auth_headers).json
    (old,) = key_file.read_bytes().split()
    result = runner.invoke(args=["provider", "rotate-key"])
    assert (result.exit_code, result.stdout, result.stderr) == (
        0,
        "",
        reported(f"Rotated: {key_file} has a new first key. Copy it again."),
    )
    new, kept = key_file.read_bytes().split()
    assert kept == old != new
    key_file.write_bytes(new)
    assert client.get(URL, headers=auth_headers).json == before


def test_rotation_keeps_the_mode_of_the_key_file_and_leaves_no_other(
    runner: FlaskCliRunner, key_file: Path
) -> None:
    key_file.chmod(0o640)
    assert runner.invoke(args=["provider", "rotate-key"]).exit_code == 0
    assert key_file.stat().st_mode == 0o100640
    assert [*key_file.parent.glob("encryption*")] == [key_file]


def test_rotation_keeps_the_owner_of_the_key_file(runner: FlaskCliRunner, key_file: Path) -> None:
    owner, group = (65534, 65533) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(key_file, owner, group)
    assert runner.invoke(args=["provider", "rotate-key"]).exit_code == 0
    assert (key_file.stat().st_uid, key_file.stat().st_gid) == (owner, group)


def test_rotation_before_the_first_put_adds_a_key(runner: FlaskCliRunner, key_file: Path) -> None:
    assert runner.invoke(args=["provider", "rotate-key"]).exit_code == 0
    assert len(key_file.read_bytes().split()) == 2


def test_rotation_without_the_right_key_changes_nothing_stored(
    app: Flask,
    client: FlaskClient,
    runner: FlaskCliRunner,
    auth_headers: dict[str, str],
    key_file: Path,
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    before, key = stored(app), key_file.read_bytes()
    key_file.write_bytes(OTHER_ENCRYPTION_KEY)
    result = runner.invoke(args=["provider", "rotate-key"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        f"Error: ENCRYPTION_KEY_FILE: {key_file}: no key in it decrypts what is stored."
        in result.stderr
    )
    assert key_file.read_bytes() == OTHER_ENCRYPTION_KEY
    key_file.write_bytes(key)
    assert stored(app) == before


def test_rotation_follows_a_link_to_the_key_file(key_file: Path, tmp_path: Path) -> None:
    create_credential()
    link = tmp_path / "link"
    link.symlink_to(key_file)
    assert flask("provider", "rotate-key", ENCRYPTION_KEY_FILE=str(link))[0] == 0
    assert link.is_symlink()
    assert len(key_file.read_bytes().split()) == 2


def back_up(folder: Path, target: Path) -> None:
    """Copy database and key file as the README does, in the same order."""
    target.mkdir()
    with (
        closing(sqlite3.connect(folder / "ai-provider.db")) as database,
        closing(sqlite3.connect(target / "ai-provider.db")) as backup,
    ):
        database.backup(backup)
    shutil.copy(folder / "encryption.key", target)


@contextmanager
def load(server: Server, credential: str) -> Iterator[None]:
    """Have six clients read and write all the time; assert that none sees an error."""
    ended = threading.Event()

    def send(method: str, body: object) -> set[int]:
        statuses = set()
        while not ended.is_set():
            answer = server.request(method, body=body, Authorization=f"token {credential}")
            statuses.add(answer.status)
        return statuses

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(send, "PUT", CONFIG) for _ in range(4)]
        clients += [pool.submit(send, "GET", None) for _ in range(2)]
        try:
            yield
        finally:
            ended.set()
    assert [client.result() for client in clients] == [{200}] * 6


@on_both
def test_rotation_under_load_goes_on_without_an_error(
    server: Server, runner: FlaskCliRunner, credential: str, key_file: Path
) -> None:
    server.put(CONFIG, credential)
    with load(server, credential):
        for _ in range(20):
            assert runner.invoke(args=["provider", "rotate-key"]).exit_code == 0
            assert server.get(credential).status == 200
            result = runner.invoke(args=["provider", "show", "--reveal"])
            assert (result.exit_code, result.stdout) == (0, f"{API_KEY}\n")
    assert len(key_file.read_bytes().split()) == 21


def test_backup_between_rotations_under_load_is_readable(
    server: Server,
    runner: FlaskCliRunner,
    start_app: Callable[[], Flask],
    credential: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    backups = [tmp_path / f"backup{number}" for number in range(20)]
    server.put(CONFIG, credential)
    with load(server, credential):
        for backup in backups:
            back_up(tmp_path, backup)
            assert runner.invoke(args=["provider", "rotate-key"]).exit_code == 0
    for backup in backups:
        monkeypatch.setenv("DATABASE_URL", f"sqlite:///{backup}/ai-provider.db")
        monkeypatch.setenv("ENCRYPTION_KEY_FILE", f"{backup}/encryption.key")
        config = stored(start_app())
        assert config
        assert config.api_key == API_KEY


def test_rotations_at_once_keep_the_keys_of_all(
    client: FlaskClient, auth_headers: dict[str, str], key_file: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: flask("provider", "rotate-key"), range(4))
        assert [status for status, *_ in results] == [0] * 4
    assert len(key_file.read_bytes().split()) == 5
    assert client.get(URL, headers=auth_headers).status_code == 200


@on_both
def test_put_that_waits_while_the_key_is_rotated_is_stored_with_the_new_key(
    server: Server, credential: str, database_url: str, key_file: Path
) -> None:
    server.put(CONFIG, credential)
    for number in range(rounds() // 2):
        body = {"provider": f"p{number}", "api_key": "k"}
        forget_last_use(database_url)
        with ThreadPoolExecutor(2) as pool:
            with locked(database_url):
                put = pool.submit(server.put, body, credential)
                server.wait_for("Last use not recorded")
                rotation = pool.submit(flask, "provider", "rotate-key")
                wait([rotation], timeout=0.2)  # for the lock, as the PUT does
            assert (put.result().status, rotation.result()[0]) == (200, 0)
        key_file.write_bytes(key_file.read_bytes().split()[0])
        shown = server.get(credential)
        assert shown.status == 200
        assert shown.body["data"]["provider"] == body["provider"]


def test_rotation_of_a_garbled_key_file_changes_nothing(
    runner: FlaskCliRunner, key_file: Path
) -> None:
    key_file.write_bytes(b"garbled")
    result = runner.invoke(args=["provider", "rotate-key"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"Error: ENCRYPTION_KEY_FILE: {key_file}: not one Fernet key per line." in result.stderr
    assert key_file.read_bytes() == b"garbled"


def replace_key_file(key_file: Path) -> None:
    other = key_file.with_name("other")
    other.write_bytes(OTHER_ENCRYPTION_KEY)
    other.replace(key_file)


def replace_key_file_twice(key_file: Path) -> None:
    replace_key_file(key_file)
    replace_key_file(key_file)  # which may have the inode of the first one again


def append_key(key_file: Path) -> None:
    with key_file.open("ab") as file:
        file.write(OTHER_ENCRYPTION_KEY)


@pytest.mark.parametrize("change", [replace_key_file, replace_key_file_twice, append_key])
def test_rotation_leaves_a_key_file_that_was_changed_meanwhile(
    app: Flask, key_file: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    def change_and_sync(path: Path) -> None:
        if path.name == "encryption.key.new":
            change(key_file)
        sync(path)

    monkeypatch.setattr("encryption.sync", change_and_sync)
    with app.app_context(), pytest.raises(StorageError, match="was changed meanwhile"):
        KeyFile().add_key()
    assert key_file.read_bytes().endswith(OTHER_ENCRYPTION_KEY)
    assert {*key_file.parent.glob("encryption*")} == {key_file}


def test_rotation_is_on_disk_with_its_folder(
    app: Flask, key_file: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_and_note(path: Path, target: Path) -> None:
        replace(path, target)
        synced.append("replaced")

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", replace_and_note)
    with app.app_context():
        KeyFile().add_key()
    folder = key_file.parent.name
    assert synced == ["encryption.key", folder, "encryption.key.new", "replaced", folder]


def test_key_is_on_disk_before_anything_is_encrypted_with_it(
    app: Flask, key_file: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[str] = []
    encrypt = MultiFernet.encrypt

    def look_and_encrypt(cipher: MultiFernet, text: bytes) -> bytes:
        before.extend(synced)
        return encrypt(cipher, text)

    monkeypatch.setattr(MultiFernet, "encrypt", look_and_encrypt)
    key_file.with_name("restored").write_bytes(OTHER_ENCRYPTION_KEY)
    key_file.with_name("restored").replace(key_file)
    with app.app_context():
        ProviderConfig.put(**CONFIG, updated_by="author")
    assert before == ["encryption.key", key_file.parent.name]


def test_keys_are_synced_once_and_where_a_link_leads(
    app: Flask, key_file: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encryption.time", lambda: key_file.stat().st_ctime + 1)
    link = key_file.with_name("links") / "link"
    link.parent.mkdir()
    link.symlink_to(key_file)
    app.config["ENCRYPTION_KEY_FILE"] = link
    keys = KeyFile()
    with app.app_context():
        for _ in range(2):
            keys.read()
    assert synced == ["encryption.key", key_file.parent.name]


def test_rotation_leaves_no_file_open(app: Flask) -> None:
    before = {*Path("/proc/self/fd").iterdir()}
    with app.app_context():
        KeyFile().add_key()
    assert {*Path("/proc/self/fd").iterdir()} == before


def test_copy_of_the_keys_is_at_no_time_open_to_others(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    chmod = Path.chmod

    def look_and_chmod(path: Path, mode: int) -> None:
        modes.append(path.stat().st_mode)
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", look_and_chmod)
    with app.app_context():
        KeyFile().add_key()
    assert modes == [0o100600, 0o100600]


def test_rotation_that_is_not_on_disk_is_an_error(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with app.app_context(), pytest.raises(StorageError, match="Input/output error"):
        KeyFile().add_key()


def test_copy_of_the_keys_that_a_killed_rotation_left_is_removed_by_the_next(
    runner: FlaskCliRunner, key_file: Path
) -> None:
    leftover = key_file.with_name("encryption.key.new")
    leftover.write_bytes(key_file.read_bytes())
    leftover.chmod(0o644)
    assert runner.invoke(args=["provider", "rotate-key"]).exit_code == 0
    assert key_file.stat().st_mode == 0o100600
    assert not leftover.exists()


def test_rotation_after_a_killed_creation_changes_nothing_if_it_fails(
    app: Flask, key_file: Path
) -> None:
    key = key_file.read_bytes()
    key_file.with_name("encryption.key.new").hardlink_to(key_file)
    with app.app_context(), file_size_limit(0), pytest.raises(StorageError, match="too large"):
        KeyFile().add_key()
    assert key_file.read_bytes() == key
    assert {*key_file.parent.glob("encryption*")} == {key_file}


def test_copy_of_the_keys_that_a_killed_rotation_left_is_removed_by_a_start(
    start_server: StartServer, key_file: Path
) -> None:
    start_server().stop()
    leftover = key_file.with_name("encryption.key.new")
    leftover.write_bytes(key_file.read_bytes())
    start_server()
    assert not leftover.exists()


@on_both
def test_start_beside_a_rotation_leaves_its_copy_of_the_keys_to_it(
    app: Flask, key_file: Path, database_url: str
) -> None:
    def prepare() -> None:
        with app.app_context():
            KeyFile().prepare()

    leftover = key_file.with_name("encryption.key.new")
    leftover.touch()
    with ThreadPoolExecutor() as pool:
        with locked(database_url):
            preparation = pool.submit(prepare)
            wait([preparation], timeout=0.3)
            leftover.replace(key_file.with_name("renamed"))
        preparation.result()


EVERY = 1 if settings.get_current_profile_name() == "long" else 5


def test_rotation_killed_at_any_step_leaves_a_readable_configuration(
    client: FlaskClient, auth_headers: dict[str, str], key_file: Path
) -> None:
    keys = key_file.read_bytes()
    for lines in itertools.count(0, EVERY):
        key_file.write_bytes(keys)  # or each one that is killed could add a key
        client.put(URL, json=CONFIG, headers=auth_headers)
        status, *_ = run(killer.rotate, lines)
        assert client.get(URL, headers=auth_headers).status_code == 200
        assert client.put(URL, json=CONFIG, headers=auth_headers).status_code == 200
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert lines > 30
    assert {*key_file.parent.glob("encryption*")} == {key_file}
