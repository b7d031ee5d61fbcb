import re
from functools import partial
from pathlib import Path

import pytest
from conftest import (
    API_KEY,
    CONFIG,
    KEY_REMEDY,
    OTHER_ENCRYPTION_KEY,
    URL,
    flask,
    issue_credential,
    on_both,
    reported,
)
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner

from app import create_app


@on_both
def test_create_prints_the_credential_alone(runner: FlaskCliRunner, client: FlaskClient) -> None:
    result = runner.invoke(args=["credentials", "create"])
    assert result.exit_code == 0
    assert re.fullmatch(r"[A-Za-z0-9]{32}:[A-Za-z0-9]{64}\n", result.stdout)
    key = result.stdout[:32]
    message = f"Created {key}. Keep the credential safe: it is shown only once."
    assert result.stderr == reported(message)
    headers = {"Authorization": f"token {result.stdout.strip()}"}
    assert client.put(URL, json=CONFIG, headers=headers).status_code == 200


@on_both
def test_list_is_a_table_without_secrets(runner: FlaskCliRunner, client: FlaskClient) -> None:
    name = "backup script".ljust(60, "!")
    create = ["credentials", "create", "--name", name]
    credential = runner.invoke(args=create).stdout.strip()
    assert "never" in runner.invoke(args=["credentials", "list"]).stdout
    client.get(URL, headers={"Authorization": f"token {credential}"})
    result = runner.invoke(args=["credentials", "list"])
    assert result.exit_code == 0
    assert re.fullmatch(
        r"API_KEY {27}CREATED {15}LAST_USED {10}NAME\n"
        rf"{credential[:32]}  [\dT:-]{{19}}Z  [\dT:-]{{16}}Z  {name}\n",
        result.stdout,
    )


@on_both
def test_list_begins_with_the_oldest(
    app: Flask, runner: FlaskCliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = ["2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z"]
    for time in times:
        monkeypatch.setattr("models.utc_now", partial(str, time))
        issue_credential(app)
    lines = runner.invoke(args=["credentials", "list"]).stdout.splitlines()
    assert [line.split()[1] for line in lines[1:]] == sorted(times)


@pytest.mark.parametrize("name", ["a\udcff", "a\nb", "a" * 61])
def test_name_that_would_spoil_the_list_is_refused(runner: FlaskCliRunner, name: str) -> None:
    result = runner.invoke(args=["credentials", "create", "--name", name])
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: Invalid value for --name: must have at most 60 printable characters\n"
    )
    assert len(runner.invoke(args=["credentials", "list"]).stdout.splitlines()) == 1


@on_both
def test_revoke_ends_a_credential(
    credential: str, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    result = flask("credentials", "revoke", credential[:32])
    assert result == (0, "", reported(f"Revoked {credential[:32]}."))
    assert client.get(URL, headers=auth_headers).status_code == 401


def test_revoke_leaves_the_other_credentials(
    runner: FlaskCliRunner, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    other = runner.invoke(args=["credentials", "create"]).stdout
    assert runner.invoke(args=["credentials", "revoke", other[:32]]).exit_code == 0
    assert client.get(URL, headers=auth_headers).status_code == 404


def test_revoke_accepts_the_whole_credential(
    runner: FlaskCliRunner, credential: str, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    result = runner.invoke(args=["credentials", "revoke", f" {credential} "])
    assert (result.exit_code, result.stdout, result.stderr) == (
        0,
        "",
        reported(f"Revoked {credential[:32]}."),
    )
    assert client.get(URL, headers=auth_headers).status_code == 401
    result = runner.invoke(args=["credentials", "revoke", credential])
    assert result.exit_code == 1
    assert credential[33:] not in result.output


@on_both
def test_revoke_of_an_unknown_credential_is_an_error(
    runner: FlaskCliRunner, credential: str
) -> None:
    revoke = ["credentials", "revoke", credential[:32]]
    runner.invoke(args=revoke)
    result = runner.invoke(args=revoke)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: No credential has this api_key. See `flask credentials list`.\n"
    )


@on_both
def test_show_masks_the_api_key(
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


@on_both
def test_reveal_prints_the_api_key_alone(
    runner: FlaskCliRunner, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    result = runner.invoke(args=["provider", "show", "--reveal"])
    assert (result.exit_code, result.stdout) == (0, f"{API_KEY}\n")
    assert result.stderr == ""


@on_both
def test_clear_removes_the_configuration(
    runner: FlaskCliRunner, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    result = runner.invoke(args=["provider", "clear"])
    assert (result.exit_code, result.stdout, result.stderr) == (
        0,
        "",
        reported("Removed the provider 'openai'."),
    )
    assert client.get(URL, headers=auth_headers).status_code == 404


@pytest.mark.parametrize("args", [["show"], ["show", "--reveal"], ["clear"]], ids=" ".join)
def test_nothing_set_is_an_error(runner: FlaskCliRunner, args: list[str]) -> None:
    result = runner.invoke(args=["provider", *args])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: No provider is set.\n"


@pytest.mark.parametrize("option", [[], ["--reveal"]], ids=["masked", "reveal"])
def test_unreadable_api_key_is_an_error(
    runner: FlaskCliRunner,
    client: FlaskClient,
    auth_headers: dict[str, str],
    key_file: Path,
    option: list[str],
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    key_file.write_bytes(OTHER_ENCRYPTION_KEY)
    result = runner.invoke(args=["provider", "show", *option])
    assert (result.exit_code, result.stdout) == (1, "")
    cause = f"ENCRYPTION_KEY_FILE: {key_file}: no key in it decrypts what is stored."
    assert result.stderr.endswith(f"Error: {cause} {KEY_REMEDY}\n")


def test_credential_that_is_no_text_cannot_be_revoked(runner: FlaskCliRunner) -> None:
    result = runner.invoke(args=["credentials", "revoke", "\udcff"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: No credential has this api_key. ")


@pytest.mark.parametrize(
    "command",
    [
        "credentials list",
        "credentials revoke x",
        "provider show",
        "provider clear",
        "provider rotate-key",
        "backup -",
        "restore app.py",
    ],
)
def test_command_without_a_database_names_it_and_creates_nothing(
    command: str, tmp_path: Path
) -> None:
    result = create_app().test_cli_runner().invoke(args=command.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{tmp_path}/ai-provider.db" in result.stderr
    assert "DATABASE_URL" in result.stderr
    assert not [*tmp_path.iterdir()]
