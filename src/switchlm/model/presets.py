"""Presets: the models of the paper, as released, and small ones for laptops and tests.

`dense-*` is the FLOP-matched twin of a preset: `dense-base` of every `switch-base-*`, `dense-tiny`
of `tiny`, and so on.
"""

import dataclasses
from typing import Any

from switchlm.errors import ConfigError, nearest
from switchlm.model.config import Initialisation, ModelConfig, RouterConfig

BYTES = 384  # 3 special tokens, 256 bytes, 100 sentinels, filled up to a multiple of 128

# With these small models learn in minutes, see `Initialisation`; those of the paper keep T5X's. The
# initial logits of a router have a standard deviation of 3 at both 32 and 512 dimensions. At 512
# they are hardly tested: there Adafactor learns faster than AdamW, with which most experts died.
_SMALL = Initialisation(embedding_std=0.3, router_std=0.5, positions="local")
_WIDER = dataclasses.replace(_SMALL, router_std=0.125)
_DROPLESS = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None)


def _layers(number: int, **shape: Any) -> ModelConfig:
    """Return a model with `number` layers in each stack."""
    return ModelConfig(num_encoder_layers=number, num_decoder_layers=number, **shape)


_SPARSE: dict[str, ModelConfig] = {
    "nano": _layers(
        2,
        vocabulary_size=BYTES,
        d_model=32,
        d_ff=64,
        d_kv=16,
        num_heads=2,
        num_experts=4,
        initialisation=_SMALL,
    ),
    "tiny": _layers(
        1,
        vocabulary_size=BYTES,
        d_model=32,
        d_ff=32,
        d_kv=8,
        num_heads=4,
        num_experts=64,
        sparse_step=1,
        initialisation=_SMALL,
        router=_DROPLESS,
    ),
    "small": _layers(
        6,
        vocabulary_size=8192,
        d_model=512,
        d_ff=2048,
        num_heads=8,
        num_experts=64,
        initialisation=_WIDER,
    ),
    **{
        f"switch-base-{experts}": _layers(
            12, d_model=768, d_ff=3072, num_heads=12, num_experts=experts
        )
        for experts in (8, 16, 32, 64, 128, 256)
    },
    "switch-large-128": _layers(24, d_model=1024, d_ff=4096, num_heads=16, num_experts=128),
    "switch-xxl-128": _layers(
        24,
        d_model=4096,
        d_ff=10240,
        num_heads=64,
        num_experts=128,
        activation="gelu",
        gated=True,
        tied_head=False,
        router=RouterConfig(evaluation_capacity_factor=4.0, min_capacity=2),
    ),
    "switch-c-2048": _layers(
        15,
        d_model=2080,
        d_ff=6144,
        num_heads=30,
        num_experts=2048,
        sparse_step=1,
        tied_head=False,
        router=RouterConfig(capacity_factor=1.0, min_capacity=2),
    ),
}

_DENSE = {
    "dense-nano": "nano",
    "dense-tiny": "tiny",
    "dense-small": "small",
    "dense-base": "switch-base-8",
    "dense-large": "switch-large-128",
    "dense-xxl": "switch-xxl-128",
    "dense-c": "switch-c-2048",
}

PRESETS: tuple[str, ...] = (*_SPARSE, *_DENSE)


def preset(name: str) -> ModelConfig:
    """Return the configuration of that name; ConfigError suggests the nearest."""
    if name in _SPARSE:
        return _SPARSE[name]
    if name in _DENSE:
        return _SPARSE[_DENSE[name]].dense_twin()
    raise ConfigError(f"There is no preset {name!r}.{nearest(name, PRESETS)}")
