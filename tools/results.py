# SPDX-License-Identifier: Apache-2.0
"""Reads and checks bench/results/*.jsonl; bench/results/README.md describes the lines."""

import json
import re

NUMBER = (int, float)
MEASUREMENT = {
    "name": str, "backend": str, "device": str, "driver": str, "commit": str, "date": str,
    "shape": dict, "input": str, "ms": NUMBER, "ms_low": NUMBER, "ms_high": NUMBER,
    "tflops": NUMBER, "gbps": NUMBER, "roofline": NUMBER, "peer": str, "peer_ms": NUMBER,
    "peer_version": str, "peer_unfinished": bool,  # stopped at peer_ms: it and the ratio are lower bounds
    "ratio": NUMBER, "note": str, "column": str, "threads": int, "dtype": str, "model": str,
    "visible_share": NUMBER, "overlap": NUMBER, "steps_ms": dict,
}
MEASUREMENT_REQUIRED = {"name", "backend", "device", "commit", "date", "shape", "ms"}
EVALUATION = {
    "name": str, "model": str, "task": str, "length": int, "attention": str, "correct": int,
    "total": int, "visible_share": NUMBER, "backend": str, "device": str, "driver": str,
    "commit": str, "date": str, "note": str, "column": str, "threads": int, "dtype": str,
    "seconds": NUMBER,
}
EVALUATION_REQUIRED = {"name", "task", "length", "attention", "correct", "total"}


class BadResult(ValueError):
    """A line that does not fit; the message names it."""


def is_evaluation(record):
    return record["name"].startswith("eval.")


def check_fields(record, fields, required):
    for name in sorted(required - record.keys()):
        raise BadResult(f'"{name}" is missing')
    for name, value in record.items():
        if name not in fields:
            raise BadResult(f'found the field "{name}", expected one of {", ".join(fields)}')
        if not isinstance(value, fields[name]) or (
                isinstance(value, bool) and fields[name] is not bool):
            raise BadResult(f'"{name}" is {json.dumps(value)}, expected '
                            f'{"a number" if fields[name] is NUMBER else fields[name].__name__}')


def check_positive(record, names):
    for name in names:
        # Not "<= 0": that would let a NaN pass.
        if name in record and not 0 < record[name] < float("inf"):
            raise BadResult(f'"{name}" is {record[name]}, expected a positive number')


def check_share(record):
    if not 0 < record.get("visible_share", 1) <= 1:
        raise BadResult(f'"visible_share" is {record["visible_share"]}, expected 0 to 1')


def check_measurement(record):
    check_fields(record, MEASUREMENT, MEASUREMENT_REQUIRED)
    check_positive(record, ["ms", "ms_low", "ms_high", "peer_ms", "ratio", "tflops", "gbps",
                            "roofline"])
    for name, value in record["shape"].items():
        if not isinstance(value, (int, float, str)) or isinstance(value, bool):
            raise BadResult(f'shape "{name}" is {json.dumps(value)}, expected a number or a name')
    for name, value in record.get("steps_ms", {}).items():
        if not isinstance(value, NUMBER) or not 0 <= value < float("inf"):
            raise BadResult(f'steps_ms "{name}" is {json.dumps(value)}, expected milliseconds')
    if not record.get("ms_low", 0) <= record["ms"] <= record.get("ms_high", float("inf")):
        raise BadResult(f'"ms" is {record["ms"]}, expected it between ms_low and ms_high')
    check_share(record)
    if ("peer" in record) != ("peer_ms" in record):
        raise BadResult('"peer" and "peer_ms" come together')
    if "peer" in record:
        true_ratio = record["peer_ms"] / record["ms"]
        # Three rounded digits in each of the three numbers.
        if abs(record.setdefault("ratio", true_ratio) / true_ratio - 1) > 0.02:
            raise BadResult(f'"ratio" is {record["ratio"]}, expected peer_ms / ms = '
                            f'{true_ratio:.4g}')


def check_evaluation(record):
    check_fields(record, EVALUATION, EVALUATION_REQUIRED)
    if record["attention"] not in ("dense", "sparse"):
        raise BadResult(f'"attention" is "{record["attention"]}", expected dense or sparse')
    if not 0 <= record["correct"] <= record["total"] or record["total"] == 0:
        raise BadResult(f'{record["correct"]} of {record["total"]} correct is no count')
    check_share(record)


def gather_context(record):
    """What the program states once for all its lines goes where a benchmark would have put it."""
    record["backend"] = record.pop("column", record.get("backend", ""))
    if not is_evaluation(record):
        shape = record["shape"]
        for name, inside in (("model", "model"), ("dtype", "weights"), ("threads", "threads")):
            if name in record:
                shape.setdefault(inside, record.pop(name))


def parse_line(line):
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadResult(f"no JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise BadResult('expected an object with a "name"')
    (check_evaluation if is_evaluation(record) else check_measurement)(record)
    if "date" in record and not re.match(r"\d{4}-\d{2}-\d{2}", record["date"]):
        raise BadResult(f'"date" is "{record["date"]}", expected YYYY-MM-DD')
    gather_context(record)
    return record


def key(record):
    """What a record measures; a later record with the same key replaces it."""
    if is_evaluation(record):
        return tuple(record.get(name, "") for name in
                     ("name", "model", "backend", "dtype", "task", "length", "attention"))
    return (record["name"], record["device"], record["backend"],
            json.dumps(record["shape"], sort_keys=True), record.get("input", ""),
            record.get("peer", ""))


def of_fields(line, required, optional=()):
    """The object of a line whose fields have the types of required and, where there, of optional."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise BadResult(f"found {type(record).__name__}, expected an object")
    known = {**required, **dict(optional)}
    if extra := record.keys() - known.keys():
        raise BadResult(f"found the fields {', '.join(sorted(extra))}, expected {', '.join(known)}")
    for field, kind in known.items():
        if (field in required or field in record) and type(record.get(field)) is not kind:
            raise BadResult(f'"{field}" is {json.dumps(record.get(field))}, expected {kind.__name__}')
    return record


def records_of(folder, parse):
    """What parse makes of each line of the folder's files, in order; of a bad one, its place too."""
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = parse(line)
            except ValueError as error:
                raise BadResult(f"{path.name}:{number}: {error}") from error
            yield record


def check_time(record):
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", record["date"]):
        raise BadResult(f'"date" is "{record["date"]}", expected YYYY-MM-DDThh:mm:ssZ')


def last_runs(folder, parse, name_of):
    """{name_of(record): the lines of its last run}, all those with the latest date."""
    runs = {}
    for record in records_of(folder, parse):
        runs.setdefault(name_of(record), []).append(record)
    return {name: [r for r in lines if r["date"] == max(x["date"] for x in lines)]
            for name, lines in runs.items()}


def load(folder):
    """(measurements, evaluations) of the folder's files, the latest of each key."""
    latest = {}
    for record in records_of(folder, parse_line):
        old = latest.get(key(record))
        if old is None or record.get("date", "") >= old.get("date", ""):
            latest[key(record)] = record
    records = list(latest.values())
    return ([r for r in records if not is_evaluation(r)], [r for r in records if is_evaluation(r)])
