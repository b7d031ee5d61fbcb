import json
import re
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import API_KEY, CONFIG, URL, basic, failure, issue_credential, on_both, stored
from flask import Flask
from flask.testing import FlaskClient

from database import execute, transaction
from models import ProviderConfig, utc_now

ASCII = "Must be printable ASCII, not empty, without line breaks or spaces at its ends."
TYPE = "Not a valid string."
MISSING = "Missing data for required field."
LENGTHS = {
    "provider": "Must have 1 to 30 characters. Is it the API key?",
    "api_key": "Must have 1 to 4096 characters.",
}


@on_both
def test_put_answers_the_documented_envelope_and_stores_both_fields(
    app: Flask, client: FlaskClient, credential: str
) -> None:
    answer = client.put(URL, json=CONFIG, headers={"Authorization": basic(credential)})
    assert answer.status_code == 200
    assert answer.json == {"status": "success", "data": True}
    config = stored(app)
    assert config
    assert (config.provider, config.api_key) == ("openai", API_KEY)
    assert config.updated_by == credential[:32]


@on_both
def test_put_replaces_both_fields(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    other = {"provider": "anthropic", "api_key": "another key"}
    assert client.put(URL, json=other, headers=auth_headers).status_code == 200
    config = stored(app)
    assert config
    assert (config.provider, config.api_key) == ("anthropic", "another key")


@on_both
def test_get_shows_the_configuration_masked_in_the_documented_order(
    client: FlaskClient, credential: str, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    answer = client.get(URL, headers=auth_headers)
    assert answer.status_code == 200
    assert re.fullmatch(
        r'{"status":"success","data":{"provider":"openai","api_key":"•{10}wxyz",'
        r'"updated_at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",'
        rf'"updated_by":"{credential[:32]}"}}}}\n',
        answer.text,
    )


@pytest.mark.parametrize(
    ("api_key", "masked"),
    [
        pytest.param("x", "•" * 10, id="shortest"),
        pytest.param("abcdefghijk", "•" * 10, id="11 characters"),
        pytest.param("abcdefghijkl", "•" * 10 + "ijkl", id="12 characters"),
        pytest.param("k" * 4092 + "tail", "•" * 10 + "tail", id="longest"),
    ],
)
def test_mask_hides_length_and_short_keys(
    client: FlaskClient, auth_headers: dict[str, str], api_key: str, masked: str
) -> None:
    body = {"provider": "openai", "api_key": api_key}
    assert client.put(URL, json=body, headers=auth_headers).status_code == 200
    answer = client.get(URL, headers=auth_headers)
    assert answer.get_json()["data"]["api_key"] == masked


def test_get_before_the_first_put_is_404(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    answer = client.get(URL, headers=auth_headers)
    assert answer.status_code == 404
    assert answer.json == failure("NotFoundException", "No provider is set.")


@pytest.mark.parametrize(
    "value", ["!", "~", "a b", "p" * 30], ids=["first", "last", "space", "longest"]
)
@on_both
def test_boundaries_of_provider_are_accepted(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str], value: str
) -> None:
    body = {"provider": value, "api_key": value}
    assert client.put(URL, json=body, headers=auth_headers).status_code == 200
    config = stored(app)
    assert config
    assert (config.provider, config.api_key) == (value, value)


BAD_FIELDS = [
    pytest.param({field: value}, {field: messages}, id=f"{field}-{name}")
    for field in ("provider", "api_key")
    for name, value, messages in [
        ("empty", "", [ASCII]),
        ("too long", "SECRET" * 683, [LENGTHS[field]]),
        ("too long and not ASCII", "SECRÉT" * 683, [LENGTHS[field], ASCII]),
        ("number", 53127, [TYPE]),
        ("boolean", True, [TYPE]),
        ("object", {"SECRET": "SECRET"}, [TYPE]),
        ("list", ["SECRET"], [TYPE]),
        ("null", None, ["Field may not be null."]),
        ("trailing newline", "SECRET\n", [ASCII]),
        ("leading space", " SECRET", [ASCII]),
        ("trailing space", "SECRET ", [ASCII]),
        ("only a tab", "\t", [ASCII]),
        ("trailing no-break space", "SECRET\u00a0", [ASCII]),
        ("inner newline", "SECRET\nX", [ASCII]),
        ("inner NUL", "SECRET\0X", [ASCII]),
        ("DEL", "SECRET\x7fX", [ASCII]),
        ("not ASCII", "SECRÉT", [ASCII]),
        ("lone surrogate", "SECRET\ud800X", [ASCII]),
        ("masked", "••••••••••wxyz", [ASCII]),
    ]
]


@pytest.mark.parametrize(
    ("change", "data"),
    [
        *BAD_FIELDS,
        *[
            pytest.param({name: "SECRET"}, {name: ["Unknown field."]}, id=name)
            for name in ("extra", "updated_at", "updated_by")
        ],
        pytest.param(
            {"provider": "", "api_key": 1},
            {"provider": [ASCII], "api_key": [TYPE]},
            id="both",
        ),
    ],
)
def test_invalid_field_is_named_with_its_rule_and_changes_nothing(
    app: Flask,
    client: FlaskClient,
    auth_headers: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    data: dict[str, list[str]],
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    before = stored(app)
    answer = client.put(
        URL,
        data=json.dumps(CONFIG | change),
        headers=auth_headers,
        content_type="application/json",
    )
    assert answer.status_code == 400
    message = " ".join(f"{field}: {' '.join(data[field])}" for field in sorted(data))
    assert answer.json == failure("InputException", message, data)
    assert "SECR" not in answer.text + caplog.text
    assert "53127" not in answer.text + caplog.text
    assert stored(app) == before


@pytest.mark.parametrize("missing", ["provider", "api_key"])
def test_missing_field_is_named(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str], missing: str
) -> None:
    body = {field: value for field, value in CONFIG.items() if field != missing}
    answer = client.put(URL, json=body, headers=auth_headers)
    assert answer.status_code == 400
    data = {missing: [MISSING]}
    assert answer.json == failure("InputException", f"{missing}: {MISSING}", data)
    assert stored(app) is None


def test_missing_fields_are_both_named(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    answer = client.put(URL, json={}, headers=auth_headers)
    assert answer.status_code == 400
    message = f"api_key: {MISSING} provider: {MISSING}"
    data = {"provider": [MISSING], "api_key": [MISSING]}
    assert answer.json == failure("InputException", message, data)
    assert stored(app) is None


def test_change_is_logged_with_provider_and_credential_key_only(
    client: FlaskClient,
    credential: str,
    auth_headers: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        client.put(URL, json=CONFIG, headers=auth_headers).close()
    change, access = caplog.messages
    assert change == f"Provider set to 'openai' by {credential[:32]}"
    assert re.fullmatch(
        rf"PUT /api/v1/ai/provider 200 \d+\.\d ms {credential[:32]} 127\.0\.0\.1", access
    )


def test_name_of_a_provider_cannot_forge_the_author(
    client: FlaskClient, auth_headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        client.put(URL, json=CONFIG | {"provider": "a by b'c"}, headers=auth_headers)
    assert caplog.messages[0].startswith('Provider set to "a by b\'c" by ')


def test_access_is_logged_on_one_line_without_the_query_string(
    client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        client.get("/a%0Ab%FF?secret=1").close()
    (access,) = caplog.messages
    assert re.fullmatch(r"GET /a%0Ab%\S+ 404 \d+\.\d ms - 127\.0\.0\.1", access)


def test_time_of_a_request_is_logged_in_milliseconds(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.perf_counter", iter([1000, 1000.25]).__next__)
    with caplog.at_level("INFO"):
        client.get("/health").close()
    assert caplog.messages == ["GET /health 200 250.0 ms - 127.0.0.1"]


@pytest.mark.parametrize("path", ["/" + "a" * 15_000, "/%00" * 5_000, "/\u20ac" * 2_000])
def test_line_of_the_log_is_bounded(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with caplog.at_level("INFO"):
        client.open(path, method="M" * 10_000).close()
    (access,) = caplog.messages
    assert len(access) < 300


@on_both
def test_delete_removes_the_configuration(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    answer = client.delete(URL, headers=auth_headers)
    assert (answer.status_code, answer.json) == (200, {"status": "success", "data": True})
    assert stored(app) is None


@on_both
def test_delete_of_nothing_is_404(client: FlaskClient, auth_headers: dict[str, str]) -> None:
    answer = client.delete(URL, headers=auth_headers)
    assert answer.status_code == 404
    assert answer.json == failure("NotFoundException", "No provider is set.")


def test_delete_is_logged_with_its_author(
    client: FlaskClient,
    credential: str,
    auth_headers: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    client.put(URL, json={"provider": "' by me", "api_key": API_KEY}, headers=auth_headers)
    with caplog.at_level("INFO"):
        client.delete(URL, headers=auth_headers)
    assert caplog.messages[0] == f"""Provider "' by me" removed by {credential[:32]}"""


def test_swapped_fields_are_refused_and_the_key_is_not_repeated(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    swapped = {"provider": "sk-SECRET-0123456789-0123456789", "api_key": "openai"}
    answer = client.put(URL, json=swapped, headers=auth_headers)
    assert answer.status_code == 400
    message = "Must have 1 to 30 characters. Is it the API key?"
    assert answer.json == failure("InputException", f"provider: {message}", {"provider": [message]})
    assert "SECRET" not in caplog.text
    assert stored(app) is None


@on_both
def test_replacement_has_its_own_time_and_author(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    with app.app_context(), transaction():
        execute(sa.update(ProviderConfig).values(updated_at="2001"))
    other, now = issue_credential(app), utc_now()
    client.put(URL, json=CONFIG, headers={"Authorization": basic(other)})
    config = stored(app)
    assert config
    assert config.updated_at >= now
    assert config.updated_by == other[:32]
