"""The data step: an archive in, plots (or digits) and parquet files out.

    python3 -m verl.timeseries.build task=ctu source=ori_data/Computers modality=image

Invariants
- The same source, seed and versions give the same bytes in every file, on a first run and on a rerun.
- The output folder is complete or untouched. `fit` and `val` are disjoint, stratified, and together are `train`; what
  the archive groups (records, people) is on one side of the cut.
- Both modalities have the same rows in the same tables.
- No path below the output holds a label. Rows keep the archive's order, so `extra_info.index` is the archive's row.
- Each plot is encoded once; the png file, the Arrow folder and the parquet files hold those bytes.
"""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.timeseries.card import TABLES, looks, make_card
from verl.timeseries.describe import sft_answer
from verl.timeseries.folder import replacing
from verl.timeseries.numeric import NumericFormat
from verl.timeseries.own import CsvOptions, csv_task
from verl.timeseries.plot import default_workers, draw_all
from verl.timeseries.readers import SPLITS, Archive, Split
from verl.timeseries.split import cut_val, resplit, stratified_cut, take
from verl.timeseries.style import PlotStyle, override_style
from verl.timeseries.task import TaskSpec
from verl.timeseries.tasks import get_task

MODALITIES = ("image", "numeric")
NESTED = ("style.", "numeric.", "csv.")
"""Starts of keys that change one field of something larger."""
OWN_ENTRIES = frozenset({"images", *SPLITS, "dataset_dict.json", "data_card.json", *(f"{t}.parquet" for t in TABLES)})


Pictures = Mapping[str, Mapping[int, bytes]]
"""PNG bytes by split and row."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Arguments of the program, `key=value`."""

    task: str
    source: str | None = None
    """Folder or zip of the archive; null for data that an installed library brings."""
    modality: str = "image"
    """image: a plot; numeric: its digits in the prompt, and no `images` column."""
    output: str | None = None
    """Null: `data/<task>_<modality>`."""
    seed: int = 1
    """Of the cut into fit and val, where it is drawn (and of `limit`)."""
    workers: int | None = None
    """Processes that draw; null: every core."""
    limit: int | None = None
    """Keep that many rows per split, stratified: for trials."""
    resplit_seed: int | None = None
    """Pool the archive's train and test and cut them anew at the same sizes; null: the archive's own split."""
    cache: str | None = "auto"
    """Folder of drawn plots, by content; auto: `.plot_cache` beside the output; null: none."""
    overwrite: bool = False
    """Replace an output folder even if it holds another task, or files that this program did not write."""
    style: dict[str, Any] = field(default_factory=dict)
    """Overrides of the task's plot style, e.g. `style.width=224`."""
    numeric: dict[str, Any] = field(default_factory=dict)
    """Overrides of how digits are written: `numeric.decimals`, `numeric.separator`, `numeric.points`."""
    csv: dict[str, Any] = field(default_factory=dict)
    """Options of task=csv, a folder of CSV files: see docs/own_data.md."""


@dataclass(frozen=True)
class BuildResult:
    """Where the data is, how many rows each table has, and how long drawing took."""

    output: Path
    rows: Mapping[str, int]
    milliseconds_per_plot: float
    """Wall time over plots, all workers together; near zero when the cache held them or digits were written."""
    cache: Path | None = None
    """Folder of drawn plots that was used; None: no plots, or no cache."""
    warnings: tuple[str, ...] = ()
    """What a reader of results must know: said by the task, and found in the files."""


def parse_args(args: Sequence[str]) -> BuildConfig:
    """Read `key=value` arguments. Raises ValueError on an unknown key (with the nearest known one) or a wrong type.

    Text is what stands after the first `=`, as it is; other values are YAML.
    """
    known = [f.name for f in fields(BuildConfig)]
    texts: dict[str, Any] = {}
    others: list[str] = []
    for arg in args:
        key, equals, _ = arg.partition("=")
        if not equals:
            raise ValueError(f"argument {arg!r} is not key=value; keys: {', '.join(known)}")
        if key.split(".")[0] not in known or ("." in key and not key.startswith(NESTED)):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown key {key!r}; {hint}known: {', '.join(known)}")
        kind = _kind(key)
        if kind.startswith(("str", "list")):
            texts[key] = _text(arg, kind)
        else:
            others.append(arg)
    if not texts.get("task"):
        raise ValueError("task=NAME is missing, e.g. task=ctu")
    try:
        typed = OmegaConf.merge(OmegaConf.structured(BuildConfig), OmegaConf.from_dotlist(["task=_", *others]))
        values = OmegaConf.to_object(typed)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{' '.join(others)}: {str(error).splitlines()[0]}") from error
    assert isinstance(values, BuildConfig), f"expected BuildConfig, got {type(values)}"
    changes: dict[str, Any] = {}
    for key, text in texts.items():
        group, dot, name = key.partition(".")
        if dot:
            changes[group] = {**changes.get(group, getattr(values, group)), name: text}
        else:
            changes[group] = text
    return replace(values, **changes)


def _kind(key: str) -> str:
    """The declared type of a known or nested key, as written. `str` for a nested one that nobody declares: whoever
    reads it refuses it by name, before its value could be a fault of its own."""
    group, _, name = key.partition(".")
    if not name:
        types = {f.name: str(f.type) for f in fields(BuildConfig)}
        if key not in types:
            raise ValueError(f"{key}= names no option after its dot; see --help")
        return types[key]
    if name.startswith("spectrogram."):
        return "nested"
    owner = {"csv": CsvOptions, "numeric": NumericFormat, "style": PlotStyle}[group]
    return {f.name: str(f.type) for f in fields(owner)}.get(name, "str")


def _text(arg: str, kind: str) -> str | list[str] | None:
    """The value of a text key, or of a list of texts, whose items stay as they are written (`no` is no False)."""
    _, _, value = arg.partition("=")
    if kind.endswith("None") and value in ("", "null"):
        return None
    if kind.startswith("str"):
        return value
    try:
        found = yaml.load(value, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{arg}: no list of words ({said}): write [a,b], in quotes what holds , [ ] or #") from error
    if not isinstance(found, list) and "," in value:
        raise ValueError(f"{arg}: a comma, and no brackets: write [a,b] for two words, ['a,b'] for one with a comma")
    items = found if isinstance(found, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{arg}: no list of words: write [a,b], in quotes what holds : , [ ] or #")
    return [str(item) for item in items]


def build(config: BuildConfig) -> BuildResult:
    """Run the data step. Raises ValueError on a user mistake or bad input; then nothing is left behind."""
    task, output, cache = _resolve(config)
    source = None if config.source is None else Path(config.source).expanduser()
    archive = task.reader.read(source, task)
    if config.resplit_seed is not None:
        archive = resplit(archive, config.resplit_seed)
    kept = {name: _limited(getattr(archive, name), config, name) for name in SPLITS}
    if not config.overwrite:
        _check_same_data(output, task)
    with replacing(output, own=OWN_ENTRIES, overwrite=config.overwrite) as folder:
        started = time.perf_counter()
        pngs: Pictures | None = None
        if config.modality == "image":
            pngs = _draw(task, archive, kept, folder, workers=config.workers or default_workers(), cache=cache)
        drawing = time.perf_counter() - started
        rows = _write(task, archive, kept, pngs, folder, seed=config.seed)
        arguments = looks(task, config.modality, task.length)
        arguments |= {name: getattr(config, name) for name in ("seed", "resplit_seed", "limit")}
        card = make_card(task, archive, rows, arguments=arguments)
        (folder / "data_card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    counts = {name: len(indices) for name, indices in rows.items()}
    plots = sum(len(indices) for indices in kept.values())
    used = cache if config.modality == "image" else None
    return BuildResult(output, counts, drawing / plots * 1e3, used, tuple(card["warnings"]))


def _resolve(config: BuildConfig) -> tuple[TaskSpec, Path, Path | None]:
    """Task with its overrides, output folder, cache folder. Raises ValueError on values that cannot work."""
    if config.csv and config.task != "csv":
        raise ValueError(f"csv.* has no effect on task={config.task}: it is for task=csv")
    task = csv_task(config.source, config.csv) if config.task == "csv" else get_task(config.task)
    if config.modality not in MODALITIES:
        raise ValueError(f"unknown modality={config.modality!r}; known: {', '.join(MODALITIES)}")
    if config.numeric and config.modality == "image":
        raise ValueError("numeric.* has no effect on plots: set modality=numeric")
    for name in ("workers", "limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1, or null")
    task = replace(task, plot=override_style(task.plot, config.style), numeric=_numeric(task, config.numeric))
    output = Path(config.output or f"data/{task.name}_{config.modality}").expanduser()
    if config.cache is None:
        return task, output, None
    return task, output, output.parent / ".plot_cache" if config.cache == "auto" else Path(config.cache).expanduser()


def _check_same_data(output: Path, task: TaskSpec) -> None:
    """Data of another task are not replaced. Raises ValueError naming the folder, and what its data card says."""
    path = output / "data_card.json"
    if not path.is_file():
        return
    ways = f"choose another output=, delete {output}, or set overwrite=true"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        found = (card["task"], card["data_source"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no data card, so {output} may hold something else: {ways}") from error
    if found != (task.name, task.data_source):
        raise ValueError(
            f"{path}: the folder holds task {found[0]!r} with data source {found[1]!r}, not {task.name!r} with "
            f"{task.data_source!r}: {ways}"
        )


def _numeric(task: TaskSpec, values: Mapping[str, Any]) -> NumericFormat:
    """The task's format with some fields replaced. Raises ValueError on an unknown field or a wrong type."""
    types = {f.name: f.type for f in fields(NumericFormat)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"unknown key numeric.{name}; known: {', '.join(types)}")
        kinds = {"decimals": (int,), "separator": (str,), "points": (int, type(None))}[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"numeric.{name}={value!r} must be of type {types[name]}")
    return replace(task.numeric, **values)


def _limited(split: Split, config: BuildConfig, name: str) -> list[int]:
    """Row numbers to keep."""
    if config.limit is None or config.limit >= len(split):
        return list(range(len(split)))
    classes = len(set(split.labels))
    if config.limit < 2 * classes:
        raise ValueError(f"limit={config.limit} is below two rows for each of the {classes} classes of {name}")
    return stratified_cut(split.labels, config.limit, config.seed)[0]


def _draw(
    task: TaskSpec,
    archive: Archive,
    kept: Mapping[str, Sequence[int]],
    folder: Path,
    *,
    workers: int,
    cache: Path | None,
) -> dict[str, dict[int, bytes]]:
    """Plots by split and row, each also as a file `images/<split>/<split>_sample_<row>.png`."""
    series = [getattr(archive, split).series[row] for split in SPLITS for row in kept[split]]
    names = [(split, row) for split in SPLITS for row in kept[split]]
    pngs: dict[str, dict[int, bytes]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        (folder / "images" / split).mkdir(parents=True)
    for (split, row), png in zip(names, draw_all(series, task.plot, workers=workers, cache=cache), strict=True):
        (folder / "images" / split / f"{split}_sample_{row:05d}.png").write_bytes(png)
        pngs[split][row] = png
    return pngs


def _write(
    task: TaskSpec,
    archive: Archive,
    kept: Mapping[str, Sequence[int]],
    pngs: Pictures | None,
    folder: Path,
    *,
    seed: int,
) -> dict[str, list[int]]:
    """Write every table; returns the archive rows of each, by table name."""
    # pyarrow and datasets take a second to import, which the drawing processes do not need.
    from verl.timeseries.tables import make_row, save_to_disk, to_table, write_parquet

    made: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        of = getattr(archive, split)
        made[split] = [
            make_row(
                task,
                split=split,
                index=row,
                label=of.labels[row],
                shown=of.series[row] if pngs is None else pngs[split][row],
            )
            for row in kept[split]
        ]
    train = take(archive.train, kept["train"])
    val, fit = cut_val(task, train.labels, train.groups, seed)
    tables = {**made, "fit": [made["train"][i] for i in fit], "val": [made["train"][i] for i in val]}
    # Who reads digits sees no picture, so their texts measure the series itself, at every point. That says less of a
    # sound than its ridge does.
    seen = task if pngs is not None else replace(task, plot=replace(task.plot, spectrogram=None))
    answers = [sft_answer(series, label, seen) for series, label in zip(train.series, train.labels, strict=True)]
    for name, rows in tables.items():
        write_parquet(to_table(rows), folder / f"{name}.parquet")
    for name, numbers in (("sft_fit", fit), ("sft_val", val)):
        rows = [{**made["train"][i], "response": answers[i]} for i in numbers]
        write_parquet(to_table(rows), folder / f"{name}.parquet")
        tables[name] = rows
    save_to_disk({split: to_table(made[split]) for split in SPLITS}, folder)
    return {name: [row["extra_info"]["index"] for row in rows] for name, rows in tables.items()}


def main(args: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    started = time.perf_counter()
    try:
        config = parse_args(sys.argv[1:] if args is None else args)
        result = build(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = ", ".join(f"{name} {count}" for name, count in result.rows.items())
    print(f"wrote {result.output}: {rows}")
    for warning in result.warnings:
        print(f"warning: {warning}")
    drawing = "" if config.modality == "numeric" else f"{result.milliseconds_per_plot:.1f} ms per plot, "
    # A second copy of every plot, in a hidden folder: who needs the disk must hear of it.
    kept = (
        ""
        if result.cache is None
        else f"; a copy of each plot is in {result.cache}, which may be deleted (cache=null: none)"
    )
    print(f"{drawing}{time.perf_counter() - started:.1f} s in all{kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
