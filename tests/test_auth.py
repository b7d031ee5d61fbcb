import re
from base64 import b64encode
from hashlib import sha256

import pytest
from conftest import CONFIG, URL, Server, basic, failure, issue_credential, on_both
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner

import models
from models import Credential

KEY, SECRET = "k" * 32, "s" * 64
UNKNOWN = {"Authorization": f"token {KEY}:{SECRET}"}
UNAUTHORIZED = failure(
    "UnauthorizedException",
    "Send a valid credential: Authorization: Basic base64(api_key:api_secret)"
    " or Authorization: token api_key:api_secret.",
)


def encoded(value: bytes) -> str:
    return b64encode(value).decode()


@pytest.mark.parametrize("scheme", ["Basic", "basic", "BASIC", "Basic  "])
def test_basic_scheme_is_accepted(client: FlaskClient, credential: str, scheme: str) -> None:
    header = f"{scheme} {encoded(credential.encode())}"
    answer = client.put(URL, json=CONFIG, headers={"Authorization": header})
    assert answer.status_code == 200


@pytest.mark.parametrize("scheme", ["token", "Token", "TOKEN"])
def test_token_scheme_is_accepted(client: FlaskClient, credential: str, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {credential}"}
    assert client.put(URL, json=CONFIG, headers=headers).status_code == 200


BAD_HEADERS = {
    "empty": "",
    "scheme only": "Basic",
    "unknown scheme": f"Bearer {KEY}:{SECRET}",
    "token after a tab": f"token \t{KEY}:{SECRET}",
    "token glued": f"token{KEY}:{SECRET}",
    "bad base64": "Basic !!!!",
    "garbage in base64": f"Basic *{encoded(f'{KEY}:{SECRET}'.encode())}",
    "base64 without padding": f"Basic {encoded(b'a:bb').rstrip('=')}",
    "basic in plain text": f"Basic {KEY}:{SECRET}",
    "no colon": f"token {KEY}{SECRET}",
    "no secret": f"token {KEY}:",
    "no key": f"token :{SECRET}",
    "three parts": f"token {KEY}:{SECRET}:x",
    "trailing equals sign": f"token {KEY}:{SECRET}=",
    "NUL": f"Basic {encoded(f'{KEY}:{SECRET}'.encode() + bytes(1))}",
    "not ASCII": f"token {KEY}:é{SECRET[1:]}",
    "not UTF-8": f"Basic {encoded(bytes([255]) * 97)}",
    "wildcard": f"token {'%' * 32}:{SECRET}",
    "very long": f"token {KEY}:{SECRET * 1000}",
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_malformed_header_is_rejected_and_names_no_key(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, header: str
) -> None:
    answer = client.put(URL, json=CONFIG, headers={"Authorization": header})
    assert (answer.status_code, answer.json) == (401, UNAUTHORIZED)
    answer.close()
    assert caplog.messages[0].endswith(" ms - 127.0.0.1")


@on_both
def test_every_failure_gets_the_same_bytes(
    client: FlaskClient, app: Flask, runner: FlaskCliRunner, credential: str
) -> None:
    revoked = issue_credential(app)
    runner.invoke(args=["credentials", "revoke", revoked[:32]])
    headers = [
        {},
        UNKNOWN,
        {"Authorization": f"token {credential[:32]}:{SECRET}"},
        {"Authorization": f"token {revoked}"},
        {"Authorization": basic(revoked)},
    ]
    answers = [client.put(URL, json=CONFIG, headers=each) for each in headers]
    assert {answer.status_code for answer in answers} == {401}
    assert answers[0].json == UNAUTHORIZED
    assert {answer.data for answer in answers} == {answers[0].data}
    assert {str(answer.headers) for answer in answers} == {str(answers[0].headers)}


def test_failure_names_both_schemes(client: FlaskClient) -> None:
    assert client.get(URL).headers.getlist("WWW-Authenticate") == [
        'Basic realm="AI provider"',
        'Token realm="AI provider"',
    ]


@on_both
def test_revoked_credential_is_rejected(
    client: FlaskClient, runner: FlaskCliRunner, credential: str, auth_headers: dict[str, str]
) -> None:
    assert client.put(URL, json=CONFIG, headers=auth_headers).status_code == 200
    runner.invoke(args=["credentials", "revoke", credential[:32]])
    answer = client.get(URL, headers=auth_headers)
    assert (answer.status_code, answer.json) == (401, UNAUTHORIZED)


@pytest.mark.parametrize("method", ["DELETE", "GET", "HEAD", "PUT"])
def test_each_method_needs_a_credential(client: FlaskClient, method: str) -> None:
    assert client.open(URL, method=method).status_code == 401


def test_authentication_comes_before_the_body(client: FlaskClient) -> None:
    answer = client.put(URL, data=b"x" * 70_000, content_type="text/plain")
    assert answer.status_code == 401


def test_options_needs_no_credential(server: Server) -> None:
    status, body, headers = server.request("OPTIONS")
    assert (status, body) == (204, None)
    assert {*headers.pop("Allow").split(", ")} == {"DELETE", "GET", "HEAD", "OPTIONS", "PUT"}
    assert {*headers} == {"Cache-Control", "Connection", "Date", "X-Content-Type-Options"}


def test_health_needs_no_credential(client: FlaskClient) -> None:
    answer = client.get("/health")
    assert (answer.status_code, answer.json) == (200, {"status": "success", "data": True})


@pytest.mark.parametrize(
    ("header", "key"),
    [(UNKNOWN["Authorization"], KEY), (f"token {KEY}:{SECRET}x", "-"), ("", "-")],
    ids=["unknown", "malformed", "none"],
)
def test_failure_is_one_line_of_the_log_with_the_public_part(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, header: str, key: str
) -> None:
    client.get(URL, headers={"Authorization": header}).close()
    ((level, message),) = [(record.levelname, record.message) for record in caplog.records]
    assert level == "WARNING"
    assert re.fullmatch(rf"GET {URL} 401 \d+\.\d ms {key} 127\.0\.0\.1", message)
    assert SECRET not in message


@on_both
def test_database_holds_the_digest(app: Flask, credential: str) -> None:
    with app.app_context():
        (row,) = Credential.all()
        assert (row.api_key, row.name, row.last_used_at) == (credential[:32], "test", None)
        assert row.secret_hash == sha256(credential[33:].encode()).hexdigest()


@on_both
def test_database_holds_the_minute_of_the_last_use(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.get(URL, headers=auth_headers)
    with app.app_context():
        (row,) = Credential.all()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\dZ", row.last_used_at or "")


def test_not_every_request_writes(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    statements: list[str] = []

    app.extensions["database_file"].connect().set_trace_callback(statements.append)
    for _ in range(5):
        client.get(URL, headers=auth_headers)
    verbs = [statement.split()[0] for statement in statements]
    assert verbs.count("SELECT") == 10
    assert 1 <= verbs.count("UPDATE") <= 2  # 2 where the minute changes


def test_unknown_key_costs_a_comparison_too(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[str, str]] = []

    def compare(stored: str, sent: str) -> bool:
        compared.append((stored, sent))
        return stored == sent

    monkeypatch.setattr(models, "compare_digest", compare)
    client.get(URL, headers=UNKNOWN)
    assert [len(digest) for digest in compared[0]] == [64, 64]
