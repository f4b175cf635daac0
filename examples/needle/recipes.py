# SPDX-License-Identifier: Apache-2.0
"""What is trained for how long: the stages of a run, as data."""

import dataclasses

import model

import infllm


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Samples of one length; batch counts one process. share, sparse, end are probabilities.

    A step attends densely, or (sparse) to selected blocks, or (end) the document to selected blocks
    and the last rows, where the questions stand, to everything.
    """

    length: int
    batch: int
    share: float = 1.0
    sparse: float = 0.0
    end: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
    steps: int
    buckets: tuple
    spread: float = 0.0  # share of samples whose RoPE positions have gaps
    varied: float = 0.0  # share of samples with facts of more kinds
    align_rows: int = 512  # last rows on which selection is taught; 0: not at all
    align_layers: int = 6  # how many layers, drawn at random, are taught in one step


@dataclasses.dataclass(frozen=True)
class Recipe:
    stages: tuple
    config: model.Config = dataclasses.field(default_factory=model.Config)
    adamw_rate: float = 2e-3
    muon_rate: float = 0.02
    warmup: int = 100
    decay: float = 0.3  # in this last share of the run the rate falls to a hundredth
    budgets: tuple = (20, 30)  # blocks a token sees, drawn in sparse steps
    longest: int = 40960  # positions end below it
    first_weight: float = 1.0  # of a document's first answer, which is what a user asks for

    @property
    def steps(self):
        return sum(s.steps for s in self.stages)

    def stage(self, step):
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def rate(self, step, progress):
        """progress: how much of the run is over, in steps or in time."""
        warm = min(1.0, (step + 1) / self.warmup)
        return warm * max(0.01, min(1.0, (1 - progress) / self.decay)) if self.decay else warm


SMOKE = Recipe(
    config=model.Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        original_max_position_embeddings=1024,
        sparse=infllm.SparseConfig(window_size=128, topk=4, dense_len=512),
    ),
    stages=(
        Stage(10, (Bucket(512, 2),), align_rows=0),
        Stage(
            10,
            (Bucket(512, 2, sparse=0.5), Bucket(1280, 1, sparse=0.3, end=0.4)),
            spread=0.5,
            varied=0.5,
            align_rows=128,
        ),
    ),
    budgets=(5, 6),
    warmup=5,
    longest=2048,
    first_weight=2.0,
)

SHORT = Recipe(  # one GPU, two minutes; the full rate to the end, for LONG goes on from it
    stages=(
        Stage(1200, (Bucket(512, 64),), align_rows=0),
        Stage(800, (Bucket(2048, 16),), spread=0.5),
        Stage(160, (Bucket(4096, 8, sparse=0.5),), spread=0.5),
    ),
    decay=0.0,
)

LONG = Recipe(  # four GPUs, seven and a half minutes, from the weights of SHORT
    stages=(
        Stage(1000, (Bucket(4096, 12, sparse=0.25),), spread=0.5, align_layers=3),
        Stage(
            1600,
            (Bucket(8192, 6, 0.4), Bucket(16384, 3, 0.6, 0.3)),
            spread=0.3,
            align_rows=1024,
            align_layers=3,
        ),
        Stage(
            1500,
            (Bucket(16384, 3, 0.3, 0.3), Bucket(32768, 1, 0.4, 0.3), Bucket(40960, 1, 0.3)),
            align_rows=1024,
            align_layers=3,
        ),
        Stage(
            1400,
            (
                Bucket(4096, 12, 0.15, 0.3),
                Bucket(8192, 6, 0.15),
                Bucket(16384, 3, 0.2, 0.3),
                Bucket(32768, 1, 0.3, 0.3),
                Bucket(40960, 1, 0.2),
            ),
            align_rows=1024,
            align_layers=3,
        ),
    ),
    muon_rate=0.015,
    warmup=50,
    decay=0.35,
)

LONGER = Recipe(  # one GPU, a minute, from the weights of LONG
    stages=(
        Stage(
            1500,
            (
                Bucket(4096, 12, 0.45, 0.3),
                Bucket(8192, 6, 0.20, 0.3),
                Bucket(16384, 3, 0.15, 0.3),
                Bucket(32768, 2, 0.12, 0.3, 0.4),
                Bucket(65536, 1, 0.05, 0.4, 0.4),
                Bucket(131072, 1, 0.03, 0.4, 0.6),
            ),
            spread=0.3,
            varied=0.45,
            align_rows=1024,
            align_layers=3,
        ),
    ),
    config=model.Config(max_position_embeddings=131072, original_max_position_embeddings=40960),
    muon_rate=0.007,
    adamw_rate=1e-3,
    warmup=20,
    decay=0.6,
    longest=131072,
    first_weight=8.0,
)

RECIPES = {"short": SHORT, "long": LONG, "longer": LONGER, "smoke": SMOKE}
