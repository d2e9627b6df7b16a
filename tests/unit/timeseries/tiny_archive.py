"""Made-up archives in every file format, for the same code that reads the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LENGTH = 12
ROWS = {"TRAIN": 20, "TEST": 10}


def cells(split: str) -> list[tuple[list[str], str]]:
    """(values as text, label) of each row: rising for class 1, falling for class 2, class 1 first."""
    rng = np.random.default_rng(len(split))
    rows = []
    for row in range(ROWS[split]):
        label = "1" if row < ROWS[split] // 2 else "2"
        slope = 1.0 if label == "1" else -1.0
        rows.append(([f"{slope * i + noise:.8f}" for i, noise in enumerate(rng.normal(size=LENGTH))], label))
    return rows


def text_of(extension: str, split: str) -> str:
    """A whole file, with the byte-order mark that the Computers files have in their first comment."""
    rows = cells(split)
    if extension == "ts":
        head = "#\ufeffmade up\n@problemName Tiny\n@univariate true\n@equalLength true\n@classLabel true 1 2\n@data\n"
        return head + "".join(f"{','.join(values)}:{label}\n" for values, label in rows)
    if extension == "arff":
        head = "%\ufeffmade up\n@relation Tiny\n" + "".join(f"@attribute att{i} numeric\n" for i in range(LENGTH))
        head += "@attribute target {1,2}\n\n@data\n"
        return head + "".join(f"{','.join(values)},{label}\n" for values, label in rows)
    return "".join("\t".join([label, *values]) + "\n" for values, label in rows)


def write_archive(folder: Path, extension: str = "ts") -> Path:
    """Write both files and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ROWS:
        (folder / f"Tiny_{split}.{extension}").write_text(text_of(extension, split), encoding="utf-8")
    return folder
