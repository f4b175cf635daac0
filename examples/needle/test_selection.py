# SPDX-License-Identifier: Apache-2.0
"""Selection against a naive loop written from the equations, in float64."""

import math

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")

import selection  # noqa: E402

CONFIG = selection.SparseConfig(window_size=128, topk=5)


def naive_blocks(q, k, p, config, budget):
    """The chosen blocks of one token and one KV head: q [G, d], k [S, d], all plain loops."""
    size, stride, block = config.kernel_size, config.kernel_stride, config.block_size
    own, window = p // block, config.window_size // block
    if own + 1 <= budget:
        return list(range(own + 1))
    scale = 1 / math.sqrt(q.shape[-1])
    fine = [k[i : i + size].mean(0) for i in range(0, len(k) - size + 1, stride)]
    coarse = [k[i : i + 4 * size].mean(0) for i in range(0, len(k) - 4 * size + 1, 4 * stride)]
    coarse = [c for m, c in enumerate(coarse) if 4 * stride * m + 4 * size - 1 <= p]
    scores = [0.0] * len(fine)
    for head in q:
        top = max(float(scale * head @ c) for c in coarse)
        total = sum(math.exp(float(scale * head @ c) - top) for c in coarse)
        for j, window_key in enumerate(fine):
            if stride * j + size - 1 <= p:
                scores[j] += math.exp(float(scale * head @ window_key) - top) / total
    ranked = []
    for b in range(own + 1):
        if b < config.init_blocks or b >= own - window:
            value = math.inf
        else:
            overlap = [
                j
                for j in range(len(fine))
                if stride * j < block * (b + 1) and stride * j + size > block * b
            ]
            value = max((scores[j] for j in overlap), default=-math.inf)
        ranked.append((-value, b))
    return sorted(b for _, b in sorted(ranked)[:budget])


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 448, 449, 1023, 1024, 1100])
def test_same_blocks_as_the_loop(heads, length):
    torch.manual_seed(length)
    hq, hk = heads
    q = torch.randn(1, hq, length, 16, dtype=torch.float64) * 2
    k = torch.randn(1, hk, length, 16, dtype=torch.float64)
    chosen = selection.select(q, k, torch.arange(length), CONFIG, stable=True)
    rows = sorted({0, length // 2, max(0, length - 2), length - 1})
    for p in rows:
        for g in range(hk):
            group = q[0, g * hq // hk : (g + 1) * hq // hk, p].float()
            expected = naive_blocks(group, k[0, g].float(), p, CONFIG, CONFIG.budget)
            assert chosen[0, g, p].nonzero().flatten().tolist() == expected


def test_ties_go_to_the_lower_block():
    length = 1024
    q, k = torch.ones(1, 2, length, 8), torch.ones(1, 1, length, 8)
    chosen = selection.select(q, k, torch.arange(length), CONFIG, stable=True)
    window = CONFIG.window_blocks
    free = CONFIG.budget - 1 - (window + 1)
    expected = list(range(1 + free)) + list(range(15 - window, 16))
    assert chosen[0, 0, -1].nonzero().flatten().tolist() == expected


def test_history_changes_nothing():
    torch.manual_seed(1)
    q, k = torch.randn(2, 4, 900, 16), torch.randn(2, 2, 900, 16)
    whole = selection.select(q, k, torch.arange(900), CONFIG, stable=True)
    part = selection.select(q[:, :, 777:], k, torch.arange(777, 900), CONFIG, stable=True)
    assert torch.equal(whole[:, :, 777:], part)


def test_alignment_is_least_where_scores_follow_the_mass():
    """Descent on the keys alone lowers the loss and brings the looked-at block into the choice."""
    torch.manual_seed(2)
    length, config = 1024, selection.SparseConfig(window_size=64, topk=3)
    needle = torch.randn(16)
    k = torch.randn(1, 1, length, 16) * 0.5
    k[0, 0, 350] = (
        4 * needle
    )  # block 5, no window shared with a neighbour; a lone key is diluted 32 times in its window
    q = (2 * needle).repeat(1, 2, 8, 1)
    positions = torch.arange(length - 8, length)
    k.requires_grad_(True)
    optimizer = torch.optim.Adam([k], lr=0.05)
    losses = []
    for _ in range(60):
        loss = selection.alignment_loss(q, k, positions, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert bool(selection.select(q, k.detach(), positions, config)[0, 0, :, 5].all())


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_flex_mask_is_the_token_mask(kv_heads):
    """The tiles and the mask function given to FlexAttention leave exactly the chosen tokens."""
    import model
    import train
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(3)
    q, k, v = (torch.randn(2, h, 1024, 16) for h in (4, kv_heads, kv_heads))
    positions = torch.arange(1024)
    chosen = selection.select(q, k, positions, CONFIG)
    mask = train.flex_mask(chosen, 4, CONFIG)
    got = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    want = model.masked_attention(q, k, v, model.token_mask(chosen, positions, 1024, 64))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert bool((mask.kv_num_blocks <= torch.arange(1, 9)).all())  # no tile of the future


def test_shared_rows_choose_as_their_first():
    import train

    torch.manual_seed(4)
    q, k = torch.randn(1, 4, 1536, 16), torch.randn(1, 2, 1536, 16)
    attend = train.Attend(
        type("Config", (), {"sparse": CONFIG}), 1536, q.device, True, 9, 0, (), None
    )
    exact = selection.select(q, k, torch.arange(1536), CONFIG, 9)
    got = attend.choose_blocks(q, k)
    shared = torch.arange(512) // train.SHARED * train.SHARED
    assert torch.equal(got[:, :, 512:], exact[:, :, 512:])
    assert torch.equal(got[:, :, :512], exact[:, :, shared])
