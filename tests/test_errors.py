import json

import pytest
from conftest import CONFIG, URL, Running, basic, failure
from flask import Flask, abort
from flask.testing import FlaskClient

BAD_BODIES = {
    "not UTF-8": b"\xff\xfe\xfd",
    "UTF-16": json.dumps(CONFIG).encode("utf-16"),
    "nested deeply": b"[" * 30_000 + b"]" * 30_000,
    "huge number": b"9" * 5000,
    "null": b"null",
    "list": b"[]",
    "string": b'"openai"',
    "NaN": b"NaN",
    "lone surrogate in a name": rb'{"\ud800": 1}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_body_must_be_a_json_object(
    client: FlaskClient, auth_headers: dict[str, str], body: bytes
) -> None:
    answer = client.put(URL, data=body, headers=auth_headers, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json == failure("InputException", "The body must be a JSON object in UTF-8.")


def test_byte_order_mark_is_ignored(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    body = json.dumps(CONFIG).encode("utf-8-sig")
    answer = client.put(URL, data=body, headers=auth_headers, content_type="application/json")
    assert (answer.status_code, answer.json) == (200, {"status": "success", "data": True})


NOT_JSON = {
    b"": "Expecting value: line 1, column 1",
    b"{": "Expecting property name enclosed in double quotes: line 1, column 2",
    b"{'SECRET': 1}": "Expecting property name enclosed in double quotes: line 1, column 2",
    b'{"api_key":\n"SECRET" "x"}': "Expecting ',' delimiter: line 2, column 10",
    b'{"api_key": "SECRET': "Unterminated string starting at: line 1, column 13",
    b'{"api_key": SECRET}': "Expecting value: line 1, column 13",
    b'{"api_key": "SECRET\n"}': "Invalid control character at: line 1, column 20",
}


@pytest.mark.parametrize(("body", "fault"), NOT_JSON.items())
def test_body_that_is_not_json_is_told_where_and_not_what(
    client: FlaskClient, auth_headers: dict[str, str], body: bytes, fault: str
) -> None:
    answer = client.put(URL, data=body, headers=auth_headers, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json == failure("InputException", f"The body is not JSON: {fault}.")


def test_endless_nesting_is_refused(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    body = b"[" * 60_000
    answer = client.put(URL, data=body, headers=auth_headers, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json in [
        failure("InputException", "The body must be a JSON object in UTF-8."),
        # Since Python 3.14, the parser gets to the end.
        failure("InputException", "The body is not JSON: Expecting value: line 1, column 60001."),
    ]


def test_name_given_twice_is_refused(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    body = '{"provider": "openai", "api_key": "SECRET", "api_key": "SECRET"}'
    answer = client.put(URL, data=body, headers=auth_headers, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json == failure(
        "InputException", "api_key: Given more than once.", {"api_key": ["Given more than once."]}
    )
    assert client.get(URL, headers=auth_headers).status_code == 404


def test_missing_content_type_is_named(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    answer = client.put(URL, data={"provider": "openai"}, headers=auth_headers)
    assert answer.status_code == 415
    assert answer.json == failure(
        "InputException", "Send the header Content-Type: application/json."
    )


NOT_FOUND = failure(
    "NotFoundException", "The paths are /api/v1/ai/provider, /health and /openapi.yaml."
)


@pytest.mark.parametrize("path", ["/", "/nowhere", URL + "/", "/api//v1/ai/provider", "/static/x"])
def test_unknown_path_is_404(client: FlaskClient, path: str) -> None:
    answer = client.post(path)
    assert (answer.status_code, answer.json) == (404, NOT_FOUND)


@pytest.mark.parametrize("path", [f"/{URL}", f"//{URL}", "/%2Fhealth", "HTTP://host//health"])
def test_doubled_slash_makes_another_path(running: Running, path: str) -> None:
    answer = running.server.request("GET", path, Authorization=basic(running.credential))
    assert (answer.status, answer.body) == (404, NOT_FOUND)


def test_doubled_slash_of_a_query_makes_no_other_path(running: Running) -> None:
    assert running.server.request("GET", "/health?next=http://x//y").status == 200


def test_options_of_an_unknown_path_is_404(client: FlaskClient) -> None:
    answer = client.options("/nowhere")
    assert (answer.status_code, answer.json) == (404, NOT_FOUND)


@pytest.mark.parametrize("method", ["POST", "PATCH", "TRACE", "BREW"])
def test_wrong_method_is_405_with_allow(client: FlaskClient, method: str) -> None:
    answer = client.open(URL, method=method)
    assert answer.status_code == 405
    allow = answer.headers["Allow"]
    assert {*allow.split(", ")} == {"DELETE", "GET", "HEAD", "OPTIONS", "PUT"}
    assert answer.json == failure("InputException", f"The allowed methods are {allow}.")


ERROR_TYPES = {
    **dict.fromkeys([400, 403, 409, 429], "InputException"),
    **dict.fromkeys([500, 501, 502, 503], "GeneralException"),
}


def test_message_of_an_abort_comes_through(app: Flask) -> None:
    app.add_url_rule("/fails", view_func=lambda: abort(400, "Own words."))
    answer = app.test_client().get("/fails")
    assert answer.json == failure("InputException", "Own words.")


@pytest.mark.parametrize(("status", "error_type"), ERROR_TYPES.items())
def test_every_http_error_has_the_envelope(app: Flask, status: int, error_type: str) -> None:
    app.add_url_rule("/fails", view_func=lambda: abort(status))
    answer = app.test_client().get("/fails")
    assert answer.status_code == status
    assert answer.content_type == "application/json"
    assert list(answer.get_json()) == ["status", "message", "error_type", "data"]
    assert answer.get_json()["status"] == "error"
    assert answer.get_json()["error_type"] == error_type


def test_crash_is_a_500_without_its_cause(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    def crash() -> str:
        raise ValueError("SECRET")

    app.add_url_rule("/crash", view_func=crash)
    answer = app.test_client().get("/crash")
    assert answer.status_code == 500
    message = "The service failed. Its log names the cause."
    assert answer.json == failure("GeneralException", message)
    assert "ValueError: SECRET" in caplog.text


def test_malformed_body_changes_nothing(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    before = client.get(URL, headers=auth_headers).json
    client.put(URL, data=b"{", headers=auth_headers, content_type="application/json")
    assert client.get(URL, headers=auth_headers).json == before
