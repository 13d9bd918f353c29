"""What every test shares: no hub, one thread, and the real data where it is at hand."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SIFTUNE_PROGRESS_SECONDS", "86400")  # a slow machine must not print where a test reads stderr

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For what is made once per module; a test's own cache is below."""
    os.environ["SIFTUNE_CACHE"] = str(tmp_path_factory.mktemp("siftune-cache"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "siftune-cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real pools and the real small model, beside the checkout; the test skips where it is absent."""
    if not (SHARED / "data" / "pools").is_dir():
        pytest.skip("real data (../shared) is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_base(shared: Path) -> Path:
    """The real small Llama in `../shared/models`."""
    folder = shared / "models" / "tiny-base"
    if not folder.is_dir():
        pytest.skip("the real small model (../shared/models/tiny-base) is not here")
    return folder


@pytest.fixture(scope="session")
def pretrained() -> Path:
    """SmolLM2-135M-Instruct, a real chat model, in the folder that SIFTUNE_PRETRAINED names; the test skips without."""
    folder = os.environ.get("SIFTUNE_PRETRAINED")
    if not folder:
        pytest.skip("SIFTUNE_PRETRAINED names no folder of a pretrained chat model")
    return Path(folder)
