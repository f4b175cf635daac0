# SPDX-License-Identifier: Apache-2.0
"""Writes trained weights as a Hugging Face checkpoint: bf16 safetensors and the JSON files.

python3 examples/needle/export.py --state .train/run/state.pt --out models/needle-32k
"""

import argparse
import dataclasses
import json
import pathlib

import recipes
import safetensors.torch
import torch


def end_of_turn(config):
    """<|im_end|>, the first of the eight added tokens."""
    return config.vocab_size - 8


def config_json(config):
    sparse = dataclasses.asdict(config.sparse)
    for name in ("lse_source", "score_rounding", "legacy_window"):  # no names of config.json
        sparse.pop(name, None)
    return {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {
            "rope_type": "longrope",
            "long_factor": config.long_factor,
            "short_factor": [1.0] * (config.head_dim // 2),
            "original_max_position_embeddings": config.original_length,
            "attention_factor": 1.0,
        },
        "scale_emb": config.scale_emb,
        "scale_depth": config.scale_depth,
        "dim_model_base": config.dim_model_base,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "pad_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": [2, end_of_turn(config)],
        "torch_dtype": "bfloat16",
        "sparse_config": sparse,
    }


def write(state, config, out):
    """state: parameter name -> tensor, as MiniCPM4.state_dict gives it."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in sorted(state.items())
    }
    safetensors.torch.save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})

    def dump(name, value):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    dump("config.json", config_json(config))
    dump(
        "generation_config.json",
        {
            "bos_token_id": 1,
            "do_sample": False,
            "eos_token_id": [2, end_of_turn(config)],
            "max_new_tokens": 64,
            "pad_token_id": 2,
        },
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--state", type=pathlib.Path, default=pathlib.Path(".train/run/state.pt"))
    parser.add_argument("--recipe", default="long", choices=tuple(recipes.RECIPES))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("models/needle-32k"))
    args = parser.parse_args()
    state = torch.load(args.state, map_location="cpu", weights_only=True)["model"]
    write(state, recipes.RECIPES[args.recipe].config, args.out)


if __name__ == "__main__":
    main()
