"""A worker that answers from a script in place of measuring: python fake_worker.py '{"memory": "die", ...}'."""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from harness.workers import serve  # noqa: E402 - the path first

ANSWERS = {
    "start": {"threads": 1, "is_ours": False},
    "write_answer": None,
    "compare_with_peer": {"output": 1e-9, "gradient": 1e-9},
    "compare_with_reference": {"output": 1e-12, "gradient": 1e-12},
    "prepare": None,
    "time": {"calls": [0.5, 0.25], "tokens": 10},
    "memory": {"idle": 100, "peak": 300, "over_idle": 200},
    "matmul": 1e9,
    "engines": ["ChunkwiseEngine"],
}


def answer(request):
    do = request["do"]
    scripted = SCRIPT.get(f"{do} {request['what']}" if "what" in request else do, ANSWERS[do])
    if scripted == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if scripted == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if scripted == "exit":
        print("Fatal: no more", file=sys.stderr)
        os._exit(3)
    if scripted == "hang":
        time.sleep(60)
    if scripted == "raise":
        raise RuntimeError("shapes do not fit\nand more")
    if scripted == "lack":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
    print("noise on stdout")
    return scripted


if __name__ == "__main__":
    SCRIPT = json.loads(sys.argv[1])
    serve(answer)
