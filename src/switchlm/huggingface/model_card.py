"""The model card (README.md) of a saved model, and what transformers cannot represent of it."""

from switchlm.huggingface.config import ARCHITECTURES, family_of, transformers_step
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


def limits(config: ModelConfig) -> list[str]:
    """Return a sentence for everything that transformers does differently, or cannot load."""
    if not config.num_experts:
        return []
    router = config.router
    found = []
    if config.gated:
        found.append(
            "transformers has no gated feed-forward layers in Switch Transformers and "
            "cannot load this model."
        )
    if config.attention_experts:
        found.append("transformers has no Switch layers in attention and cannot load this model.")
    for stack in ("encoder", "decoder"):
        if transformers_step(config, stack) is None:
            found.append(
                f"transformers has no schedule for the sparse layers of the {stack} and "
                "cannot load this model."
            )
    if router.experts_per_token > 1:
        found.append(
            f"transformers sends a token to one expert; here it goes to "
            f"{router.experts_per_token}, so outputs differ."
        )
    if router.selection == "expert_choice":
        found.append(
            "transformers lets tokens choose experts; here the encoder's experts choose "
            "tokens, so outputs differ."
        )
    if router.balance == "bias":
        found.append("transformers ignores the routers' selection bias, so outputs differ.")
    return found


def remarks(config: ModelConfig) -> list[str]:
    """Return what differs only in training or where capacity binds."""
    router = config.router
    if not config.num_experts or router.dropless or router.mode == "hf":
        return []
    return [
        "transformers knows absolute capacities only: config.json tells it never to drop a token. "
        f"Here the capacity factor is {router.capacity_factor} in training and "
        f"{router.evaluation_capacity_factor} in evaluation."
    ]
