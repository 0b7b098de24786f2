"""switchlm inspect: sizes, FLOPs and layers of a model; with text, its expert assignment."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from switchlm.cli import options
from switchlm.errors import ConfigError
from switchlm.files import to_json

if TYPE_CHECKING:
    from switchlm.evaluation.routing import LayerRouting
    from switchlm.model.config import ModelConfig

MOST_EXPERTS = 16  # shown of a layer, the busiest first


def inspect(
    model: options.OptionalModel = None,
    preset: Annotated[str | None, typer.Option(help="Or a model by name, without weights.")] = None,
    data: options.Data = None,
    batches: options.Batches = 4,
    batch_size: options.BatchSize = None,
    input_length: options.InputLength = None,
    cache: options.Cache = None,
    target_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a row of targets, for FLOPs; as in training."),
    ] = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Show the size of a model, and which expert takes which tokens."""
    if (model is None) == (preset is None):
        raise ConfigError("Give either --model DIR or --preset NAME.")
    from switchlm.recipes.trained_with import lengths, trained_with

    layers: list[LayerRouting] = []
    if model is None:
        from switchlm.model.presets import preset as find_preset

        if data:
            raise ConfigError("--data needs --model: a preset has no weights to route text with.")
        config = find_preset(str(preset))
    elif data:
        from switchlm.evaluation.routing import routing_statistics

        loaded, tokenizer = options.open_model(model, device)
        config = loaded.config
        read, sources, _ = options.read_batches(
            model,
            tokenizer,
            data,
            batches=batches,
            batch_size=batch_size,
            input_length=input_length,
            cache=cache,
        )
        layers = routing_statistics(loaded, read, tokenizer, sources)
    else:
        from switchlm.huggingface.load import load_config

        config = load_config(model, report=options.note)

    sections = {} if model is None else trained_with(model)
    sizes = describe(config, *lengths(sections, input_length, target_length))
    if model is not None:
        from switchlm.huggingface.load import load_quantisation

        quantised = load_quantisation(model)
        sizes["quantisation"] = quantised and {
            key: getattr(quantised, key) for key in ("bits", "group_size", "what")
        }
    if as_json:
        routing = {"routing": [dataclasses.asdict(layer) for layer in layers]} if layers else {}
        typer.echo(to_json({"model": model or preset, **sizes, **routing}))
        return
    console = Console()
    console.print(_size_table(sizes))
    for layer in layers:
        console.print(_layer_table(dataclasses.asdict(layer)))
    if data and not layers:
        options.note("This model is dense: it has no experts.")


def describe(config: "ModelConfig", input_length: int, target_length: int) -> dict[str, Any]:
    """Return parameters, FLOPs, shape, layers and router as plain values."""
    from switchlm.config import to_mapping
    from switchlm.model import count

    shape = to_mapping(config)
    router = shape.pop("router")

    def kinds(num_layers: int, decoder: bool) -> list[str]:
        sparse = [config.is_sparse(layer, decoder=decoder) for layer in range(num_layers)]
        return ["switch" if is_sparse else "dense" for is_sparse in sparse]

    return {
        "parameters": count.parameters(config),
        "active_parameters": count.active_parameters(config),
        "flops_per_token": count.flops_per_token(config, input_length, target_length),
        "input_length": input_length,
        "target_length": target_length,
        "encoder_layers": kinds(config.num_encoder_layers, decoder=False),
        "decoder_layers": kinds(config.num_decoder_layers, decoder=True),
        "shape": shape,
        "router": router if config.num_experts else None,
    }


def _size_table(sizes: dict[str, Any]) -> Table:
    shape = sizes["shape"]
    table = Table(show_header=False)
    lengths = f"{sizes['input_length']} inputs, {sizes['target_length']} targets"
    rows = {
        "parameters": f"{sizes['parameters']:,}",
        "active parameters per token": f"{sizes['active_parameters']:,}",
        "forward FLOPs per token": f"{sizes['flops_per_token']:,.0f} ({lengths})",
        "vocabulary": f"{shape['vocabulary_size']:,}",
        "d_model, d_ff": f"{shape['d_model']}, {shape['d_ff']}",
        "heads x d_kv": f"{shape['num_heads']} x {shape['d_kv']}",
        "encoder layers": _layer_line(sizes["encoder_layers"]),
        "decoder layers": _layer_line(sizes["decoder_layers"]),
    }
    if sizes["router"]:
        router = sizes["router"]
        capacity = router["expert_capacity"] or router["evaluation_capacity_factor"]
        kind = "capacity" if router["expert_capacity"] else "capacity factor"
        rows["experts per Switch layer"] = f"{shape['num_experts']}"
        rows["router"] = f"mode {router['mode']}, " + (
            "dropless" if capacity is None else f"{kind} {capacity} in evaluation"
        )
    if sizes.get("quantisation"):
        quantised = sizes["quantisation"]
        rows["quantised"] = f"{quantised['what']} to {quantised['bits']} bits"
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def _layer_line(layers: list[str]) -> str:
    return f"{len(layers)}, of them Switch layers: {layers.count('switch')}"


def _layer_table(layer: "dict[str, Any]") -> Table:
    """Show the load of each expert by kind of token and source, and where tokens are dropped."""
    from switchlm.report.write import dead_experts, describe_expert

    total, loads = sum(layer["load_E"]), layer["load_E"]
    dead = dead_experts(loads)
    several = len(layer["source_load"]) > 1
    table = Table(
        title=f"{layer['name']}: {layer['dropped']:.1%} dropped, mean gate {layer['gate']:.2f}",
        title_justify="left",
    )
    table.add_column("expert", justify="right")
    table.add_column("share", justify="right")
    table.add_column("serves most")
    if several:
        table.add_column("more than its share of")
    table.add_column("most frequent tokens")
    busiest = [one for one in sorted(range(len(loads)), key=lambda one: -loads[one]) if loads[one]]
    for expert in busiest[:MOST_EXPERTS]:
        found = describe_expert(layer, expert, list(layer["source_load"]))
        sources = ", ".join(f"{name} x{times:.1f}" for name, times in found["sources"])
        table.add_row(
            str(expert),
            f"{loads[expert] / total:.1%}",
            ", ".join(f"{name} {share:.0%}" for name, share in found["classes"]),
            *([Text(sources)] if several else []),
            Text(" ".join(map(repr, found["tokens"]))),
        )
    remarks = [f"{len(dead)} of {len(loads)} experts are dead"]
    if len(busiest) > MOST_EXPERTS:
        remarks.append(f"{len(busiest) - MOST_EXPERTS} more not shown (all with --json)")
    if layer["dropped"]:
        by_place = layer["dropped_by_place"]
        worst = max(range(len(by_place)), key=lambda place: by_place[place])
        start, end = worst / len(by_place), (worst + 1) / len(by_place)
        remarks.append(f"most drops from {start:.0%} to {end:.0%} of a row: {by_place[worst]:.1%}")
    table.caption = "; ".join(remarks)
    table.caption_justify = "left"
    return table
