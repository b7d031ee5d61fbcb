import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import API_KEY, CONFIG, URL, basic, on_both
from flask import Flask
from flask.testing import FlaskClient

import auth
import models

SPACE = "Must not begin or end with white space or a line break."
ASCII = "Must be of visible ASCII characters, as no masked key is."
TYPE = "Not a valid string."
MISSING = "Missing data for required field."
LENGTHS = {
    "provider": "Length must be between 1 and 140.",
    "api_key": "Length must be between 1 and 4096.",
}


def stored(app: Flask) -> tuple[str, str, str, str] | None:
    """Return provider, API key, and when and by whom they were set."""
    with app.app_context():
        try:
            return models.get_provider()
        except models.NotSetError:
            return None


@on_both
def test_put_answers_the_documented_envelope_and_stores_both_fields(
    app: Flask, client: FlaskClient, credential: str
) -> None:
    answer = client.put(URL, json=CONFIG, headers={"Authorization": basic(credential)})
    assert answer.status_code == 200
    assert answer.json == {"status": "success", "data": True}
    config = stored(app)
    assert config
    assert config[:2] == ("openai", API_KEY)
    assert config[3] == credential[:32]


@on_both
def test_put_replaces_both_fields(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    other = {"provider": "anthropic", "api_key": "another key"}
    assert client.put(URL, json=other, headers=auth_headers).status_code == 200
    config = stored(app)
    assert config
    assert config[:2] == ("anthropic", "another key")


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
    assert answer.json == {
        "status": "error",
        "message": "No provider is set yet.",
        "error_type": "NotFoundException",
        "data": None,
    }


@pytest.mark.parametrize(
    "value", ["!", "~", "a b", "p" * 140], ids=["first", "last", "space", "longest"]
)
@on_both
def test_boundaries_of_provider_are_accepted(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str], value: str
) -> None:
    body = {"provider": value, "api_key": value}
    assert client.put(URL, json=body, headers=auth_headers).status_code == 200
    config = stored(app)
    assert config
    assert config[:2] == (value, value)


BAD_FIELDS = [
    pytest.param({field: value}, {field: messages}, id=f"{field}-{name}")
    for field in ("provider", "api_key")
    for name, value, messages in [
        ("empty", "", [LENGTHS[field]]),
        ("too long", "SECRET" * 683, [LENGTHS[field]]),
        ("number", 53127, [TYPE]),
        ("boolean", True, [TYPE]),
        ("object", {"SECRET": "SECRET"}, [TYPE]),
        ("list", ["SECRET"], [TYPE]),
        ("null", None, ["Field may not be null."]),
        ("trailing newline", "SECRET\n", [SPACE]),
        ("leading space", " SECRET", [SPACE]),
        ("only a tab", "\t", [SPACE]),
        ("trailing no-break space", "SECRET\u00a0", [SPACE]),
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
        pytest.param({"extra": "SECRET"}, {"extra": ["Unknown field."]}, id="unknown"),
        pytest.param({"\ud800é": 1}, {"\\ud800\\xe9": ["Unknown field."]}, id="unknown surrogate"),
        pytest.param(
            {"provider": "", "api_key": 1},
            {"provider": [LENGTHS["provider"]], "api_key": [TYPE]},
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
    assert answer.json == {
        "status": "error",
        "message": " ".join(f"{field}: {data[field][0]}" for field in sorted(data)),
        "error_type": "InputException",
        "data": data,
    }
    assert "SECR" not in answer.text + caplog.text
    assert "53127" not in answer.text + caplog.text
    assert stored(app) == before


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        ({}, ["provider", "api_key"]),
        ({"provider": "openai"}, ["api_key"]),
        ({"api_key": "k"}, ["provider"]),
    ],
    ids=["both", "api_key", "provider"],
)
def test_missing_field_is_named(
    app: Flask,
    client: FlaskClient,
    auth_headers: dict[str, str],
    body: dict[str, str],
    missing: list[str],
) -> None:
    answer = client.put(URL, json=body, headers=auth_headers)
    assert answer.status_code == 400
    assert answer.json == {
        "status": "error",
        "message": " ".join(f"{field}: {MISSING}" for field in sorted(missing)),
        "error_type": "InputException",
        "data": {field: [MISSING] for field in missing},
    }
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
    assert change == f"Provider set to openai by {credential[:32]}"
    assert re.fullmatch(
        rf"PUT /api/v1/ai/provider 200 \d+\.\d ms {credential[:32]} 127\.0\.0\.1", access
    )


def test_access_is_logged_on_one_line_without_the_query_string(
    client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        client.get("/a%0Ab%FF?secret=1").close()
    (access,) = caplog.messages
    assert re.fullmatch(r"GET /a%0Ab%\S+ 404 \d+\.\d ms - 127\.0\.0\.1", access)


def test_provider_that_is_not_allowed_is_refused_with_the_allowed_names(
    app: Flask,
    start_app: Callable[[], Flask],
    client: FlaskClient,
    auth_headers: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AI_PROVIDERS", " openai, my own ,anthropic,")
    app.config["AI_PROVIDERS"] = start_app().config["AI_PROVIDERS"]
    for provider in ("openai", "my own", "anthropic"):
        body = CONFIG | {"provider": provider}
        assert client.put(URL, json=body, headers=auth_headers).status_code == 200
    answer = client.put(URL, json=CONFIG | {"provider": "OpenAI"}, headers=auth_headers)
    message = "Must be one of: openai, my own, anthropic."
    assert (answer.status_code, answer.json) == (
        400,
        {
            "status": "error",
            "message": f"provider: {message}",
            "error_type": "InputException",
            "data": {"provider": [message]},
        },
    )


@on_both
def test_replacement_has_its_own_time_and_author(
    app: Flask, client: FlaskClient, auth_headers: dict[str, str]
) -> None:
    client.put(URL, json=CONFIG, headers=auth_headers)
    with app.app_context():
        models.execute("UPDATE provider_config SET updated_at = '2001'")
        other = auth.issue_credential(None)
        now = models.utc_now()
    client.put(URL, json=CONFIG, headers={"Authorization": basic(other)})
    config = stored(app)
    assert config
    assert config[2] >= now
    assert config[3] == other[:32]
