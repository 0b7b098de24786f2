"""The encoder alone, as transformers returns it.

Shapes: B batch, S source, D d_model.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput, MoEModelOutput

from switchlm.model.transformer import SwitchTransformer
from switchlm.transformers.inputs import check_length, one_of, returned, segments_of, wanted_of
from switchlm.transformers.loading import refuse_options
from switchlm.transformers.stacks import Wanted, run_stack


def encode(
    model: SwitchTransformer,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    segments_BS: Tensor | None,
    wanted: Wanted,
) -> Any:
    """Return a BaseModelOutput, or a MoEModelOutput of a sparse model.

    Its attribute `routing` is that of the encoder, for losses.
    """
    inputs = one_of(input_ids, inputs_embeds, "input_ids, inputs_embeds, encoder_outputs")
    check_length(segments_BS, inputs.shape[1], "attention_mask")
    encoded = run_stack(model.encoder, model.encoder_inputs(inputs, segments_BS), wanted)
    values: dict[str, Any] = {
        "last_hidden_state": encoded.last_hidden_state,
        "hidden_states": encoded.hidden_states,
        "attentions": encoded.attentions,
    }
    output: Any
    if model.config.num_experts:
        output = MoEModelOutput(**values, router_logits=encoded.router_logits)  # type: ignore[arg-type]
    else:
        output = BaseModelOutput(**values)
    output.routing = encoded.routing
    return output


class Encoder(nn.Module):
    """The encoder for `generate`. It has no parameters, since the model has them."""

    main_input_name = "input_ids"

    def __init__(self, model: SwitchTransformer, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self._model = (model,)  # in a tuple, so that it is no part of this module

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return what `encode` returns. Raises ConfigError for other inputs."""
        refuse_options(options, "get_encoder()")
        wanted = wanted_of(
            self.config, output_attentions, output_hidden_states, output_router_logits
        )
        segments_BS = segments_of(attention_mask, "attention_mask")
        output = encode(self._model[0], input_ids, inputs_embeds, segments_BS, wanted)
        return returned(output, self.config, return_dict)
