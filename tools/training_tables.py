# SPDX-License-Identifier: Apache-2.0
"""Tables of bench/results/training/*.jsonl for docs/training.md; render_results.py calls it.

Records: adapt.* of examples/adapt, with its training log, and scale.* of python/tests/scale.py. The
paper's numbers (arXiv 2509.24663, tables 1 and 4) stand beside them.
"""

import json
import math
import statistics

import region
from training_scores import TASKS, Scores, load, of_seeds, seeds_of_all, task_records

# The paper's table 1 (RULER at 32K, 8B), without its two question-answering columns.
PAPER = {
    "paper: short, YaRN": (98, 68, 50, 46, 6, 0, 32, 31.5, 36, 21.4, 87.33),
    "paper: dense continued": (100, 100, 100, 96, 94, 92, 82, 98.5, 93.2, 44.4, 91.33),
    "paper: InfLLM-V2, read sparse": (100, 100, 100, 94, 82, 62, 98.5, 94.5, 98, 50.4, 82.67),
    "paper: InfLLM-V2, read dense": (100, 100, 100, 94, 98, 98, 99, 98, 98.4, 52.8, 90),
}
ARMS = {
    "short": "(c) not continued", "dense": "(a) dense", "sparse": "(b) sparse",
    "aligned": "(d) sparse, selection taught", "taught": "(e) dense, selection taught",
}
LONG = 32768
FIRST = "h200-first"  # the model name in records of the first, shorter run
PAPER_NOTE = ("±: of the cases. The paper's (b) sparse / (a) dense at 32K: 98.1 % over RULER's thirteen tasks, 97.0 % "
              "over these eleven.\n")
SEEDS_NOTE = "± of a seed: of its cases. ± of the mean: standard error of what the seeds say.\n"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def kilo(tokens):
    return f"{tokens // 1024}K"


def one(value, digits=1):
    return "" if value is None else f"{value:.{digits}f}"


def task_table(score):
    rows = []
    for arm, label in ARMS.items():
        for attention in ("dense", "sparse"):
            if score(arm, attention, LONG) is not None:
                cells = [one(score(arm, attention, LONG, t)) for t in TASKS]
                rows.append([label, attention, *cells, one(score(arm, attention, LONG))])
    for label, cells in PAPER.items():
        read = "sparse" if "sparse" in label else "dense"
        rows.append([label, read, *map(one, cells), one(sum(cells) / len(cells))])
    return table(["continued", "read", *TASKS.values(), "mean"], rows)


def with_error(value, error):
    return "" if value is None else f"{value:.1f} ± {error:.1f} %"


def told(head, rows):
    """Head and rows without the columns that say nothing."""
    kept = [i for i in range(len(head)) if any(row[i] != "" for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def mean_table(score):
    """Every reading at every length."""
    rows = [[kilo(length), *(one(score(arm, attention, length))
                             for arm in ARMS for attention in ("dense", "sparse")),
             one(score.error("dense", "dense", length))] for length in score.lengths()]
    head = [f"{label[:3]} read {a}" for label in ARMS.values() for a in ("dense", "sparse")]
    return table(*told(["tokens", *head, "± of (a) read dense"], rows))


# Of what a reading keeps, and of which: (first, second) of Scores.ratio.
FAIR = "(d) sparse / (e) dense"  # taught both, sparse beside dense
UNEVEN = ("variables",)  # learnt by (e) with one seed and not with another, at every length
KEPT = {
    FAIR: (("aligned", "sparse"), ("taught", "dense")),
    "(b) sparse / (a) dense": (("sparse", "sparse"), ("dense", "dense")),
    "(d) sparse / (d) dense": (("aligned", "sparse"), ("aligned", "dense")),
    "(d) sparse / (a) dense": (("aligned", "sparse"), ("dense", "dense")),
    "(d) dense / (e) dense": (("aligned", "dense"), ("taught", "dense")),
    "(d) dense / (a) dense": (("aligned", "dense"), ("dense", "dense")),
    "(e) dense / (a) dense": (("taught", "dense"), ("dense", "dense")),
    "(e) sparse / (e) dense": (("taught", "sparse"), ("taught", "dense")),
    "(b) dense / (a) dense": (("sparse", "dense"), ("dense", "dense")),
    "(a) sparse / (a) dense": (("dense", "sparse"), ("dense", "dense")),
}
BEFORE = {f"{ARMS[arm][:3]} / (c)": ((arm, "dense"), ("short", "dense")) for arm in ARMS if arm != "short"}


def ratio_table(score, ratios, lengths):
    """A row a ratio, without those of which nothing is known."""
    rows = [[name, *(with_error(*score.ratio(*pair, length)) for length in lengths)]
            for name, pair in ratios.items()]
    return table(["ratio", *map(kilo, lengths)], [row for row in rows if any(row[1:])])


def of_every_seed(each, pair, length):
    """[ratio of every seed], and (their mean, its standard error) where there are several."""
    found = [of.ratio(*pair, length) for of in each]
    values = [value for value, _ in found if value is not None]
    if len(values) < 2:
        return found, None
    return found, (statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)))


def seed_table(records, score):
    """What is kept, seed by seed, of the ratios that several seeds have."""
    tasks = task_records(records)
    seeds = sorted({r["seed"] for r in tasks if r["arm"] != "short"})
    each, fewer = ([Scores(of_seeds(tasks, {seed}), without) for seed in seeds] for without in ((), UNEVEN))
    ratios = [(name, pair, each) for name, pair in KEPT.items()]
    ratios[1:1] = [(f"{FAIR}, without {TASKS[UNEVEN[0]]}", KEPT[FAIR], fewer)]
    rows = []
    for name, pair, scores in ratios:
        for length in score.lengths():
            found, mean = of_every_seed(scores, pair, length)
            if length not in short_lengths(score) and mean:
                rows.append([name, kilo(length), *(with_error(*one_of) for one_of in found), with_error(*mean)])
    return table(["ratio", "tokens", *(f"seed {seed}" for seed in seeds), "mean of the seeds"],
                 rows) if rows else ""


def short_lengths(score):
    """Lengths at which both readings are one."""
    return [n for n in score.lengths()
            if n < LONG and score("short", "dense", n) is not None
            and score("short", "dense", n) == score("short", "sparse", n)]


def budget_table(records, score):
    """Sparse readings at 32K with fewer blocks than the run had."""
    budgets = sorted({(r["arm"], r["blocks"]) for r in records
                      if r["name"] == "adapt.task" and r["blocks"] != score.blocks})
    rows = []
    for arm, blocks in budgets:
        few = Scores([r for r in records if r["name"] == "adapt.task" and r["blocks"] == blocks])
        value, whole = few(arm, "sparse", LONG), score(arm, "dense", LONG)
        if value is not None and whole:
            rows.append([ARMS[arm], blocks, f"{100 * blocks * 64 / LONG:.1f} %", one(value),
                         f"{100 * value / whole:.1f} %"])
    return table(["continued", "blocks", "visible at 32K", "mean of the tasks",
                  "of its dense reading"], rows) if rows else ""


def perplexity_table(records):
    cells = {}
    for r in records:
        if r["name"] == "adapt.perplexity":
            cells.setdefault((r["arm"], r["attention"], r["length"]), []).append(r["nll"])
    cells = {key: statistics.mean(each) for key, each in cells.items()}
    lengths = sorted({length for _, _, length in cells})
    rows = []
    for arm, label in ARMS.items():
        for attention in ("dense", "sparse"):
            if any((arm, attention, n) in cells for n in lengths):
                values = [cells.get((arm, attention, n)) for n in lengths]
                rows.append([label, attention,
                             *(one(None if x is None else math.exp(x), 3) for x in values)])
    return table(["continued", "read", *map(kilo, lengths)], rows)


def log_table(log):
    """Losses of the answers in training, early and late, of the same steps in every arm."""
    seed = min((r["seed"] for r in log if r["phase"] == "adapt"), default=None)
    log = [r for r in log if r["seed"] == seed]
    arms = [arm for arm in ARMS if any(r["arm"] == arm and r["phase"] == "adapt" for r in log)]
    steps = {arm: {r["step"]: r for r in log if r["phase"] == "adapt" and r["arm"] == arm and r["answer_loss"]}
             for arm in arms}
    common = sorted(set.intersection(*(set(each) for each in steps.values()))) if arms else []
    if not common:
        return ""
    third = (common[-1] + 1) // 3
    parts = [[s for s in common if i * third <= s < (i + 1) * third] for i in range(3)]
    rows = []
    for length in sorted({steps[arms[0]][s]["length"] for s in common}):
        which = [[s for s in part if steps[arms[0]][s]["length"] == length] for part in parts]
        if all(which):
            cells = (" -> ".join(one(statistics.median(steps[arm][s]["answer_loss"] for s in part), 2)
                                 for part in which) for arm in arms)
            rows.append([kilo(length), ", ".join(str(len(part)) for part in which), *cells])
    return table(["tokens", "steps in the log", *(ARMS[arm] for arm in arms)], rows)


def cost_table(records):
    rows = [[ARMS.get(r["arm"], r["arm"]) if r["phase"] == "adapt" else "short, dense", r["seed"], r["steps"],
             f'{r["tokens"] / 1e6:.1f} M', r["processes"], f'{r["seconds"]:.0f} s',
             f'{r["seconds"] * r["processes"] / 60:.1f}']
            for r in sorted((r for r in records if r["name"] == "adapt.run"),
                            key=lambda r: (r["phase"] != "pretrain", r["seed"], list(ARMS).index(r["arm"])))]
    return table(["run", "seed", "steps", "tokens", "GPUs", "time", "GPU minutes"], rows)


def step_table(records):
    steps = [{"weights": "random", **r} for r in records if r["name"] == "adapt.step"]
    dense = {(r["weights"], r["length"]): r["ms"] for r in steps if r["arm"] == "dense"}
    label = {"dense": "dense, cuDNN", "taught": "dense, cuDNN, selection taught", "sparse": "sparse",
             "aligned": "sparse, selection taught"}
    rows = []
    for r in sorted(steps, key=lambda r: (r["weights"] == "random", r["length"], list(label).index(r["arm"]))):
        beside = dense.get((r["weights"], r["length"]))
        rows.append([r["weights"], kilo(r["length"]), r["sequences"], label[r["arm"]],
                     f'{r["ms"]:.1f} ({r["ms_low"]:.1f}-{r["ms_high"]:.1f})',
                     f'{r["tokens_per_second"]:,}', f'{100 * r["mfu"]:.1f} %',
                     f'{beside / r["ms"]:.2f}x' if beside else "", r["memory_gb"]])
    text = table(["weights", "tokens", "sequences", "attention", "ms", "tokens/s", "MFU", "beside dense", "GB"],
                 rows)
    places = sorted({f'{r["device"]}, driver {r["driver"]}, commit `{r["commit"]}`, {r["date"]}'
                     for r in steps if "driver" in r})
    return text + "".join(f"\n{place}.\n" for place in places)


def scale_table(records):
    rows = []
    for r in sorted((r for r in records if r["name"].startswith("scale.")),
                    key=lambda r: (r["processes"], r["name"], r.get("tokens", 0), r.get("attention", ""))):
        shape = (f'{r["tokens"]} tokens, {r["heads_q"]}/{r["heads_kv"]} heads of {r["head_dim"]}, '
                 f'{r["attention"]}' if "tokens" in r else f'{r["parameters"]:,} parameters')
        gpus = r.get("gpus", r["processes"])
        on = "a CPU" if r["device"] == "cpu" else f'{gpus} x {r["device"]}'
        if r["device"] == "cpu" or gpus != r["processes"]:
            on = f'{r["processes"]} processes on {on}'
        rows.append([r["name"].removeprefix("scale."), on, shape,
                     f'{r["error"]:.2g}', f'{r["bound"]:.2g}', one(r.get("ms")), one(r.get("ms_one"))])
    return table(["what", "on", "shape", "error", "bound", "ms", "ms, one"], rows)


def first_run(records):
    """What the first run kept and cost."""
    score = Scores(records)
    if not score.lengths():
        return []
    lengths = [n for n in score.lengths() if n not in short_lengths(score)]
    return ["### The first run\n",
            "16 heads of 64 over two KV heads, 900 steps, taught by each sample's last rows and by any.\n",
            ratio_table(score, KEPT, lengths), cost_table(records), step_table(records)]


def tables(records, log=()):
    earlier = [r for r in records if r.get("model") == FIRST]
    records = [r for r in records if r.get("model") != FIRST]
    names = {r["name"] for r in records}
    score, out = Scores(records), []
    seeds = seeds_of_all(records)
    complete = of_seeds(records, seeds)
    which = "seed " + " and ".join(map(str, sorted(seeds)))
    if score.lengths():
        short = short_lengths(score)
        out += ["### What is kept, in percent\n",
                ratio_table(score, KEPT, [n for n in score.lengths() if n not in short]), PAPER_NOTE]
        if by_seed := seed_table(records, score):
            out += ["### The same of every seed\n", by_seed, SEEDS_NOTE]
        out += ["### Short inputs, after continuing against before\n",
                ratio_table(score, BEFORE, short)] if short else []
        out += [f"### Mean of the tasks at every length, {which}\n", mean_table(Scores(complete)),
                f"### Tasks at 32K, % of the answers' items, {which}\n", task_table(Scores(complete))]
        if few := budget_table(records, score):
            out += ["### Fewer blocks than trained with\n", few]
    if "adapt.perplexity" in names:
        out += [f"### Held-out perplexity of the same tokens after more and more text, {which}\n",
                perplexity_table(complete)]
    if in_training := log_table(log):
        out += ["### Loss of the answers in training, each third of the steps\n", in_training]
    if "adapt.run" in names:
        out += ["### Cost\n", cost_table(records)]
    if "adapt.step" in names:
        out += ["### A training step\n", step_table(records)]
    out += first_run(earlier)
    if any(name.startswith("scale.") for name in names):
        out += ["### Several processes against one\n", scale_table(records)]
    return "\n".join(out) or "No results yet.\n"


def summary(root):
    """What README.md says of the experiment; nothing where it has not been made."""
    records = [r for r in load(root / "bench/results/training") if r.get("model") != FIRST]
    score = Scores(records)
    each = [Scores(of_seeds(records, {seed})) for seed in {r["seed"] for r in task_records(records)}]

    def kept(name):
        """With the error of the cases or of the seeds, whichever is larger."""
        parts = []
        for length in score.lengths():
            value, error = score.ratio(*KEPT[name], length)
            if value is not None and length not in short_lengths(score):
                _, mean = of_every_seed(each, KEPT[name], length)
                value, spread = mean or (value, error)
                parts.append(f"{with_error(value, max(error, spread))} at {kilo(length)}")
        return ", ".join(parts)

    fair, own, plain = (kept(name) for name in (FAIR, "(d) sparse / (d) dense", "(b) sparse / (a) dense"))
    if not (fair and own and plain):
        return ""
    return ("\nA model of 65 M parameters, trained short and dense, is continued at up to 32K with its selection "
            f"taught. Continued and read sparse, it answers {fair} of what it does continued and read dense with "
            f"the same teaching, and {own} of what it does itself read dense. Untaught, sparse beside dense, that "
            f"is {plain}. Setting and limits: [docs/training.md](docs/training.md).\n")


def logged(root):
    path = root / "examples/adapt/training_log.jsonl"
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def rendered(root, so_far=None):
    return region.rendered(root / "docs/training.md", "training", "tools/training_tables.py",
                           lambda: tables(load(root / "bench/results/training"), logged(root)), so_far)
