"""Serves a judge that always gives the same verdict, until it is killed: `serve.py [--value 0.6] [--delay 0.1]`.

Prints the address on its first line. For runs by hand and for tests that need the judge in another process.
"""

from __future__ import annotations

import argparse
import threading

from judge_server import JudgeServer, good

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--value", type=float, default=0.6)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds before each reply")
    args = parser.parse_args()
    with JudgeServer() as server:
        server.plan = lambda _: good(args.value, delay_s=args.delay)
        print(server.url, flush=True)
        threading.Event().wait()
