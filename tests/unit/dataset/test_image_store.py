"""The image store: decoded once, whole or absent, shared by path."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from verl.utils.dataset import image_store
from verl.utils.dataset.image_store import INDEX_FILE, PIXELS_FILE, ImageItem, ImageStore, default_cache_dir
from verl.utils.dataset.images import ImageSpec, process_image

SPEC = ImageSpec()


def png(seed: int, width: int = 90, height: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def items(*seeds: int) -> list[ImageItem]:
    return [ImageItem.of(png(seed, 60 + 30 * seed), where=f"row {seed}") for seed in seeds]


@pytest.fixture
def decode_counter(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    original = image_store.process_image

    def counting(source: bytes, spec: ImageSpec, *, key: str, where: str):
        seen.append(key)
        return original(source, spec, key=key, where=where)

    monkeypatch.setattr(image_store, "process_image", counting)
    return seen


def test_each_distinct_image_is_decoded_once(tmp_path: Path, decode_counter: list[str]) -> None:
    store = ImageStore.build(items(0, 1, 0, 2, 1), SPEC, tmp_path, workers=2)
    assert sorted(decode_counter) == sorted(store) and len(store) == store.decoded == 3


def test_a_second_build_decodes_nothing(tmp_path: Path, decode_counter: list[str]) -> None:
    first = ImageStore.build(items(0, 1), SPEC, tmp_path)
    again = ImageStore.build(items(1, 0), SPEC, tmp_path)
    assert len(decode_counter) == 2 and again.decoded == 0
    assert again.path == first.path


def test_another_spec_is_another_store(tmp_path: Path) -> None:
    small = ImageSpec(max_pixels=56 * 56)
    paths = {ImageStore.build(items(3), spec, tmp_path).path for spec in (SPEC, small)}
    assert len(paths) == 2


def test_records_equal_direct_processing(tmp_path: Path) -> None:
    given = items(0, 1, 2, 5)
    store = ImageStore.build(given, SPEC, tmp_path, workers=3)
    for item in given:
        expected = process_image(item.source, SPEC)
        assert np.array_equal(store[item.key].pixels, expected.pixels)
        assert store[item.key].grid == expected.grid and store[item.key].key == expected.key


def test_pixels_are_a_read_only_view_of_the_file(tmp_path: Path) -> None:
    store = ImageStore.build(items(0), SPEC, tmp_path)
    pixels = store[next(iter(store))].pixels
    assert isinstance(pixels, np.memmap) and not pixels.flags.writeable


def test_a_store_pickles_as_its_path(tmp_path: Path) -> None:
    store = ImageStore.build(items(0, 1, 2), SPEC, tmp_path)
    data = pickle.dumps(store)
    assert len(data) < 400
    copy = pickle.loads(data)
    assert {k: copy[k].pixels.tobytes() for k in copy} == {k: store[k].pixels.tobytes() for k in store}


def test_a_broken_image_names_its_row_and_leaves_nothing(tmp_path: Path) -> None:
    broken = ImageItem.of(png(1)[:200], where="train.parquet row 41")
    with pytest.raises(ValueError, match=r"^train.parquet row 41: image cannot be decoded"):
        ImageStore.build([*items(0), broken], SPEC, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(0))
    item = ImageItem.of(path, where="row 0")
    path.write_bytes(png(1))
    with pytest.raises(ValueError, match=r"^row 0: .*changed"):
        ImageStore.build([item], SPEC, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["truncate", "index", "missing"])
def test_a_damaged_store_is_an_error_and_is_built_again(tmp_path: Path, damage: str) -> None:
    store = ImageStore.build(items(0, 1), SPEC, tmp_path)
    if damage == "truncate":
        with open(store.path / PIXELS_FILE, "r+b") as file:
            file.truncate(100)
    elif damage == "index":
        (store.path / INDEX_FILE).write_text("{")
    else:
        (store.path / PIXELS_FILE).unlink()
    with pytest.raises(ValueError, match=str(store.path)):
        ImageStore.open(store.path)
    assert ImageStore.build(items(0, 1), SPEC, tmp_path).decoded == 2


def test_a_missing_key_names_the_store(tmp_path: Path) -> None:
    store = ImageStore.build(items(0), SPEC, tmp_path)
    assert "absent" not in store
    with pytest.raises(KeyError, match="absent is not among the 1"):
        store["absent"]


def test_a_store_written_meanwhile_by_another_process_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = image_store._write_store

    def slow_write(folder: Path, *rest) -> None:
        monkeypatch.setattr(image_store, "_write_store", write)
        ImageStore.build(items(0, 1), SPEC, tmp_path)
        write(folder, *rest)

    monkeypatch.setattr(image_store, "_write_store", slow_write)
    store = ImageStore.build(items(0, 1), SPEC, tmp_path)
    assert list(tmp_path.iterdir()) == [store.path] and len(store) == 2


def test_a_build_that_was_killed_is_removed_by_the_next_and_a_living_one_is_not(tmp_path: Path) -> None:
    """A kill leaves the folder and the file, and takes the lock away."""
    with contextlib.ExitStack() as stack:
        living = stack.enter_context(image_store._aside(tmp_path))
        for name in ("killed", "old_version"):
            (tmp_path / f".tmp-{name}").mkdir()
            (tmp_path / f".tmp-{name}" / PIXELS_FILE).write_bytes(b"half")
        (tmp_path / ".tmp-killed.lock").touch()
        for path in list(tmp_path.iterdir()):
            os.utime(path, (0, 0))
        store = ImageStore.build(items(0), SPEC, tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {store.path.name, living.name, f"{living.name}.lock"}
    assert list(tmp_path.iterdir()) == [store.path]


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/timemaster/images")
