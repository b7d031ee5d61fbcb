import pytest
from conftest import CONFIG, URL, failure
from flask import Flask, abort
from flask.testing import FlaskClient

NOT_OBJECT = failure("InputException", "The body must be a JSON object.")


BAD_BODIES = {
    "empty": b"",
    "cut": b"{",
    "single quotes": b"{'provider': 'openai'}",
    "not UTF-8": b"\xff\xfe\xfd",
    "nested past the parser": b"[" * 990,
    "nested deeply": b"[" * 30_000 + b"]" * 30_000,
    "huge number": b"9" * 5000,
    "null": b"null",
    "list": b"[]",
    "string": b'"openai"',
    "NaN": b"NaN",
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_body_must_be_a_json_object(
    client: FlaskClient, auth_headers: dict[str, str], body: bytes
) -> None:
    answer = client.put(URL, data=body, headers=auth_headers, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json == NOT_OBJECT


def test_missing_content_type_is_named(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    answer = client.put(URL, data={"provider": "openai"}, headers=auth_headers)
    assert answer.status_code == 415
    assert answer.json == failure(
        "InputException", "Send the header Content-Type: application/json."
    )


@pytest.mark.parametrize("path", ["/", "/nowhere", URL + "/", "/api//v1/ai/provider", "/static/x"])
def test_unknown_path_is_404(client: FlaskClient, path: str) -> None:
    answer = client.post(path)
    assert answer.status_code == 404
    assert answer.json == failure(
        "NotFoundException",
        "The requested URL was not found on the server. If you entered the URL manually please"
        " check your spelling and try again.",
    )


@pytest.mark.parametrize("method", ["POST", "DELETE", "PATCH", "TRACE", "BREW"])
def test_wrong_method_is_405_with_allow(client: FlaskClient, method: str) -> None:
    answer = client.open(URL, method=method)
    assert answer.status_code == 405
    assert {*answer.allow} == {"GET", "HEAD", "OPTIONS", "PUT"}
    assert answer.json == failure(
        "InputException", "The method is not allowed for the requested URL."
    )


ERROR_TYPES = {
    **dict.fromkeys([400, 403, 409, 429], "InputException"),
    **dict.fromkeys([500, 501, 502, 503], "GeneralException"),
}


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
        raise ValueError("cause")

    app.add_url_rule("/crash", view_func=crash)
    answer = app.test_client().get("/crash")
    assert answer.status_code == 500
    assert "cause" not in answer.text
    assert answer.get_json()["error_type"] == "GeneralException"
    assert answer.get_json()["data"] is None
    assert "ValueError: cause" in caplog.text


def test_malformed_body_changes_nothing(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    before = client.get(URL, headers=auth_headers).json
    client.put(URL, data=b"{", headers=auth_headers, content_type="application/json")
    assert client.get(URL, headers=auth_headers).json == before
