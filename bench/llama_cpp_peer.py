#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Side by side with llama.cpp on one CPU: one llama-architecture shape with generated weights.

    python3 -m venv venv
    CMAKE_ARGS="-DGGML_NATIVE=ON" venv/bin/pip install --no-binary llama-cpp-python \
        llama-cpp-python gguf numpy
    venv/bin/python bench/llama_cpp_peer.py --infllm build/release/infllm \
        --output bench/results/cpu.jsonl

The peer runs every weight type and cache asked for, with and without flash attention. Each of our
results is compared with the fastest of the peer's at the weight types that hold as many bits or
more: bf16 with the better of bf16 and f16, int8 with q8_0. Ours and the peer's take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

SHAPES = {
    # layers, hidden, query heads, KV heads, head dimension, intermediate, vocabulary
    "minicpm4-0.5b": (24, 1024, 16, 2, 64, 4096, 73448),
}
RIVALS = {"bf16": ("bf16", "f16"), "int8": ("q8_0",)}  # ours: the peer's
FLASH = {"both": (True, False), "on": (True,), "off": (False,)}


@dataclass
class Measured:
    """Seconds of each repetition."""

    seconds: list[float] = field(default_factory=list)
    variant: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def write_gguf(path: pathlib.Path, shape: str, weight_type: str) -> None:
    import gguf
    import numpy as np

    layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary = SHAPES[shape]
    kind = gguf.GGMLQuantizationType[weight_type.upper()]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"{shape} with generated weights")
    writer.add_block_count(layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(1)

    def matrix(name: str, outputs: int, inputs: int) -> None:
        values = random.standard_normal((outputs, inputs), dtype=np.float32) * inputs**-0.5
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))

    matrix("token_embd", vocabulary, hidden)  # no "output": the head is tied to it
    norm("output_norm")
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        matrix(f"{block}.attn_q", heads * head_dim, hidden)
        matrix(f"{block}.attn_k", kv_heads * head_dim, hidden)
        matrix(f"{block}.attn_v", kv_heads * head_dim, hidden)
        matrix(f"{block}.attn_output", hidden, heads * head_dim)
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.ffn_gate", intermediate, hidden)
        matrix(f"{block}.ffn_up", intermediate, hidden)
        matrix(f"{block}.ffn_down", hidden, intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    """A llama.cpp context that evaluates made-up token ids."""

    def __init__(self, path: pathlib.Path, context: int, threads: int, flash: bool) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = 2048
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"llama.cpp could not open {path}")

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def evaluate(self, count: int, at_once: int) -> float:
        """Seconds for `count` tokens behind what is cached, logits of each call's last token."""
        ids = (self.lib.llama_token * count)(*(7 + 31 * i % 70000 for i in range(count)))
        start = time.perf_counter()
        for first in range(0, count, at_once):
            size = min(at_once, count - first)
            part = (self.lib.llama_token * size).from_buffer(ids, first * 4)
            batch = self.lib.llama_batch_get_one(part, size)
            if self.lib.llama_decode(self.context, batch) != 0:
                sys.exit("llama.cpp: llama_decode failed")
        self.lib.llama_synchronize(self.context)
        return time.perf_counter() - start

    def prefill(self, tokens: int) -> float:
        self.clear()
        return self.evaluate(tokens, 2048)

    def decode(self, depth: int, tokens: int) -> float:
        self.clear()
        if depth > 0:
            self.evaluate(depth, 2048)
        return self.evaluate(tokens, 1)


class Ours:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def run(self, weights: str, prompt: int, generated: int, attention: str) -> dict:
        depth = self.args.depth if generated else 0
        command = [self.args.infllm, "bench", "--synthetic", self.args.shape, "--dtype", weights]
        command += ["-p", str(prompt), "-n", str(generated), "-d", str(depth), "-r", "1"]
        command += ["-t", str(self.args.threads), "--attention", attention, "-o", "json"]
        command += ["--sparse", "on"] if attention == "sparse" else []
        command += [] if self.args.warmup else ["--no-warmup"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        return json.loads(done.stdout)[0]


@dataclass
class Case:
    name: str  # of the result lines
    prompt: int
    generated: int
    attention: str  # ours; the peer is always dense


def fastest(results: list[Measured]) -> Measured:
    return min(results, key=lambda result: result.median)


def measure_peer(args: argparse.Namespace, case: Case, path: pathlib.Path, kind: str) -> Measured:
    """The better of flash attention on and off; the slower one runs once."""
    results = []
    for flash in FLASH[args.flash]:
        tokens = max(case.prompt, args.depth + case.generated)
        peer = Peer(path, tokens + 64, args.threads, flash)
        result = Measured(variant=f"{kind}, flash attention {'on' if flash else 'off'}")
        if args.warmup:
            peer.prefill(64)
        for _ in range(args.repetitions):
            if case.generated:
                result.seconds.append(peer.decode(args.depth, case.generated))
            else:
                result.seconds.append(peer.prefill(case.prompt))
            if results and result.median > 1.3 * results[0].median:
                break
        peer.close()
        results.append(result)
        print(f"  llama.cpp {result.variant}: {result.median:.3f} s", file=sys.stderr, flush=True)
    return fastest(results)


def line_of(args: argparse.Namespace, case: Case, weights: str, ours: list[dict], peer: Measured):
    seconds = sorted(row["ms"] / 1e3 for row in ours)
    milliseconds = statistics.median(seconds) * 1e3
    processor = next(
        (
            text.split(": ", 1)[1].strip()
            for text in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if text.startswith("model name")
        ),
        "unknown processor",
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True, check=False
    ).stdout.strip()
    shape = {
        "model": args.shape,
        "weights": weights,
        "threads": args.threads,
        "tokens": case.generated or case.prompt,
        "attention": case.attention,
    }
    if case.generated:
        shape["depth"] = args.depth
    return {
        "name": case.name,
        "backend": ours[0]["device"],
        "device": processor,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "shape": shape,
        "ms": round(milliseconds, 4),
        "ms_low": round(seconds[0] * 1e3, 4),
        "ms_high": round(seconds[-1] * 1e3, 4),
        "peer": "llama.cpp",
        "peer_ms": round(peer.median * 1e3, 4),
        "ratio": round(peer.median * 1e3 / milliseconds, 3),
        "note": f"the peer's best: {peer.variant}; llama-cpp-python {args.peer_version}",
    }


def run_case(args: argparse.Namespace, cases: list[Case], weights: str, files: dict) -> None:
    """Cases that share one measurement of the peer: ours with dense and with sparse attention."""
    print(f"{cases[0].name}, {weights}:", file=sys.stderr, flush=True)
    rivals = [kind for kind in RIVALS[weights] if kind in files]
    if not rivals:
        return
    ours: dict[str, list[dict]] = {case.attention: [] for case in cases}
    peers = []
    for i in range(max(args.repetitions, len(rivals))):
        if i < args.repetitions:
            for case in cases:
                row = Ours(args).run(weights, case.prompt, case.generated, case.attention)
                ours[case.attention].append(row)
                print(f"  infllm {case.attention}: {row['ms'] / 1e3:.3f} s", file=sys.stderr)
        if i < len(rivals):
            peers.append(measure_peer(args, cases[0], files[rivals[i]], rivals[i]))
    best = fastest(peers)
    for case in cases:
        line = line_of(args, case, weights, ours[case.attention], best)
        print(
            f"{case.name:<14} {weights:<5} {case.attention:<7} {line['shape']['tokens']:>6} tokens "
            f"{line['ms']:>12.1f} ms, llama.cpp {line['peer_ms']:>12.1f} ms: {line['ratio']:.2f}x"
        )
        if args.output:
            with args.output.open("a") as output:
                output.write(json.dumps(line) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--infllm", default="build/release/infllm", help="our program")
    parser.add_argument("--shape", choices=SHAPES, default="minicpm4-0.5b")
    parser.add_argument("--weights", default="bf16,int8", help="ours, a list")
    parser.add_argument("--peer-types", default="bf16,f16,q8_0", help="the peer's weight types")
    parser.add_argument("--flash", choices=FLASH, default="both", help="the peer's flash attention")
    parser.add_argument("--prompt", default="4096,32768", help="lengths of the prefill; 0: none")
    parser.add_argument("--generate", type=int, default=64, help="tokens to decode; 0: none")
    parser.add_argument("--depth", type=int, default=128, help="cached tokens before the decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-warmup", dest="warmup", action="store_false")
    parser.add_argument("--work-dir", type=pathlib.Path, help="keeps the generated files")
    parser.add_argument("--output", type=pathlib.Path, help="append JSON lines to this file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    try:
        import llama_cpp
    except ImportError:
        sys.exit("llama_cpp_peer: llama-cpp-python is not installed; see this file's first lines")
    args.peer_version = llama_cpp.__version__
    with contextlib.ExitStack() as stack:
        folder = args.work_dir or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for kind in args.peer_types.split(","):
            files[kind] = folder / f"{args.shape}-{kind}.gguf"
            if not files[kind].exists():
                write_gguf(files[kind], args.shape, kind)
        for weights in args.weights.split(","):
            if args.generate:
                case = Case("model.decode", 0, args.generate, "dense")
                run_case(args, [case], weights, files)
            for prompt in (int(text) for text in args.prompt.split(",")):
                if prompt:
                    cases = [Case("model.prefill", prompt, 0, a) for a in ("dense", "sparse")]
                    run_case(args, cases, weights, files)


if __name__ == "__main__":
    main()
