# SPDX-License-Identifier: Apache-2.0
"""Weights out and in: Hugging Face checkpoints that `infllm run` loads, and states to resume from."""

import dataclasses
import os
import pathlib
import shutil

import network
import safetensors.torch
import torch
from needle import export, model


def config_of(settings) -> network.Config:
    import infllm

    return network.Config(**settings.model, sparse=infllm.SparseConfig.from_dict(settings.sparse))


def write(net: network.Network, folder: pathlib.Path, tokenizer: pathlib.Path | None) -> None:
    """bf16 safetensors, config.json and the tokenizer's files."""
    fields = {f.name: getattr(net.config, f.name) for f in dataclasses.fields(net.config)}
    export.write(net.state_dict(), model.Config(**fields), folder)
    if tokenizer is not None:
        for path in tokenizer.parent.glob("*token*"):
            shutil.copy(path, folder)


def read(net: network.Network, folder: pathlib.Path) -> None:
    given = safetensors.torch.load_file(str(pathlib.Path(folder) / "model.safetensors"))
    net.load_state_dict({name: value.float() for name, value in given.items()})


def load(folder: pathlib.Path, device) -> network.Network:
    net = network.Network(network.Config.load(folder))
    read(net, folder)
    return net.to(device).eval()


def save_state(path: pathlib.Path, net, optimizers, **progress) -> None:
    """All that a run needs to go on; a state on disk is always whole."""
    temporary = path.with_suffix(".tmp")
    state = {"model": net.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save({**state, **progress}, temporary)
    os.replace(temporary, path)


def load_state(path: pathlib.Path, net, optimizers, device) -> dict:
    state = torch.load(path, map_location=device, weights_only=True)
    net.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state
