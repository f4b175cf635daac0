#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times what else computes attention on this GPU, beside our own results.

    bench/peers_cuda.py --ours ours.jsonl --output bench/results/h200.jsonl

Reads the lines of device_bench, runs PyTorch's scaled_dot_product_attention with its cuDNN and
FlashAttention-2 backends at the same shapes (causal prefill for dense.forward and
attention.forward, its gradients for the backward rows, one query token for the decode rows), and
infllm_v2's published kernels where they are installed (published_peer.py) at the sparse rows, with
the same kind of inputs, and writes every line of ours with its peers: peer, peer_ms, peer_version,
ratio. Run it right after device_bench, on the same machine.
Lines of other programs pass through unchanged. A line leaves ours.jsonl when it is in the output, so
that each is in one of the two files whenever the program is stopped.
"""

import argparse
import json
import pathlib
import statistics
import sys
import unittest.mock

import published_peer
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
PUBLISHED = "infllm_v2"
PUBLISHED_LIMIT = 131072  # tokens beyond which its stage 1 needs more memory than there is
FORWARD = ("compress.forward", "select.forward", "attend.forward", "attention.forward")
BACKWARD = ("attend.backward", "attention.forward_backward")
LONG = 200_000  # tokens from which a call takes seconds: one warm-up on fewer tokens, one run
FLASH_LIMIT = 300_000  # FlashAttention-2 would take minutes beyond


def milliseconds(call, repetitions):
    """Median of event-timed calls, each of as many repeats as take some milliseconds."""
    def timed(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    if repetitions == 1:
        return timed(1)
    call()
    count = max(1, min(200, int(5 / max(timed(1), 1e-3))))
    return statistics.median(timed(count) for _ in range(repetitions))


def graphed(call):
    """The call as a replayed graph, as our own decode rows are timed; the call where it cannot be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"launched, not replayed: {str(error).splitlines()[0]}", file=sys.stderr)
        return call
    return graph.replay


def inputs(shape, queries, keys):
    def normal(heads, tokens):
        return torch.randn(shape["batch"], heads, tokens, shape["head_dim"], device="cuda",
                           dtype=torch.bfloat16)
    return (normal(shape["heads_q"], queries), normal(shape["heads_kv"], keys),
            normal(shape["heads_kv"], keys))


def dense_prefill(shape, backend):
    tokens = shape["tokens"]

    def call_of(count):
        q, k, v = inputs(shape, count, count)
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with sdpa_kernel(BACKENDS[backend]):
        if tokens > LONG:
            call_of(8192)()
            return milliseconds(call_of(tokens), 1)
        return milliseconds(call_of(tokens), 5)


def dense_backward(shape, backend, with_forward):
    """Gradients of causal attention alone, or both passes."""
    tokens = shape["tokens"]
    q, k, v = (x.requires_grad_() for x in inputs(shape, tokens, tokens))

    def forward():
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with sdpa_kernel(BACKENDS[backend]):
        o = forward()
        grad_o = torch.randn_like(o)
        if with_forward:
            call = lambda: torch.autograd.grad(forward(), (q, k, v), grad_o)  # noqa: E731
        else:
            call = lambda: torch.autograd.grad(o, (q, k, v), grad_o, retain_graph=True)  # noqa: E731
        return milliseconds(call, 3)


def dense_decode(shape, backend):
    """Caches of several layers in turn, so that none of them stays in the L2 cache."""
    bytes_of_layer = 4 * shape["batch"] * shape["heads_kv"] * shape["tokens"] * shape["head_dim"]
    layers = [inputs(shape, 1, shape["tokens"])
              for _ in range(max(2, min(24, 200_000_000 // bytes_of_layer + 1)))]

    def call():
        for q, k, v in layers:
            scaled_dot_product_attention(q, k, v, enable_gqa=True)

    with sdpa_kernel(BACKENDS[backend]):
        return milliseconds(graphed(call), 5) / len(layers)


def published_forward(module, shape, kind):
    """{our name: milliseconds} of the published kernels' steps on a prompt, and of all of them."""
    peer = published_peer.Prefill(module, shape, kind)
    print(f"{PUBLISHED} {shape['tokens']} {kind}: overlap {peer.overlap:.3f}", flush=True)
    calls = (peer.compress, peer.select, peer.attend, peer.forward)
    return {name: milliseconds(call, 3) for name, call in zip(FORWARD, calls)}


def published_backward(module, shape, kind):
    """{our name: milliseconds} of their gradients alone, and of all steps with them.

    Their backward pass gives PyTorch's unused memory back to the device, twice a call, which costs more
    than its kernels on short prompts; that is left out."""
    peer = published_peer.Prefill(module, shape, kind)
    leaves = peer.leaves()
    o = peer.attend(leaves)
    grad_o = torch.randn_like(o)

    def alone():
        torch.autograd.grad(o, leaves, grad_o, retain_graph=True)

    def whole():
        torch.autograd.grad(peer.forward(leaves), leaves, grad_o)

    with unittest.mock.patch.object(torch.cuda, "empty_cache", lambda: None):
        return {name: milliseconds(call, 3) for name, call in zip(BACKWARD, (alone, whole))}


def published_decode(module, shape):
    """{our name: milliseconds} of a token of each sequence; layers in turn as in device_bench."""
    width = 4 * shape["batch"] * shape["heads_kv"] * shape["head_dim"]
    bytes_of_layer = width * (64 * shape["blocks"] + shape["tokens"] * 5 // 128)
    layers = max(2, min(24, 200_000_000 // bytes_of_layer + 1))
    peer = published_peer.Decode(module, shape, layers)
    return {"attention.decode": milliseconds(graphed(peer.step), 5) / layers}


class Peers:
    """Peers' times by shape, each measured once; of those that are wanted and there."""

    def __init__(self, wanted):
        self.known = {}
        self.backends = [name for name in BACKENDS if name in wanted]
        self.versions = dict.fromkeys(BACKENDS, f"PyTorch {torch.__version__}")
        self.published = None
        if PUBLISHED in wanted:
            try:
                self.published = published_peer.load()
                self.versions[PUBLISHED] = published_peer.version(self.published)
            except ImportError as error:
                print(f"without the published kernels: {error}", file=sys.stderr)

    def measure(self, key, call):
        if key not in self.known:
            try:
                self.known[key] = call()
            except Exception as error:  # a peer that cannot do a shape is no reason to stop
                print(f"{' '.join(map(str, key))}: {str(error).splitlines()[0]}", file=sys.stderr)
                self.known[key] = None
            torch.cuda.empty_cache()
            print(*key, self.known[key], flush=True)
        return self.known[key]

    def of(self, line):
        """{peer: milliseconds} for one of our lines."""
        shape = line.get("shape", {})
        place = tuple(shape.get(name) for name in ("batch", "heads_q", "tokens", "head_dim"))
        kind = line["name"]
        found = {}
        if kind in ("dense.forward", "attention.forward", "dense.decode", "attention.decode"):
            prefill = kind.endswith("forward")
            for backend in self.backends:
                if backend == "flash2" and prefill and shape["tokens"] > FLASH_LIMIT:
                    continue
                run = dense_prefill if prefill else dense_decode
                found[backend] = self.measure(
                    (backend, "prefill" if prefill else "decode", *place),
                    lambda run=run, backend=backend: run(shape, backend))
        if kind in ("dense.backward", "attend.backward", "dense.forward_backward",
                    "attention.forward_backward") and shape["tokens"] <= LONG:
            for backend in self.backends:
                both = kind.endswith("forward_backward")
                found[backend] = self.measure(
                    (backend, "forward_backward" if both else "backward", *place),
                    lambda both=both, backend=backend: dense_backward(shape, backend, both))
        if self.published and shape["tokens"] <= PUBLISHED_LIMIT:
            found[PUBLISHED] = self.of_published(kind, line, place)
        return {peer: value for peer, value in found.items() if value is not None}

    def of_published(self, name, line, place):
        """Milliseconds of the published kernels at what the line measures, None if they do not do it."""
        shape, inputs = line["shape"], line.get("input", "random")
        if inputs == "trace":
            return None  # another model's selections
        for names, run in ((FORWARD, lambda: published_forward(self.published, shape, inputs)),
                           (BACKWARD, lambda: published_backward(self.published, shape, inputs)),
                           (("attention.decode",), lambda: published_decode(self.published, shape))):
            if name in names:
                times = self.measure((PUBLISHED, names[-1], *place, inputs), run)
                return times and times[name]
        return None


def with_peers(line, peers):
    """Our line once for every peer; as it is when there is none."""
    found = peers.of(line) if "heads_q" in line.get("shape", {}) else {}
    lines = [line] if not found or "peer" in line else []
    for peer, value in found.items():
        lines.append({**line, "peer": peer, "peer_ms": round(value, 5),
                      "peer_version": peers.versions[peer], "ratio": round(value / line["ms"], 4)})
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="lines are appended")
    parser.add_argument("--peers", default=",".join((*BACKENDS, PUBLISHED)),
                        help="which of them, all by default: %(default)s")
    options = parser.parse_args()
    peers = Peers(options.peers.split(","))
    waiting = options.ours.read_text(encoding="utf-8").splitlines(keepends=True)
    with options.output.open("a", encoding="utf-8") as output:
        while waiting:
            merged = with_peers(json.loads(waiting.pop(0)), peers)
            output.writelines(json.dumps(line) + "\n" for line in merged)
            output.flush()
            options.ours.write_text("".join(waiting), encoding="utf-8")


if __name__ == "__main__":
    main()
