from http import HTTPStatus
from typing import Any

import pytest
from conftest import CONFIG, URL
from flask import Flask, abort
from flask.testing import FlaskClient

NOT_OBJECT = "The body must be a JSON object."


def failure(error_type: str, message: str) -> dict[str, Any]:
    return {
        "status": "error",
        "message": message,
        "error_type": error_type,
        "data": None,
    }


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"{'provider': 'openai'}", id="single quotes"),
        pytest.param(b"\xff\xfe\xfd", id="not UTF-8"),
        pytest.param(b"[" * 990, id="nested past the parser"),
        pytest.param(b"[" * 30_000 + b"]" * 30_000, id="nested deeply"),
        pytest.param(b"9" * 5000, id="huge number"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'"openai"', id="string"),
        pytest.param(b"NaN", id="NaN"),
    ],
)
def test_body_that_is_no_json_object_is_rejected(
    client: FlaskClient, auth_headers: dict[str, str], body: bytes
) -> None:
    answer = client.put(URL, data=body, headers=auth_headers, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json == failure("InputException", NOT_OBJECT)


def test_missing_content_type_is_answered_with_the_header_to_send(
    client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    answer = client.put(URL, data={"provider": "openai"}, headers=auth_headers)
    assert answer.status_code == 415
    assert answer.json == failure(
        "InputException", "Send the header Content-Type: application/json."
    )


@pytest.mark.parametrize(("size", "status"), [(65536, 200), (65537, 413)])
def test_body_is_limited_to_64_kib(
    client: FlaskClient, auth_headers: dict[str, str], size: int, status: int
) -> None:
    body = b'{"provider": "openai", "api_key": "k"}'.ljust(size)
    answer = client.put(URL, data=body, headers=auth_headers, content_type="application/json")
    assert answer.status_code == status
    if status == 413:
        assert answer.json == failure("InputException", "The body must be at most 64 KiB.")


@pytest.mark.parametrize("path", ["/", "/nowhere", URL + "/", "/api//v1/ai/provider", "/static/x"])
def test_unknown_path_is_404_in_the_envelope(client: FlaskClient, path: str) -> None:
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


@pytest.mark.parametrize("status", [400, 403, 409, 429, 500, 501, 502, 503])
def test_every_http_error_has_the_envelope_in_its_order(app: Flask, status: int) -> None:
    app.add_url_rule("/fails", view_func=lambda: abort(status))
    answer = app.test_client().get("/fails")
    assert answer.status_code == status
    assert answer.content_type == "application/json"
    error_type = "InputException" if status < 500 else "GeneralException"
    assert list(answer.get_json().items())[::2] == [
        ("status", "error"),
        ("error_type", error_type),
    ]
    assert list(answer.get_json()) == ["status", "message", "error_type", "data"]


def test_crash_is_a_500_without_its_cause(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    def crash() -> str:
        raise ValueError("cause")

    app.add_url_rule("/crash", view_func=crash)
    answer = app.test_client().get("/crash")
    assert answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR
    assert "cause" not in answer.text
    assert answer.get_json()["error_type"] == "GeneralException"
    assert answer.get_json()["data"] is None
    assert "ValueError: cause" in caplog.text


def test_malformed_body_changes_nothing(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    before = client.get(URL, headers=auth_headers).json
    client.put(URL, data=b"{", headers=auth_headers, content_type="application/json")
    assert client.get(URL, headers=auth_headers).json == before
