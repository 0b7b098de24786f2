"""Initialisation: small, by fan-in, and the same whatever the number of experts (section 2.4).

The distributions are T5X's: truncated normal for FFNs, experts and an untied head, normal for
attention with queries scaled down by sqrt(d_kv) (the scores are not scaled), for routers and for
the embedding, uniform by fan average for relative biases. `model.initialisation` has their scales,
and whether attention is local at first.

Every parameter, and every expert of a stack, has its own generator, seeded by the model's seed and
the parameter's name. So any process can draw any part of a model alone, with the same result.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from switchlm.model.config import Initialisation, ModelConfig

# The standard deviation of a unit normal cut at two standard deviations.
TRUNCATED_STD = 0.87962566103423978
LOCAL_SLOPE, LOCAL_REACH = 1.5, 4  # of a local bias: decrease per position, and positions


class Initialiser:
    """Draws the parameters of a model, each as a pure function of the seed and its name.

    initialisation: the scales of the distributions.
    d_kv: the width of a head, by whose root queries are scaled down.
    seed: None draws one from torch's generator.
    """

    def __init__(
        self, initialisation: Initialisation, *, d_kv: int = 1, seed: int | None = None
    ) -> None:
        self.initialisation = initialisation
        self.d_kv = d_kv
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed

    @classmethod
    def of(cls, config: ModelConfig, seed: int | None = None) -> "Initialiser":
        """Return the initialiser of a model."""
        return cls(config.initialisation, d_kv=config.d_kv, seed=seed)

    @torch.no_grad()
    def fill(self, module: nn.Module) -> None:
        """Initialise every parameter of a module in place, and zero its buffers."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.draw(name, tuple(parameter.shape)))
        for buffer in module.buffers():
            buffer.zero_()

    @torch.no_grad()
    def draw(self, name: str, shape: tuple[int, ...], experts: range | None = None) -> Tensor:
        """Return the initial values of the parameter `name`, float32 on the CPU.

        experts: which of a stack to draw, [len(experts), ...]; None draws all.
        """
        if ".experts." not in f".{name}":
            return self._fill(torch.empty(shape), name, self._generator(name))
        chosen = range(shape[0]) if experts is None else experts
        stack = torch.empty(len(chosen), *shape[1:])
        for weight, expert in zip(stack, chosen, strict=True):
            self._fill(weight, name, self._generator(f"{name}/{expert}"))
        return stack

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def _fill(self, weight: Tensor, name: str, generator: torch.Generator) -> Tensor:
        """Fill a parameter, or one expert's [D, F], by the distribution of its kind."""
        how = self.initialisation
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind.endswith("norm"):
            return nn.init.ones_(weight)
        if kind == "embedding":
            return nn.init.normal_(weight, std=how.embedding_std, generator=generator)
        if kind == "router":
            return nn.init.normal_(weight, std=how.router_std, generator=generator)
        if kind == "relative_bias":
            bound = math.sqrt(3 * how.scale / (sum(weight.shape) / 2))
            nn.init.uniform_(weight, -bound, bound, generator=generator)
            if how.positions == "local":
                weight += local_bias(*weight.shape, decoder=name.startswith("decoder."))
            return weight
        if kind in ("query", "key", "value", "output"):
            fan_in = weight.shape[1] * (self.d_kv if kind == "query" else 1)
            return nn.init.normal_(weight, std=math.sqrt(how.scale / fan_in), generator=generator)
        # Experts multiply from the right, [D, F]; linear layers hold [F, D].
        fan_in = weight.shape[0] if ".experts." in f".{name}" else weight.shape[1]
        std = math.sqrt(how.scale / fan_in) / TRUNCATED_STD
        return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def local_bias(buckets: int, heads: int, *, decoder: bool) -> Tensor:
    """Return bias [buckets, heads] with which every head prefers one offset at first.

    -LOCAL_SLOPE times the distance from that offset, but at most LOCAL_REACH of it. The offsets of
    the heads, key position minus query position, are -1, +1, -2, +2 ... in an encoder and 0, -1,
    -2 ... in a decoder, and repeat after the last bucket of a single distance.

    Buckets are those of `RelativeBias`: the past first, and in an encoder the future in the second
    half. A bucket of several distances counts as its index; it is far from every offset.
    """
    bucket = torch.arange(buckets)
    head = torch.arange(heads)
    if decoder:
        offset_X = -bucket
        preferred_H = -(head % (buckets // 2))
    else:
        side = buckets // 2
        offset_X = torch.where(bucket < side, -bucket, bucket - side)
        step_H = 1 + head // 2 % max(side // 2 - 1, 1)
        preferred_H = torch.where(head % 2 == 0, -step_H, step_H)
    distance_XH = (offset_X[:, None] - preferred_H).abs().clamp(max=LOCAL_REACH)
    return -LOCAL_SLOPE * distance_XH.float()
