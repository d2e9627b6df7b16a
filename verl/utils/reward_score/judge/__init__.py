"""LLM judges: any OpenAI-compatible server, within limits of time, rate and money.

Example, in a custom reward function:

    RUBRIC = Rubric(name="clarity", task="An explanation of a plot.", criteria=(("clear", "easy to follow"),))

    async def compute_score(solution_str, ground_truth, model, base_url):
        judge = shared_judge(JudgeConfig(base_url=base_url, model=model, api_key_env=None))
        return (await judge.judge(JudgeRequest(RUBRIC, {"answer": solution_str}))).score

A JudgeError that it lets pass becomes a failed score of the error's kind.
"""

from verl.utils.reward_score.judge.config import JudgeConfig
from verl.utils.reward_score.judge.errors import JudgeError
from verl.utils.reward_score.judge.judge import Judge, LLMJudge, Verdict
from verl.utils.reward_score.judge.rubric import JudgeRequest, Rubric
from verl.utils.reward_score.judge.shared import SharedJudge, shared_judge

__all__ = [
    "Judge",
    "JudgeConfig",
    "JudgeError",
    "JudgeRequest",
    "LLMJudge",
    "Rubric",
    "SharedJudge",
    "Verdict",
    "shared_judge",
]
