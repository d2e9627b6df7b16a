"""Config node of the LLM judge. Its fields but `enable` are those of `verl.utils.reward_score.judge.JudgeConfig`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardJudgeConfig:
    """The judge of soft parts: any OpenAI-compatible server."""

    enable: bool
    """Ask it; False leaves the soft parts out of the reward, and says so."""
    base_url: str
    """Address of the server, ending in /v1."""
    model: str
    """The model's name there."""
    api_key_env: str | None
    """Name of the environment variable that holds the key; null: the server asks for none."""
    temperature: float | None
    """null leaves it to the server."""
    structured_output: bool
    """Ask for a json schema, until the server refuses it; False: never. The reply is read strictly in both cases."""
    max_answer_tokens: int
    """Limit of one verdict, in tokens."""
    max_chars: int
    """Longer fields are cut to this many characters, and the judge is told."""
    timeout_s: float
    """One answer: all attempts and the waits between them, in seconds, once it has a slot."""
    attempt_timeout_s: float
    """One HTTP request, in seconds."""
    queue_timeout_s: float
    """Waiting for a slot, and then again for room under max_rpm and max_tpm, in seconds."""
    max_retries: int
    """Further requests for one answer after the first."""
    backoff_s: float
    """Upper end of the first random wait between attempts, in seconds."""
    give_up_after: int
    """After so many answers in a row without a working server, answers fail at once for timeout_s seconds."""
    max_concurrent: int
    """Requests in flight, over all workers."""
    max_rpm: int | None
    """Requests a minute, over all workers; null: no limit."""
    max_tpm: int | None
    """Tokens a minute, over all workers; null: no limit."""
    max_calls: int | None
    """Requests the run may spend, retries included; null: no limit."""
    max_total_tokens: int | None
    """Tokens the run may spend; null: no limit."""
    cache_path: str | None
    """sqlite file of verdicts and spending, on a local disk; null: in memory, forgotten with the run."""
    run_name: str
    """Whose spending is counted; a resumed run keeps it."""
