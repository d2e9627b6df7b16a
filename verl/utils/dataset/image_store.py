"""Every image of a data set decoded and resized once, kept in one memory-mapped file per node.

A store is a folder named by the digest of its image keys and of the `ImageSpec`: `pixels.bin` (all images end to end,
uint8) and `index.json` (key -> offset, height, width). All processes of a node map the same file, so that its pages are
in memory once however many workers look at them.

Invariants
- Each distinct image is decoded once; a second build of the same images with the same spec decodes nothing.
- A store folder exists only when it is whole.
- A store pickles as its path.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from verl.protocol import ImageRecord
from verl.utils.dataset.images import ImageSpec, grid_of, image_key, process_image, read_image_file
from verl.utils.files import fsync_path, fsync_tree

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
PIXELS_FILE = "pixels.bin"
INDEX_FILE = "index.json"
_TEMPORARY = ".tmp-"
_LOCK = ".lock"
_NOT_YET_LOCKED = 60.0  # seconds: between making the file and locking it
_SURELY_DEAD = 24 * 3600.0  # seconds


def default_cache_dir() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/timemaster/images`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "timemaster" / "images"


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An encoded image and where it came from. A path is read again when decoded, so that it need not stay in memory.

    Example: `ImageItem.of(b"\\x89PNG...", where="data/train.parquet row 7")`
    """

    key: str
    source: bytes | Path
    where: str

    @classmethod
    def of(cls, source: bytes | Path, *, where: str) -> ImageItem:
        """Address the image by its content. Raises ValueError beginning with `where` when a file cannot be read."""
        data = source if isinstance(source, bytes) else read_image_file(source, where=where)
        return cls(image_key(data), source, where)

    def decode(self, spec: ImageSpec) -> ImageRecord:
        """Raises ValueError beginning with `where` when the image is broken or its file has changed meanwhile."""
        data = self.source if isinstance(self.source, bytes) else read_image_file(self.source, where=self.where)
        if image_key(data) != self.key:
            raise ValueError(f"{self.where}: image file {self.source!s} changed while it was read; start again")
        return process_image(data, spec, key=self.key, where=self.where)


class ImageStore(Mapping[str, ImageRecord]):
    """Read-only mapping of image key to `ImageRecord`, whose pixels are views of the mapped file."""

    def __init__(self, path: Path, spec: ImageSpec, index: dict[str, list[int]], pixels: NDArray[np.uint8]) -> None:
        """Use `open` or `build`. `index` is key -> [offset in bytes, height, width]; `pixels` (bytes of the file,)."""
        self.path = path
        self.spec = spec
        self.decoded = 0
        """Images that this object's `build` had to decode; 0 when the store was there already."""
        self._index = index
        self._pixels = pixels

    @classmethod
    def build(
        cls, items: Iterable[ImageItem], spec: ImageSpec, cache_dir: Path | None = None, workers: int | None = None
    ) -> ImageStore:
        """Open the store of these images, writing it first when there is none.

        `workers` threads decode (default: one per core). Raises ValueError for an image that cannot be decoded;
        then nothing is left behind.
        """
        unique = {item.key: item for item in reversed(list(items))}
        ordered = [unique[key] for key in sorted(unique)]
        cache_dir = cache_dir or default_cache_dir()
        path = cache_dir / _store_name(ordered, spec)
        if path.is_dir():
            try:
                return cls.open(path)
            except ValueError as error:
                logger.warning("%s; decoding its %d images again", error, len(ordered))
                shutil.rmtree(path)
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        with _aside(cache_dir) as aside:
            _write_store(aside, ordered, spec, workers or os.cpu_count() or 1)
            _move_into_place(aside, path)
        store = cls.open(path)
        store.decoded = len(ordered)
        return store

    @classmethod
    def open(cls, path: str | Path) -> ImageStore:
        """Map an existing store. Raises ValueError when it is missing, of another version, or damaged."""
        path = Path(path)
        try:
            content = json.loads((path / INDEX_FILE).read_text())
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content["spec"].items()}
            spec = ImageSpec(**fields)
            index, version = content["images"], content["version"]
            size = (path / PIXELS_FILE).stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no image store here ({error.filename} is missing)") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path / INDEX_FILE}: damaged index ({error}); remove the folder {path}") from error
        expected = sum(3 * height * width for _, height, width in index.values())
        if version != FORMAT_VERSION or size != expected:
            raise ValueError(
                f"{path}: damaged image store: version {version} (expected {FORMAT_VERSION}), "
                f"{size} bytes of pixels (expected {expected}); remove the folder"
            )
        # an empty file cannot be mapped
        pixels = np.memmap(path / PIXELS_FILE, np.uint8, mode="r") if size else np.empty(0, np.uint8)
        return cls(path, spec, index, pixels)

    def __getitem__(self, key: str) -> ImageRecord:
        try:
            offset, height, width = self._index[key]
        except KeyError:
            raise KeyError(f"image {key} is not among the {len(self)} of {self.path}") from None
        pixels = self._pixels[offset : offset + 3 * height * width].reshape(3, height, width)
        return ImageRecord(key, pixels, grid_of(pixels, self.spec))

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageStore.open, (self.path,)


def open_images(stores: Sequence[str | Path]) -> Mapping[str, ImageRecord]:
    """The images of all `stores` by key. Raises ValueError as `ImageStore.open`."""
    return ChainMap(*(ImageStore.open(path) for path in stores))  # type: ignore[arg-type]


def encode_png(record: ImageRecord) -> bytes:
    """The stored pixels, as the model sees them, as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(record.pixels.transpose(1, 2, 0))).save(out, "PNG")
    return out.getvalue()


def _store_name(items: list[ImageItem], spec: ImageSpec) -> str:
    content = {"version": FORMAT_VERSION, "spec": asdict(spec), "keys": [item.key for item in items]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _write_store(folder: Path, items: list[ImageItem], spec: ImageSpec, workers: int) -> None:
    index: dict[str, list[int]] = {}
    offset = 0
    chunk = 16 * workers  # bounds the decoded images that wait to be written
    with open(folder / PIXELS_FILE, "wb") as file, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), chunk):
            for record in pool.map(lambda item: item.decode(spec), items[start : start + chunk]):
                _, height, width = record.pixels.shape
                index[record.key] = [offset, height, width]
                offset += file.write(np.ascontiguousarray(record.pixels).data)
    content = {"version": FORMAT_VERSION, "spec": asdict(spec), "images": index}
    (folder / INDEX_FILE).write_text(json.dumps(content))
    fsync_tree(folder)


@contextmanager
def _aside(cache_dir: Path) -> Iterator[Path]:
    """A folder to build in, and beside it a locked file that says that its builder lives."""
    aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=cache_dir))
    held = aside.with_name(aside.name + _LOCK)
    with open(held, "w") as file:
        _try_lock(file)
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            held.unlink(missing_ok=True)


def _remove_abandoned(cache_dir: Path) -> None:
    """Delete what builds that were killed have left; one that another process is at stays."""
    for held in sorted(cache_dir.glob(f"{_TEMPORARY}*{_LOCK}")):
        try:
            with open(held) as file:
                young = time.time() - held.stat().st_mtime < _NOT_YET_LOCKED
                if not young and _try_lock(file):
                    logger.info("removing %s of a build that was killed", held.with_suffix(""))
                    shutil.rmtree(held.with_suffix(""), ignore_errors=True)
                    held.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # its builder has just finished
    for folder in cache_dir.glob(f"{_TEMPORARY}*"):
        # Without its file: made a moment ago, or by a version that locked nothing.
        bare = folder.is_dir() and not folder.with_name(folder.name + _LOCK).exists()
        if bare and time.time() - folder.stat().st_mtime > _SURELY_DEAD:
            shutil.rmtree(folder, ignore_errors=True)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks: then nothing counts as abandoned
        return False
    return True


def _move_into_place(aside: Path, path: Path) -> None:
    aside.chmod(0o755)  # mkdtemp is private; a cache on a shared disk is read by others
    try:
        aside.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        logger.info("%s was written by another process meanwhile", path)
    fsync_path(path.parent)
