"""Run by the tests as a process of its own: `ask_in_process.py URL CACHE COUNT CONCURRENT` judges COUNT answers."""

import sys

from asking import ask, different

from verl.utils.reward_score.judge import JudgeConfig

url, cache, count, concurrent = sys.argv[1:]
settings = JudgeConfig(
    base_url=url, model="stub", api_key_env=None, cache_path=cache, max_concurrent=int(concurrent), timeout_s=30.0
)
outcome = ask(settings, different(int(count)))
print(*outcome.kinds)
