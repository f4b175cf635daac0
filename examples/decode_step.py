#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prefill in chunks and decoding over a paged cache: what docs/python.md shows, as a program.

    python3 examples/decode_step.py           prints how far it is from attention in one pass
"""

import torch

import infllm


def main() -> float:
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    config = infllm.SparseConfig(window_size=128, topk=4, dense_len=512)
    # Two sequences with room for 16 pages of 64 tokens each, which may lie anywhere.
    cache = infllm.KVCache(num_pages=32, heads_kv=2, head_dim=64, dtype=dtype, device=device,
                           sparse_config=config)
    page_table = torch.randperm(32, dtype=torch.int32, device=device).view(2, 16)
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    queries, keys, values = (torch.randn(2, 903, heads, 64, device=device, dtype=dtype)
                             for heads in (4, 2, 2))
    results = []
    with torch.no_grad():
        for tokens in (600, 300, 1, 1, 1):  # a prompt in two chunks, then token by token
            begin = sum(out.shape[1] for out in results)
            q, k, v = (x[:, begin:begin + tokens] for x in (queries, keys, values))
            out = infllm.attend_with_kvcache(q, cache, k, v, cache_seqlens=lengths,
                                             page_table=page_table)
            lengths += tokens
            results.append(out)
        whole = infllm.attention(queries, keys, values, sparse_config=config)
    return float((torch.cat(results, 1) - whole).abs().max() / whole.abs().max())


if __name__ == "__main__":
    print(f"{main():.2g}")
