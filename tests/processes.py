"""Processes of the application, most of them forked from one that has it imported.

A fork starts in a tenth of the time that a new interpreter takes.
"""

import gc
import multiprocessing.forkserver
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

from flask import cli
from waitress.trigger import trigger

import app

Function = Callable[..., object]
ROOT = Path(__file__).parent.parent

# The process that is forked: a new interpreter that has imported these modules and no others.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    [
        "app",
        "psycopg",
        "flask_sqlalchemy.cli",
        "sqlalchemy.dialects.postgresql",
        "sqlalchemy.dialects.sqlite",
    ]
)


def stop_forkserver() -> None:
    """End the processes behind the forks; the standard library would only tell them to end."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


class Fork:
    """A forked process that calls a function, with the interface of subprocess.Popen."""

    def __init__(self, function: Function, *arguments: object, **settings: str) -> None:
        self.stdout, stdout = open_pipe()
        self.stderr, stderr = open_pipe()
        call = (stdout, stderr, os.environ | settings, function, *arguments)
        # A daemon is ended with its parent.
        self.process = forkserver.Process(target=call_as_new_process, args=call, daemon=True)
        with stdout, stderr:
            self.process.start()

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.pid and self.poll() is None:
            os.kill(self.process.pid, number)


def open_pipe() -> tuple[TextIO, Connection]:
    """Return a pipe's end for this process and its end for another one."""
    reader, writer = os.pipe()
    return os.fdopen(reader), Connection(writer, readable=False)


def call_as_new_process(
    stdout: Connection,
    stderr: Connection,
    environment: dict[str, str],
    function: Function,
    *arguments: object,
) -> None:
    """Make the forked process like a new one; call the function."""
    gc.freeze()  # or a collection would copy the pages that both processes share
    os.dup2(stdout.fileno(), sys.stdout.fileno())
    os.dup2(stderr.fileno(), sys.stderr.fileno())
    stdout.close()
    stderr.close()
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    os.chdir(ROOT)
    # A shell has its background jobs ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(*arguments)


def run(function: Function, *arguments: object, **settings: str) -> tuple[int, str, str]:
    """Call the function in a fork; return its exit status, standard output and standard error."""
    fork = Fork(function, *arguments, **settings)
    with fork.stdout, fork.stderr:
        try:
            status = fork.wait(60)  # the output fits in the pipes
        finally:
            fork.send_signal(signal.SIGKILL)
        return status, fork.stdout.read(), fork.stderr.read()


def serve(*arguments: str) -> None:
    """Do what `python app.py` does with these arguments."""
    sys.argv = ["app.py", *arguments]
    app.main()


def serve_beside(root: Path) -> None:
    """Do what `python app.py` does in a checkout in this folder."""
    app.ROOT = root
    serve()


def serve_with_umask(umask: int) -> None:
    """Do what `python app.py` does in a shell with this umask."""
    os.umask(umask)
    serve()


def serve_with_descriptors(count: int) -> None:
    """Do what `python app.py` does after `ulimit -n`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    serve()


def serve_into_journal() -> None:
    """Do what `python app.py` does when systemd writes its log into the journal."""
    stream = os.fstat(sys.stderr.fileno())
    os.environ["JOURNAL_STREAM"] = f"{stream.st_dev}:{stream.st_ino}"
    serve()


@contextmanager
def without_privileges() -> Iterator[None]:
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def serve_as_nobody() -> None:
    """Do what `python app.py` does for a user without privileges."""
    with without_privileges():
        serve()


def stop_and_hang() -> None:
    """Print in how many seconds a process that was told to stop is ended."""
    app._stop_on_signals(trigger({}), {})
    os.kill(os.getpid(), signal.SIGTERM)
    sys.stdout.write(str(signal.alarm(0)))
    sys.stdout.flush()


def execute_command(*arguments: str) -> None:
    """Do what `flask` does with these arguments."""
    sys.argv = ["flask", *arguments]
    cli.main()


def execute_command_beside(root: Path, *arguments: str) -> None:
    """Do what `flask` does in a checkout in this folder."""
    app.ROOT = root
    os.chdir(root)
    execute_command(*arguments)


def execute_command_without(module: str, *arguments: str) -> None:
    """Do what `flask` does where this module is not installed."""
    sys.modules[module] = None  # type: ignore[assignment]
    execute_command(*arguments)


def start_interpreter(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start Python with these arguments, in a process that is not forked but new."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=reset_interrupt,
    )


def reset_interrupt() -> None:
    """Undo what a shell does to its background jobs, which ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
