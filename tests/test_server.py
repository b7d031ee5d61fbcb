"""The service as a process: what it answers, logs and keeps."""

import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from conftest import (
    API_KEY,
    CONFIG,
    URL,
    Answer,
    Running,
    Server,
    StartApp,
    StartServer,
    basic,
    create_credential,
    failure,
    locked,
    on_both,
)
from flask import Flask, abort
from processes import (
    ROOT,
    Fork,
    execute_command,
    run,
    serve_into_journal,
    serve_with_descriptors,
    serve_with_umask,
    start_interpreter,
    stop_and_hang,
)
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.trigger import trigger

from app import VERSION, _JournalFormatter, _stop_on_signals, create_servers

SUCCESS = {"status": "success", "data": True}


class Loop:
    """A server in this process, whose loop the test turns."""

    def __init__(self, app: Flask) -> None:
        self.sockets: dict[int, Any] = {}
        (self.server,) = create_servers(app, self.sockets)
        self.channels = vars(self.server)["active_channels"]

    def connect(self, timeout: float | None = None) -> socket.socket:
        address: Any = self.server.getsockname()
        return socket.create_connection(address, timeout)

    def turn(self, count: int = 1, timeout: float = 1) -> None:
        wasyncore.loop(timeout, map=self.sockets, count=count)


@pytest.fixture
def loop(app: Flask) -> Iterator[Loop]:
    loop = Loop(app)
    yield loop
    wasyncore.close_all(loop.sockets)


@on_both
def test_new_interpreter_serves_both_schemes(start_server: StartServer, credential: str) -> None:
    server = start_server(start_interpreter("app.py"))
    answer = server.request("PUT", body=CONFIG, Authorization=basic(credential))
    assert (answer.status, answer.body) == (200, SUCCESS)
    answer = server.request("GET", Authorization=f"token {credential}")
    assert answer.status == 200
    assert answer.body["data"]["api_key"] == "•" * 10 + "wxyz"
    log = server.stop()
    assert f"INFO Provider set to 'openai' by {credential[:32]}" in log
    assert API_KEY not in log
    assert credential[33:] not in log
    assert "Traceback" not in log
    assert server.process.poll() == 0


def test_start_and_stop_are_logged_with_version_and_address(start_server: StartServer) -> None:
    server = start_server()
    log = server.stop()
    end = f"version {VERSION} on http://127.0.0.1:{server.port}\n"
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.search(rf"^{time} INFO Serving {end}{time} INFO Stopped {end}\Z", log, re.MULTILINE)


def test_times_in_the_log_are_in_utc(start_server: StartServer) -> None:
    time, *_ = start_server(TZ="EAST-9").stop().split()
    age = datetime.now(timezone.utc) - datetime.fromisoformat(time.replace("Z", "+00:00"))
    assert abs(age) < timedelta(hours=1)


def test_request_is_one_line_of_the_log(server: Server) -> None:
    server.request("GET", "/health")
    *_, start, access, _ = server.stop().splitlines()
    assert " INFO Serving version " in start
    assert " INFO GET /health 200 " in access


def test_journal_gets_priorities_instead_of_the_time(start_server: StartServer) -> None:
    server = start_server(Fork(serve_into_journal))
    server.request("GET")
    log = server.stop()
    assert re.search(r"^<4>WARNING Created database ", log, re.MULTILINE)
    assert re.search(r"^<6>INFO Serving version ", log, re.MULTILINE)
    assert re.search(r"^<4>WARNING GET /api/v1/ai/provider 401 ", log, re.MULTILINE)


@pytest.mark.parametrize(
    ("level", "priority"), {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3}.items()
)
def test_each_level_has_its_priority(level: str, priority: int) -> None:
    record = logging.makeLogRecord({"levelname": level, "msg": "text"})
    assert _JournalFormatter("%(message)s").format(record) == f"<{priority}>text"


def test_each_line_of_a_traceback_has_its_priority() -> None:
    record = logging.LogRecord("app", logging.ERROR, "", 0, "first\nsecond", None, None)
    formatter = _JournalFormatter("%(levelname)s %(message)s")
    assert formatter.format(record) == "<3>ERROR first\n<3>second"


@pytest.mark.parametrize("prefix", ["", "@"], ids=["path", "abstract"])
def test_systemd_is_told_when_the_service_answers(
    start_server: StartServer, tmp_path: Path, prefix: str
) -> None:
    address = f"{tmp_path}/user@1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{address}" if prefix else address)
        systemd.settimeout(30)
        start_server(NOTIFY_SOCKET=prefix + address)
        assert systemd.recv(100) == b"READY=1"


def test_socket_of_systemd_that_is_gone_is_ignored(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(NOTIFY_SOCKET=f"{tmp_path}/gone")
    assert server.request("GET", "/health").status == 200


def test_interrupted_interpreter_ends_without_an_error(start_server: StartServer) -> None:
    server = start_server(start_interpreter("app.py"))
    server.request("GET", "/health")  # it is at work from here on
    assert "Traceback" not in server.stop(signal.SIGINT)
    assert server.process.poll() == 0


def print_time_that_is_left() -> None:
    _stop_on_signals(trigger({}), {})
    signal.raise_signal(signal.SIGTERM)
    signal.setitimer(signal.ITIMER_REAL, 2)  # 3 seconds later
    signal.raise_signal(signal.SIGTERM)
    sys.stdout.write(str(signal.alarm(0)))


def test_second_signal_does_not_put_off_the_end() -> None:
    assert run(print_time_that_is_left) == (0, "2", "")


def catches_interrupt(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = re.findall(r"SigCgt:\s+(\w+)", status)
    return bool(int(mask, 16) & 1 << signal.SIGINT - 1)


@pytest.mark.parametrize("delay", [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
def test_interrupt_of_the_start_has_no_traceback(delay: float) -> None:
    process = start_interpreter("app.py")
    while not catches_interrupt(process.pid):
        assert process.poll() is None  # Python itself starts
    for _ in range(10_000):  # Python starts to read the module; or has, unseen
        if not catches_interrupt(process.pid):
            break
    with suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=30)
    assert "Traceback" not in log
    assert process.returncode in {0, -signal.SIGINT}


def test_files_are_in_the_instance_folder_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    for module in ROOT.glob("*.py"):
        shutil.copy(module, project)
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.delenv("ENCRYPTION_KEY_FILE")
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that the start ends here
        monkeypatch.setenv("LISTEN", f"127.0.0.1:{taken.getsockname()[1]}")
        start_interpreter(project / "app.py", cwd=elsewhere).communicate(timeout=60)
    assert not list(elsewhere.iterdir())
    instance = project / "instance"
    assert instance.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in instance.iterdir()} == {"ai-provider.db", "encryption.key"}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777], ids=["000", "022", "777"])
def test_files_are_their_owners_alone_whatever_the_umask(
    start_server: StartServer, tmp_path: Path, umask: int
) -> None:
    start_server(Fork(serve_with_umask, umask))
    assert {path.name: f"{path.stat().st_mode:o}" for path in tmp_path.iterdir()} == dict.fromkeys(
        ["ai-provider.db", "ai-provider.db-shm", "ai-provider.db-wal", "encryption.key"], "100600"
    )


def connect(server: Server) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=30)


def put_body_of(size: int, running: Running, chunked: bool) -> Answer:
    body = b'{"provider": "openai", "api_key": "k"}'.ljust(size)
    if not chunked:
        return running.server.put(body, running.credential)
    return running.server.request(
        "PUT",
        body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        Authorization=f"token {running.credential}",
        **{"Transfer-Encoding": "chunked"},
    )


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_body_of_64_kib_is_accepted(running: Running, chunked: bool) -> None:
    assert put_body_of(64 * 1024, running, chunked).status == 200


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_longer_body_is_refused(running: Running, chunked: bool) -> None:
    answer = put_body_of(64 * 1024 + 1, running, chunked)
    assert answer.status == 413
    assert answer.body == failure("InputException", "The body must be at most 64 KiB.")


@pytest.mark.parametrize("path", ["/", "/health", URL])
def test_body_of_128_kib_is_refused_by_its_length(running: Running, path: str) -> None:
    with connect(running.server) as connection:
        connection.sendall(b"PUT %b HTTP/1.1\r\nContent-Length: 131072\r\n\r\n" % path.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_chunked_body_of_more_than_128_kib_is_refused(running: Running) -> None:
    with connect(running.server) as connection:
        connection.sendall(f"PUT {URL} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(b"1\r\nx\r\n" * (128 * 1024 // 6 + 1))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_header_of_more_than_16_kib_is_refused(running: Running) -> None:
    assert running.server.request("GET", "/health", Cookie="x" * 16_000).status == 200
    with connect(running.server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nCookie: " + b"x" * 17_000)
        assert connection.recv(65536).startswith(b"HTTP/1.0 431 ")


MALFORMED = {
    "long length": b"GET /health HTTP/1.1\r\nContent-Length: " + b"9" * 5000,
    "bracket": b"GET http://[x HTTP/1.1",
    "line break in a secret": b"GET /health HTTP/1.1\r\nAuthorization: Basic c2Vj\ncmV0",
    "method": b"get /health HTTP/1.1",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("request_head", MALFORMED.values(), ids=MALFORMED)
def test_malformed_header_is_answered_without_repeating_it(
    server: Server, request_head: bytes
) -> None:
    with connect(server) as connection:
        connection.sendall(request_head + b"\r\n\r\n")
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    title, message, _ = body.split(b"\r\n\r\n")
    assert (title, message) == (b"Bad Request", b"The request line or a header is malformed.")
    assert "Traceback" not in server.stop()


def test_connections_have_a_limit(server: Server) -> None:
    pid, answered = server.process.pid, 0
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(520)]
        for connection in connections:
            connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        for connection in connections[:498]:
            answered += connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        sockets = [link for link in Path(f"/proc/{pid}/fd").iterdir() if is_socket(link)]
    assert answered == 498
    assert len(sockets) == 499  # one of them listens; the limit counts a pipe too


def is_socket(link: Path) -> bool:
    return "socket:" in os.path.realpath(link)  # of one that ends, too


def test_one_thread_serves_all(server: Server) -> None:
    server.request("GET", "/health")
    assert len([*Path(f"/proc/{server.process.pid}/task").iterdir()]) == 1


def test_answer_is_one_packet(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        received = connection.recv(65536)
        while b"}" not in received:
            received += connection.recv(65536)
        state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
    assert struct.unpack_from("I", state, 152) == (1,)  # tcpi_data_segs_in of tcp(7)


def test_requests_of_one_packet_are_answered_in_their_order(server: Server) -> None:
    with connect(server) as connection, connection.makefile("rb") as answers:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\nGET /nowhere HTTP/1.1\r\n\r\n")
        connection.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert re.findall(rb"HTTP/1.1 (\d+)", answers.read()) == [b"200", b"404", b"200"]


def test_requests_of_one_packet_do_not_wait_for_the_next_event(server: Server) -> None:
    started = monotonic()
    with connect(server) as connection, connection.makefile("rb") as answers:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100 + b"G / HTTP/1.0\r\n\r\n")
        assert answers.read().count(b"HTTP/1.1 404 ") == 100
    assert monotonic() - started < 50  # the loop waits a second for an event


def test_client_that_takes_no_answer_gets_no_other_until_it_does(loop: Loop) -> None:
    with loop.connect(timeout=30) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        loop.turn()
        (channel,) = loop.channels.values()
        channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.sendall(b"GET /openapi.yaml HTTP/1.1\r\n\r\n" * 100)
        loop.turn(200, timeout=0)
        assert len(channel.requests) > 50
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 100:
            loop.turn(20, timeout=0)
            received += connection.recv(65536) or pytest.fail("The connection is closed.")


def test_requests_sent_in_advance_keep_nobody_out(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(30):
            connection = stack.enter_context(connect(server))
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 455)
        assert server.request("GET", "/health").status == 200
    before, _, _ = server.stop().partition("GET /health 200")
    assert before.count("GET / 404") < 30 * 100


def test_little_is_read_of_a_connection_in_a_round(loop: Loop) -> None:
    with loop.connect() as connection:
        loop.turn()
        (channel,) = loop.channels.values()
        connection.sendall(b"G / HTTP/1.1\r\n\r\n" * 1000)
        loop.turn()
        assert 0 < len(channel.requests) <= 2048 // 16


EXPECTING = {
    "no body": (b"GET /health HTTP/1.1", b"200"),
    "empty body": (b"GET /health HTTP/1.1\r\nContent-Length: 0", b"200"),
    "too long": (b"PUT / HTTP/1.1\r\nContent-Length: 200000", b"413"),
    "no length": (b"PUT / HTTP/1.1\r\nContent-Length: abc", b"400"),
    "body": (b"PUT / HTTP/1.1\r\nContent-Length: 2", b"100"),
}


@pytest.mark.parametrize(("head", "status"), EXPECTING.values(), ids=EXPECTING)
def test_expectation_is_answered(running: Running, head: bytes, status: bytes) -> None:
    with connect(running.server) as connection:
        connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(65536)[9:12] == status


def test_answer_does_not_wait_for_the_next_one(loop: Loop) -> None:
    with loop.connect(timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n" * 2)
        loop.turn(2)
        assert connection.recv(65536).count(b"HTTP/1.1 200 OK") == 1


def test_client_whose_network_fails_leaves_no_error_in_the_log(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    with loop.connect() as connection:
        loop.turn()
        (channel,) = loop.channels.values()  # which gives up as soon as nothing is taken
        channel.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
        for _ in range(1000):
            with suppress(OSError):
                connection.send(b"GET /openapi.yaml HTTP/1.1\r\n\r\n" * 20, socket.MSG_DONTWAIT)
            loop.turn()
            if not loop.channels:
                break
    assert not loop.channels
    assert "ERROR" not in caplog.text


def test_connection_that_is_reset_amid_an_expectation_ends_alone(
    app: Flask, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    def reset_and_fail() -> str:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        abort(404)

    app.add_url_rule("/reset", view_func=reset_and_fail)
    connection = loop.connect()
    connection.sendall(b"GET /reset HTTP/1.1\r\n\r\nPUT / HTTP/1.1\r\nContent-Length: 2\r\n")
    connection.sendall(b"Expect: 100-continue\r\n\r\n")
    loop.turn(2)
    assert not loop.channels
    assert "ERROR" not in caplog.text


def test_connection_that_is_reset_before_the_answer_to_its_expectation_ends_alone(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    with loop.connect() as connection:
        loop.turn()
        connection.sendall(b"PUT / HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    loop.turn(2)
    assert not loop.channels
    assert "ERROR" not in caplog.text


def test_urgent_data_ends_the_connection(server: Server) -> None:
    with connect(server) as connection:
        connection.settimeout(5)  # half of that of an idle connection
        connection.send(b"x", socket.MSG_OOB)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


@pytest.mark.parametrize("error", [TimeoutError, RuntimeError])
def test_error_of_a_connection_ends_it_alone(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(_channel: HTTPChannel) -> None:
        raise error

    with loop.connect() as broken, loop.connect() as other:
        with monkeypatch.context() as patch:
            patch.setattr(HTTPChannel, "service", fail)
            broken.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            loop.turn(4, timeout=0.1)
        assert broken.recv(1) == b""
        other.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        loop.turn(3, timeout=0.1)
        assert other.recv(15) == b"HTTP/1.1 200 OK"


def test_name_of_two_addresses_is_served_on_both(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = ["127.0.0.1", "127.0.0.2"]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in hosts]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: found)
    sockets: dict[int, Any] = {}
    servers = create_servers(app, sockets)
    assert [server.getsockname()[0] for server in servers] == hosts
    wasyncore.close_all(sockets)


def test_process_that_hangs_is_ended_by_its_stop() -> None:
    assert run(stop_and_hang)[1] == "5"


def test_few_descriptors_are_no_flood_in_the_log(
    start_server: StartServer, credential: str, key_file: Path
) -> None:
    server = start_server(Fork(serve_with_descriptors, 64))
    server.put(CONFIG, credential)
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(200)]
        os.utime(key_file)  # has it read again
        head = f"GET {URL} HTTP/1.1\r\nAuthorization: token {credential}\r\n\r\n"
        connections[0].sendall(head.encode())
        assert connections[0].recv(65536).startswith(b"HTTP/1.1 200 ")
    assert server.request("GET", "/health").status == 200
    log = server.stop()
    assert "Traceback" not in log
    assert len(log.splitlines()) < 20


def test_lack_of_descriptors_is_no_flood_in_the_log(server: Server) -> None:
    pid = server.process.pid
    assert pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, hard))
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in server.stop()


def test_client_that_goes_away_leaves_no_traceback(
    server: Server, credential: str, database_url: str
) -> None:
    body = json.dumps(CONFIG).encode()
    head = f"PUT {URL} HTTP/1.1\r\nAuthorization: token {credential}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with locked(database_url):
        connection = connect(server)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(head.encode() + body)
        server.wait_for("Last use not recorded")
        connection.close()  # with a reset
    server.wait_for("PUT /api/v1/ai/provider 200")
    assert "Traceback" not in server.stop()


def test_idle_connections_have_a_limit_in_time(loop: Loop) -> None:
    assert (loop.server.adj.channel_timeout, loop.server.adj.cleanup_interval) == (10, 1)
    with loop.connect(timeout=30) as connection:
        loop.turn()
        (channel,) = loop.channels.values()
        for age in (9, 11):
            assert not channel.will_close
            loop.server.maintenance(int(channel.last_activity) + age)
        loop.turn()
        assert connection.recv(1) == b""


@on_both
def test_configuration_survives_a_restart(start_server: StartServer, credential: str) -> None:
    server = start_server()
    server.put(CONFIG, credential)
    before = server.get(credential).body
    server.stop()
    assert start_server().get(credential).body == before


@pytest.mark.parametrize(("path", "status"), [(URL, 404), ("/health", 200), ("/nowhere", 404)])
def test_answer_has_the_headers_of_an_api_that_handles_secrets(
    server: Server, credential: str, path: str, status: int
) -> None:
    answer = server.request("GET", path, Authorization=f"token {credential}")
    assert answer.status == status
    del answer.headers["Date"]
    assert answer.headers == {
        "Content-Length": answer.headers["Content-Length"],
        "Content-Type": "application/json",
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }


def test_stalled_connections_do_not_keep_others_out(server: Server, credential: str) -> None:
    header = f"PUT {URL} HTTP/1.1\r\nAuthorization: token {credential}\r\n".encode()
    with ExitStack() as stalled:
        for number in range(100):
            connection = socket.create_connection(("127.0.0.1", server.port))
            stalled.enter_context(connection)
            connection.sendall(header + b"Content-Length: 9\r\n\r\n{" * (number % 2))
        assert server.put(CONFIG, credential).status == 200
        assert server.request("GET", "/health").status == 200


def test_development_server_logs_as_the_other_does(
    start_server: StartServer,
) -> None:
    create_credential()
    server = start_server(Fork(execute_command, "run", "--port", "0"))
    server.wait_for("Press CTRL+C to quit")
    assert server.request("GET", "/health?secret=1").body == SUCCESS
    access = server.wait_for("")
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(rf"{stamp} INFO GET /health 200 \d+\.\d ms - 127\.0\.0\.1\n", access)
    assert "secret" not in server.stop(signal.SIGINT)


def test_second_application_in_a_process_adds_nothing_to_the_log(start_app: StartApp) -> None:
    loggers = [logging.getLogger(name) for name in (None, "app", "werkzeug", "waitress")]
    start_app()
    before = [[*logger.handlers, *logger.filters] for logger in loggers]
    start_app()
    assert [[*logger.handlers, *logger.filters] for logger in loggers] == before


def test_secrets_are_in_no_log_and_in_no_file_but_encrypted(
    server: Server, credential: str, tmp_path: Path
) -> None:
    server.put(CONFIG, credential)
    server.put(CONFIG | {"extra": API_KEY}, credential)
    server.request("PUT", body=CONFIG | {"api_key": f"{API_KEY}\n"})
    server.get(f"{credential}x")
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    log = server.stop().encode()
    for content in [*files, log]:
        assert API_KEY.encode() not in content
        assert credential[33:].encode() not in content
    assert len(files) == 4
    assert log.count(b"WARNING PUT /api/v1/ai/provider 401 ") == 1
    assert log.count(b"WARNING GET /api/v1/ai/provider 401 ") == 1
