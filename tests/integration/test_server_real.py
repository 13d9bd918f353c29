"""A real OpenAI-compatible server on loopback: `transformers serve` with a tiny model."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from siftune.errors import UserError
from siftune.models.generate import Request, open_generator
from siftune.models.journal import Journal, Journaled
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of a model that is being served."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    folder = save_tiny(tmp_path_factory.mktemp("served"), "llama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (folder / "serve.log").open("wb")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not _healthy(port):
            assert process.poll() is None, (folder / "serve.log").read_text()
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_replies_counts_and_journal(served: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = served
    requests = [
        Request(key=str(n), messages=(("user", f"Say {n}"),), seed=n, temperature=0.9, top_p=0.95, max_new_tokens=12)
        for n in range(6)
    ]
    generator = open_generator(f"{address}#{folder}", concurrency=3, timeout=60)
    with Journal(tmp_path / "r.jsonl") as journal:
        replies = {reply.key: reply for reply in Journaled(generator, journal).replies(requests)}
    assert [replies[request.key].error for request in requests] == [None] * 6
    assert all(0 < reply.completion_tokens <= 12 and reply.prompt_tokens > 0 for reply in replies.values())
    assert {reply.finish_reason for reply in replies.values()} <= {"stop", "length"}
    with Journal(tmp_path / "r.jsonl") as journal:
        again = Journaled(generator, journal)
        assert {reply.key: reply for reply in again.replies(requests)} == replies
        assert again.counts.sent == 0


def test_greedy_replies_are_those_of_the_local_model(served: tuple[str, Path]) -> None:
    address, folder = served
    request = Request(key="a", messages=(("user", "Hello there"),), temperature=0.0, max_new_tokens=10)
    (remote,) = open_generator(f"{address}#{folder}", timeout=60).replies([request])
    (local,) = open_generator(str(folder), device="cpu").replies([request])
    assert (remote.text, remote.prompt_tokens) == (local.text, local.prompt_tokens)


def test_a_model_it_does_not_have_gives_no_reply(served: tuple[str, Path]) -> None:
    address, _ = served
    generator = open_generator(f"{address}#no/such-model", timeout=60, attempts=2, first_wait=0.1)
    request = Request(key="a", messages=(("user", "Hello"),), max_new_tokens=4)
    said = []
    with contextlib.suppress(UserError):  # some servers say 404, which ends the run; this one says 500 for now
        said += generator.replies([request])
    assert all(reply.error and not reply.text for reply in said)
