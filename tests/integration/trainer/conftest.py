"""Data, models and runs that many tests read; each is made once per session, when the first test asks for it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import rl_here, sft_here
from runs import LONG_RUN, SIZE, Data, Launcher, Run, environment, rl_overrides, sft_overrides

from verl.models.tiny import create_tiny_model, texts_of_parquet
from verl.timeseries import build


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the session; image stores go there too."""
    folder = tmp_path_factory.mktemp("trainer")
    with environment(XDG_CACHE_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1"):
        yield folder


@pytest.fixture(scope="session")
def data(work: Path) -> Data:
    """BasicMotions, 32 + 8 + 40 rows and the supervised files."""
    folder = work / "basic_motions"
    assert build.main(["task=basic_motions", f"output={folder}"]) in (None, 0)
    return Data(folder)


@pytest.fixture(scope="session")
def tiny(work: Path, data: Data) -> Path:
    """A model with random weights."""
    create_tiny_model(work / "tiny", texts_of_parquet([Path(data.file("sft_fit"))]), size=SIZE, seed=0)
    return work / "tiny"


@pytest.fixture(scope="session")
def sft_run(work: Path, data: Data, tiny: Path) -> Run:
    """Supervised until fewer than 20 % of the answers are malformed, so that rewards differ within a group."""
    stop = ("rollout.n=4", "trainer.total_epochs=60", "trainer.stop_parse_failure=0.2", "trainer.test_freq=8")
    folder = work / "sft"
    return sft_here(sft_overrides(data, tiny, folder, *stop, "trainer.save_freq=8"), folder).ok()


@pytest.fixture(scope="session")
def start(sft_run: Run) -> Path:
    """A model whose answers are sometimes right: where RL runs begin."""
    last = (sft_run.folder / "latest_checkpointed_iteration.txt").read_text()
    return sft_run.checkpoint(int(last)) / "actor" / "huggingface"


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts real subprocesses. Ray's folder is short: a path of a unix socket has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="tm"))
    yield Launcher(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def long_run(work: Path, data: Data, start: Path, launcher: Launcher) -> Run:
    """An uninterrupted run through Ray on one rank; the test split is scored at its end."""
    folder = work / "long"
    test = data.edited(work / "test8.parquet", "test", lambda number, row: None)
    overrides = rl_overrides(data, start, folder, *LONG_RUN, f"data.test_files={test}")
    return launcher.run("main_ppo", overrides, folder).ok()


@pytest.fixture(scope="session")
def long_run_here(work: Path, data: Data, start: Path) -> Run:
    """The same run without Ray."""
    folder = work / "long_here"
    return rl_here(rl_overrides(data, start, folder, *LONG_RUN), folder).ok()
