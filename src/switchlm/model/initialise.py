"""Initialisation: small, by fan-in, and the same whatever the number of experts (section 2.4).

The distributions are T5X's: truncated normal for FFNs, experts and an untied head, normal for
attention with queries scaled down by sqrt(d_kv) (the scores are not scaled), N(0, 0.02) for
routers, N(0, 1) for the embedding, uniform by fan average for relative biases.

Every parameter, and every expert of a stack, is drawn from a generator of its own, seeded by the
model's seed and the parameter's name. So any part of a model can be drawn alone, by any process,
and is the same part of the same model.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from switchlm.model.config import ModelConfig

ROUTER_STD = 0.02
# The standard deviation of a unit normal cut at two standard deviations.
TRUNCATED_STD = 0.87962566103423978


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int | None = None) -> None:
    """Initialise every parameter of a SwitchTransformer in place; seed: see `initialise_all`."""
    initialise_all(model, config.initialisation_scale, config.d_kv, seed)


@torch.no_grad()
def initialise_all(module: nn.Module, scale: float, d_kv: int, seed: int | None = None) -> None:
    """Initialise every parameter of a module in place, and zero its buffers.

    seed: None takes one from torch's generator.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    for name, parameter in module.named_parameters():
        parameter.copy_(draw(name, tuple(parameter.shape), scale, d_kv, seed))
    for buffer in module.buffers():
        buffer.zero_()


@torch.no_grad()
def draw(
    name: str,
    shape: tuple[int, ...],
    scale: float,
    d_kv: int,
    seed: int,
    experts: range | None = None,
) -> Tensor:
    """Return the initial values of the parameter `name`, float32 on the CPU.

    scale: s in std = sqrt(s / fan_in). experts: which of a stack to draw, [len(experts), ...]; None
    draws all.
    """
    if ".experts." not in f".{name}":
        return _fill(torch.empty(shape), name, scale, d_kv, _generator(seed, name))
    chosen = range(shape[0]) if experts is None else experts
    stack = torch.empty(len(chosen), *shape[1:])
    for weight, expert in zip(stack, chosen, strict=True):
        _fill(weight, name, scale, d_kv, _generator(seed, f"{name}/{expert}"))
    return stack


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _fill(weight: Tensor, name: str, scale: float, d_kv: int, generator: torch.Generator) -> Tensor:
    """Fill a whole parameter, or one expert's [D, F], by the distribution of its kind."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind.endswith("norm"):
        return nn.init.ones_(weight)
    if kind == "embedding":
        return nn.init.normal_(weight, generator=generator)
    if kind == "router":
        return nn.init.normal_(weight, std=ROUTER_STD, generator=generator)
    if kind == "relative_bias":
        bound = math.sqrt(3 * scale / (sum(weight.shape) / 2))
        return nn.init.uniform_(weight, -bound, bound, generator=generator)
    if kind in ("query", "key", "value", "output"):
        fan_in = weight.shape[1] * (d_kv if kind == "query" else 1)
        return nn.init.normal_(weight, std=math.sqrt(scale / fan_in), generator=generator)
    # Experts multiply from the right, [D, F]; linear layers hold [F, D].
    fan_in = weight.shape[0] if ".experts." in f".{name}" else weight.shape[1]
    std = math.sqrt(scale / fan_in) / TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
