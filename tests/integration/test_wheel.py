"""The wheel: what is in it, and that it works where only the core's own requirements are installed.

Nothing is fetched: the empty environment gets the wheel and, as links, the distributions that its requirements without an
extra lead to. A package that only an extra brings is absent there, as it is for a user.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ("siftune", "pyproject.toml", "README.md", "LICENSE")
ABSENT = (
    "trl",
    "peft",
    "accelerate",
    "openai",
    "lm_eval",
    "plotly",
    "openTSNE",
    "matplotlib",
    "ray",
    "pytest",
)
"""Modules that only an extra brings (jinja2, of the page, comes with torch)."""
ROWS = 200
OUTSIDE = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
"""The environment's variables, without those that lead back to the checkout."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, so that nothing is left behind in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


def required(requirements: list[str], extras: set[str]) -> set[str]:
    """Names of the installed distributions that requirements lead to, theirs included."""
    names: set[str] = set()
    pending = [(text, extras) for text in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while pending:
        text, wanted = pending.pop()
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in wanted | {""}):
            continue
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        names.add(key[0])
        pending += [(line, requirement.extras) for line in metadata.requires(requirement.name) or []]
    return names


def link(name: str, into: Path) -> None:
    """A distribution's modules and metadata as links in a folder of packages."""
    distribution = metadata.distribution(name)
    for top in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
        source = Path(str(distribution.locate_file(top)))
        if source.exists() and not (into / top).exists():
            (into / top).symlink_to(source)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and the core's requirements alone."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    executable = folder / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(executable),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, "--disable-pip-version-check", str(wheel)], cwd=folder.parent, env=OUTSIDE, check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (facts,) = packages.glob("siftune-*.dist-info")
    requirements = metadata.Distribution.at(facts).requires
    assert requirements
    for name in required(requirements, set()):
        link(name, packages)
    return executable


class Environment:
    """Commands in the environment of the wheel, from a folder that holds no sources."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder = python, folder
        self.environment = {**OUTSIDE, "SIFTUNE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}

    def run(self, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """One command; fails unless it ends with `code` and without a traceback."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def siftune(self, *words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """The installed command `siftune`."""
        return self.run(self.python.with_name("siftune"), *words, code=code)

    def evaluate(self, statement: str) -> str:
        """What a line of Python prints there."""
        return self.run(self.python, "-c", statement).stdout.strip()


@pytest.fixture(scope="module")
def environment(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(python, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def demo(environment: Environment) -> subprocess.CompletedProcess[str]:
    """The demo with the core alone; its folder `demo/data` holds the pool and the seed rows of the other tests."""
    return environment.siftune("demo", "--run", "demo", "--rows", ROWS, "--steps", 1)


def test_the_wheel_holds_the_package_and_its_data_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"siftune"}
    package = ROOT / "siftune"
    sources = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    needed = {path.relative_to(ROOT).as_posix() for path in sources if path.suffix != ".md"}
    assert needed - names == set()
    for pattern in ("presets", "suites", "tasks", "templates", "demo/assets/model"):
        assert any(f"/{pattern}/" in name for name in names), pattern
    assert "siftune/py.typed" in names
    assert not any("test" in Path(name).parts or "tests" in Path(name).parts for name in names)


def test_versions_agree(wheel: Path, environment: Environment) -> None:
    import siftune

    assert wheel.name.startswith(f"siftune-{siftune.__version__}-")
    first = environment.siftune("version").stdout.splitlines()[0].split()
    assert first == ["siftune", siftune.__version__]
    assert f"\nversion: {siftune.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_what_runs_is_the_installed_wheel_without_any_extra(environment: Environment, python: Path) -> None:
    folder = environment.evaluate("import siftune; print(siftune.__file__)")
    assert Path(folder).is_relative_to(python.parents[1])
    present = f"[name for name in {ABSENT} if importlib.util.find_spec(name)]"
    assert environment.evaluate(f"import importlib.util; print({present})") == "[]"


def test_methods_are_listed(environment: Environment) -> None:
    listed = environment.siftune("methods").stdout
    assert all(name in listed for name in ("daar", "length", "uds"))


def test_the_demo_runs_as_far_as_the_core_goes(
    environment: Environment, demo: subprocess.CompletedProcess[str]
) -> None:
    facts = json.loads((environment.folder / "demo" / "demo.json").read_text(encoding="utf-8"))
    assert facts["offline"]["kept"] == ROWS // 5
    assert "needs accelerate" in facts["online"]["left_out"]
    printed = " ".join((demo.stdout + demo.stderr).split())
    assert printed.count("pip install 'siftune[demo]'") == 1, printed
    assert printed.count("pip install 'siftune[report]'") == 1, printed


@pytest.mark.usefixtures("demo")
def test_rows_are_chosen(environment: Environment) -> None:
    model = environment.evaluate("from siftune.demo.embedded import model_folder; print(model_folder())")
    daar = ("daar", "demo/data/pool.jsonl", "--model", model, "--seeds", "demo/data/seeds.jsonl")
    for words in (daar, ("length", "demo/data/pool.jsonl")):
        name = words[0]
        environment.siftune("select", *words, "--keep", "20%", "--run", f"run-{name}", "--out", f"{name}.jsonl")
        assert len((environment.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()) == ROWS // 5


@pytest.mark.usefixtures("demo")
@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (("report", "demo/select"), "plotly", "report"),
        (("train", "recipe.yaml", "--run", "tuned"), "trl", "train"),
        (("evaluate", "MODEL", "--suite", "uds", "--skip", "humaneval", "--data", "demo/data"), "lm-eval", "evaluate"),
        (("select", "alpagasus", "demo/data/pool.jsonl", "--judge", "http://127.0.0.1:9/v1"), "openai", "generate"),
        (
            ("select", "daar", "demo/data/pool.jsonl", "--seeds", "S", "--model", "MODEL", "--engine", "ray"),
            "ray",
            "ray",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_an_absent_extra_is_one_sentence(
    environment: Environment, words: tuple[str, ...], package: str, extra: str
) -> None:
    model = environment.evaluate("from siftune.demo.embedded import model_folder; print(model_folder())")
    (environment.folder / "recipe.yaml").write_text(f"model: {model}\ntrain: demo/select/selected.jsonl\n")
    places = {"MODEL": model, "S": "demo/data/seeds.jsonl"}
    done = environment.siftune(*(places.get(word, word) for word in words), code=2)
    sentence = " ".join(done.stderr.split())
    assert f"needs {package}, which is not installed; run: pip install 'siftune[{extra}]'" in sentence
