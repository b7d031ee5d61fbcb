from typing import Any

import schemathesis
import yaml
from conftest import Running, basic
from flask.testing import FlaskClient
from hypothesis import HealthCheck, settings
from openapi_spec_validator import validate
from processes import ROOT
from schemathesis import Case

schema = schemathesis.openapi.from_path(ROOT / "openapi.yaml")


def test_document_is_valid() -> None:
    validate(yaml.safe_load((ROOT / "openapi.yaml").read_text()))


def test_service_hands_out_the_document(client: FlaskClient) -> None:
    answer = client.get("/openapi.yaml")
    assert answer.status_code == 200
    assert answer.content_type == "application/yaml"
    assert answer.data == (ROOT / "openapi.yaml").read_bytes()


@schema.parametrize()
@settings(max_examples=30)
def test_service_keeps_to_the_document(case: Case[Any], running: Running) -> None:
    case.call_and_validate(
        base_url=f"http://127.0.0.1:{running.server.port}",
        headers={"Authorization": basic(running.credential)},
    )


def test_service_keeps_to_the_document_in_any_order(running: Running) -> None:
    class Machine(schema.as_state_machine()):  # type: ignore[misc]
        def get_call_kwargs(self, case: Case[Any]) -> dict[str, Any]:
            return {
                "base_url": f"http://127.0.0.1:{running.server.port}",
                "headers": {"Authorization": f"token {running.credential}"},
            }

    Machine.run(
        settings=settings(
            max_examples=20, stateful_step_count=6, suppress_health_check=[*HealthCheck]
        )
    )
