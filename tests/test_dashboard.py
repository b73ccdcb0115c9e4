"""The dashboard as its user meets it: a server on this machine, and a browser that shows the study."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.ui import WebDriverWait

from planner.dashboard import serve
from planner.storage import open_storage

SERVE = """
import signal, sys
from planner.dashboard import serve
signal.signal(signal.SIGINT, signal.default_int_handler)
serve(sys.argv[1], 0, on_ready=lambda address: print(address, flush=True))
"""


@pytest.fixture
def storage_url(tmp_path: Path) -> str:
    url = f"journal:{tmp_path / 'studies.journal'}"
    study = optuna.create_study(study_name="gpt2-on-6-gib", storage=open_storage(url))
    study.add_trial(optuna.trial.create_trial(value=0.25))
    return url


@pytest.fixture
def server(storage_url: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVE, storage_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server
        server.kill()


@pytest.fixture
def address(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    return server.stdout.readline().strip()


def test_the_page_shows_the_study_that_is_in_the_storage(address: str, browser: webdriver.Chrome) -> None:
    browser.get(address)
    body = (By.TAG_NAME, "body")
    WebDriverWait(browser, 60).until(expected_conditions.text_to_be_present_in_element(body, "gpt2-on-6-gib"))


def test_the_server_is_reached_from_this_machine_only(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")


def test_an_open_connection_does_not_keep_the_server_from_stopping(
    address: str, server: subprocess.Popen[str]
) -> None:
    port = int(address.removeprefix("http://127.0.0.1:").removesuffix("/dashboard"))
    with socket.create_connection(("127.0.0.1", port)) as idle:
        # The server takes connections in turn: when it answers this page, it holds the idle one.
        urllib.request.urlopen(address).close()
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) != 0
        assert idle.recv(1) == b""


def never(address: str) -> None:
    raise AssertionError(f"{address} is served")


def test_a_taken_port_is_refused_with_the_way_out(storage_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match="taken") as caught:
            serve(storage_url, port, on_ready=never)
    assert str(caught.value) == (
        f"Port {port} on 127.0.0.1 is taken. Give another port, or port 0 for any free one."
    )


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int, storage_url: str) -> None:
    with pytest.raises(ValueError, match=rf"^A port is a number from 0 to 65535, got {port}\."):
        serve(storage_url, port, on_ready=never)


def test_a_host_that_is_not_this_machine_is_refused(storage_url: str) -> None:
    with pytest.raises(ValueError, match=r"^Cannot serve on port 0 of 192\.0\.2\.1: "):
        serve(storage_url, 0, host="192.0.2.1", on_ready=never)
