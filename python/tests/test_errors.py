# SPDX-License-Identifier: Apache-2.0
"""Bad input: a message that names the argument, what was found and what was expected; no crash."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SMALL, starts

import infllm

Q = torch.randn(10, 4, 16)
K = torch.randn(10, 2, 16)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"q": Q[0]}, r"q and k: \[4, 16\] and \[10, 2, 16\], expected \[T, Hq, D\]"),
    ({"k": K.double()}, r"k: torch.float64 \[10, 2, 16\] on cpu, expected torch.float32"),
    ({"v": K[:9]}, r"v: torch.float32 \[9, 2, 16\] on cpu, expected torch.float32 \[10, 2, 16\]"),
    ({"k": K[..., :8], "v": K[..., :8]}, r"k: .*\[10, 2, 8\].*expected .*\[S, Hkv, 16\]"),
    ({"q": Q[:, :3]}, "q: 3 heads for 2 KV heads, expected a multiple"),
    ({"q": torch.randn(11, 4, 16)}, "max_seqlen_q: 11, expected at most max_seqlen_k = 10"),
    ({"cu_seqlens_q": torch.tensor([0, 10])}, r"cu_seqlens_q: torch.int64 \[2\], expected int32"),
    ({"cu_seqlens_q": starts((4, 5))}, "cu_seqlens_q: ends at 9, expected 10, the tokens of q"),
    ({"cu_seqlens_q": torch.tensor([0, 12, 10], dtype=torch.int32)},
     "cu_seqlens_q: falls from 12 to 10"),
    ({"cu_seqlens_q": torch.tensor([1, 10], dtype=torch.int32)},
     "cu_seqlens_q: begins at 1, expected 0"),
    ({"cu_seqlens_q": [0, 10]}, "cu_seqlens_q: list, expected a torch.Tensor"),
    ({"cu_seqlens_q": starts((10,)), "max_seqlen_q": 5},
     "max_seqlen_q: 5, but the longest sequence has 10"),
    ({"cu_seqlens_q": starts((10,)), "max_seqlen_q": 10.0}, "max_seqlen_q: 10.0, expected an int"),
    ({"cu_seqlens_q": starts((6, 4)), "cu_seqlens_k": starts((5, 5))},
     "cu_seqlens_q: sequence 0 has 6 queries for 5 keys|max_seqlen_q: 6"),
    ({"cu_seqlens_q": starts((2, 8)), "cu_seqlens_k": starts((9, 1))},
     "cu_seqlens_q: sequence 1 has 8 queries for 1 keys"),
    ({"cu_seqlens_q": starts((10,)), "cu_seqlens_k": starts((5, 5))},
     "cu_seqlens_q: 1 sequences, but cu_seqlens_k has 2"),
    ({"cu_seqlens_k": starts((10,))}, "cu_seqlens_k: given without cu_seqlens_q"),
    ({"sparse": True}, "sparse: given without sparse_config"),
    ({"sparse": torch.tensor([1]), "sparse_config": SMALL}, "sparse: torch.int64"),
    ({"softmax_scale": float("nan")}, "softmax_scale: nan, expected a positive number"),
    ({"q_score": Q}, "q_score: given, but sparse_config.use_nope is not set"),
    ({"sparse_config": infllm.SparseConfig(use_nope=True)}, r"q_score: missing, expected"),
    ({"sparse_config": infllm.SparseConfig(block_size=128)}, "block_size = 128, but this device"),
    ({"backend": "gpu"}, 'no device "gpu" here; choose one of: auto, cpu, reference'),
    ({"q": Q.numpy()}, "q: ndarray, expected a torch.Tensor"),
    ({"v": None}, "v: NoneType, expected a torch.Tensor"),
    ({"sparse_config": {"topk": 3}}, "sparse_config: dict, expected infllm.SparseConfig.*from_d"),
    ({"softmax_scale": "small"}, "softmax_scale: 'small', expected a number"),
    ({"selection": torch.zeros(2, 10, 1, dtype=torch.int32)}, "selection: given without"),
    ({"selection": torch.zeros(2, 10, 1), "sparse_config": SMALL},
     r"selection: torch.float32 .*expected int32 \[2, 10"),
    ({"selection": torch.full((2, 10, 1), 7, dtype=torch.int32), "sparse_config": SMALL},
     "selection: block 7, expected -1 to 0"),
    ({"selection": torch.zeros((2, 10, 2), dtype=torch.int32), "sparse_config": SMALL},
     "selection: expected ascending"),
    ({"plan": infllm.make_plan(starts((10,)), None, 10, 10), "sparse_config": SMALL},
     "plan: made without sparse_config"),
    ({"plan": infllm.make_plan(starts((10,)), None, 10, 10, sparse_config=SMALL),
      "sparse_config": infllm.SparseConfig(dense_len=0)},
     "plan: made for dense_len = 256, but sparse_config has 0"),
    ({"plan": {}}, "plan: <class 'dict'>, expected what infllm.make_plan returns"),
    ({"q": Q.int()}, "k: torch.float32 .*expected torch.int32"),
    ({"q": Q.int(), "k": K.int(), "v": K.int()}, "q: torch.int32, expected one of torch.float64"),
    ({"q": Q.to_sparse()}, "q: torch.sparse_coo, expected a dense tensor"),
    ({"sparse": "yes", "sparse_config": SMALL}, "sparse: 'yes', expected None, a bool or"),
    ({"selection": [0], "sparse_config": SMALL}, "selection: list, expected a torch.Tensor"),
    ({"q_score": [0]}, "q_score: list, expected a torch.Tensor"),
    ({"max_seqlen_q": 10}, "max_seqlen_q: given without cu_seqlens_q"),
    ({"cu_seqlens_q": starts((10,)), "max_seqlen_q": -1}, "max_seqlen_q: -1, expected at least 0"),
    ({"cu_seqlens_q": starts((10,)), "cu_seqlens_k": starts((10,)).to("meta"), "max_seqlen_k": 10},
     "cu_seqlens_q: on cpu, but cu_seqlens_k is on meta"),
    ({"backend": 3}, "backend: 3, expected None or one of reference"),
    ({"plan": infllm.make_plan(starts((10,)), None, 10, 10), "sparse": True},
     "plan: given with cu_seqlens, max_seqlen or sparse"),
])
def test_messages(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        infllm.attention(**{"q": Q, "k": K, "v": K, **arguments})


@pytest.mark.parametrize(("call", "message"), [
    (lambda: infllm.compress(K[0], sparse_config=SMALL), r"k: \[2, 16\], expected \[S, Hkv, D\]"),
    (lambda: infllm.score(Q, K, starts((10,)), plan=infllm.make_plan(starts((10,)), None, 10, 10),
                          sparse_config=SMALL), "plan: given with cu_seqlens"),
    (lambda: infllm.select(torch.zeros(2, 10, 1), None, starts((10,)), sparse_config=SMALL),
     "cu_seqlens_k: given without cu_seqlens_q"),
    (lambda: infllm.attend(Q, K, K, None, sparse_config=SMALL), "selection: NoneType, expected"),
    (lambda: infllm.selection_alignment_loss(Q, K, sparse_config=SMALL, rows=[1]), "rows: list"),
    (lambda: infllm.choose(Q, K, sparse_config=None), "sparse_config: NoneType, expected"),
    (lambda: infllm.KVCache(8, 2, 64, dtype="bf16"), "dtype: bf16, expected one of torch.float64"),
    (lambda: infllm.KVCache(8, 2.0, 64, dtype=torch.float32), "heads_kv: 2.0, expected an int"),
    (lambda: infllm.KVCache(0, 2, 64, dtype=torch.float32), "num_pages: 0, expected at least 1"),
    (lambda: infllm.KVCache(8, 2, 64, dtype=torch.float32, device="mps"), "device: mps, expected"),
])
def test_messages_of_the_others(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        call()


@pytest.mark.parametrize(("values", "message"), [
    ({"topK": 3}, r"unknown \['topK'\], expected some of"),
    ({"topk": 3.5}, "topk = 3.5, expected an int"),
    ({"lse_source": "both"}, "lse_source = 'both', expected one of"),
    ({"use_nope": 1}, "use_nope = 1, expected a bool"),
    ({"topk": 0}, "topk = 0, expected 1 to"),
    ({"topk": 2**40}, f"topk = {2**40}, expected 32 bits"),
    ({"block_size": 0}, "block_size = 0, expected"),
    ({"kernel_stride": 10}, "expected a multiple of"),
])
def test_config_messages(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        infllm.SparseConfig.from_dict(values)


def test_config_from_a_checkpoint() -> None:
    config = infllm.SparseConfig.from_dict({
        "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64,
        "window_size": 2048, "topk": 64, "use_nope": False, "dense_len": 8192})
    assert config == infllm.SparseConfig() and config.budget_blocks == 96
    assert infllm.SparseConfig.from_numbers(config.numbers()) == config


def test_forward_mode_is_refused() -> None:
    """PyTorch would take the derivative for zero."""
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: infllm.attention(q, K, K), (Q,), (Q,))


def test_shapes_without_numbers() -> None:
    out, lse = infllm.attention(*(x.to("meta") for x in (Q, K, K)), return_lse=True)
    assert out.is_meta and out.shape == Q.shape and lse.shape == (4, 10)


def test_half_precision_on_the_cpu() -> None:
    q, k = Q.half(), K.half()
    out = infllm.attention(q, k, k)
    assert out.dtype is torch.float16
    assert torch.equal(out, infllm.attention(q.float(), k.float(), k.float()).half())


@pytest.mark.cuda
def test_messages_on_a_device() -> None:
    q, k = Q.cuda(), K.cuda()
    with pytest.raises(TypeError, match="q: torch.float32 on cuda:0, expected bfloat16 or float16"):
        infllm.attention(q, k, k)
    with pytest.raises(NotImplementedError, match="head dimension 16, but this device takes 64"):
        infllm.attention(q.bfloat16(), k.bfloat16(), k.bfloat16())
    with pytest.raises(ValueError, match="max_seqlen_q: missing"):
        infllm.attention(q.bfloat16(), k.bfloat16(), k.bfloat16(), starts((10,)).cuda())


def test_no_random_shape_crashes() -> None:
    """Whatever comes: a result of q's shape or one of our exceptions."""
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        pick = lambda *choices: chance.choice(choices)
        q = torch.randn(pick(0, 1, 5, 64), pick(0, 1, 2, 4), pick(0, 1, 16, 20))
        k = torch.randn(pick(0, 1, 5, 64), pick(0, 1, 2), pick(16, q.shape[2]))
        lengths = [chance.randint(-1, 6) for _ in range(chance.randint(0, 3))]
        arguments = pick({}, {"cu_seqlens_q": torch.tensor(
            [pick(0, 0, 3), *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)})
        if arguments and chance.random() < 0.5:
            arguments["max_seqlen_q"] = chance.randint(-2, 9)
        numbers = {"dense_len": pick(-1, 0, 3), "topk": pick(0, 1, 9), "init_blocks": pick(0, 1, 5),
                   "window_size": pick(0, 64, 100)}
        sparse = chance.random() < 0.5
        try:
            config = infllm.SparseConfig(**numbers) if sparse else None
            out = infllm.attention(q, k, k, **arguments, sparse_config=config)
            assert out.shape == q.shape
        except (ValueError, TypeError, NotImplementedError):
            refused += 1
    assert 100 < refused < 300
