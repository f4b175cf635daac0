# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints with the logits and greedy texts that Hugging Face gives for them.

    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch transformers safetensors
    /tmp/hf/bin/python tools/make_model_golden.py tests/golden/model

Made with torch 2.15 and transformers 5.23. Llama checkpoints run in transformers' own class. Its
releases up to 5.23 have no MiniCPM4 class, so MiniCPM4 runs in the Llama class with the three muP
factors as hooks at the four places where OpenBMB's code applies them:

    embed_tokens  output times scale_emb
    o_proj, down_proj  output times scale_depth / sqrt(layers)
    lm_head  input divided by hidden_size / dim_model_base

A case is a folder: config.json in the hub's spelling, one or two safetensors files, and

    golden.json         prompt, rows of the logits, greedy text, the smallest margin between the two
                        best logits on its way, and for bf16 the largest error of the bf16 run
    golden.safetensors  "logits" [rows, vocab] of the float32 run

rope.json holds what transformers computes for every rope type that it and we know.

Seeds are searched until the greedy text has a margin that float32 rounding cannot turn around.
"""

import json
import math
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

VOCAB = 320
HEAD_DIM = 64
NEW_TOKENS = 200
MIN_MARGIN = 1e-3  # of the largest logit: ten times the agreement that the tests ask for


def long_factors(scale):
    """A ramp like the released ones: 1 for the fast dimensions, `scale` for the slow ones."""
    half = HEAD_DIM // 2
    return [round(1 + (scale - 1) * (i / (half - 1)) ** 2, 6) for i in range(half)]


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": long_factors(1.5),
    "long_factor": long_factors(4.0),
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

# name: architecture, layers, hidden, heads, KV heads, tied, shards, dtype, rope, prompt length
CASES = {
    "llama-group1": dict(kind="llama", layers=2, hidden=32, heads=2, kv=2, tied=False, prompt=100),
    "llama-llama3": dict(kind="llama", layers=2, hidden=32, heads=4, kv=2, tied=True, prompt=90,
                         rope=LLAMA3),
    "llama-yarn-bf16": dict(kind="llama", layers=2, hidden=32, heads=2, kv=1, tied=False,
                            prompt=70, rope=YARN, dtype="bfloat16"),
    "minicpm-tied": dict(kind="minicpm", layers=2, hidden=32, heads=4, kv=2, tied=True, prompt=40,
                         rope=LONGROPE),
    "minicpm-sharded": dict(kind="minicpm", layers=3, hidden=32, heads=8, kv=1, tied=False,
                            prompt=130, rope=LONGROPE, shards=2),
    "minicpm-bf16": dict(kind="minicpm", layers=3, hidden=64, heads=8, kv=1, tied=True,
                         prompt=130, rope=LONGROPE, dtype="bfloat16"),
}
MUP = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}


def config_json(case):
    out = {
        "architectures": ["LlamaForCausalLM" if case["kind"] == "llama" else "MiniCPMForCausalLM"],
        "model_type": case["kind"],
        "hidden_size": case["hidden"],
        "num_hidden_layers": case["layers"],
        "num_attention_heads": case["heads"],
        "num_key_value_heads": case["kv"],
        "head_dim": HEAD_DIM,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": case.get("rope"),
        "max_position_embeddings": 512,
        "tie_word_embeddings": case["tied"],
        "torch_dtype": case.get("dtype", "float32"),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return out | (MUP if case["kind"] == "minicpm" else {})


def add_mup(model, config):
    residual = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    divisor = config["hidden_size"] / config["dim_model_base"]
    inner = model.model
    inner.embed_tokens.register_forward_hook(lambda m, args, out: out * config["scale_emb"])
    for layer in inner.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.register_forward_hook(lambda m, args, out: out * residual)
    model.lm_head.register_forward_pre_hook(lambda m, args: (args[0] / divisor,))


def build(case, seed):
    """The model in float32, with values that its checkpoint's dtype can hold."""
    config = config_json(case)
    ours = {*MUP, "rope_scaling", "rope_theta"}
    known = {k: v for k, v in config.items() if k not in ours}
    known["model_type"] = "llama"
    rope = dict(config["rope_scaling"] or {"rope_type": "default"}, rope_theta=config["rope_theta"])
    model = LlamaForCausalLM(LlamaConfig(**known, rope_parameters=rope)).eval().float()
    generator = torch.Generator().manual_seed(seed)
    table = 0.5 if case["kind"] == "llama" else 0.1
    dtype = getattr(torch, config["torch_dtype"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                value = 1 + 0.1 * noise
            elif "embed_tokens" in name or "lm_head" in name:
                value = table * noise
            else:
                value = 2 * noise / math.sqrt(parameter.shape[1])
            parameter.copy_(value.to(dtype))
    if case["kind"] == "minicpm":
        add_mup(model, config)
    return model, config


@torch.no_grad()
def greedy(model, prompt):
    """Token by token with the cache; the text and its smallest margin."""
    ids, past, text, margin = torch.tensor([prompt]), None, [], math.inf
    for _ in range(NEW_TOKENS):
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        best = out.logits[0, -1].topk(2)
        margin = min(margin, float((best.values[0] - best.values[1]) / best.values[0].abs()))
        text.append(int(best.indices[0]))
        ids = best.indices[:1].view(1, 1)
    return text, margin


def save(folder, case, model, config):
    dtype = getattr(torch, config["torch_dtype"])
    tensors = {name: p.detach().to(dtype).contiguous() for name, p in model.named_parameters()}
    shards = case.get("shards", 1)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map, names = {}, sorted(tensors)
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = names[i::shards]
            save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
            weight_map |= {n: file for n in part}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make(folder, name, case):
    for seed in range(1000):
        model, config = build(case, seed)
        generator = torch.Generator().manual_seed(seed + 10_000)
        prompt = torch.randint(3, VOCAB, (case["prompt"],), generator=generator).tolist()
        text, margin = greedy(model, prompt)
        if margin >= MIN_MARGIN and len(set(text[-50:])) >= 20:  # a text, not a loop
            break
    else:
        sys.exit(f"{name}: no seed with a safe margin")
    rows = sorted({0, 1, 15, 16, 17, case["prompt"] // 2, case["prompt"] - 2, case["prompt"] - 1})
    golden = {"prompt": prompt, "rows": rows, "greedy": text, "margin": margin, "seed": seed}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, rows].contiguous()
        if config["torch_dtype"] == "bfloat16":
            # Parameters only: model.to() would round the rotary frequencies as well.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
            half = model(input_ids=torch.tensor([prompt])).logits[0, rows]
            golden["bf16_error"] = float((half.float() - logits).abs().max())
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, case, model, config)
    save_file({"logits": logits}, folder / "golden.safetensors")
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    print(f"{name}: seed {seed}, margin {margin:.2e}, {len(set(text))} different tokens")


ROPE_CASES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "longrope", "short_factor": long_factors(1.5), "long_factor": long_factors(40.0),
     "original_max_position_embeddings": 4096},
    LLAMA3 | {"original_max_position_embeddings": 8192},
    YARN | {"original_max_position_embeddings": 8192},
    YARN | {"original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0,
            "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False},
]


def make_rope(path):
    """Inverse frequencies and attention factors, for sequences below and above the original."""
    out = []
    for rope in ROPE_CASES:
        config = config_json(CASES["llama-group1"]) | {"max_position_embeddings": 16384}
        parameters = dict(rope, rope_theta=50000.0)
        hf = LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=16384, hidden_size=64,
                         num_attention_heads=1, rope_parameters=dict(parameters))
        for length in (100, 16000):
            if rope["rope_type"] == "default":
                inverse, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(hf)
            else:
                inverse, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, seq_len=length)
            config = config | {"rope_scaling": rope, "rope_theta": 50000.0}
            out.append({"config": config, "length": length, "attention_factor": float(factor),
                        "inverse_frequencies": inverse.tolist()})
    path.write_text(json.dumps(out) + "\n")


def main():
    root = pathlib.Path(sys.argv[1])
    torch.set_num_threads(1)
    make_rope(root / "rope.json")
    for name, case in CASES.items():
        make(root / name, name, case)


if __name__ == "__main__":
    main()
