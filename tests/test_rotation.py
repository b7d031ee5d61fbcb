import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from conftest import API_KEY, CONFIG, ROOT, URL, Server, flask, on_both
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from hypothesis import settings

import models
from app import create_app


@on_both
def test_rotation_puts_a_new_key_first_and_encrypts_with_it(
    client: FlaskClient, runner: FlaskCliRunner, auth_headers: dict[str, str], tmp_path: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    before = client.get(URL, headers=auth_headers).json
    path = tmp_path / "encryption.key"
    path.chmod(0o640)
    (old,) = path.read_bytes().split()
    result = runner.invoke(args=["provider", "rotate-key"])
    assert (result.exit_code, result.output) == (0, "Rotated.\n")
    new, kept = path.read_bytes().split()
    assert kept == old != new
    assert path.stat().st_mode == 0o100640
    path.write_bytes(new)
    assert client.get(URL, headers=auth_headers).json == before
    assert [name.name for name in tmp_path.glob("encryption*")] == ["encryption.key"]


def test_rotation_before_the_first_put_changes_the_key_file_alone(
    runner: FlaskCliRunner, tmp_path: Path
) -> None:
    assert runner.invoke(args=["provider", "rotate-key"]).exit_code == 0
    assert len((tmp_path / "encryption.key").read_bytes().split()) == 2


def test_rotation_without_the_right_key_changes_nothing_stored(
    app: Flask,
    client: FlaskClient,
    runner: FlaskCliRunner,
    auth_headers: dict[str, str],
    tmp_path: Path,
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    path = tmp_path / "encryption.key"
    key = path.read_bytes()
    path.write_bytes(b"A" * 43 + b"=\n")
    result = runner.invoke(args=["provider", "rotate-key"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: The stored API key is not readable" in result.stderr
    path.write_bytes(key)
    with app.app_context():
        assert models.get_provider()[1] == API_KEY


def back_up(folder: Path, target: Path) -> None:
    """Copy database and key file as the README does, in the same order."""
    target.mkdir()
    with (
        closing(sqlite3.connect(folder / "ai-provider.db")) as database,
        closing(sqlite3.connect(target / "ai-provider.db")) as backup,
    ):
        database.backup(backup)
    shutil.copy(folder / "encryption.key", target)


def test_rotation_follows_a_link_to_the_key_file(
    environment: dict[str, str], tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "encryption.key")
    result = flask(environment | {"ENCRYPTION_KEY_FILE": str(link)}, "provider", "rotate-key")
    assert result.returncode == 0
    assert link.is_symlink()
    assert len((tmp_path / "encryption.key").read_bytes().split()) == 2


@on_both
def test_rotation_under_load_goes_on_without_an_error(
    server: Server,
    runner: FlaskCliRunner,
    credential: str,
    database_url: str,
    tmp_path: Path,
) -> None:
    authorization = f"token {credential}"
    server.request("PUT", body=CONFIG, Authorization=authorization)
    rotated: list[bool] = []

    def send(method: str, body: object) -> None:
        while not rotated:
            answer = server.request(method, body=body, Authorization=authorization)
            assert answer.status == 200

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(send, "PUT", CONFIG) for _ in range(4)]
        clients += [pool.submit(send, "GET", None) for _ in range(2)]
        for number in range(20):
            if database_url.startswith("sqlite"):
                back_up(tmp_path, tmp_path / f"backup{number}")
            assert runner.invoke(args=["provider", "rotate-key"]).exit_code == 0
            assert server.request("GET", Authorization=authorization).status == 200
            result = runner.invoke(args=["provider", "show", "--reveal"])
            assert (result.exit_code, result.stdout) == (0, f"{API_KEY}\n")
        rotated.append(True)
        for future in clients:
            future.result()
    assert len((tmp_path / "encryption.key").read_bytes().split()) == 21
    for backup in tmp_path.glob("backup*"):
        app = create_app(
            {
                "SQLALCHEMY_DATABASE_URI": f"sqlite:///{backup}/ai-provider.db",
                "ENCRYPTION_KEY_FILE": f"{backup}/encryption.key",
            }
        )
        with app.app_context():
            assert models.get_provider()[1] == API_KEY
            models.close_connection(None)
            models.db.engine.dispose()


def test_two_rotations_at_once_keep_both_keys(
    client: FlaskClient,
    auth_headers: dict[str, str],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: flask(environment, "provider", "rotate-key"), range(4))
        assert [result.returncode for result in results] == [0] * 4
    assert len((tmp_path / "encryption.key").read_bytes().split()) == 5
    assert client.get(URL, headers=auth_headers).status_code == 200


def test_rotation_killed_at_any_step_leaves_a_readable_configuration(
    client: FlaskClient, auth_headers: dict[str, str], environment: dict[str, str]
) -> None:
    """Kill it at the n-th line of the code of rotate_key and what that calls."""
    client.put(URL, json=CONFIG, headers=auth_headers)
    killer = """if True:
        import os, signal, sys
        from app import create_app
        import models
        lines = int(sys.argv[1])
        def trace(frame, event, _):
            global lines
            if frame.f_code.co_filename != models.__file__:
                return None
            if event == "line":
                lines -= 1
                if lines < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        app = create_app()
        with app.app_context():
            sys.settrace(trace)
            models.rotate_key()
    """
    for lines in itertools.count(0, 1 if settings.get_current_profile_name() == "long" else 13):
        result = subprocess.run(
            [sys.executable, "-c", killer, str(lines)], cwd=ROOT, env=os.environ | environment
        )
        assert client.get(URL, headers=auth_headers).status_code == 200
        assert client.put(URL, json=CONFIG, headers=auth_headers).status_code == 200
        if result.returncode == 0:
            break
    assert lines > 30
