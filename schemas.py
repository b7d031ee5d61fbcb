"""What goes over the wire: the request schema and the response envelope."""

import re

from flask import current_app
from marshmallow import Schema, ValidationError, fields, validate, validates


def header_value(value: str) -> None:
    """Accept what an HTTP header carries unchanged (RFC 9110, section 5.5)."""
    if value != value.strip():
        raise ValidationError("Must not begin or end with white space or a line break.")
    if not re.fullmatch(r"[ -~]*", value):
        raise ValidationError("Must be of visible ASCII characters, as no masked key is.")


class ProviderSchema(Schema):
    """The body of a PUT: both fields required, others refused."""

    provider = fields.String(required=True, validate=[validate.Length(1, 140), header_value])
    api_key = fields.String(required=True, validate=[validate.Length(1, 4096), header_value])

    @validates("provider")
    def check_allowed(self, value: str, **_: str) -> None:
        """Refuse a name that is not in AI_PROVIDERS, if that names any."""
        allowed = current_app.config["AI_PROVIDERS"]
        if allowed and value not in allowed:
            raise ValidationError(f"Must be one of: {', '.join(allowed)}.")


provider_schema = ProviderSchema()


def masked(provider: str, api_key: str, at: str, by: str) -> dict[str, str]:
    """Return the fields, with all hidden of the API key but the end of a long one."""
    mask = "•" * 10 + (api_key[-4:] if len(api_key) >= 12 else "")
    return {"provider": provider, "api_key": mask, "updated_at": at, "updated_by": by}


def success(data: object) -> dict[str, object]:
    """Return the envelope of an answer."""
    return {"status": "success", "data": data}


def failure(status: int, message: str, data: object = None) -> dict[str, object]:
    """Return the envelope of an error with this HTTP status."""
    error_type = {401: "UnauthorizedException", 404: "NotFoundException"}.get(
        status, "InputException" if status < 500 else "GeneralException"
    )
    return {"status": "error", "message": message, "error_type": error_type, "data": data}
