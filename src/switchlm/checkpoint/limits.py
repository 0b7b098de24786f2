"""What transformers cannot represent of a model, in words for warnings and model cards."""

from switchlm.checkpoint.write_config import transformers_step
from switchlm.model.config import ModelConfig


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
