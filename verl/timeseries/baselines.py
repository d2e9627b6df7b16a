"""Baselines beside every accuracy: majority class, 1-NN, and ROCKET-type classifiers, on the split of the task.

    python3 -m verl.timeseries.baselines ctu=ori_data/Computers tee=ori_data/Lightning7.zip gun_point

Run with sktime 1.2, numba 0.65, scikit-learn 1.9. ROCKET and MiniRocket normalise every series, so that amplitude is
lost to them; 1-NN is Euclidean on the values as they are.

Invariants
- A baseline sees the train part only (`fit` and `val` together) before it is scored on test.
- Accuracy is of all test rows, with its standard error: half the width of Wilson's score interval, which is not 0 at
  accuracy 0 or 1.
- Series of different lengths are stretched to the median length of train (linear interpolation), for all baselines.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verl.timeseries.build import parse_args
from verl.timeseries.own import csv_task
from verl.timeseries.readers import Archive
from verl.timeseries.task import TaskSpec
from verl.timeseries.tasks import get_task
from verl.utils.report.wilson import wilson_half_width

Series3 = NDArray[np.float64]
"""(rows, channels, length)"""
Predict = Callable[[Series3, Sequence[str], Series3, int], Sequence[str]]
"""(train series, train labels, test series, seed) -> labels of the test rows."""


def majority(_train: Series3, labels: Sequence[str], test: Series3, _seed: int) -> Sequence[str]:
    """The commonest train class, for every row; of equal ones the first."""
    return [Counter(labels).most_common(1)[0][0]] * len(test)


def one_nn(train: Series3, labels: Sequence[str], test: Series3, _seed: int) -> Sequence[str]:
    """The class of the nearest train series (Euclidean over all channels)."""
    from sklearn.neighbors import KNeighborsClassifier

    nearest = KNeighborsClassifier(n_neighbors=1, algorithm="brute")
    nearest.fit(train.reshape(len(train), -1), labels)
    return list(nearest.predict(test.reshape(len(test), -1)))


def _rocket(kind: str) -> Predict:
    def predict(train: Series3, labels: Sequence[str], test: Series3, seed: int) -> Sequence[str]:
        from sktime.classification.kernel_based import RocketClassifier

        classifier = RocketClassifier(rocket_transform=kind, random_state=seed, n_jobs=1)
        classifier.fit(train, np.asarray(labels))
        return list(classifier.predict(test))

    return predict


BASELINES: Mapping[str, Predict] = {
    "majority": majority,
    "1-NN": one_nn,
    "MiniRocket": _rocket("minirocket"),
    "ROCKET": _rocket("rocket"),
}
RANDOM = frozenset({"MiniRocket", "ROCKET"})
"""Baselines whose result depends on the seed."""


@dataclass(frozen=True)
class BaselineScore:
    """One baseline on one task; accuracy and macro-F1 are means over the seeds."""

    task: str
    baseline: str
    n: int
    """Test rows."""
    accuracies: tuple[float, ...]
    """By seed."""
    macro_f1: float
    seconds: float = field(compare=False)
    """Fit and predict, mean over the seeds."""

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def standard_error(self) -> float:
        """Of one accuracy, from the number of test rows; see `wilson_half_width`."""
        return wilson_half_width(self.accuracy, self.n)


def score(task: TaskSpec, archive: Archive, baseline: str, seeds: Sequence[int]) -> BaselineScore:
    """Fit on train, score on test, once a seed. Raises ValueError where series differ in their number of channels."""
    from sklearn.metrics import f1_score

    channels = {len(series) for part in (archive.train, archive.test) for series in part.series}
    if len(channels) > 1:
        raise ValueError(f"task {task.name}: series of {sorted(channels)} channels; the baselines need one number")
    length = int(np.median([series.shape[1] for series in archive.train.series]))
    train, test = (of_one_length(part.series, length) for part in (archive.train, archive.test))
    truth, accuracies, f1, seconds = np.asarray(archive.test.labels), [], [], []
    for seed in seeds if baseline in RANDOM else (0,):
        started = time.perf_counter()
        found = np.asarray(BASELINES[baseline](train, archive.train.labels, test, seed))
        seconds.append(time.perf_counter() - started)
        accuracies.append(float((found == truth).mean()))
        f1.append(f1_score(truth, found, average="macro", labels=list(task.classes), zero_division=0.0))
    return BaselineScore(task.name, baseline, len(test), tuple(accuracies), float(np.mean(f1)), float(np.mean(seconds)))


def of_one_length(series: Sequence[NDArray[np.float64]], length: int) -> Series3:
    """Series (channels, any length) stretched over `length` points by linear interpolation."""
    return np.stack([s if s.shape[1] == length else np.stack([_stretched(c, length) for c in s]) for s in series])


def _stretched(channel: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    places = np.linspace(0, len(channel) - 1, length)
    return np.interp(places, np.arange(len(channel)), channel)


def table(scores: Sequence[BaselineScore]) -> str:
    """One markdown row a task, one column a baseline: accuracy +- standard error (Wilson) / macro-F1, in percent."""
    by_task: dict[str, dict[str, BaselineScore]] = {}
    for found in scores:
        by_task.setdefault(found.task, {})[found.baseline] = found
    names = [name for name in BASELINES if any(name in of for of in by_task.values())]
    lines = [f"| task | n | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for task, of in by_task.items():
        cells = [
            f"{100 * s.accuracy:.1f} +- {100 * s.standard_error:.1f} / {100 * s.macro_f1:.1f}" if s else ""
            for s in (of.get(name) for name in names)
        ]
        lines.append(f"| {task} | {next(iter(of.values())).n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tasks",
        nargs="+",
        metavar="TASK[=SOURCE]",
        help="the source is a folder or a zip; csv=FOLDER: your own, see docs/own_data.md",
    )
    parser.add_argument("--csv", nargs="+", default=[], metavar="csv.KEY=VALUE", help="options of csv=FOLDER")
    parser.add_argument("--baselines", nargs="+", default=["majority", "1-NN", "MiniRocket"], choices=list(BASELINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    args: Any = parser.parse_args(arguments)
    scores = []
    try:
        csv_options = parse_args(["task=csv", *args.csv]).csv
        for named in args.tasks:
            name, _, source = named.partition("=")
            task = csv_task(source, csv_options) if name == "csv" else get_task(name)
            archive = task.reader.read(Path(source).expanduser() if source else None, task)
            scores += [score(task, archive, baseline, args.seeds) for baseline in args.baselines]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(scores))
    print(f"accuracy +- standard error (Wilson) / macro-F1, percent; seeds {args.seeds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
