# SPDX-License-Identifier: Apache-2.0
"""Configuration files and the places where the parts of the experiment leave their results.

A configuration (configs/*.toml) has the tables [model], [sparse] (config.json's sparse_config),
[optimizer], [pretrain], [adapt] and [evaluate]. A phase is a list of stages:

    stages = [{steps = 500, lengths = {512 = 1.0}}, {steps = 700, lengths = {2048 = 1, 4096 = 3}}]

where a step takes tokens_per_step tokens on each process, of samples of one length, drawn with
these weights.
"""

import argparse
import dataclasses
import pathlib
import tomllib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = pathlib.Path(".train/adapt")


def add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=pathlib.Path, default=ROOT / "text")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=ROOT / "tokenizer/tokenizer.model")
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "data")


@dataclasses.dataclass(frozen=True)
class Stage:
    steps: int
    lengths: dict  # length -> weight


@dataclasses.dataclass(frozen=True)
class Phase:
    """A run: stages, and the learning rate as a share of the full one, from first to last."""

    stages: tuple
    warmup: int
    rate: tuple  # full share until `decay_from` of the run, then linearly to the second number
    decay_from: float
    seconds: float  # the run is over after this many, whatever has been reached

    @property
    def steps(self):
        return sum(s.steps for s in self.stages)

    def stretched(self, factor: float) -> "Phase":
        """The same with so many times the steps."""
        stages = tuple(Stage(max(1, round(s.steps * factor)), s.lengths) for s in self.stages)
        return dataclasses.replace(self, stages=stages)

    def length(self, step: int, seed: int) -> int:
        """The samples' length in a step; every process of a run draws the same."""
        for stage in self.stages:
            if step < stage.steps:
                break
            step -= stage.steps
        lengths, weights = zip(*stage.lengths.items())
        rng = np.random.default_rng([seed, step, stage.steps, 7])
        return int(rng.choice(lengths, p=np.array(weights) / sum(weights)))

    def share(self, step: int, progress: float) -> float:
        """progress: how much of the run is over, 0 to 1, in steps or in seconds."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        done = max(0.0, min(1.0, (progress - self.decay_from) / max(1e-9, 1 - self.decay_from)))
        return warm * (self.rate[0] + (self.rate[1] - self.rate[0]) * done)


@dataclasses.dataclass(frozen=True)
class Settings:
    name: str
    model: dict
    sparse: dict
    optimizer: dict
    tokens_per_step: int
    phases: dict
    evaluate: dict
    align: dict


def phase(raw: dict) -> Phase:
    stages = tuple(
        Stage(s["steps"], {int(k): float(v) for k, v in s["lengths"].items()})
        for s in raw["stages"]
    )
    return Phase(stages, raw["warmup"], tuple(raw["rate"]), raw["decay_from"], raw["seconds"])


def load(path) -> Settings:
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        raw = tomllib.load(file)
    return Settings(
        path.stem, raw["model"], raw["sparse"], raw["optimizer"], raw["tokens_per_step"],
        {name: phase(raw[name]) for name in ("pretrain", "adapt")}, raw["evaluate"], raw["align"],
    )  # fmt: skip
