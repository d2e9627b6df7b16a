"""Small made-up archives in the formats of CinC 2017, UCI HAR and RightWhaleCalls."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

WINDOW = 1500
CINC_CLASSES = "NAO~"
SIGNALS = ("body_acc_x", "body_acc_y", "body_acc_z")


def write_cinc(
    folder: Path, *, records: int = 24, reference: str = "REFERENCE-v3.csv", nested: bool = False
) -> dict[str, tuple[str, int]]:
    """Record -> (label, windows); record n has 1 to 3 windows and some samples more."""
    rng = np.random.default_rng(0)
    listed = {}
    lines = []
    for number in range(records):
        record, label, windows = f"A{number + 1:05d}", CINC_CLASSES[number % 4], 1 + number % 3
        place = folder / record[:3] if nested else folder
        place.mkdir(parents=True, exist_ok=True)
        values = rng.integers(-900, 900, (1, windows * WINDOW + 7 * number)).astype(np.int16)
        savemat(place / f"{record}.mat", {"val": values}, format="4")
        lines.append(f"{record[:3]}/{record},{label}" if nested else f"{record},{label}")
        listed[record] = (label, windows)
    (folder / reference).write_text("\n".join(lines) + "\n")
    return listed


def write_har(folder: Path, *, run: int = 6, runs: int = 18, subjects: bool = False) -> Path:
    """`runs` runs of `run` windows that overlap by half within the run, activities in turn; the test part is half."""
    for split, count in (("train", runs), ("test", runs // 2)):
        signals = folder / split / "Inertial Signals"
        signals.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(len(split))
        long = rng.normal(size=(count, len(SIGNALS), 64 * (run + 1)))
        for channel, name in enumerate(SIGNALS):
            rows = [long[r, channel, 64 * i : 64 * i + 128] for r in range(count) for i in range(run)]
            np.savetxt(signals / f"{name}_{split}.txt", rows, fmt="%.4e")
        labels = [1 + r % 6 for r in range(count) for _ in range(run)]
        (folder / split / f"y_{split}.txt").write_text("".join(f"{label}\n" for label in labels))
        if subjects:
            people = [1 + r // 6 + (10 if split == "test" else 0) for r in range(count) for _ in range(run)]
            (folder / split / f"subject_{split}.txt").write_text("".join(f"{person}\n" for person in people))
    return folder


def up_call(rng: np.random.Generator) -> np.ndarray:
    """Two seconds at 2 kHz: a tone that rises from 80 to 220 Hz within the second second, in noise."""
    time = np.arange(4000) / 2000
    sweep = np.where((time > 1.0), np.sin(2 * np.pi * (80 * (time - 1) + 70 * (time - 1) ** 2)), 0.0)
    return 3 * sweep + rng.normal(size=4000)


def write_whales(folder: Path, extension: str = "arff", *, rows: tuple[int, int] = (20, 10)) -> Path:
    """RightWhaleCalls with few rows, calls and noise in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for split, count in zip(("TRAIN", "TEST"), rows, strict=True):
        series = [up_call(rng) if row % 2 == 0 else rng.normal(size=4000) for row in range(count)]
        cells = [",".join(f"{value:.4f}" for value in values) for values in series]
        if extension == "arff":
            head = "@relation RightWhaleCalls\n" + "".join(f"@attribute att{i} numeric\n" for i in range(4000))
            head += "@attribute target {NoWhale,RightWhale}\n@data\n"
            lines = [f"{row},{('RightWhale', 'NoWhale')[i % 2]}" for i, row in enumerate(cells)]
        else:
            head = "@problemName RightWhaleCalls\n@univariate true\n@classLabel true 1 0\n@data\n"
            lines = [f"{row}:{1 - i % 2}" for i, row in enumerate(cells)]
        (folder / f"RightWhaleCalls_{split}.{extension}").write_text(head + "\n".join(lines) + "\n")
    return folder


def zipped(folder: Path, path: Path) -> Path:
    """The folder's files as a zip, sub-folders kept."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path
