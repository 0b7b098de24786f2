"""Write docs/settings.md: every setting, its type, default and meaning, from the dataclasses.

python docs/make_settings.py
"""

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

from switchlm.data.config import DataConfig
from switchlm.model.config import Initialisation, ModelConfig, RouterConfig
from switchlm.parallel.mesh import MeshConfig
from switchlm.recipes.distill_config import DistillationConfig
from switchlm.recipes.finetune_config import FinetuneConfig
from switchlm.training.config import KernelsConfig, TrainingConfig

PAGE = Path(__file__).parent / "settings.md"
SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "model.initialisation": Initialisation,
    "router": RouterConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "mesh": MeshConfig,
    "kernels": KernelsConfig,
    "finetune": FinetuneConfig,
    "distillation": DistillationConfig,
}
HEAD = """# Settings

`--set section.name=value` on the command line, `section:` and `name: value` in YAML; a run writes
what it resolved to `config.yaml`. Presets give the section `model`. Written by
`python docs/make_settings.py`.
"""


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for section, cls in SECTIONS.items():
        meanings, hints = described(cls), typing.get_type_hints(cls)
        parts.append(f"## {section}\n\n| setting | type | default | meaning |\n|---|---|---|---|")
        rows = [
            f"| `{field.name}` | {typed(hints[field.name])} | {default(field)} | "
            f"{meanings[field.name]} |"
            for field in dataclasses.fields(cls)
            if not is_section(field)
        ]
        parts[-1] += "\n" + "\n".join(rows)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def described(cls: type) -> dict[str, str]:
    """Return what the docstring says of each field: lines `name, other: meaning`."""
    names = {field.name for field in dataclasses.fields(cls)}
    found: dict[str, str] = {}
    current: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        match = re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)", line)
        if match and set(match[1].split(", ")) <= names:
            current = match[1].split(", ")
            found |= dict.fromkeys(current, match[2])
        elif line.startswith("    ") and current:
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        else:
            current = []
    return {name: text.replace("|", "\\|") for name, text in found.items()}


def typed(hint: Any) -> str:
    """Return a type as a user thinks of it: alternatives spelt out, null for None."""
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(map(typed, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"list of {typed(typing.get_args(hint)[0])}"
    return "null" if hint is types.NoneType else str(hint.__name__)


def default(field: "dataclasses.Field[Any]") -> str:
    """Return the default as YAML has it; nothing where there is none."""
    if field.default is dataclasses.MISSING:
        return ""
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def is_section(field: "dataclasses.Field[Any]") -> bool:
    """Whether the field is a section of its own."""
    return field.default_factory is not dataclasses.MISSING


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
