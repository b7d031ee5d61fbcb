"""The wire: the provider configuration and the response envelope."""

import re

from flask import current_app
from marshmallow import Schema, ValidationError, fields, validate


def _validate_header_value(value: str) -> None:
    # What an HTTP header carries unchanged (RFC 9110, section 5.5).
    if value != value.strip():
        raise ValidationError("Must not begin or end with whitespace or a line break.")
    if not re.fullmatch(r"[ -~]*", value):
        raise ValidationError("Must be printable ASCII, which a masked key is not.")


def _validate_allowed(value: str) -> None:
    allowed = current_app.config["AI_PROVIDERS"]
    if allowed and value not in allowed:
        raise ValidationError(f"Must be one of: {', '.join(allowed)}.")


class SecretString(fields.String):
    """A string that is dumped masked, except for the last four characters of a long one."""

    def _serialize(self, value: str, *_: object, **__: object) -> str:  # type: ignore[override]
        return "•" * 10 + (value[-4:] if len(value) >= 12 else "")


class ProviderSchema(Schema):
    """A provider configuration, as a PUT sets it and a GET shows it."""

    provider = fields.String(
        required=True, validate=[validate.Length(1, 140), _validate_header_value, _validate_allowed]
    )
    api_key = SecretString(
        required=True, validate=[validate.Length(1, 4096), _validate_header_value]
    )
    updated_at = fields.String(dump_only=True)
    updated_by = fields.String(dump_only=True)


provider_schema = ProviderSchema()


def success(data: object) -> dict[str, object]:
    """Return the envelope of an answer."""
    return {"status": "success", "data": data}


def failure(status: int, message: str, data: object = None) -> dict[str, object]:
    """Return the envelope of an error with this HTTP status."""
    error_type = {401: "UnauthorizedException", 404: "NotFoundException"}.get(
        status, "InputException" if status < 500 else "GeneralException"
    )
    return {"status": "error", "message": message, "error_type": error_type, "data": data}
