import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

from conftest import API_KEY, CONFIG, ROOT, URL, Server, basic, flask, on_both

SUCCESS = {"status": "success", "data": True}


@on_both
def test_real_server_serves_both_schemes(server: Server, credential: str) -> None:
    answer = server.request("PUT", body=CONFIG, Authorization=basic(credential))
    assert (answer.status, answer.body) == (200, SUCCESS)
    answer = server.request("GET", Authorization=f"token {credential}")
    assert answer.status == 200
    assert answer.body["data"]["api_key"] == "•" * 10 + "wxyz"
    log = server.stop()
    assert f"INFO Provider set to openai by {credential[:32]}" in log
    assert API_KEY not in log
    assert credential[33:] not in log


def test_chunked_body_is_read_and_limited(server: Server, credential: str) -> None:
    headers = {
        "Authorization": f"token {credential}",
        "Transfer-Encoding": "chunked",
        "Content-Type": "application/json",
    }
    body = b'{"provider": "openai", "api_key": "k"}'
    for padding, status in ((65536, 200), (65537, 413)):
        data = body.ljust(padding)
        chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
        assert server.request("PUT", body=chunked, **headers).status == status


def test_body_past_the_servers_own_limit_is_refused(server: Server) -> None:
    client = HTTPConnection("127.0.0.1", server.port)
    client.putrequest("PUT", URL)
    client.putheader("Content-Length", str(1024 * 1024 + 1))
    client.endheaders()
    assert client.getresponse().status == 413
    client.close()


@on_both
def test_concurrent_writers_never_mix_their_fields(server: Server, credential: str) -> None:
    authorization = f"token {credential}"

    def put(number: int) -> int:
        body = {"provider": f"p{number}", "api_key": f"key-of-provider-{number:04}"}
        return server.request("PUT", body=body, Authorization=authorization).status

    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(put, range(200))} == {200}
    data = server.request("GET", Authorization=authorization).body["data"]
    assert int(data["provider"][1:]) == int(data["api_key"][-4:])


def test_port_taken_is_one_clear_line(server: Server, environment: dict[str, str]) -> None:
    listen = f"127.0.0.1:{server.port}"
    result = subprocess.run(
        [sys.executable, ROOT / "app.py"],
        env=os.environ | environment | {"LISTEN": listen},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: Cannot listen on LISTEN={listen}: [Errno 98] Address already in use\n"
    )


@on_both
def test_restarted_server_keeps_the_configuration(
    start_server: Callable[..., Server], credential: str
) -> None:
    authorization = f"token {credential}"
    first = start_server()
    first.request("PUT", body=CONFIG, Authorization=authorization)
    before = first.request("GET", Authorization=authorization).body
    first.stop()
    assert start_server().request("GET", Authorization=authorization).body == before


def test_answers_have_the_headers_of_an_api_that_handles_secrets(
    server: Server, credential: str
) -> None:
    for path, status in ((URL, 404), ("/health", 200), ("/nowhere", 404)):
        answer = server.request("GET", path, Authorization=f"token {credential}")
        assert answer.status == status
        assert {key: value for key, value in answer.headers.items() if key != "Date"} == {
            "Content-Length": answer.headers["Content-Length"],
            "Content-Type": "application/json",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }


def test_development_server_logs_as_the_other_does(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "run", "--port", str(port)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    with process, process.stderr as log:
        assert next(line for line in log if "Press CTRL+C to quit" in line)
        client = HTTPConnection("127.0.0.1", port, timeout=30)
        client.request("GET", "/health?secret=1")
        assert client.getresponse().read() == b'{"status":"success","data":true}\n'
        client.close()
        line = next(log)
        process.terminate()
        rest = log.read()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.fullmatch(rf"{stamp} INFO GET /health 200 \d+\.\d ms - 127\.0\.0\.1\n", line)
    assert "secret" not in rest


def test_level_of_the_log_is_a_setting(environment: dict[str, str]) -> None:
    result = flask(environment | {"LOG_LEVEL": "LOUD"}, "credentials", "list")
    assert (result.returncode, result.stderr) == (
        1,
        "Error: LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR.\n",
    )
    result = flask(environment | {"LOG_LEVEL": "ERROR"}, "credentials", "list")
    assert (result.returncode, result.stderr) == (0, "")


def test_trusted_proxy_passes_on_the_clients_address(
    start_server: Callable[..., Server],
) -> None:
    trusting, plain = start_server(TRUSTED_PROXY="127.0.0.1"), start_server()
    for server, address in ((trusting, "203.0.113.7"), (plain, "127.0.0.1")):
        server.request("GET", "/health", **{"X-Forwarded-For": "203.0.113.7"})
        assert server.stop().splitlines()[-1].endswith(f" ms - {address}")
