"""What rewards cost a step: a judge of 1 s latency beside a generation of 10 s, and rules in bulk.

Answers end one after the other over the simulated generation and go to the reward pool as a rollout worker sends them;
the judge is a local HTTP server. Serial: the same answers after generation, one judge call after the other.
Exits with 1 when overlapped rewards take longer after the generation than one judge call and 0.5 s, or 100,000 rule
scores longer than 10 s.

    python3 benchmarks/reward_overlap.py
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import ray
import rows

from verl.protocol import Prompt
from verl.workers.reward_manager import RewardItem, RewardManager
from verl.workers.reward_manager.dispatch import Answer
from verl.workers.reward_manager.pool import RewardPool

sys.path.insert(0, str(rows.ROOT / "tests" / "integration" / "judge"))
from judge_server import JudgeServer, good

TEXT = "<think>spikes</think><class>Neuropathy</class><extension>Repeat the study of side {} in {} weeks.</extension>"
OVERLAP_SLACK_S = 0.5
RULES_LIMIT_S = 10.0
"""For 100,000 scores."""
GENERATION = "{n} answers over {s:g} s, judge {j:g} s, concurrency {c}"


def prompts(count: int, source: str, truth: str) -> list[Prompt]:
    return [Prompt(f"p{i}", i, source, np.zeros(0, np.int32), (), (), truth, {"index": i}) for i in range(count)]


def simulate(pool: RewardPool, texts: list[str], seconds: float, *, at_the_end: bool) -> tuple[float, dict[str, Any]]:
    """Seconds from the end of the generation to the last score, and the pool's numbers.

    Answers end at even intervals; `at_the_end` makes all of them end together with the generation.
    """
    batch = prompts(len(texts) // 5, "emg_dataset", "Neuropathy")
    sink = pool.open(batch)
    begin = time.perf_counter()
    for number, text in enumerate(texts):
        due = begin + (seconds if at_the_end else seconds * (number + 1) / len(texts))
        time.sleep(max(0.0, due - time.perf_counter()))
        sink.send([Answer(number // 5, number % 5, text, 20)])
    ended = time.perf_counter()
    scores, metrics = pool.collect(sink, [5] * len(batch))
    assert all(score.is_ok and score.parts["soft"] == 0.6 for score in scores)
    return time.perf_counter() - ended, metrics


def overlap(args: argparse.Namespace) -> list[rows.BenchmarkRow]:
    workload = GENERATION.format(n=args.answers, s=args.generation, j=args.latency, c=args.concurrency)
    found = {}
    with JudgeServer() as server:
        server.plan = lambda _: good(0.6, delay_s=args.latency)
        judge = {
            "base_url": server.url,
            "model": "stub",
            "api_key_env": None,
            "max_concurrent": args.concurrency,
        }
        manager = RewardManager(max_failure_rate=0, judge=judge)
        manager.check_prompts(prompts(1, "emg_dataset", "Neuropathy"))
        pool = RewardPool(manager, workers=args.workers, timeout=600)
        pool.ready(60)
        warm_up = [TEXT.format("warm", i) for i in range(5)]  # the first answer pays for the client's import
        simulate(pool, warm_up, 0.0, at_the_end=True)
        for name, at_the_end in (("reward_overlapped_s", False), ("reward_all_at_end_s", True)):
            texts = [TEXT.format(name, i) for i in range(args.answers)]
            found[name], metrics = simulate(pool, texts, args.generation, at_the_end=at_the_end)
            mode = f"scored before the end {metrics['reward/pool/before_end_share']:.0%}"
            found[name] = (found[name], mode)
        most = server.most_in_flight
        pool.close()
        serial = RewardManager(max_failure_rate=0, judge=judge | {"max_concurrent": 1})
        first, *some = [
            RewardItem(p, TEXT.format("serial", p.row), 20)
            for p in prompts(args.serial + 1, "emg_dataset", "Neuropathy")
        ]
        serial.score([first])  # pays for the client's import and the connection
        begin = time.perf_counter()
        serial.score(some)
        each = (time.perf_counter() - begin) / args.serial
    found["reward_serial_s"] = (each * args.answers, f"{args.serial} answers measured, {each:.2f} s each")
    base = found["reward_overlapped_s"][0]
    made = [
        rows.BenchmarkRow(
            row=name,
            workload=workload,
            samples=args.answers,
            value=value,
            unit="s after generation",
            ratio=None if name == "reward_overlapped_s" else value / base,
            ratio_to=None if name == "reward_overlapped_s" else "reward_overlapped_s",
            mode=mode,
        )
        for name, (value, mode) in found.items()
    ]
    made.append(rows.BenchmarkRow(row="judge_most_in_flight", workload=workload, value=most, unit="requests"))
    return made


def rules(args: argparse.Namespace) -> rows.BenchmarkRow:
    """Rule scores, best and worst answers mixed, through the pool."""
    manager = RewardManager(max_failure_rate=0)
    batch = prompts(1000, "computer_dataset", "Desktop")
    manager.check_prompts(batch)
    pool = RewardPool(manager, workers=args.workers, timeout=600)
    pool.ready(60)
    words = "the load is high in the evening and low at night " * 10
    said = ("Desktop", "Laptop", "neither")
    items = [
        RewardItem(batch[i % 1000], f"<think>{words}{i}</think><class>{said[i % 3]}</class>", 130)
        for i in range(args.rules)
    ]
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        scores = pool.score(items)
        seconds.append(time.perf_counter() - begin)
    pool.close()
    assert scores == manager.score(items), "the pool and one process disagree"
    each = ", ".join(f"{s:.1f}" for s in seconds)
    return rows.BenchmarkRow(
        row="rules_in_pool_s",
        workload=f"{args.rules:,} rule scores of 500 characters, {args.workers} workers",
        samples=args.rules,
        value=sorted(seconds)[1],
        unit="s",
        mode=f"median of {each}; equal to one process",
    )


def too_slow(made: list[rows.BenchmarkRow], args: argparse.Namespace) -> list[str]:
    """What took longer than the project promises."""
    value = {row.row: row.value for row in made}
    limits = {
        "reward_overlapped_s": args.latency + OVERLAP_SLACK_S,
        "rules_in_pool_s": RULES_LIMIT_S * args.rules / 100_000,
    }
    return [
        f"{name}: {value[name]:.2f} s, allowed {limit:g} s" for name, limit in limits.items() if value[name] > limit
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=320)
    parser.add_argument("--generation", type=float, default=10.0, help="seconds")
    parser.add_argument("--latency", type=float, default=1.0, help="of the judge, in seconds")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--serial", type=int, default=10, help="answers measured for the serial row")
    parser.add_argument("--rules", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=40)
    made = [*overlap(args), rules(args)]
    ray.shutdown()
    rows.write("reward_overlap", made)
    if missed := too_slow(made, args):
        sys.exit("too slow: " + "; ".join(missed))


if __name__ == "__main__":
    main()
