"""The README.md of a saved model."""

from switchlm.checkpoint.config_fields import ARCHITECTURES
from switchlm.checkpoint.limits import limits, remarks
from switchlm.checkpoint.write_config import family_of
from switchlm.model import count
from switchlm.model.config import ModelConfig


def model_card(config: ModelConfig, dtype: str) -> str:
    """Return Markdown: what the model is, how to load it, what transformers does differently."""
    architecture = ARCHITECTURES[family_of(config)]
    differences = limits(config) + remarks(config)
    notes = ""
    if differences:
        notes = "\n## In transformers\n\n" + "\n".join(f"- {line}" for line in differences) + "\n"
    loadable = not any("cannot load" in line for line in differences)
    theirs = ""
    if loadable:
        theirs = (
            f"\nor with transformers:\n\n```python\nfrom transformers import {architecture}\n\n"
            f'model = {architecture}.from_pretrained("DIR")\n```\n'
        )
    return _card(config, dtype) + theirs + notes


def quantised_card(config: ModelConfig, bits: int, what: str) -> str:
    """Return the card of a model whose weights are codes of so many bits."""
    held = "all matrices" if what == "all" else "experts"
    return _card(config, f"{held} of {bits} bits") + (
        "\n## In transformers\n\n- transformers cannot load this model: only switchlm knows the "
        "layout of its codes.\n"
    )


def _card(config: ModelConfig, weights: str) -> str:
    experts = config.num_experts
    kind = f"sparse model with {experts} experts a Switch layer" if experts else "dense model"
    rows = {
        "parameters": f"{count.parameters(config):,}",
        "used by one token": f"{count.active_parameters(config):,}",
        "layers (encoder, decoder)": f"{config.num_encoder_layers}, {config.num_decoder_layers}",
        "d_model, d_ff": f"{config.d_model}, {config.d_ff}",
        "heads": f"{config.num_heads} of {config.d_kv}",
        "vocabulary": f"{config.vocabulary_size:,}",
        "routing": f"{config.router.mode}" if experts else "none",
        "weights": weights,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: switchlm\ntags: [switch-transformers, mixture-of-experts, t5]\n---\n\n"
        f"# A T5-style encoder-decoder\n\nA {kind}, written by switchlm.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Loading\n\n"
        '```python\nimport switchlm\n\nmodel, tokenizer = switchlm.load("DIR")\n```\n'
    )
