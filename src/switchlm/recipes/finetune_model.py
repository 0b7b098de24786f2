"""The model of a fine-tuning run: loaded, its dropout and routing set, and in part frozen.

What a run writes of it: the whole model, and adapters by themselves where it trains some.
"""

import hashlib
import json
from collections.abc import Callable, Sequence

import torch

from switchlm.checkpoint.adapters import AdapterConfig, save_adapters
from switchlm.checkpoint.files import replace_file
from switchlm.checkpoint.huggingface import fill, load, save
from switchlm.checkpoint.run_folder import RunFolder
from switchlm.checkpoint.weights import read_json
from switchlm.data.task import Task
from switchlm.data.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, DataError
from switchlm.model import lora
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import AnyMesh, Mesh
from switchlm.recipes.config import RunConfig
from switchlm.recipes.finetune_config import FinetuneConfig, FinetuneRun
from switchlm.recipes.pretrain import build_model, default_device
from switchlm.recipes.start import open_tokenizer
from switchlm.training.trainable import train_only

Say = Callable[[str], None]


def open_model(
    config: FinetuneRun, mesh: AnyMesh, report: Say
) -> tuple[SwitchTransformer, Tokenizer]:
    """Load the model as configured, on the default device, with only what shall train unfrozen.

    On many processes it is sharded over the mesh, and all of it trains.
    """
    settings = config.finetune
    with mesh.first_on_node("model"):  # which may come from the hub
        tokenizer = open_tokenizer(settings.model, "model to fine-tune")
    if isinstance(mesh, Mesh):
        model = build_model(RunConfig(model=config.model, training=config.training), mesh)
        fill(model, settings.model, report=report, group=mesh.storage)
        return model, tokenizer
    model, _ = load(settings.model, dtype=torch.float32, device=default_device(), report=report)
    model = reconfigured(model, config.model)
    if settings.lora_rank is None:
        train_only(model, settings.trainable)
    else:
        lora.apply(model, settings.lora_rank, settings.lora_alpha, config.training.seed)
    return model, tokenizer


def reconfigured(model: SwitchTransformer, config: ModelConfig) -> SwitchTransformer:
    """Return a model of that configuration with the weights of `model`, which it takes over."""
    state = model.state_dict()
    with torch.device("meta"):
        other = SwitchTransformer(config)
    for name, place in other.state_dict().items():
        if name not in state:  # selection biases, where the router is to be balanced by them now
            state[name] = torch.zeros(place.shape, device=model.embedding.weight.device)
    other.load_state_dict({name: state[name] for name in other.state_dict()}, assign=True)
    return other


def check_base(model: SwitchTransformer, folder: RunFolder, name: str) -> None:
    """Note what of the model stays as it is, which no checkpoint of the run holds.

    Raises CheckpointError where a resumed run finds something else under the name of its model.
    """
    digest = hashlib.sha256()
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{key} {int(torch.hash_tensor(parameter).view(torch.int64))}\n".encode())
    noted = {"frozen": digest.hexdigest()}
    if not folder.base.exists():
        replace_file(folder.base, json.dumps(noted).encode())
    elif read_json(folder.root, folder.base.name) != noted:
        raise CheckpointError(
            f"The model {name!r} is not the one that the run in {str(folder.root)!r} began with: "
            "its weights have changed since, and the run's checkpoints hold only what it trains. "
            "Put the old model back to resume, or choose another --out for a new run."
        )


def check_spelling(tasks: Sequence[Task], tokenizer: Tokenizer, model: str) -> None:
    """Raise DataError for a label that the tokenizer cannot write: no answer would be right."""
    for task in tasks:
        for label in task.labels or ():
            spelt = tokenizer.decode(tokenizer.encode(label)).strip()
            if spelt != label:
                raise DataError(
                    f"The model {model!r} cannot learn the task {task.name!r}: its tokenizer turns "
                    f"the label {label!r} into {spelt!r}. Take a model whose vocabulary covers the "
                    "task, or a file with other words for the labels."
                )


def keep(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    settings: FinetuneConfig,
    folder: RunFolder,
    report: Say,
) -> None:
    """Write the model as the best of the run, adapters both alone and melted into it."""
    if settings.lora_rank is not None:
        about = AdapterConfig(
            rank=settings.lora_rank, alpha=settings.lora_alpha, base=settings.model
        )
        save_adapters(model, about, folder.adapters)
        model = lora.merged(model)
    save(model, tokenizer, folder.model, report=report)
