# SPDX-License-Identifier: Apache-2.0
"""published_peer calls the published kernels as they are declared: a package of the same functions,
written with PyTorch by their documentation, must choose and attend as the algorithm says. Where the
published package is installed and there is a GPU, it must do what that one does."""

import sys
import types
import unittest

try:
    import torch
except ImportError as error:
    raise unittest.SkipTest("needs PyTorch") from error

import peer_inputs
import published_peer

SHAPE = {"batch": 1, "heads_q": 32, "heads_kv": 2, "head_dim": 128, "tokens": 1000, "blocks": 8}
BATCH = {**SHAPE, "batch": 3}
LOCAL = 3  # blocks before the own one, so that short prompts choose
EPS = 2**-8  # of bf16


def stage1(q, k, v, cu_seqlens_q, cu_seqlens_k, cu_seqlens_v, max_seqlen_q, max_seqlen_k,
           dropout_p=0.0, softmax_scale=None, causal=False):
    """[Hkv, T, windows]: softmax over the coarse windows' denominator, added up over the group."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    for starts, rows in ((cu_seqlens_q, q), (cu_seqlens_k, k), (cu_seqlens_v, v)):
        assert starts.dtype == torch.int32 and int(starts[-1]) == rows.shape[0]
        assert rows.is_contiguous()
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) == max_seqlen_k
    assert causal == (max_seqlen_q > 1) and dropout_p == 0 and softmax_scale is None
    heads, dim = q.shape[1:]
    result = []
    for b in range(len(cu_seqlens_q) - 1):
        queries, fine, coarse = (x[int(s[b]):int(s[b + 1])].float() for x, s in
                                 ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_v)))
        scaled = queries.reshape(len(queries), k.shape[1], heads // k.shape[1], dim) * dim**-0.5
        position = torch.arange(len(queries), device=q.device)[None, :, None, None]

        def logits(rows, size, stride, scaled=scaled, position=position):
            x = torch.einsum("thgd,whd->htgw", scaled, rows)
            last = torch.arange(len(rows), device=rows.device) * stride + size - 1
            return x.masked_fill(last > position, float("-inf")) if causal else x
        norm = logits(coarse, 128, 64).logsumexp(-1, keepdim=True)
        result.append((logits(fine, 32, 16) - norm).exp().nan_to_num(0, 0, 0).sum(2))
    return torch.cat(result, 1).to(torch.bfloat16)


def max_pooling_1d(input, cache_len, local_blocks, init_blocks, block_size=64, stride=16):
    """[Hkv, T, blocks]; infinity for the sink, the own block and local_blocks before it, -infinity
    beyond the windows."""
    assert input.dtype == torch.bfloat16
    per = block_size // stride
    position = torch.arange(input.shape[1], device=input.device) + cache_len
    blocks = -(-(input.shape[1] + cache_len) // block_size)
    x = torch.nn.functional.pad(input.float(), (1, per * blocks - input.shape[2]), value=-torch.inf)
    best = x.unfold(-1, per + 1, per).amax(-1)[..., :blocks].clone()
    own = (position // block_size)[:, None]
    block = torch.arange(blocks, device=input.device)[None]
    best[:, (block < init_blocks) | ((block >= own - local_blocks) & (block <= own))] = torch.inf
    return best.to(input.dtype)


def visible(topk_idx, tokens):
    """[..., columns] -> [..., tokens]: which keys the chosen blocks hold."""
    blocks = -(-tokens // 64)
    chosen = torch.zeros(*topk_idx.shape[:-1], blocks + 1, dtype=torch.bool, device=topk_idx.device)
    chosen.scatter_(-1, torch.where(topk_idx < 0, blocks, topk_idx).long(), True)
    return chosen[..., :blocks].repeat_interleave(64, -1)[..., :tokens]


def attention(q, k, v, keep):
    """[T, Hq, D] over keys [L, Hkv, D] where keep [Hkv, T, L], in the type of q."""
    group = q.shape[1] // k.shape[1]
    k, v, keep = (x.repeat_interleave(group, dim) for x, dim in ((k, 1), (v, 1), (keep, 0)))
    x = torch.einsum("thd,lhd->htl", q, k) * q.shape[-1]**-0.5
    return torch.einsum("htl,lhd->thd", x.masked_fill(~keep, -torch.inf).softmax(-1), v)


def attn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
                topk_idx=None):
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, max_seqlen_q]
    assert max_seqlen_q == max_seqlen_k == q.shape[0] and causal
    assert topk_idx.dtype == torch.int32 and topk_idx.shape[:2] == (k.shape[1], q.shape[0])
    position = torch.arange(len(q), device=q.device)
    keep = visible(topk_idx, len(k)) & (position[None] <= position[:, None])
    return attention(q.float(), k.float(), v.float(), keep).to(q.dtype)


def with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, topk_idx=None):
    assert k is None and v is None and cache_seqlens.tolist() == [k_cache.shape[1]] * len(q)
    assert topk_idx.dtype == torch.int32 and topk_idx.is_contiguous()
    keep = visible(topk_idx, k_cache.shape[1])
    return torch.stack([attention(*(x[b].float() for x in (q, k_cache, v_cache)), keep[b])
                        for b in range(len(q))]).to(q.dtype)


def fake(**changes):
    functions = {"infllmv2_attn_stage1": stage1, "max_pooling_1d": max_pooling_1d,
                 "infllmv2_attn_varlen_func": attn_varlen,
                 "infllmv2_attn_with_kvcache": with_kvcache, **changes}
    return types.SimpleNamespace(**functions)


class WithFewLocalBlocks(unittest.TestCase):
    def setUp(self):
        self.addCleanup(setattr, published_peer, "LOCAL_BLOCKS", published_peer.LOCAL_BLOCKS)
        published_peer.LOCAL_BLOCKS = LOCAL

    def assert_choice(self, row, position, blocks=8):
        """Ascending, no more than the budget, nothing ahead, and the forced blocks are in."""
        ids = row[row >= 0].tolist()
        own = position // 64
        self.assertEqual(len(ids), min(blocks, own + 1))
        self.assertEqual(ids, sorted(set(ids)))
        self.assertLessEqual({0, *range(max(0, own - LOCAL), own + 1)}, set(ids))
        self.assertLessEqual(max(ids), own)


class PublishedPeerTest(WithFewLocalBlocks):
    def test_a_prompt_gets_what_it_sees_up_to_the_budget(self):
        self.assertEqual(published_peer.missing(fake()), [])
        peer = published_peer.Prefill(fake(), SHAPE, device="cpu")
        self.assertEqual(list(peer.chosen.shape), [2, 1000, 8])
        for token in (0, 63, 64, 511, 512, 999):
            self.assert_choice(peer.chosen[0, token], token)
        self.assertEqual(list(peer.forward().shape), [1000, 32, 128])

    def test_gradients_reach_the_leaves(self):
        peer = published_peer.Prefill(fake(), {**SHAPE, "tokens": 200}, device="cpu")
        leaves = peer.leaves()
        o = peer.attend(leaves)
        gradients = torch.autograd.grad(o, leaves, torch.randn_like(o))
        self.assertTrue(all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients))

    def test_a_token_of_each_sequence_chooses_and_attends(self):
        peer = published_peer.Decode(fake(), BATCH, layers=2, device="cpu")
        chosen = peer.select(1)
        self.assertEqual(list(chosen.shape), [3, 2, 1, 8])
        for row in chosen.view(-1, 8):
            self.assert_choice(row, 999)
        self.assertEqual(list(peer.attend(chosen, 1).shape), [3, 1, 32, 128])
        peer.step()

    def test_a_package_that_lacks_something_is_refused_by_name(self):
        module = fake(max_pooling_1d=lambda input, cache_len: None)
        del module.infllmv2_attn_stage1
        self.assertEqual(published_peer.missing(module)[:2],
                         ["infllmv2_attn_stage1()", "max_pooling_1d(local_blocks=)"])
        package = types.ModuleType("infllm_v2")
        package.__version__ = "0.1.0"
        installed = sys.modules.get("infllm_v2")
        sys.modules["infllm_v2"] = package
        try:
            with self.assertRaisesRegex(ImportError, r"infllm_v2 0.1.0 lacks infllmv2_attn_stage1\(\)"):
                published_peer.load()
        finally:
            del sys.modules["infllm_v2"]
            if installed:
                sys.modules["infllm_v2"] = installed

    def test_shapes_of_other_groups_are_refused(self):
        with self.assertRaisesRegex(ValueError, "16 query heads a KV head here, found 8 and 2"):
            published_peer.Prefill(fake(), {**SHAPE, "heads_q": 8}, device="cpu")
        with self.assertRaisesRegex(ValueError, "found 3 sequences, expected one prompt"):
            published_peer.Prefill(fake(), BATCH, device="cpu")


class InputsTest(WithFewLocalBlocks):
    def test_neighbours_share_what_was_asked_for(self):
        torch.manual_seed(1)
        shape = {**SHAPE, "heads_q": 16, "heads_kv": 1, "head_dim": 64, "tokens": 2000}
        peer = published_peer.Prefill(fake(), shape, "correlated-0.8", "cpu")
        random = published_peer.Prefill(fake(), shape, device="cpu")
        # The bisection ends in an interval of 1/256 of the correlation; 63 rows with 3 free blocks move
        # the overlap, which there grows some ten times as fast as the correlation, in steps of 1/189.
        self.assertAlmostEqual(peer.overlap, 0.8, delta=0.05)
        self.assertLess(random.overlap, 0.5)

    def test_queries_are_the_recurrence(self):
        noise = torch.randn(300, 2, 4)
        want = torch.zeros(2, 4)
        got = peer_inputs.queries(noise, 0.9)
        for t in range(300):
            want = 0.9 * want + peer_inputs.QUERY_SCALE * (1 - 0.81)**0.5 * noise[t]
            # Rounding to bf16, and the terms left out: 1e-4 of a sum of about the query's size.
            self.assertTrue(torch.allclose(got[t].float(), want, rtol=EPS, atol=1e-2), t)

    def test_overlap_counts_free_blocks_alone(self):
        # Blocks of one token; the own one and one before it are local, block 0 is everybody's.
        chosen = torch.tensor([[[0, 1, 2, 3, 5, 6], [0, 1, 3, 4, 6, 7]]], dtype=torch.int32)
        whole = torch.cat([torch.full((1, 6, 6), -1, dtype=torch.int32), chosen], 1)
        # Token 7 has 1, 3, 4 free, token 6 1, 2, 3, and the tokens before chose nothing.
        self.assertAlmostEqual(peer_inputs.overlap(whole, first=1, local=1, block=1), 2 / 6)

    def test_unknown_kinds_are_refused(self):
        with self.assertRaisesRegex(ValueError, 'found the input "trace"'):
            peer_inputs.wanted_overlap("trace")


def published():
    try:
        return published_peer.load() if torch.cuda.is_available() else None
    except ImportError:
        return None


@unittest.skipUnless(published(), "needs infllm_v2 and a GPU")
class InstalledPackageTest(WithFewLocalBlocks):
    def setUp(self):
        super().setUp()
        torch.manual_seed(3)
        self.module = published()

    def assert_close(self, got, want, v):
        """P and the result are rounded to bf16; a result is a mean of values."""
        self.assertLessEqual(float((got.float() - want.float()).abs().max()),
                             2 * EPS * float(v.abs().max()))

    def test_a_prompt(self):
        peer = published_peer.Prefill(self.module, SHAPE)
        same = published_peer.Prefill(fake(), SHAPE)
        same.q, same.k, same.v = peer.q, peer.k, peer.v
        for token in (0, 63, 64, 511, 512, 999):
            self.assert_choice(peer.chosen[1, token], token)
        same.compress()
        want = same.select()
        # bf16 sums of 16 heads in another order: near the cut a block may be another.
        agree = (peer.chosen == want).all(-1).float().mean()
        print(f"selections that agree: {100 * agree:.1f} %")
        self.assertGreater(float(agree), 0.9)
        same.chosen = peer.chosen
        self.assert_close(peer.attend(), same.attend(), peer.v)

    def test_gradients(self):
        peer = published_peer.Prefill(self.module, SHAPE)
        same = published_peer.Prefill(fake(), SHAPE)
        same.chosen = peer.chosen
        leaves, grad_o = peer.leaves(), torch.randn_like(peer.q)
        both = [torch.autograd.grad(p.attend(leaves), leaves, grad_o) for p in (peer, same)]
        for got, want in zip(*both):
            got, want = got.float(), want.float()
            # P, dS and the result are rounded to bf16, each by EPS at most.
            self.assertLess(float((got - want).norm() / want.norm()), 3 * EPS)

    def test_a_token_of_each_sequence(self):
        peer = published_peer.Decode(self.module, BATCH)
        same = published_peer.Decode(fake(), BATCH)
        same.q, same.layers = peer.q, peer.layers
        chosen = peer.select()
        for row in chosen.view(-1, 8):
            self.assert_choice(row, 999)
        self.assert_close(peer.attend(chosen), same.attend(chosen), peer.layers[0][1])


if __name__ == "__main__":
    unittest.main()
