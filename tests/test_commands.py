import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import API_KEY, CONFIG, ROOT, URL, flask, on_both
from flask.testing import FlaskClient, FlaskCliRunner


@on_both
def test_create_prints_the_credential_alone_on_standard_output(
    runner: FlaskCliRunner, client: FlaskClient
) -> None:
    result = runner.invoke(args=["credentials", "create"])
    assert result.exit_code == 0
    assert re.fullmatch(r"[A-Za-z0-9]{32}:[A-Za-z0-9]{64}\n", result.stdout)
    assert result.stderr == "Keep this credential safe: it is shown only once.\n"
    headers = {"Authorization": f"token {result.stdout.strip()}"}
    assert client.put(URL, json=CONFIG, headers=headers).status_code == 200


@on_both
def test_list_is_a_table_without_secrets(runner: FlaskCliRunner, client: FlaskClient) -> None:
    create = ["credentials", "create", "--name", "backup script"]
    credential = runner.invoke(args=create).stdout.strip()
    assert "never" in runner.invoke(args=["credentials", "list"]).stdout
    client.get(URL, headers={"Authorization": f"token {credential}"})
    result = runner.invoke(args=["credentials", "list"])
    assert result.exit_code == 0
    assert re.fullmatch(
        r"API_KEY {27}CREATED {15}LAST_USED {10}NAME\n"
        rf"{credential[:32]}  [\dT:-]{{19}}Z  [\dT:-]{{16}}Z  backup script\n",
        result.stdout,
    )


def test_unprintable_name_is_refused(runner: FlaskCliRunner) -> None:
    result = runner.invoke(args=["credentials", "create", "--name", "a\udcff"])
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Invalid value for --name: must be printable\n")
    assert len(runner.invoke(args=["credentials", "list"]).stdout.splitlines()) == 1


@on_both
def test_revoke_works_once(runner: FlaskCliRunner, credential: str, client: FlaskClient) -> None:
    revoke = ["credentials", "revoke", credential[:32]]
    result = runner.invoke(args=revoke)
    assert (result.exit_code, result.output) == (0, "Revoked.\n")
    headers = {"Authorization": f"token {credential}"}
    assert client.get(URL, headers=headers).status_code == 401
    result = runner.invoke(args=revoke)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: No credential has this API key; see: flask credentials list.\n"
    )


@on_both
def test_show_masks_and_reveal_prints_the_api_key_alone(
    runner: FlaskCliRunner, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    result = runner.invoke(args=["provider", "show"])
    assert result.exit_code == 0
    assert re.fullmatch(
        r"provider    openai\napi_key     •{10}wxyz\n"
        r"updated_at  [\dT:-]+Z\nupdated_by  \w{32}\n",
        result.stdout,
    )
    result = runner.invoke(args=["provider", "show", "--reveal"])
    assert (result.exit_code, result.stdout) == (0, f"{API_KEY}\n")
    assert result.stderr == ""


@on_both
def test_clear_removes_the_configuration(
    runner: FlaskCliRunner, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    result = runner.invoke(args=["provider", "clear"])
    assert (result.exit_code, result.output) == (0, "Removed.\n")
    assert client.get(URL, headers=auth_headers).status_code == 404


@pytest.mark.parametrize("args", [["show"], ["show", "--reveal"], ["clear"]], ids=" ".join)
def test_nothing_set_is_an_error(runner: FlaskCliRunner, args: list[str]) -> None:
    result = runner.invoke(args=["provider", *args])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: No provider is set yet.\n"


@pytest.mark.parametrize("option", [[], ["--reveal"]], ids=["masked", "reveal"])
def test_undecryptable_configuration_is_an_error(
    runner: FlaskCliRunner,
    client: FlaskClient,
    auth_headers: dict[str, str],
    tmp_path: Path,
    option: list[str],
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    (tmp_path / "encryption.key").write_bytes(b"A" * 43 + b"=\n")
    result = runner.invoke(args=["provider", "show", *option])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.endswith(
        "Error: The stored API key is not readable with the present encryption key."
        " Restore the encryption key file, or remove it and set the provider again.\n"
    )


DATABASE_URL = "DATABASE_URL must be sqlite:/// and a file's path, or postgresql://."


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", DATABASE_URL),
        ("sqlite://", DATABASE_URL),
        ("sqlite:///", DATABASE_URL),
        ("sqlite:///:memory:", DATABASE_URL),
        ("sqlite://two/slashes", DATABASE_URL),
        ("oracle://u:SECRET@h/d", DATABASE_URL),
        ("sqlite:////nowhere/x.db", "/nowhere: No such file or directory."),
        (
            "postgresql://user:SECRET@127.0.0.1:1/db",
            'Database error: connection failed: connection to server at "127.0.0.1", port 1'
            " failed: Connection refused. Check that the database of DATABASE_URL is there,"
            " intact, writable, not locked, and has disk space.",
        ),
    ],
)
def test_bad_database_url_is_one_clear_line(url: str, message: str) -> None:
    result = flask({"DATABASE_URL": url}, "credentials", "list")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"Error: {message}\n"


@pytest.mark.parametrize(
    "listen",
    ["", "8080", "localhost", "127.0.0.1:", "127.0.0.1:65536", "x:-1", "a b:1"],
)
def test_bad_listen_is_one_clear_line(environment: dict[str, str], listen: str) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "app.py"],
        env=os.environ | environment | {"LISTEN": listen},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "Error: LISTEN must be host:port."


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage\n"])
def test_unusable_key_file_is_one_clear_line(
    environment: dict[str, str], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "encryption.key"
    path.write_bytes(content)
    result = subprocess.run(
        [sys.executable, ROOT / "app.py"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    assert result.stderr.endswith(
        f"\nError: Encryption key file {path}: not Fernet keys. Restore it, or remove it and PUT"
        " again.\n"
    )
    assert path.read_bytes() == content


def test_missing_driver_for_postgresql_is_one_clear_line() -> None:
    start = "import sys; sys.modules['psycopg'] = None; from flask.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", start, "credentials", "list"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": "postgres://localhost/db"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == ("Error: PostgreSQL needs: .venv/bin/pip install 'psycopg[binary]'\n")
