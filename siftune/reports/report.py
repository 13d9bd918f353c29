"""`siftune report RUN`: the page of a run folder, for any kind of run. Reads files; loads no model.

Cost: seconds, plus the map the first time (see maps).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..data.protect import refuse_overlap, setting_inputs
from ..errors import MissingExtra, UserError
from ..files import read_json
from ..progress import doing
from . import page
from .blocks import Page
from .rows_file import MANIFEST, ROWS
from .study import is_study
from .training_run import is_training

REPORT = "report.html"
DEMO = "select"
"""The selection inside a demo's run folder."""
MAP_ROWS = 10_000
"""Default number of rows of the map."""
MAX_MAP_ROWS = 20_000
"""Maximum number of rows of the map, to bound the page's size."""


def write(
    run_folder: str | Path,
    out: str | Path | None = None,
    *,
    map_rows: int = MAP_ROWS,
    rows: str | None = None,
    figures: bool = False,
    cache: str | Path | None = None,
    seed: int = 0,
) -> Path:
    """Write the page of a run to `out`, else to `report.html` in the run folder; returns its path.

    `map_rows` bounds the map (0 omits it), `rows` is the file that a trainer's OUTPUT_DIR was trained on, `figures` draws the
    charts as PNG and SVG as well (into `figures_beside` the page), `cache` is the run's cache folder, and `seed` draws the
    rows that are shown of many. Raises `UserError` for a folder that holds no finished run, for invalid options, and where
    plotly, jinja2 or openTSNE is missing.

    >>> report.write("siftune-runs/daar-0a1b2c")
    """
    if not 0 <= map_rows <= MAX_MAP_ROWS:
        raise UserError(
            f"map_rows={map_rows} is not between 0 and {MAX_MAP_ROWS:,}; of a larger pool the map shows a random sample"
        )
    folder = Path(run_folder)
    kind = kind_of(folder)
    if rows is not None and kind != "training":
        raise UserError(f"--rows {rows} is for a trainer's OUTPUT_DIR, and {folder} holds a {kind}; remove it")
    path = folder / REPORT if out is None else Path(out)
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; pass the path of a file, such as {path / REPORT}")
    _check_out(path, out, folder, kind, rows=rows, figures=figures)
    page.require(mapped=map_rows > 0 and kind in ("selection", "demo"))
    if figures:
        require_matplotlib()
    with doing("writing the page"):
        content = page_of(folder, kind, map_rows=map_rows, rows=rows, cache=cache, seed=seed)
        if figures:
            from .page_figures import draw

            draw(content, figures_beside(path))
        return page.save(content, path)


def _check_out(path: Path, out: str | Path | None, folder: Path, kind: str, *, rows: str | None, figures: bool) -> None:
    """Refuse a path that is not .html, that is an input of the run, or (in the run folder) a file that siftune did not write."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {path} is not an HTML file; pass a path that ends in .html")
    if out is None and path.exists() and not page.was_written_by_siftune(path):
        raise UserError(f"{path} was not written by siftune report; pass another path with --out")
    own = folder / DEMO if kind == "demo" else folder
    manifest = read_json(own / MANIFEST) if (own / MANIFEST).is_file() else {}
    config = manifest.get("config") if isinstance(manifest, dict) else None
    inputs = setting_inputs(config if isinstance(config, dict) else {}, "the run's {}") | {"--rows": rows}
    beside = figures_beside(path) if figures else None
    refuse_overlap({"--out": path, "the figures' folder": beside}, inputs)


def figures_beside(path: Path) -> Path:
    """The folder of a page's figures."""
    return path.with_name(f"{path.stem}-figures")


def require_matplotlib() -> None:
    """Raise `MissingExtra` where figures cannot be drawn, before anything is computed."""
    if find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", extra="report", needed_for="siftune report --figures")


def kind_of(folder: Path) -> str:
    """`selection`, `training`, `study` or `demo`. Raises `UserError` for a folder that holds none of them."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; pass the run folder that siftune select printed")
    if (folder / DEMO / MANIFEST).is_file():
        return "demo"
    if is_study(folder):
        return "study"
    command = _command(folder)
    if command == "select" or (command is None and (folder / ROWS).is_file() and not is_training(folder)):
        return "selection"
    if is_training(folder):
        return "training"
    rounds = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    way_out = f"it holds runs: {', '.join(rounds[:6])}; pass one of them" if rounds else "pass the run folder itself"
    raise UserError(f"{folder} holds no {MANIFEST} of a selection, no training log and no ledger; {way_out}")


def _command(folder: Path) -> str | None:
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_json(folder / MANIFEST)
    command = manifest.get("config", {}).get("command") if isinstance(manifest, dict) else None
    return str(command) if command is not None else None


def page_of(folder: Path, kind: str, *, map_rows: int, rows: str | None, cache: str | Path | None, seed: int) -> Page:
    """The page of a run, before it is written."""
    from .selection import PageSettings, selection_page
    from .study import study_page
    from .training import training_page

    if kind == "training":
        return training_page(folder, rows=rows, cache=cache, seed=seed)
    if kind == "study":
        return study_page(folder)
    settings = PageSettings(map_rows=map_rows, cache=cache, seed=seed)
    if kind == "selection":
        return selection_page(folder, settings)
    from .demo_run import demo_page

    return demo_page(folder, settings)
