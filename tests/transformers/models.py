"""Pairs of the same model: of our class and of transformers."""

import dataclasses

import torch
import transformers

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface import load
from switchlm.model.config import Initialisation, RouterConfig
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.transformers import SwitchTransformersForConditionalGeneration

HF = RouterConfig(
    mode="hf",
    capacity_factor=None,
    evaluation_capacity_factor=None,
    expert_capacity=64,
    exploration="argmax",
    z_weight=0.001,
)


def save(folder, **changes):
    torch.manual_seed(0)
    options = {
        "initialisation": Initialisation(scale=4.0),
        "tied_head": False,
        "router": HF,
        **changes,
    }
    config = dataclasses.replace(preset("nano"), **options)
    load.save(SwitchTransformer(config), Tokenizer.bytes(), folder)
    return folder


def pair_of(folder):
    """Return our model and that of transformers from the same files."""
    config = load.load_config(folder)
    name = "SwitchTransformers" if config.num_experts else "T5"
    theirs = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(
        folder, attn_implementation="eager"
    )
    return SwitchTransformersForConditionalGeneration.from_pretrained(folder), theirs.eval()


def assert_same(ours, theirs):
    """Compare two outputs, nested, and what they have."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        theirs, ours = theirs.values(), ours.values()
    elif isinstance(theirs, torch.Tensor | float):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        return
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert_same(one, other)
