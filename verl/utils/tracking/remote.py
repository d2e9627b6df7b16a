"""Experiment trackers of other makers. Each is imported only when asked for, and never prompts.

Run on wandb 0.31, mlflow 3.17 and swanlab 0.10; Volcengine's is written to wandb's interface, as verl uses it. What a
tracker collects by itself (command line, host, git) is switched off: overrides may hold a secret.
"""

from __future__ import annotations

import importlib
import io
import netrc
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from verl.utils.tracking.base import BackendUnavailable, Metrics, RunInfo, Sample, finite

_INIT_SECONDS = 30
_FINISH_SECONDS = 60
_ID_FILE = "wandb_run_id.txt"


def _import(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable(f"{package} is not installed (pip install {package})") from error


class WandbBackend:
    """Weights & Biases. Works offline with `WANDB_MODE=offline`; unavailable without a login or network."""

    def __init__(self, run: RunInfo) -> None:
        self._wandb: Any = _import("wandb", "wandb")
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "disabled":
            raise BackendUnavailable("WANDB_MODE=disabled")
        online = mode in ("online", "shared")
        if online and not _wandb_login(self._wandb):
            raise BackendUnavailable("no login (run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline)")
        run.run_dir.mkdir(parents=True, exist_ok=True)
        settings = self._wandb.Settings(
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            x_disable_meta=True,
            disable_git=True,
            save_code=False,
            console="off",
            quiet=True,
        )
        self._run = self._wandb.init(
            project=run.project,
            name=run.experiment,
            config=dict(run.config),
            dir=str(run.run_dir),
            id=_run_id(run),
            resume="allow" if online and run.resume_step else None,
            settings=settings,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(finite(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._run.log(_wandb_samples(self._wandb, step, samples), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_samples(wandb: Any, step: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """A table of answers, and the plots with theirs, in the types of a module with wandb's interface."""
    table = wandb.Table(columns=["step", "uid", "prompt", "answer", "label", "score"])
    for s in samples:
        table.add_data(step, s.uid, s.prompt, s.answer, s.label, s.score)
    # Beside the table, not in it: an offline run leaves out the files of a table's images.
    plots = [wandb.Image(_opened(s.image), caption=_caption(s)) for s in samples if s.image is not None]
    return {"samples": table, **({"samples_plots": plots} if plots else {})}


def _opened(image: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(image)).convert("RGB")


def _caption(sample: Sample) -> str:
    return f"{sample.uid} | label {sample.label} | score {sample.score}\n{sample.answer}"


def _run_id(run: RunInfo) -> str:
    """A resumed run keeps the id of the attempt before it."""
    file = run.run_dir / _ID_FILE
    if run.resume_step and file.exists():
        return file.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:12]
    file.write_text(f"{run_id}\n", encoding="utf-8")
    return run_id


def _wandb_login(wandb: Any) -> bool:
    """Whether a key is configured; looked up here because `wandb.init` would ask for one on a terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(wandb.Settings().base_url).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if path.is_file() and netrc.netrc(str(path)).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False


class VemlpWandbBackend:
    """Volcengine's tracker, which has wandb's interface."""

    def __init__(self, run: RunInfo) -> None:
        platform: Any = _import("volcengine_ml_platform", "volcengine-ml-platform")
        names = ("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION")
        absent = [name for name in names if not os.environ.get(name)]
        if absent:
            raise BackendUnavailable(f"{', '.join(absent)} not set")
        key, secret, region = (os.environ[name] for name in names)
        platform.init(ak=key, sk=secret, region=region)
        self._wandb: Any = importlib.import_module("volcengine_ml_platform.wandb")
        self._wandb.init(project=run.project, name=run.experiment, config=dict(run.config))

    def log(self, step: int, metrics: Metrics) -> None:
        self._wandb.log(finite(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._wandb.log(_wandb_samples(self._wandb, step, samples), step=step)

    def close(self) -> None:
        self._wandb.finish()


class MlflowBackend:
    """MLflow, at `MLFLOW_TRACKING_URI` or its local default."""

    def __init__(self, run: RunInfo) -> None:
        self._mlflow: Any = _import("mlflow", "mlflow")
        self._mlflow.set_experiment(run.project)
        self._mlflow.start_run(run_name=run.experiment)
        self._mlflow.log_dict(dict(run.config), "config.json")

    def log(self, step: int, metrics: Metrics) -> None:
        # "@" (mean@N) is not allowed in a name there.
        self._mlflow.log_metrics({k.replace("@", "_at_"): v for k, v in finite(metrics).items()}, step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        columns = ("uid", "prompt", "answer", "label", "score")
        rows: dict[str, list[Any]] = {name: [getattr(sample, name) for sample in samples] for name in columns}
        rows["plot"] = [None if s.image is None else f"step_{step}/{number}.png" for number, s in enumerate(samples)]
        self._mlflow.log_dict(rows, f"samples/step_{step}.json")
        for sample, plot in zip(samples, rows["plot"], strict=True):
            if sample.image is not None:
                self._mlflow.log_image(_opened(sample.image), artifact_file=f"samples/{plot}")

    def close(self) -> None:
        self._mlflow.end_run()


class SwanlabBackend:
    """SwanLab, with `SWANLAB_{API_KEY,LOG_DIR,MODE}`."""

    def __init__(self, run: RunInfo) -> None:
        self._swanlab: Any = _import("swanlab", "swanlab")
        key, mode = os.environ.get("SWANLAB_API_KEY"), os.environ.get("SWANLAB_MODE", "cloud")
        if mode == "cloud" and not key:
            raise BackendUnavailable("no login (set SWANLAB_API_KEY, or SWANLAB_MODE=local)")
        if not hasattr(getattr(self._swanlab, "Settings", None), "Probe"):
            raise BackendUnavailable("swanlab 0.10 or newer is needed: older ones store the command line")
        if mode == "cloud":
            self._swanlab.login(key)
        settings = self._swanlab.Settings
        self._swanlab.init(
            project=run.project,
            experiment_name=run.experiment,
            config=dict(run.config),
            logdir=os.environ.get("SWANLAB_LOG_DIR") or "swanlog",
            mode=mode,
            settings=settings(
                probe=settings.Probe(runtime=False, git=False, requirements=False),
                terminal=settings.Terminal(proxy_type="none"),
            ),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._swanlab.log(finite(metrics), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        shown: dict[str, Any] = {"samples": [self._swanlab.Text(s.answer, caption=s.uid) for s in samples]}
        plots = [s for s in samples if s.image is not None]
        if plots:
            shown["samples_plots"] = [self._swanlab.Image(_opened(s.image), caption=_caption(s)) for s in plots]
        self._swanlab.log(shown, step=step)

    def close(self) -> None:
        self._swanlab.finish()
