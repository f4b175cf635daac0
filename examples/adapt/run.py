# SPDX-License-Identifier: Apache-2.0
"""The whole experiment on the GPUs there are: pretraining on all of them, then arms and evaluations.

    python3 examples/adapt/run.py OUT --seconds 580 --seeds 1 2

needs .train/adapt/text and .train/adapt/tokenizer (text.py, tokenizer.py) and `import infllm`. Jobs
run one a GPU, in the order below as GPUs become free and what they need is done. OUT gets results.jsonl,
a log of every job, and one folder a run with its checkpoint and state. When the seconds are over, runs
save their state and evaluations what they have; started again, everything goes on.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import settings as settings_lib
import torch

HERE = settings_lib.HERE
STOPPING = 8  # seconds before the end at which jobs begin to save what they have
LEAST = 25  # seconds that a job must have ahead to be begun
EVALUATION = 55  # seconds that scoring a run takes
ARMS = ("dense", "aligned", "taught", "sparse")  # where time may run out, the first are wanted most
# Cases a task at the lengths where the two readings differ: first those that tables need,
# for the readings that they compare, and when all else is done as many as there are.
FIRST = {
    "short": ("--most-dense", 16, "--most-sparse", 16),
    "dense": ("--most-dense", 64, "--most-sparse", 16),
    "aligned": ("--most-dense", 32, "--most-sparse", 64),
    "taught": ("--most-dense", 64, "--most-sparse", 32),
    "sparse": ("--most-dense", 16, "--most-sparse", 64),
}
MORE = {
    "aligned": (),
    "dense": ("--most-sparse", 16),
    "taught": ("--most-sparse", 64),
    "sparse": ("--most-dense", 64),
}


@dataclasses.dataclass
class Job:
    name: str
    command: tuple
    needs: tuple = ()
    gpus: int = 1
    ahead: Callable[[], float] = lambda: LEAST  # seconds that must be left for it to be begun
    process: subprocess.Popen | None = None
    held: tuple = ()  # the GPUs it runs on


class Jobs:
    """Runs jobs in their order; OUT/done/NAME tells that one has ended well."""

    def __init__(self, out: pathlib.Path, jobs: list, gpus: int, end: float):
        self.out, self.jobs, self.end = out, jobs, end
        self.free, self.failed, self.began = list(range(gpus)), set(), time.time()
        (out / "done").mkdir(parents=True, exist_ok=True)

    def done(self, name: str) -> bool:
        return (self.out / "done" / name).exists()

    def say(self, text: str) -> None:
        print(f"{time.time() - self.began:5.0f} s  {text}", flush=True)

    def begin(self, job: Job) -> None:
        job.held, self.free = tuple(self.free[: job.gpus]), self.free[job.gpus :]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, job.held))} if job.gpus else {}
        with open(self.out / f"{job.name}.log", "a", encoding="utf-8") as log:
            job.process = subprocess.Popen(
                tuple(map(str, job.command)), stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **visible},
            )  # fmt: skip
        self.say(f"{job.name} begins" + (f" on GPU {visible['CUDA_VISIBLE_DEVICES']}" if visible else ""))

    def ended(self, job: Job) -> None:
        status, job.process = job.process.returncode, None
        self.free = sorted([*self.free, *job.held])
        if status == 0:
            (self.out / "done" / job.name).touch()
        else:
            self.failed.add(job.name)
        log = (self.out / f"{job.name}.log").read_text(encoding="utf-8", errors="replace")
        last = ([""] + [line for line in log.replace("\r", "\n").splitlines() if line.strip()])[-1]
        self.say(f"{job.name} {'done' if status == 0 else f'ended with {status}'}: {last[:160]}")

    def run(self) -> None:
        while True:
            for job in self.jobs:
                if job.process and job.process.poll() is not None:
                    self.ended(job)
            running = [job for job in self.jobs if job.process]
            late = self.end - time.time()
            for job in self.jobs:
                if not (job.process or job.name in self.failed or self.done(job.name)) and (
                    late > job.ahead() and all(map(self.done, job.needs)) and len(self.free) >= job.gpus
                ):
                    self.begin(job)
                    running.append(job)
            if late < 0:
                for job in running:
                    os.killpg(job.process.pid, signal.SIGKILL)
                    self.say(f"{job.name} stopped")
            if late < 0 or not running:
                return
            time.sleep(0.2)


def whole(out: pathlib.Path, arm: str, name: str) -> float:
    """Seconds that a run and its scoring take, going by the same arm's run with another seed."""
    told = out / arm / "run.jsonl"
    if (out / name / "state.pt").exists() or not told.exists():
        return LEAST
    return json.loads(told.read_text(encoding="utf-8"))["seconds"] + EVALUATION


def cores() -> int:
    return len(os.sched_getaffinity(0))


def plan(args, gpus: int, workers: int, end: float) -> list:
    """The jobs, most wanted first."""
    python, out, stop = sys.executable, args.out, end - STOPPING
    places = ("--text", args.text, "--tokenizer", args.tokenizer, "--data", args.data)
    common = ("--config", args.config, *places)
    kept = (*common, "--workers", workers, "--stretch", args.stretch, "--pause-at", stop)
    limit = ("--deadline", args.short_until) if args.short_until else ()
    seed, *others = args.seeds
    first = (python,) if gpus == 1 else (python, "-m", "torch.distributed.run", "--nproc-per-node", gpus)
    jobs = [
        Job("documents", (python, HERE / "documents.py", *places, "--processes", max(1, cores() - 4)), gpus=0),
        Job("short", (*first, HERE / "train.py", *kept, *limit, "--phase", "pretrain", "--seed", seed,
                      "--out", out / "short"), ("documents",), gpus),
    ]  # fmt: skip

    def train(arm, seed, name):
        jobs.append(Job(name, (python, HERE / "train.py", *kept, "--phase", "adapt", "--arm", arm, "--seed", seed,
                               "--init", out / "short/model", "--out", out / name), ("short",),
                        ahead=lambda: whole(out, arm, name)))  # fmt: skip

    def evaluate(run, arm, seed, job, to, needed, *more):
        jobs.append(Job(job, (python, HERE / "evaluate.py", *common, "--workers", workers, "--deadline", stop,
                              "--model", out / run / "model", "--arm", arm, "--seed", seed,
                              "--out", out / f"{to}.jsonl", *more), (needed,)))  # fmt: skip

    def score(run, arm, seed, *more):
        evaluate(run, arm, seed, f"evaluate-{run}", f"evaluate-{run}", run, *FIRST[arm], *more)

    # What is trained is scored as soon as a GPU is free, so that little is lost where time runs out.
    for pair in (ARMS[:2], ARMS[2:]):
        for arm in pair:
            train(arm, seed, arm)
        for arm in pair:
            score(arm, arm, seed)
    score("short", "short", seed)
    step = (python, HERE / "bench_step.py", *common, "--out", out / "step.jsonl")
    jobs.append(Job("step", (*step, "--model", out / "aligned/model"), ("aligned",)))
    again = [(arm, other, f"{arm}-{other}") for other in others for arm in args.again]
    for arm, other, name in again:
        train(arm, other, name)
    for arm, other, name in again:
        score(name, arm, other, "--no-text")
    for arm in MORE:
        evaluate(arm, arm, seed, f"more-{arm}", f"evaluate-{arm}", f"evaluate-{arm}", *MORE[arm], "--no-text")
    for topk in (32, 8):  # 64 and 40 of the 96 blocks that it was continued with
        evaluate("aligned", "aligned", seed, f"few-{topk}", f"few-{topk}", "aligned",
                 "--topk", topk, "--lengths", 32768, "--most", 16)  # fmt: skip
    if torch.cuda.is_available():  # compiles what all runs need while ids are made, on one of the GPUs
        step = (python, HERE / "bench_step.py", "--config", args.config, "--lengths", 4096)
        jobs.insert(0, Job("warm", (*step, "--arms", "dense", "--warmup", 1, "--steps", 1)))
    else:
        jobs = [job for job in jobs if job.name != "step"]
    return jobs


def gather(out: pathlib.Path) -> None:
    parts = [*sorted(out.glob("*.jsonl")), *sorted(out.glob("*/run.jsonl"))]
    lines = [part.read_text(encoding="utf-8") for part in parts if part.name != "results.jsonl"]
    (out / "results.jsonl").write_text("".join(lines), encoding="utf-8")
    logs = sorted(out.glob("*/log.jsonl"))
    for field in ("text_loss", "wrong"):
        picture = ("--field", field, "--out", out / f"{field}.svg", *logs)
        subprocess.run([sys.executable, HERE / "plot.py", *picture], check=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    settings_lib.add_paths(parser)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=86400, help="of this start")
    parser.add_argument("--config", type=pathlib.Path, default=HERE / "configs/h200.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the arms, one start for all")
    parser.add_argument("--again", nargs="*", default=ARMS, choices=ARMS, help="of the seeds after the first")
    parser.add_argument("--stretch", type=float, default=1, help="so many times the steps")
    parser.add_argument("--short-until", type=float, help="Unix time at which pretraining ends at the latest")
    args = parser.parse_args()
    end = time.time() + args.seconds
    gpus = max(1, torch.cuda.device_count())
    workers = max(1, cores() // gpus - 1)
    Jobs(args.out, plan(args, gpus, workers, end), gpus, end).run()
    gather(args.out)


if __name__ == "__main__":
    main()
