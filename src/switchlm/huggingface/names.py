"""The table of parameters: name here, name in the Hugging Face format, shape.

The format is that of transformers' `SwitchTransformersForConditionalGeneration` and, for dense
models, `T5ForConditionalGeneration`; what transformers does not have (gated experts, Switch
attention, a selection bias) is named by the same scheme.

Shape letters: V vocabulary, D d_model, W heads * d_kv, F d_ff, E experts, R relative buckets,
H heads. Placeholders: {stack} encoder or decoder, {i} layer, {j} expert, {last} the feed-forward
sublayer (1 in the encoder, 2 in the decoder), {ffn} `mlp` (Switch) or `DenseReluDense` (T5).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from switchlm.model.config import ModelConfig

Family = Literal["switch", "t5"]
FFN_NAMES: dict[Family, str] = {"switch": "mlp", "t5": "DenseReluDense"}
STACKS = ("encoder", "decoder")
LAST_SUBLAYER = {"encoder": 1, "decoder": 2}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    name, hf_name: templates of the name here and in the Hugging Face format.
    shape: one letter per dim of the tensor in the Hugging Face format.
    needs: features that a model, stack or block must have for the row to apply.

    A row with {j} in `hf_name` is one expert of a stacked tensor: the tensor here is
    [E, *reversed(shape)], each expert transposed.
    """

    name: str
    hf_name: str
    shape: str
    needs: frozenset[str] = frozenset()

    @property
    def is_expert(self) -> bool:
        return "{j}" in self.hf_name


def _row(name: str, hf_name: str, shape: str, needs: str = "") -> Row:
    return Row(name, hf_name, shape, frozenset(needs.split()))


def _switch(name: str, hf_name: str, needs: str) -> tuple[Row, ...]:
    """The router of a Switch layer."""
    return (
        _row(f"{name}.router.weight", f"{hf_name}.router.classifier.weight", "ED", needs),
        _row(f"{name}.router.bias_E", f"{hf_name}.router.selection_bias", "E", f"{needs} bias"),
    )


_SELF, _CROSS = "block.{i}.layer.0.SelfAttention", "block.{i}.layer.1.EncDecAttention"
_FFN = "block.{i}.layer.{last}.{ffn}"
_RELATIVE_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"

MODEL_ROWS: tuple[Row, ...] = (
    _row("embedding.weight", "shared.weight", "VD"),
    _row("head.weight", "lm_head.weight", "VD", "untied"),
)
STACK_ROWS: tuple[Row, ...] = (
    _row("relative_bias.weight", _RELATIVE_BIAS, "RH"),
    _row("final_norm.weight", "final_layer_norm.weight", "D"),
)
BLOCK_ROWS: tuple[Row, ...] = (
    _row("blocks.{i}.attention_norm.weight", "block.{i}.layer.0.layer_norm.weight", "D"),
    _row("blocks.{i}.attention.query.weight", f"{_SELF}.q.weight", "WD", "dense_attention"),
    _row("blocks.{i}.attention.key.weight", f"{_SELF}.k.weight", "WD", "dense_attention"),
    _row("blocks.{i}.attention.value.weight", f"{_SELF}.v.weight", "WD", "dense_attention"),
    _row("blocks.{i}.attention.output.weight", f"{_SELF}.o.weight", "DW"),
    *_switch("blocks.{i}.attention.query", f"{_SELF}.q", "switch_attention"),
    _row(
        "blocks.{i}.attention.query.experts.projection",
        f"{_SELF}.q.experts.expert_{{j}}.weight",
        "WD",
        "switch_attention",
    ),
    *_switch("blocks.{i}.attention.key_value", f"{_SELF}.kv", "switch_attention"),
    _row(
        "blocks.{i}.attention.key_value.experts.projection",
        f"{_SELF}.kv.experts.expert_{{j}}.weight",
        "WD",
        "switch_attention",
    ),
    _row(
        "blocks.{i}.cross_attention_norm.weight",
        "block.{i}.layer.1.layer_norm.weight",
        "D",
        "decoder",
    ),
    _row("blocks.{i}.cross_attention.query.weight", f"{_CROSS}.q.weight", "WD", "decoder"),
    _row("blocks.{i}.cross_attention.key.weight", f"{_CROSS}.k.weight", "WD", "decoder"),
    _row("blocks.{i}.cross_attention.value.weight", f"{_CROSS}.v.weight", "WD", "decoder"),
    _row("blocks.{i}.cross_attention.output.weight", f"{_CROSS}.o.weight", "DW", "decoder"),
    _row("blocks.{i}.feedforward_norm.weight", "block.{i}.layer.{last}.layer_norm.weight", "D"),
    _row("blocks.{i}.feedforward.up.weight", f"{_FFN}.wi.weight", "FD", "dense plain"),
    _row("blocks.{i}.feedforward.gate.weight", f"{_FFN}.wi_0.weight", "FD", "dense gated"),
    _row("blocks.{i}.feedforward.up.weight", f"{_FFN}.wi_1.weight", "FD", "dense gated"),
    _row("blocks.{i}.feedforward.down.weight", f"{_FFN}.wo.weight", "DF", "dense"),
    *_switch("blocks.{i}.feedforward", _FFN, "sparse"),
    *(
        _row(
            f"blocks.{{i}}.feedforward.experts.{name}",
            f"{_FFN}.experts.expert_{{j}}.{hf_name}.weight",
            shape,
            f"sparse {needs}",
        )
        for name, hf_name, shape, needs in (
            ("up", "wi", "FD", "plain"),
            ("gate", "wi_0", "FD", "gated"),
            ("up", "wi_1", "FD", "gated"),
            ("down", "wo", "DF", ""),
        )
    ),
)

# Other names of a tensor in files; where several are present they must be equal.
ALIASES: dict[str, tuple[str, ...]] = {
    "shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    "lm_head.weight": ("decoder.lm_head.weight",),
}
# In files of old T5 models; not used there nor in transformers.
IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the Hugging Face format.

    name, hf_name: of the parameter here, and in the Hugging Face format.
    shape: in the Hugging Face format.
    expert: its index in the stacked parameter here, transposed; None: the tensors are the same.
    """

    name: str
    hf_name: str
    shape: tuple[int, ...]
    expert: int | None = None


def entries(config: ModelConfig, family: Family) -> Iterator[Entry]:
    """Yield every tensor of a model of that configuration, lazily, in the order of the layers."""
    shared_features = {
        "gated" if config.gated else "plain",
        "tied" if config.tied_head else "untied",
        "bias" if config.router.balance == "bias" else "no_bias",
    }
    yield from _expand(MODEL_ROWS, config, shared_features, "", {})
    for stack in STACKS:
        decoder = stack == "decoder"
        prefix = f"{stack}."
        yield from _expand(STACK_ROWS, config, shared_features, prefix, {})
        for layer in range(config.num_decoder_layers if decoder else config.num_encoder_layers):
            sparse = config.is_sparse(layer, decoder=decoder)
            switched = sparse and config.attention_experts
            features = shared_features | {
                stack,
                "sparse" if sparse else "dense",
                "switch_attention" if switched else "dense_attention",
            }
            fill: dict[str, int | str] = {
                "i": layer,
                "ffn": FFN_NAMES[family],
                "last": LAST_SUBLAYER[stack],
            }
            yield from _expand(BLOCK_ROWS, config, features, prefix, fill)


def _expand(
    rows: tuple[Row, ...],
    config: ModelConfig,
    features: set[str],
    prefix: str,
    fill: dict[str, int | str],
) -> Iterator[Entry]:
    """Yield the entries of the rows that apply, one per expert where tensors are stacked."""
    sizes = {
        "V": config.vocabulary_size,
        "D": config.d_model,
        "W": config.num_heads * config.d_kv,
        "F": config.d_ff,
        "E": config.num_experts,
        "R": config.relative_buckets,
        "H": config.num_heads,
    }
    for row in rows:
        if not row.needs <= features:
            continue
        name = prefix + row.name.format(**fill)
        shape = tuple(sizes[letter] for letter in row.shape)
        if row.is_expert:
            for expert in range(config.num_experts):
                yield Entry(name, prefix + row.hf_name.format(j=expert, **fill), shape, expert)
        else:
            yield Entry(name, prefix + row.hf_name.format(**fill), shape)


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """The row of the table that a key of a file matches, and its stack, layer and expert."""

    row: Row
    family: Family | None = None
    stack: str | None = None
    layer: int | None = None
    expert: int | None = None


_NUMBERS = re.compile(r"(?:(?<=\.block\.)|(?<=\.blocks\.)|(?<=\.expert_))[0-9]{1,9}(?=\.)")


def _templates() -> dict[str, ParsedKey]:
    """Return the row, family and stack by name, in both formats, numbers as `#`."""
    table = {row.hf_name: ParsedKey(row) for row in MODEL_ROWS}
    for stack in STACKS:
        for row in (*STACK_ROWS, *BLOCK_ROWS):
            for family, ffn in FFN_NAMES.items():
                key = row.hf_name.replace("{ffn}", ffn).replace("{last}", str(LAST_SUBLAYER[stack]))
                key = key.replace("{i}", "#").replace("{j}", "#").replace("block.0.", "block.#.")
                known = family if "{ffn}" in row.hf_name else None
                table.setdefault(f"{stack}.{key}", ParsedKey(row, known, stack))
            name = f"{stack}.{row.name.replace('{i}', '#')}"
            # wi and wi_1 have the same name here: it needs what both rows need.
            needs = row.needs & table[name].row.needs if name in table else row.needs
            table[name] = ParsedKey(replace(row, needs=needs), None, stack)
    return table


_TEMPLATES = _templates()


def parse_key(key: str) -> ParsedKey | None:
    """Parse a key of the Hugging Face format or of quantised folders; None for an unknown key.

    Keys of quantised folders are of all experts: their expert is None.
    """
    found = _TEMPLATES.get(_NUMBERS.sub("#", key))
    if found is None:
        return None
    layer, expert = [*map(int, _NUMBERS.findall(key)), None, None][:2]
    if found.row.hf_name == _RELATIVE_BIAS and layer != 0:
        return None
    return ParsedKey(found.row, found.family, found.stack, layer, expert)
