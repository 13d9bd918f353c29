"""Imports point one way, and `import siftune` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "siftune"
ORDER = [
    "redaction", "errors", "output", "screen", "progress", "files", "file_keys", "yaml_io", "budget", "records", "registry",
    "data", "models", "engines", "offline", "online", "hook", "sft", "evaluation", "warmup", "reports", "demo",
    "runs", "study", "testing", "integrations", "cli", "__main__",
]  # fmt: skip
"""Root modules and folders from top to bottom; each has a place of its own and imports only from what is above it."""
RANK = {name: rank for rank, name in enumerate(ORDER)}
NOT_TOGETHER = {("offline", "engines"), ("online", "offline"), ("hook", "offline"), ("sft", "offline")}
"""Engines are handed to offline methods; the two sides of selection know nothing of each other."""


def imports(path: Path) -> set[str]:
    """First folder or module of siftune that each import statement of a file names, those inside functions too."""
    package = ("siftune", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names]
        found |= {name[1] for name in names if name[0] == "siftune" and len(name) > 1}
    return found


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_every_folder_and_root_module_has_one_place_in_the_order() -> None:
    here = {path.stem for path in ROOT.glob("*.py")} | {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py")}
    assert here - {"__init__"} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_layers_above_its_own(path: Path) -> None:
    own, here = layer(path), path.relative_to(ROOT)
    for name in imports(path) - {own, "__version__"}:
        assert name in RANK, f"{here} imports {name} from siftune itself; import it from the module that defines it"
        assert RANK[name] < RANK[own], f"{here} imports {name}, which is below {own}"
        assert (own, name) not in NOT_TOGETHER, f"{here} imports {name}; it must be handed in"


def test_the_walk_sees_relative_and_absolute_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "offline" / "daar" / "new.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from ...engines.local import x\nimport siftune.cli.main\nfrom ..base import y\nfrom ... import data\n"
    )
    assert imports(path) == {"engines", "cli", "offline", "data"}


HEAVY = ("torch", "transformers", "datasets", "sklearn", "pyarrow")


def test_import_siftune_pulls_in_no_heavy_library_and_is_quick() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import siftune; took = time.perf_counter() - start;"
        f"print(took, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert all(run.stdout.split(" ", 1)[1].strip() == "[]" for run in runs), runs[0].stdout
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.3


POSIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_needs_a_module_of_posix_to_be_imported(path: Path) -> None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        needed = [name for name in names if name in POSIX_ONLY]
        assert not needed, f"{path.name} imports {needed[0]}, which Windows lacks; import it where it is used"


def test_the_python_interface_imports_without_fcntl_and_resource() -> None:
    code = (
        "import sys, torch, datasets, sklearn\n"
        "from transformers import Trainer, TrainerCallback\n"  # these try such modules themselves
        "sys.modules |= {'fcntl': None, 'resource': None}\n"
        "import siftune.files, siftune.models.journal, siftune.study.cell, siftune.evaluation.grading\n"
        "from siftune import DaaR, attach, load_pool\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
