# SPDX-License-Identifier: Apache-2.0
"""published_peer calls the published kernels as they are declared: a package of the same functions,
written for the CPU by their documentation, must choose and attend as the algorithm says."""

import sys
import types
import unittest

try:
    import torch
except ImportError as error:
    raise unittest.SkipTest("needs PyTorch") from error

import published_peer

SHAPE = {"batch": 1, "heads_q": 32, "heads_kv": 2, "head_dim": 64, "tokens": 1000, "blocks": 8}


def stage1(q, k, v, cu_seqlens_q, cu_seqlens_k, cu_seqlens_v, max_seqlen_q, max_seqlen_k,
           dropout_p=0.0, softmax_scale=None, causal=False):
    """[Hkv, T, windows]: softmax over the coarse windows' denominator, added up over the group."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    for starts, rows, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k),
                                  (cu_seqlens_v, v, v.shape[0])):
        assert starts.dtype == torch.int32 and starts.tolist() == [0, rows.shape[0]]
        assert longest == rows.shape[0] and rows.is_contiguous()
    assert causal and dropout_p == 0 and softmax_scale is None
    tokens, heads, dim = q.shape
    group = heads // k.shape[1]
    scaled = q.float().reshape(tokens, -1, group, dim) * dim**-0.5
    position = torch.arange(tokens)[None, :, None, None]
    def logits(rows, size, stride):
        x = torch.einsum("thgd,whd->htgw", scaled, rows.float())
        last = torch.arange(rows.shape[0]) * stride + size - 1
        return x.masked_fill(last > position, float("-inf"))
    norm = logits(v, 128, 64).logsumexp(-1, keepdim=True)
    scores = (logits(k, 32, 16) - norm).exp().nan_to_num(0, 0, 0).sum(2)
    return scores.to(torch.bfloat16)


def max_pooling_1d(input, cache_len, local_blocks, init_blocks, block_size=64, stride=16):
    """[Hkv, T, blocks]; infinity for the sink and the local blocks, -infinity beyond."""
    assert input.dtype == torch.bfloat16 and cache_len == 0
    per = block_size // stride
    blocks = -(-input.shape[1] // block_size)
    x = torch.nn.functional.pad(input.float(), (1, per * blocks - input.shape[2]))
    best = x.unfold(-1, per + 1, per).amax(-1)[..., :blocks].clone()
    own = (torch.arange(input.shape[1]) // block_size)[:, None]
    block = torch.arange(blocks)[None]
    best[:, (block < init_blocks) | (block > own - local_blocks)] = float("inf")
    best[:, block.expand(own.shape[0], -1) > own] = float("-inf")
    return best.to(input.dtype)


def attn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
                topk_idx=None):
    """Remembers the selection; its output is not looked at."""
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, max_seqlen_q]
    assert max_seqlen_q == max_seqlen_k == q.shape[0] and causal
    assert topk_idx.dtype == torch.int32 and topk_idx.shape[:2] == (k.shape[1], q.shape[0])
    attn_varlen.seen = topk_idx
    return torch.zeros_like(q)


def fake(**changes):
    functions = {"infllmv2_attn_stage1": stage1, "max_pooling_1d": max_pooling_1d,
                 "infllmv2_attn_varlen_func": attn_varlen, **changes}
    return types.SimpleNamespace(**functions)


class PublishedPeerTest(unittest.TestCase):
    def test_the_calls_fit_the_declarations(self):
        self.assertEqual(published_peer.missing(fake()), [])
        select, attend = published_peer.steps(fake(), SHAPE, device="cpu")
        chosen = select()
        self.assertEqual(list(chosen.shape), [2, 1000, 8])
        self.assertEqual(list(attend().shape), [1000, 32, 64])
        self.assertTrue(torch.equal(attn_varlen.seen, chosen))

    def test_every_token_gets_what_it_sees_up_to_the_budget(self):
        original = published_peer.LOCAL_BLOCKS
        published_peer.LOCAL_BLOCKS = 3
        try:
            select, _ = published_peer.steps(fake(), SHAPE, device="cpu")
        finally:
            chosen = select()
            published_peer.LOCAL_BLOCKS = original
        for token in (0, 63, 64, 511, 512, 999):
            row = chosen[0, token]
            ids = row[row >= 0].tolist()
            own = token // 64
            self.assertEqual(len(ids), min(8, own + 1))
            self.assertEqual(ids, sorted(set(ids)))
            self.assertLessEqual({0, own, max(0, own - 1), max(0, own - 2)}, set(ids))

    def test_a_package_that_lacks_something_is_refused_by_name(self):
        module = fake(max_pooling_1d=lambda input, cache_len: None)
        del module.infllmv2_attn_stage1
        self.assertEqual(published_peer.missing(module)[:2],
                         ["infllmv2_attn_stage1()", "max_pooling_1d(local_blocks=)"])
        package = types.ModuleType("infllm_v2")
        package.__version__ = "0.1.0"
        sys.modules["infllm_v2"] = package
        try:
            with self.assertRaisesRegex(ImportError, r"infllm_v2 0.1.0 lacks infllmv2_attn_stage1\(\)"):
                published_peer.load()
        finally:
            del sys.modules["infllm_v2"]

    def test_shapes_of_other_groups_are_refused(self):
        with self.assertRaisesRegex(ValueError, "16 query heads a KV head"):
            published_peer.steps(fake(), {**SHAPE, "heads_q": 8}, device="cpu")


if __name__ == "__main__":
    unittest.main()
