import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import API_KEY, CONFIG, ROOT, URL, Server, basic, flask, on_both
from flask import Flask
from flask.testing import FlaskClient

import auth
import models
from models import OperatorError

UNREADABLE = {
    "status": "error",
    "message": (
        "The stored API key is not readable with the present encryption key."
        " Restore the encryption key file, or remove it and set the provider again."
    ),
    "error_type": "GeneralException",
    "data": None,
}


def test_database_is_in_wal_mode_with_full_synchronisation(app: Flask) -> None:
    with app.app_context():
        assert models.execute("PRAGMA journal_mode") == [("wal",)]
        assert models.execute("PRAGMA synchronous") == [(2,)]


@on_both
def test_table_refuses_a_second_configuration(app: Flask) -> None:
    insert = "INSERT INTO provider_config VALUES (CAST(:id AS integer), 'p', 'k', 't', 'b')"
    with app.app_context():
        models.execute(insert, id="1")
        for row_id in ("0", "1", "2"):
            with pytest.raises(OperatorError, match="constraint"):
                models.execute(insert, id=row_id)


@pytest.mark.parametrize("umask", ["000", "022", "777"])
def test_files_are_their_owners_alone_whatever_the_umask(tmp_path: Path, umask: str) -> None:
    (tmp_path / "folder").mkdir()
    start = (
        "import os, stat; os.umask(0o%s); from app import create_app;"
        "app = create_app(); app.app_context().push();"
        "import auth; auth.issue_credential(None);"
        "[print(f.name, oct(f.stat().st_mode)) for f in os.scandir('%s')]"
    )
    result = subprocess.run(
        [sys.executable, "-c", start % (umask, tmp_path / "folder")],
        cwd=ROOT,
        env=os.environ
        | {
            "DATABASE_URL": f"sqlite:///{tmp_path}/folder/a.db",
            "ENCRYPTION_KEY_FILE": f"{tmp_path}/folder/a.key",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(result.stdout.splitlines()) == [
        f"{name} 0o100600" for name in ("a.db", "a.db-shm", "a.db-wal", "a.key")
    ]


def test_api_key_is_encrypted_in_every_file(
    client: FlaskClient, auth_headers: dict[str, str], tmp_path: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    files = list(tmp_path.iterdir())
    assert len(files) == 4
    assert not [path for path in files if API_KEY.encode() in path.read_bytes()]


def test_secret_is_stored_as_digest_only(app: Flask, tmp_path: Path) -> None:
    with app.app_context():
        secret = auth.issue_credential("name").partition(":")[2].encode()
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(files) == 4
    assert not [content for content in files if secret in content]
    assert [content for content in files if sha256(secret).hexdigest().encode() in content]


@on_both
def test_configuration_survives_a_restart(
    start_app: Callable[[], Flask], client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    before = client.get(URL, headers=auth_headers).json
    again = start_app().test_client()
    assert again.get(URL, headers=auth_headers).json == before


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"A" * 43 + b"=\n"])
@on_both
def test_get_without_the_right_key_says_so_and_what_to_do(
    client: FlaskClient,
    auth_headers: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes | None,
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    path = tmp_path / "encryption.key"
    key = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    answer = client.get(URL, headers=auth_headers)
    assert (answer.status_code, answer.json) == (500, UNREADABLE)
    assert str(path) in caplog.messages[-1]
    path.write_bytes(key)
    assert client.get(URL, headers=auth_headers).status_code == 200


@on_both
def test_lost_key_is_not_replaced_at_start_but_by_one_put(
    start_app: Callable[[], Flask],
    client: FlaskClient,
    auth_headers: dict[str, str],
    tmp_path: Path,
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    path = tmp_path / "encryption.key"
    path.unlink()
    again = start_app().test_client()
    assert not path.exists()
    assert again.get(URL, headers=auth_headers).json == UNREADABLE
    assert not path.exists()
    assert again.put(URL, json=CONFIG, headers=auth_headers).status_code == 200
    assert path.stat().st_mode == 0o100600
    assert again.get(URL, headers=auth_headers).status_code == 200


@on_both
def test_put_replaces_what_another_key_encrypted(
    client: FlaskClient, auth_headers: dict[str, str], tmp_path: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    (tmp_path / "encryption.key").write_bytes(b"A" * 43 + b"=\n")
    assert client.get(URL, headers=auth_headers).status_code == 500
    assert client.put(URL, json=CONFIG, headers=auth_headers).status_code == 200
    assert client.get(URL, headers=auth_headers).status_code == 200


@on_both
def test_newest_key_encrypts_and_older_ones_decrypt(
    client: FlaskClient, auth_headers: dict[str, str], tmp_path: Path
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    path = tmp_path / "encryption.key"
    newest = b"A" * 43 + b"=\n"
    path.write_bytes(newest + path.read_bytes())
    assert client.get(URL, headers=auth_headers).status_code == 200
    client.put(URL, json=CONFIG, headers=auth_headers)
    path.write_bytes(newest)
    assert client.get(URL, headers=auth_headers).status_code == 200


def test_key_file_is_generated_over_no_other(app: Flask, tmp_path: Path) -> None:
    before = (tmp_path / "encryption.key").read_bytes()
    with app.app_context():
        models.create_key_file()
    assert (tmp_path / "encryption.key").read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("encryption*")) == ["encryption.key"]


def test_default_place_is_the_instance_folder_from_any_folder(tmp_path: Path) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    for module in ROOT.glob("*.py"):
        shutil.copy(module, project)
    environment = {**os.environ, "LISTEN": "not valid, so that the start ends here"}
    subprocess.run([sys.executable, project / "app.py"], cwd=elsewhere, env=environment)
    assert not list(elsewhere.iterdir())
    instance = project / "instance"
    assert instance.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in instance.iterdir()} == {
        "ai-provider.db",
        "encryption.key",
    }


def test_folder_that_cannot_be_created_is_an_error_for_the_operator(tmp_path: Path) -> None:
    (tmp_path / "instance").symlink_to("missing/folder")
    app = Flask("app", instance_path=str(tmp_path / "instance"))
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///ai-provider.db"
    app.config["ENCRYPTION_KEY_FILE"] = "encryption.key"
    with pytest.raises(OperatorError, match=f"^{tmp_path}/instance: File exists.$"):
        models.init_app(app)


@on_both
def test_servers_that_start_and_are_first_written_to_at_once_share_one_configuration(
    start_server: Callable[..., Server],
    start_app: Callable[[], Flask],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    with ThreadPoolExecutor(8) as pool:
        servers = list(pool.map(lambda _: start_server(), range(8)))
        authorization = basic(flask(environment, "credentials", "create").stdout.strip())
        answers = pool.map(
            lambda server: server.request("PUT", body=CONFIG, Authorization=authorization), servers
        )
        assert {answer.status for answer in answers} == {200}
    assert len((tmp_path / "encryption.key").read_bytes().split()) == 1
    log = "".join(server.stop() for server in servers)
    assert log.count("Generated encryption key file") == 1
    with start_app().app_context():
        assert models.execute("SELECT count(*) FROM provider_config") == [(1,)]


@on_both
def test_database_failure_is_500_never_401(
    app: Flask,
    client: FlaskClient,
    auth_headers: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with app.app_context():
        models.execute("DROP TABLE credential")
        models.execute("DROP TABLE provider_config")
    answer = client.put(URL, json=CONFIG, headers=auth_headers)
    assert answer.status_code == 500
    assert answer.get_json()["error_type"] == "GeneralException"
    assert "credential" not in answer.text
    assert caplog.messages[-1] in {
        f"Database error: {cause}. Check that the database of DATABASE_URL is there, intact,"
        " writable, not locked, and has disk space."
        for cause in ("no such table: credential", 'relation "credential" does not exist')
    }
    answer = client.get("/health")
    assert (answer.status_code, answer.json) == (
        503,
        {
            "status": "error",
            "message": "The database does not answer.",
            "error_type": "GeneralException",
            "data": None,
        },
    )
