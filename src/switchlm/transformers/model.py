"""A PreTrainedModel that wraps a switchlm model, and uses the KV cache of transformers.

Shapes: B batch, S source, T target, D d_model, V vocabulary, L layers.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqMoEOutput,
)
from transformers.utils import logging

from switchlm import files
from switchlm.config import parse_size
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.data.text.tokenizer_files import TOKENIZER
from switchlm.errors import ConfigError
from switchlm.generation.decode import dropless
from switchlm.huggingface import load
from switchlm.huggingface.config import write_config
from switchlm.huggingface.metadata import (
    GENERATION_CONFIG,
    Metadata,
    end_values,
    generation_values,
)
from switchlm.huggingface.weights import find_model
from switchlm.model.layers import Linear
from switchlm.model.routing import ModelOutput
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import SwitchTransformer
from switchlm.transformers import loading
from switchlm.transformers.cache import TransformersCache, new_cache
from switchlm.transformers.encoder import Encoder, encode
from switchlm.transformers.inputs import (
    check_length,
    one_of,
    returned,
    segments_of,
    wanted_of,
    with_mask,
)
from switchlm.transformers.loading import refuse_options
from switchlm.transformers.losses import IGNORED, loss_of, router_losses
from switchlm.transformers.stacks import StackOutput, Wanted, run_stack

logger = logging.get_logger(__name__)
# The name of the cache, in forward and in outputs, depends on the version of transformers.
CACHE = next(
    field.name
    for field in dataclasses.fields(Seq2SeqLMOutput)
    if field.name in ("cache", "past_key_values")
)


class SwitchTransformersForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A switchlm model, sparse or dense, as a model of transformers.

    model, tokenizer: of switchlm; or use `from_pretrained`.

    Differences from the class of this name in transformers: parameters have the names of switchlm
    (`query`, `key`, `value`, `output`, `up`, `down`; for PEFT's target_modules; see adapters.py),
    experts are stacked, `generate` drops no token, and the loss is divided by `num_items_in_batch`
    where Trainer gives it.
    """

    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _can_compile_fullgraph = False

    def __init__(self, model: SwitchTransformer, tokenizer: Tokenizer | None = None) -> None:
        if not isinstance(model, SwitchTransformer):
            raise ConfigError(
                f"This takes a switchlm model, got {type(model).__name__}. Load one with "
                "from_pretrained, or create one: SwitchTransformer(switchlm.preset('nano'))."
            )
        kept = model.metadata or Metadata()
        values = write_config(model.config, str(model.embedding.weight.dtype)[len("torch.") :])
        super().__init__(AutoConfig.for_model(**values | end_values(model.config, kept)))
        self.generation_config = GenerationConfig.from_dict(
            generation_values(model.config, kept.generation)
        )
        self.config._attn_implementation = "eager"  # with which all outputs are allowed
        self.model = model
        for layer in switch_layers(model).values():
            layer.router.trains_on_padding = True  # as transformers does
        self.tokenizer = tokenizer
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> "SwitchTransformersForConditionalGeneration":
        """Load what switchlm.load loads: a run, a model folder, or a hub name, in eval mode.

        config: of transformers; its `use_cache` and `output_...` are taken, all else must be equal.
        cache_dir, token: of the hub.
        dtype: a torch.dtype or its name; `auto` and None keep the dtype of the files.
        device_map: one device; `auto`: an accelerator if there is one.
        attn_implementation: `eager` or `sdpa`; attention is the same here, and the fastest.

        Raises ConfigError for other options and values.
        """
        dtype = options.pop("torch_dtype", dtype)
        runtime = {name: options.pop(name) for name in loading.RUNTIME if name in options}
        refuse_options(options, "from_pretrained", loading.LOADING)
        loading.check_attention(attn_implementation)
        kind, device = loading.dtype_of(dtype), loading.device_of(device_map)
        folder = find_model(
            pretrained_model_name_or_path,
            revision,
            local_files_only,
            cache_dir=cache_dir,
            token=token,
        )

        def report(line: str) -> None:
            if not line.startswith(GENERATION_CONFIG):  # whose settings have an effect here
                warnings.warn(line, stacklevel=4)

        model, tokenizer = load.load(folder, dtype=kind, device=device, report=report)
        self = cls(model, tokenizer)
        if config is not None:
            loading.check_config(config, self.config)
            runtime = {name: getattr(config, name, None) for name in loading.RUNTIME} | runtime
        for name, value in runtime.items():
            if value is not None:
                setattr(self.config, name, value)
        if generation_config is not None:
            self.generation_config = generation_config
        return self.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        **options: Any,
    ) -> None:
        """Save the model for switchlm.load and transformers; other files of the folder are kept.

        state_dict: the weights to save, with the names of this model; None: its own.

        Raises ConfigError for other options.
        """
        refuse_options(options, "save_pretrained", loading.SAVING)
        size = parse_size(str(max_shard_size), "max_shard_size")
        if not is_main_process:
            return
        model = self.model
        if state_dict is not None:
            with torch.device("meta"):
                model = SwitchTransformer(self.model.config)
            weights = {name.removeprefix("model."): one for name, one in state_dict.items()}
            model.load_state_dict(weights, assign=True)
        with files.changed_folder(Path(save_directory)) as folder:
            written = folder / ".written"
            own = (folder / TOKENIZER).is_file()
            load.save(model, None if own else self.tokenizer, written, max_shard_bytes=size)
            self.generation_config.save_pretrained(written)
            for old in folder.glob("model*.safetensors*"):
                old.unlink()
            for path in written.iterdir():
                path.replace(folder / path.name)
            written.rmdir()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state_dict, or the tensors of a saved folder, as Trainer does to resume.

        The tensors of a folder may be loaded in several calls, one per shard, with strict=False.
        """
        if any(name.startswith("model.") for name in state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        return loading.load_saved(self.model, state_dict, strict)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> Any:
        """Return what the class of transformers returns: the loss of labels, logits_BTV, the cache.

        The loss is the sum of the negative log likelihood of labels other than -100, in nats, over
        `num_items_in_batch`, or over their number; zero if there are none. With
        `output_router_logits`, as argument or in `config`, the balance and z-losses are added,
        weighted as configured: training a sparse model needs them. Capacity is enforced as
        configured. What is None is as `config` says.

        Raises ConfigError for other inputs.
        """
        # What generate passes on to every step.
        for name in ("tokenizer", "assistant_tokenizer"):
            options.pop(name, None)
        refuse_options(options, "forward")
        model, config = self.model, self.model.config
        # With prefix tuning, generate passes its own empty cache, and PEFT the prefix.
        if past_key_values is not None and (cache is None or cache.get_seq_length() == 0):
            cache = past_key_values
        wanted = wanted_of(
            self.config, output_attentions, output_hidden_states, output_router_logits
        )
        segments_BS = segments_of(attention_mask, "attention_mask")
        if encoder_outputs is None:
            encoder_outputs = encode(model, input_ids, inputs_embeds, segments_BS, wanted)
        elif isinstance(encoder_outputs, tuple | list):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        encoded_BSD = encoder_outputs[0]
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        decoder_inputs = one_of(
            decoder_input_ids,
            decoder_inputs_embeds,
            "labels, decoder_input_ids, decoder_inputs_embeds",
        )
        if cache is None and self._makes_cache(use_cache):
            cache = new_cache(self.config)
        decoded, logits_BTV = self._decode(
            decoder_inputs, encoded_BSD, segments_BS, decoder_attention_mask, cache, wanted
        )
        values = {
            "logits": logits_BTV,
            CACHE: cache,
            "decoder_hidden_states": decoded.hidden_states,
            "decoder_attentions": decoded.attentions,
            "cross_attentions": decoded.cross_attentions,
            "encoder_last_hidden_state": encoded_BSD,
            "encoder_hidden_states": encoder_outputs.get("hidden_states"),
            "encoder_attentions": encoder_outputs.get("attentions"),
        }
        output = ModelOutput(
            logits_BTV=logits_BTV,
            encoder_routing=getattr(encoder_outputs, "routing", ()),
            decoder_routing=decoded.routing,
        )
        if wanted.router_logits:
            if not hasattr(encoder_outputs, "routing"):
                raise ConfigError(
                    "output_router_logits needs the routing of the encoder, which these "
                    "encoder_outputs lack: pass input_ids, or what get_encoder() returns."
                )
            values["encoder_router_logits"] = encoder_outputs.get("router_logits")
            values["decoder_router_logits"] = decoded.router_logits
            values |= router_losses(output, config)
        elif labels is not None and self.training and config.num_experts:
            logger.warning_once(
                "The router losses are left out of the loss, as in transformers: for training, "
                "pass output_router_logits=True, or set it in model.config."
            )
        if labels is not None:
            values["loss"] = loss_of(
                output, labels, num_items_in_batch, config, wanted.router_logits
            )
        kind: Any = Seq2SeqMoEOutput if config.num_experts else Seq2SeqLMOutput
        return returned(kind(**values), self.config, return_dict)

    def _makes_cache(self, use_cache: bool | None) -> bool:
        """Whether to make a cache; what is recomputed in the backward pass cannot fill one."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        recomputed = self.model.decoder.activation_checkpointing and torch.is_grad_enabled()
        return bool(use_cache) and not recomputed

    def _decode(
        self,
        inputs_BT: Tensor,
        encoded_BSD: Tensor,
        segments_BS: Tensor | None,
        mask: Tensor | None,
        cache: Any,
        wanted: Wanted,
    ) -> tuple[StackOutput, Tensor]:
        """Return the decoder's output and logits_BTV."""
        model, length = self.model, inputs_BT.shape[1]
        places = None
        if cache is not None:
            places = TransformersCache(cache, model.decoder, encoded_BSD, length)
            length += places.length
        # For caches of a fixed length, generate makes a mask of all places itself.
        mask_B1TM = mask if mask is not None and mask.dim() == 4 else None
        segments_BM = segments_of(None if mask_B1TM is not None else mask, "decoder_attention_mask")
        check_length(segments_BM, length, "decoder_attention_mask")
        if segments_BM is not None and places is not None:
            # Places of a cache of a fixed length that are not written yet are in the future.
            segments_BM = nn.functional.pad(segments_BM, (0, places.num_places - length))
        inputs = model.decoder_inputs(
            inputs_BT, input_segments_BS=segments_BS, target_segments_BT=segments_BM, cache=places
        )
        if mask_B1TM is not None:
            inputs = with_mask(inputs, mask_B1TM)
        decoded = run_stack(model.decoder, inputs, wanted, encoded_BSD, places)
        return decoded, model.logits(decoded.last_hidden_state)

    @torch.no_grad()
    def generate(self, *inputs: Any, **options: Any) -> Any:
        """Generate as transformers does, but drop no token, whatever capacity is configured.

        The output of a row then does not depend on other rows, nor on padding. For stop_strings,
        `tokenizer` is the model's own if it is left out.
        """
        tokenizer = options.get("tokenizer", self.tokenizer)
        given = options.get("generation_config", self.generation_config)
        stops = options.get("stop_strings") or getattr(given, "stop_strings", None)
        if isinstance(tokenizer, Tokenizer):
            options.pop("tokenizer", None)
            if stops:
                options["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
        with dropless(self.model):
            return super().generate(*inputs, **options)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the labels one place later, after the start token; -100 becomes padding."""
        shifted = nn.functional.pad(labels, (1, -1), value=self.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == IGNORED, self.model.config.pad_id)

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        """Return the encoder as a module, from input_ids to a BaseModelOutput."""
        return Encoder(self.model, self.config)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding, of both stacks and of a tied head."""
        if not isinstance(value, nn.Embedding):
            raise ConfigError(f"The embedding is an nn.Embedding, got {type(value).__name__}.")
        self.model.embedding = value
        self.model.config = dataclasses.replace(
            self.model.config, vocabulary_size=value.num_embeddings
        )

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head; None: it is tied to the embedding."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace a head that is not tied."""
        if self.model.head is None or not isinstance(new_embeddings, nn.Linear):
            raise ConfigError(
                "Only a head that is not tied to the embedding can be set, to an nn.Linear."
            )
        with torch.device("meta"):
            head = Linear(new_embeddings.in_features, new_embeddings.out_features)
        head.weight = new_embeddings.weight
        self.model.head = head

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.model.encoder.activation_checkpointing

    def gradient_checkpointing_enable(self, *_: Any, on: bool = True, **__: Any) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        for stack in (self.model.encoder, self.model.decoder):
            stack.activation_checkpointing = on

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.gradient_checkpointing_enable(on=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the model has its weights."""
