# SPDX-License-Identifier: Apache-2.0
"""The paged cache: chunks and single tokens against one pass over everything."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import SMALL, Case, starts

import infllm

Place = tuple[str, torch.dtype]


def shuffled_table(sequences: int, pages: int, device: str) -> torch.Tensor:
    """Pages in an order of chance, entries behind the last block out of range."""
    order = torch.randperm(sequences * pages, dtype=torch.int32).view(sequences, pages)
    return torch.cat([order, torch.full((sequences, 1), 2**30, dtype=torch.int32)], 1).to(device)


def close(mine: torch.Tensor, true: torch.Tensor) -> None:
    """Bitwise on a CPU; a device decodes with other kernels, which round once elsewhere."""
    if mine.is_cuda:
        eps = torch.finfo(mine.dtype).eps
        assert (mine - true).abs().max() <= 4 * eps * true.abs().max()
    else:
        assert torch.equal(mine, true)


@pytest.mark.parametrize("sparse", [False, True])
def test_chunks_and_steps_are_one_pass(place: Place, sparse: bool) -> None:
    device, dtype = place
    config = dataclasses.replace(SMALL, dense_len=0) if sparse else None
    total, sequences = 330, 2
    q, k, v = (torch.randn(sequences, total, heads, 64).to(device, dtype) for heads in (4, 2, 2))
    whole, lse, chosen = infllm.attention(q, k, v, sparse_config=config, return_lse=True,
                                          return_selection=True)
    cache = infllm.KVCache(14, 2, 64, dtype=dtype, device=device, sparse_config=config)
    table = shuffled_table(sequences, 6, device)
    lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
    start = 0
    for chunk in (100, 1, 64, 150, *[1] * 15):
        rows = slice(start, start + chunk)
        out, part_lse, part = infllm.attend_with_kvcache(
            q[:, rows], cache, k[:, rows], v[:, rows], cache_seqlens=lengths, page_table=table,
            max_seqlen_k=total, return_softmax_lse=True, return_selection=True)
        mine = chosen.unflatten(1, (sequences, total))[:, :, rows].flatten(1, 2)
        if device == "cpu":
            assert torch.equal(part, mine)
        if device == "cpu" or torch.equal(part, mine):
            close(out, whole[:, rows])
            expected = lse.unflatten(1, (sequences, total))[:, :, rows].flatten(1, 2)
            torch.testing.assert_close(part_lse, expected, rtol=1e-5, atol=1e-5)
        start += chunk
        lengths = lengths + chunk
    assert start == total


def test_append_alone_then_attend(place: Place) -> None:
    device, dtype = place
    case = Case("appended", (3, 1), (200, 70))
    q, k, v = case.numbers(dtype, device)
    cache = infllm.KVCache(10, 2, 64, dtype=dtype, device=device, sparse_config=SMALL)
    table = shuffled_table(2, 5, device)
    where = case.where(device)
    none = torch.zeros(2, dtype=torch.int32, device=device)
    cache.append(k, v, none, table, cu_seqlens=where["cu_seqlens_k"], max_seqlen=200,
                 max_seqlen_k=200)
    out = infllm.attend_with_kvcache(q, cache, cache_seqlens=where["cu_seqlens_k"].diff(),
                                     page_table=table, cu_seqlens_q=where["cu_seqlens_q"],
                                     max_seqlen_q=3, max_seqlen_k=200)
    close(out, infllm.attention(q, k, v, **where, sparse_config=SMALL))


def test_a_step_compiles(device: str) -> None:
    dtype = torch.bfloat16
    q, k, v = (torch.randn(1, 300, heads, 64).to(device, dtype) for heads in (4, 2, 2))
    caches = [infllm.KVCache(5, 2, 64, dtype=dtype, device=device, sparse_config=SMALL)
              for _ in range(2)]
    length = torch.zeros(1, dtype=torch.int32, device=device)
    table = shuffled_table(1, 5, device)

    def step(cache: infllm.KVCache) -> torch.Tensor:
        return infllm.attend_with_kvcache(q, cache, k, v, cache_seqlens=length, page_table=table,
                                          max_seqlen_k=320)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(caches[0]), step(caches[1]))
    assert torch.equal(caches[0].pages, caches[1].pages)


def test_a_sequence_that_does_not_fit_is_refused() -> None:
    cache = infllm.KVCache(2, 2, 64, dtype=torch.float32)
    k = torch.randn(1, 65, 2, 64)
    one_page = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen_q: 65, expected at most max_seqlen_k = 64"):
        cache.append(k, k, torch.zeros(1, dtype=torch.int32), one_page)
    bad = torch.tensor([[0, 7]], dtype=torch.int32)
    with pytest.raises(ValueError, match="has page 7 at block 1, expected 0 to 1"):
        cache.append(k, k, torch.zeros(1, dtype=torch.int32), bad)
    with pytest.raises(ValueError, match=r"pages: .*expected uint8"):
        cache.pages = cache.pages[:, :100]
        cache.append(k, k, torch.zeros(1, dtype=torch.int32), bad)


def test_new_tokens_that_do_not_fit_together() -> None:
    cache = infllm.KVCache(2, 2, 64, dtype=torch.float32)
    q, k = torch.randn(1, 3, 4, 64), torch.randn(1, 3, 2, 64)
    rest = {"cache_seqlens": torch.zeros(1, dtype=torch.int32),
            "page_table": torch.tensor([[0, 1]], dtype=torch.int32)}
    with pytest.raises(ValueError, match="k: 2 tokens with 2 heads, expected 3 as in q with 2"):
        infllm.attend_with_kvcache(q, cache, k[:, :2], k[:, :2], **rest)
    with pytest.raises(ValueError, match="k: 3 tokens with 1 heads, expected 3 as in q with 2 as"):
        infllm.attend_with_kvcache(q, cache, k[:, :, :1], k[:, :, :1], **rest)
    with pytest.raises(ValueError, match="k: torch.float64"):
        infllm.attend_with_kvcache(q, cache, k.double(), k.double(), **rest)
    with pytest.raises(ValueError, match=r"v: torch.float32 \[2, 2, 64\]"):
        infllm.attend_with_kvcache(q, cache, k, k[:, :2], **rest)
    for change in (lambda x: x[..., :32], lambda x: x.bfloat16()):
        with pytest.raises(ValueError, match=r"q, k and v: .*expected torch.float32 \[..., 64\]"):
            infllm.attend_with_kvcache(change(q), cache, change(k), change(k), **rest)
    for change, message in (
            ({"cache_seqlens": [0]}, "cache_seqlens: list, expected a torch.Tensor"),
            ({"cache_seqlens": rest["cache_seqlens"].to("meta")},
             "cache_seqlens: on meta, expected cpu, as the cache"),
            ({"k": [0], "v": [0]}, "k: list, expected a torch.Tensor"),
            ({"cache": None}, "cache: NoneType, expected infllm.KVCache"),
            ({"sparse": True}, "sparse: given without sparse_config"),
            ({"max_seqlen_k": 64.0}, "max_seqlen_k: 64.0, expected an int"),
            ({"cache_seqlens": rest["cache_seqlens"] - 1},
             "cache_seqlens: sequence 0 has 2 keys, its 3 new tokens included, expected at least"),
            ({"q": q[0], "k": k[0], "v": k[0], "cu_seqlens_q": starts((2,))},
             "cu_seqlens_q: ends at 2, expected 3, the tokens of q"),
            ({"q": q[0], "k": k[0], "v": k[0], "cu_seqlens_q": starts((1, 2))},
             "cu_seqlens_q: 2 sequences, but cache_seqlens has 1")):
        with pytest.raises((TypeError, ValueError), match=message):
            infllm.attend_with_kvcache(**{"q": q, "cache": cache, "k": k, "v": k, **rest, **change})
