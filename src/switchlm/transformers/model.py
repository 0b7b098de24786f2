"""A PreTrainedModel that wraps a switchlm model, and uses the KV cache of transformers.

Beam search in transformers reorders that cache, and assisted decoding crops it.

Shapes: B batch, S source, T target, D d_model, V vocabulary.
"""

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from switchlm._torch import IncompatibleKeys
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.data.text.tokenizer_files import TOKENIZER
from switchlm.errors import CheckpointError, ConfigError
from switchlm.generation.decode import dropless
from switchlm.huggingface import load
from switchlm.huggingface.config import family_of, write_config
from switchlm.huggingface.metadata import GENERATION_CONFIG
from switchlm.huggingface.names import ALIASES, entries
from switchlm.huggingface.weights import find_model
from switchlm.model.attention import KeysValues, KeyValueStore
from switchlm.model.losses import cross_entropy, routing_losses
from switchlm.model.routing import Routing
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import Stack, SwitchTransformer, shift_right
from switchlm.parallel.mesh import default_device

IGNORED = -100  # a label that is ignored
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
    (`query`, `key`, `value`, `output`, `up`, `down`; for PEFT's target_modules), experts are
    stacked, the loss includes the router losses as configured, and `generate` drops no token.
    """

    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _can_compile_fullgraph = False

    def __init__(self, model: SwitchTransformer, tokenizer: Tokenizer | None = None) -> None:
        if not isinstance(model, SwitchTransformer):
            raise ConfigError(
                f"This takes a switchlm model, got {type(model).__name__}. Load one with "
                "from_pretrained, or create one: SwitchTransformer(switchlm.preset('nano'))."
            )
        values = write_config(model.config, str(model.embedding.weight.dtype)[len("torch.") :])
        super().__init__(AutoConfig.for_model(**values))
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
        revision: str | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | None = None,
        **options: Any,
    ) -> "SwitchTransformersForConditionalGeneration":
        """Load what switchlm.load loads: a run, a model folder, or a hub name, in eval mode.

        dtype: a torch.dtype or its name; `auto` and None keep the dtype of the files.
        device_map: one device; `auto`: an accelerator if there is one.

        Raises ConfigError for other options.
        """
        dtype = options.pop("torch_dtype", dtype)
        _refuse_options(options, "from_pretrained")
        if isinstance(dtype, str):
            named = None if dtype == "auto" else getattr(torch, dtype, None)
            if dtype != "auto" and not isinstance(named, torch.dtype):
                raise ConfigError(f"There is no dtype {dtype!r}; bfloat16 is one, for example.")
            dtype = named
        if device_map == "auto":
            device_map = default_device()
        folder = find_model(pretrained_model_name_or_path, revision, local_files_only)

        def report(line: str) -> None:
            if not line.startswith(GENERATION_CONFIG):  # whose settings have an effect here
                warnings.warn(line, stacklevel=4)

        model, tokenizer = load.load(
            folder,
            dtype=cast("torch.dtype | None", dtype),
            device=device_map or "cpu",
            report=report,
        )
        self = cls(model, tokenizer)
        if (folder / GENERATION_CONFIG).is_file():
            self.generation_config = GenerationConfig.from_pretrained(folder)
        return self.eval()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, is_main_process: bool = True, **options: Any
    ) -> None:
        """Save the model for switchlm.load and transformers; other files of the folder are kept."""
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            written = Path(partial) / "model"
            own = (folder / TOKENIZER).is_file()
            load.save(self.model, None if own else self.tokenizer, written)
            self.generation_config.save_pretrained(written)
            for old in folder.glob("model*.safetensors*"):
                old.unlink()
            for path in written.iterdir():
                path.replace(folder / path.name)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state_dict, or the tensors of a saved folder, as Trainer does to resume.

        The tensors of a folder may be loaded in several calls, one per shard, with strict=False.
        """
        if any(name.startswith("model.") for name in state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        return load_saved(self.model, state_dict, strict)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return a Seq2SeqLMOutput: the loss if there are labels, logits_BTV, and the cache.

        The loss is the mean negative log likelihood of labels other than -100, in nats, plus the
        balance and z-losses of the routers, weighted as configured. Capacity is enforced as
        configured. Raises ConfigError for other inputs.
        """
        _refuse_options(options, "forward")
        cache = cache if past_key_values is None else past_key_values
        segments_BS = _segments(attention_mask)
        encoder_routing: tuple[Routing, ...] = ()
        if encoder_outputs is not None:
            encoded_BSD = encoder_outputs[0]
        elif input_ids is not None:
            encoded_BSD, encoder_routing = self.model.encode(input_ids, segments_BS)
        else:
            raise ConfigError("There are neither input_ids nor encoder_outputs.")
        if decoder_input_ids is None:
            if labels is None:
                raise ConfigError("There are neither labels nor decoder_input_ids.")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        output = self.model.decode(
            decoder_input_ids,
            encoded_BSD,
            input_segments_BS=segments_BS,
            target_segments_BT=_segments(decoder_attention_mask) if cache is None else None,
            cache=None
            if cache is None
            else TransformersCache(cache, self.model.decoder, encoded_BSD),
        )
        output = dataclasses.replace(output, encoder_routing=encoder_routing)
        loss = None
        if labels is not None:
            counts_BT = labels != IGNORED
            total, count = cross_entropy(
                output.logits_BTV, labels.masked_fill(~counts_BT, 0), counts_BT
            )
            loss = total / count + sum(routing_losses(output, self.model.config))
        result: Any = Seq2SeqLMOutput(
            loss=loss,
            logits=output.logits_BTV,
            encoder_last_hidden_state=encoded_BSD,
            **{CACHE: cache},
        )
        return result.to_tuple() if return_dict is False else result

    @torch.no_grad()
    def generate(self, *inputs: Any, **options: Any) -> Any:
        """Generate as transformers does, but drop no token, whatever capacity is configured.

        The output of a row then does not depend on other rows, nor on padding.
        """
        with dropless(self.model):
            return super().generate(*inputs, **options)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Return the labels shifted right by the start token, with padding in place of -100."""
        config = self.model.config
        targets_BT = labels.masked_fill(labels == IGNORED, config.pad_id)
        return shift_right(targets_BT, None, config.start_id)

    def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
        """Return the encoder as a module, from input_ids to a BaseModelOutput."""
        return _Encoder(self.model.encode)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head; None: it is tied to the embedding."""
        return self.model.head

    def gradient_checkpointing_enable(self, *_: Any, on: bool = True, **__: Any) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        for stack in (self.model.encoder, self.model.decoder):
            stack.activation_checkpointing = on

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.gradient_checkpointing_enable(on=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the model has its weights."""


class _Encoder(nn.Module):
    """The encoder for `generate`. It has no parameters, since the model has them."""

    def __init__(self, encode: Callable[..., tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.encode = encode

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        encoded_BSD, _ = self.encode(input_ids, _segments(attention_mask))
        return BaseModelOutput(last_hidden_state=encoded_BSD)


def _segments(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask != 0).int()


def _refuse_options(options: dict[str, Any], what: str) -> None:
    """Raise ConfigError for options that are not supported."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise ConfigError(
                f"{what} does not support {name}={str(value)[:80]!r} here; leave it out."
            )


@torch.no_grad()
def load_saved(model: SwitchTransformer, tensors: Mapping[str, Tensor], strict: bool) -> Any:
    """Copy tensors with the names of a saved folder; return missing and unexpected names.

    Raises CheckpointError for a tensor of another shape and, if strict, for these names.
    """
    places = model.state_dict()
    missing: list[str] = []
    known = {alias for names in ALIASES.values() for alias in names}
    for entry in entries(model.config, family_of(model.config)):
        known.add(entry.hf_name)
        if entry.hf_name not in tensors:
            missing.append(entry.hf_name)
            continue
        tensor = tensors[entry.hf_name]
        place = places[entry.name] if entry.expert is None else places[entry.name][entry.expert].t()
        if place.shape != tensor.shape:
            raise CheckpointError(
                f"{entry.hf_name} is {list(tensor.shape)} there and {list(place.shape)} here: the "
                "weights are those of another model."
            )
        place.copy_(tensor)
    unexpected = sorted(set(tensors) - known)
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"The weights are not those of this model: {len(missing)} tensors are missing and "
            f"{len(unexpected)} unknown, such as {(missing + unexpected)[0]!r}."
        )
    return IncompatibleKeys(missing, unexpected)


class TransformersLayerStore:
    """The self-attention of one layer of a cache; see model.attention.KeyValueStore."""

    def __init__(self, cache: Any, layer: int) -> None:
        self.cache = cache
        self.layer = layer

    def update(self, key_BHQK: Tensor, value_BHQK: Tensor) -> KeysValues:
        """Append the new keys and values and return all."""
        keys_BHMK, values_BHMK = self.cache.update(key_BHQK, value_BHQK, self.layer)
        return keys_BHMK, values_BHMK


class TransformersCache:
    """A DecodingCache (see model/transformer.py) in an EncoderDecoderCache of transformers.

    The keys and values of cross-attention are computed at the first token and stored in it. Raises
    ConfigError for caches of a fixed length.
    """

    def __init__(self, cache: Any, decoder: Stack, encoded_BSD: Tensor) -> None:
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        if getattr(cache, "is_compileable", False):
            raise ConfigError(
                f"A {type(own).__name__} of a fixed length is not supported here: leave "
                "cache_implementation out."
            )
        layers = range(len(decoder.blocks))
        self.length: int = cache.get_seq_length()
        self.device = encoded_BSD.device
        self.self_attention: list[KeyValueStore] = [
            TransformersLayerStore(own, layer) for layer in layers
        ]
        if not cache.is_updated.get(0):
            for layer, (keys, values) in enumerate(decoder.memories(encoded_BSD)):
                cross.update(keys, values, layer)
                cache.is_updated[layer] = True
        self.cross_attention: list[KeysValues] = [
            (cross.layers[layer].keys, cross.layers[layer].values) for layer in layers
        ]

    def positions(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Return the positions of the new tokens, [T], and of all keys with them, [M]."""
        positions_M = torch.arange(self.length + num_new, device=self.device)
        return positions_M[self.length :], positions_M
