"""Measure methods on a model of yours from Python: what `qkv bench` does, as a call.

python examples/compare_methods.py [MODEL] [FOLDER]
"""

from __future__ import annotations

import sys

from qkv.bench.job import Job
from qkv.bench.run import run
from qkv.bench.tasks import Settings


def main(name: str = "smollm2", folder: str = "runs/example") -> None:
    text = " ".join(f"In the year {1000 + i} a ship came home with {i % 7 + 2} men." for i in range(400))
    job = Job.of(
        name,
        ["h2o:budget=0.25", "streamingllm:window=60", "kivi:bits=4"],
        contexts=[256],
        tasks=["kl"],
        settings=Settings(windows=1, tokens=8),
    )
    results = run(job, folder, text=text)
    for row in results.rows:
        kl, held, full = row["metrics"]["kl"], row["cost"]["held_bytes"], row["cost"]["full_bytes"]
        print(f"{row['method']['label']:<24} KL to full {kl:.4f} nats   bytes held {held / full:.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
