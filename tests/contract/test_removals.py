"""Every place that removes, renames, replaces or writes over is listed here, with the test of what it may touch.

A new call site fails until it is listed: say why it can touch only what siftune wrote, and name the test that plants a
file of the user's beside or inside and finds it again.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent / "siftune"
CALLS = {
    "os": {"replace", "remove", "unlink", "rename", "renames", "rmdir", "removedirs", "truncate", "ftruncate"},
    "shutil": {"rmtree", "move", "copyfile", "copytree", "copy", "copy2"},
}
METHODS = {"unlink", "rename", "rmdir", "write_text", "write_bytes"}
OURS = {"remove", "clear", "discard", "place", "refill"}
"""Functions of siftune.data that remove or replace; `remove` takes anything, so its arguments are checked below."""

EXPORT = "unit/test_protect.py::test_an_export_with_anything_of_the_users_stays"
KILLED = "unit/test_protect.py::test_an_export_that_a_kill_left_aside_comes_back"
SWEPT = "unit/test_user_files.py::test_sweeping_removes_only_temporaries_of_dead_processes"
FAILED = "unit/test_user_files.py::test_a_failed_write_removes_its_own_temporary"
POOL = "unit/test_user_files.py::test_a_damaged_pool_in_the_cache_is_replaced_without_the_users_files"
TOKENS = "unit/test_user_files.py::test_damaged_tokens_in_the_cache_are_replaced_without_the_users_files"
TABLE = "unit/test_user_files.py::test_parts_of_a_table_are_known_by_their_note"
LEDGER = "unit/test_user_files.py::test_a_ledger_replaces_only_parts_of_ledgers"
TRAIN = "faults/test_user_files.py::test_train_replaces_its_own_export_until_the_user_changes_it"
MERGE = "unit/test_user_files.py::test_a_merged_adapter_replaces_only_a_merged_adapter"
WARMUP = "parity/test_target_loss.py::test_a_damaged_run_in_the_cache_is_replaced_without_the_users_files"
LOOP = "unit/test_user_files.py::test_a_tuning_done_again_removes_its_own_note_alone"
LOOPED = "faults/test_user_files.py::test_loop_replaces_nothing_that_it_reads"

LISTED: dict[tuple[str, str, str], tuple[int, str]] = {
    # the mechanisms
    ("data/exports.py", "place", "os.rename"): (4, KILLED),
    ("data/exports.py", "place", "discard"): (2, EXPORT),
    ("data/exports.py", "_remove", "unlink"): (1, EXPORT),
    ("data/exports.py", "_remove", "os.rmdir"): (1, EXPORT),
    ("files.py", "atomic_path", "os.replace"): (1, "unit/test_protect.py::test_only_ordinary_files_are_replaced"),
    ("files.py", "atomic_path", "unlink"): (1, FAILED),
    ("files.py", "sweep_temporaries", "remove"): (1, SWEPT),
    ("files.py", "remove", "shutil.rmtree"): (1, SWEPT),
    ("files.py", "remove", "unlink"): (1, SWEPT),
    # the cache: folders and files called by content hashes
    ("data/exports.py", "refill", "os.replace"): (1, POOL),
    ("data/load.py", "_publish", "refill"): (1, POOL),
    ("data/load.py", "_publish", "os.rename"): (1, POOL),
    ("data/load.py", "_stored", "remove"): (1, POOL),
    ("sft/dataset.py", "_make", "refill"): (1, TOKENS),
    ("sft/dataset.py", "_make", "os.rename"): (1, TOKENS),
    ("sft/dataset.py", "_make", "remove"): (1, TOKENS),
    ("warmup/tuning.py", "_run", "refill"): (1, WARMUP),
    ("warmup/tuning.py", "_run", "os.rename"): (1, WARMUP),
    ("warmup/tuning.py", "_run", "remove"): (2, WARMUP),
    ("models/store.py", "Store.get", "unlink"): (1, "unit/test_user_files.py::test_an_unsound_entry_is_removed_alone"),
    ("models/journal.py", "Journal.__enter__", "open"): (1, "unit/test_journal.py"),
    ("models/journal.py", "Journal._read", "os.ftruncate"): (1, "unit/test_journal.py"),
    # the pool of a contract check, in a temporary folder
    ("testing.py", "example_pool", "write_text"): (1, "contract/test_testing.py"),
    # run folders, and what is beside a table
    ("study/cell.py", "_drop_model", "discard"): (
        1,
        "unit/test_user_files.py::test_weights_of_a_measured_cell_go_without_the_users_files",
    ),
    ("study/data.py", "prepare", "unlink"): (
        1,
        "unit/test_user_files.py::test_the_rows_of_a_study_are_drawn_again_beside_the_users_files",
    ),
    ("runs/loop.py", "_tune", "unlink"): (1, LOOP),
    ("runs/loop.py", "_tune", "open"): (1, LOOPED),
    ("runs/score_reference.py", "_compute", "remove"): (
        1,
        "faults/test_user_files.py::test_score_reference_replaces_only_its_own_table",
    ),
    ("hook/ledger.py", "Ledger.drop_after", "unlink"): (2, LEDGER),
    ("sft/reference_losses.py", "reference_losses", "clear"): (1, TABLE),
    ("sft/reference_losses.py", "_begin", "clear"): (1, TABLE),
    # exports
    ("sft/adapters.py", "merge", "place"): (1, MERGE),
    ("sft/adapters.py", "merge", "remove"): (1, MERGE),
    ("runs/train.py", "_copy", "shutil.copytree"): (1, TRAIN),
    ("runs/train.py", "_copy", "place"): (1, TRAIN),
    ("runs/train.py", "_copy", "remove"): (1, TRAIN),
    ("runs/train.py", "_Job._save", "unlink"): (1, TRAIN),
    ("runs/train.py", "_Job._save", "discard"): (1, TRAIN),
    ("runs/train.py", "_Job._save", "place"): (1, TRAIN),
    ("runs/train.py", "_Job._save", "remove"): (1, TRAIN),
    ("runs/train.py", "_Job._save", "write_text"): (1, TRAIN),
    # folders that are new or empty, or the package's own
    ("evaluation/program_keeper.py", "_new_namespace", "open"): (1, "unit/test_evaluation_grading.py"),
    ("evaluation/programs.py", "failure", "write_text"): (1, "unit/test_evaluation_grading.py"),
    ("evaluation/programs.py", "_remove", "os.unlink"): (1, "unit/test_evaluation_grading.py"),
    ("evaluation/programs.py", "_remove", "os.rmdir"): (1, "unit/test_evaluation_grading.py"),
    ("evaluation/programs.py", "_empty", "os.unlink"): (1, "unit/test_evaluation_grading.py"),
    ("evaluation/programs.py", "_empty", "os.rename"): (1, "unit/test_evaluation_grading.py"),
    ("evaluation/programs.py", "_empty", "os.rmdir"): (1, "unit/test_evaluation_grading.py"),
    ("data/build.py", "save", "open"): (1, POOL),
    ("data/build.py", "Writer.__init__", "open"): (1, POOL),
    ("data/write.py", "_opened", "open"): (1, "unit/test_protect.py::test_a_subset_never_replaces_its_pool"),
}
"""(file, function, call) -> how often, and the test. Writes to the temporary of `atomic_path` are not listed."""


def calls(path: Path) -> dict[tuple[str, str], int]:
    """(function, call) of a file -> how often."""
    counts: dict[tuple[str, str], int] = {}

    def visit(node: ast.AST, where: tuple[str, ...], temporary: set[str]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            where, temporary = (*where, node.name), temporaries(node)
        if isinstance(node, ast.Call) and (name := named(node, temporary)) is not None:
            key = (".".join(where), name)
            counts[key] = counts.get(key, 0) + 1
        for child in ast.iter_child_nodes(node):
            visit(child, where, temporary)

    visit(ast.parse(path.read_text(encoding="utf-8")), (), set())
    return counts


def temporaries(function: ast.AST) -> set[str]:
    """Names that a function gets from `atomic_path` or `temporary_beside`."""
    names: list[ast.expr | None] = []
    for node in ast.walk(function):
        if isinstance(node, ast.withitem) and "atomic_path(" in ast.unparse(node.context_expr):
            names.append(node.optional_vars)
        if isinstance(node, ast.Assign) and "temporary_beside(" in ast.unparse(node.value):
            names += [name for target in node.targets for name in getattr(target, "elts", [target])]
    return {name.id for name in names if isinstance(name, ast.Name)}


def named(call: ast.Call, temporary: set[str]) -> str | None:
    """What a call removes, renames or writes with; None for another call, and for a write to a temporary."""

    def is_temporary(value: ast.expr | None) -> bool:
        return isinstance(value, ast.Name) and value.id in temporary

    match call.func:
        case ast.Attribute(value=ast.Name(id=("os" | "shutil") as module), attr=attr):
            copied = attr == "copyfile" and is_temporary(call.args[-1])
            return f"{module}.{attr}" if attr in CALLS[module] and not copied else None
        case ast.Attribute(value=value, attr=attr):
            if attr in METHODS:
                return None if attr.startswith("write_") and is_temporary(value) else attr
            if attr == "replace" and len(call.args) == 1 and not call.keywords:  # Path.replace; str.replace takes two
                return attr
            return "open" if attr == "open" and writes(call.args[:1]) and not is_temporary(value) else None
        case ast.Name(id="open"):
            return "open" if writes(call.args[1:2]) else None
        case ast.Name(id=name) if name in OURS:
            return name
    return None


def writes(modes: list[ast.expr]) -> bool:
    return any(isinstance(mode, ast.Constant) and set("wax+") & set(str(mode.value)) for mode in modes)


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_removal_is_listed(path: Path) -> None:
    file = str(path.relative_to(ROOT))
    listed = {(where, call): count for (name, where, call), (count, _) in LISTED.items() if name == file}
    assert calls(path) == listed, "list the call site above, with the test that plants a file of the user's there"


@pytest.mark.parametrize("test", sorted({test for _, test in LISTED.values()}))
def test_every_listed_test_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert (TESTS / file).is_file()
    assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8") or not name


def test_whatever_is_removed_without_a_look_is_a_temporary_of_this_process() -> None:
    for path in FILES:
        if path == ROOT / "files.py":
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            made = temporaries(function)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "remove":
                    assert ast.unparse(node.args[0]) in made, f"{path.relative_to(ROOT)}: {ast.unparse(node)}"


def test_a_new_call_site_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "new.py"
    path.write_text(
        "import os, shutil\ndef f(p, q):\n    shutil.rmtree(p)\n    p.unlink()\n    os.replace(p, q)\n    p.replace(q)\n"
        "    p.rename(q)\n    q.write_text('x')\n    open(q, 'w')\n    q.open('ab')\n    'a'.replace('b', 'c')\n    open(p)\n"
        "    with atomic_path(q) as temporary:\n        temporary.write_text('x')\n"
    )
    expected = {"shutil.rmtree": 1, "unlink": 1, "os.replace": 1, "replace": 1, "rename": 1, "write_text": 1, "open": 2}
    assert calls(path) == {("f", name): count for name, count in expected.items()}
