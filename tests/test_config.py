import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.config import from_mapping, override, read_yaml, to_mapping, write_yaml
from switchlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 3
    rate: float | None = 0.5
    kind: Literal["left", "right"] = "left"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ConfigError(f"inner.size must not be negative, got {self.size}.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    flag: bool = False
    steps: int = 1
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    table: Mapping[str, int] = field(default_factory=dict)
    either: int | str = 0
    anything: Any = None
    inner: Inner = field(default_factory=Inner)
    inners: tuple[Inner, ...] = ()
    maybe: Inner | None = None


numbers = st.integers(-(10**12), 10**12)
floats = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=12)
inners = st.builds(
    Inner,
    size=st.integers(0, 10**6),
    rate=st.none() | floats,
    kind=st.sampled_from(["left", "right"]),
)
outers = st.builds(
    Outer,
    name=texts,
    flag=st.booleans(),
    steps=numbers,
    names=st.lists(texts, max_size=3).map(tuple),
    weights=st.lists(floats, max_size=3).map(tuple),
    table=st.dictionaries(st.text("abc", min_size=1, max_size=3), numbers, max_size=3),
    either=numbers,
    anything=st.none() | st.lists(numbers, max_size=2),
    inner=inners,
    inners=st.lists(inners, max_size=2).map(tuple),
    maybe=st.none() | inners,
)


@given(outers)
def test_round_trip_through_mappings_and_yaml(
    tmp_path_factory: pytest.TempPathFactory, config: Outer
) -> None:
    assert from_mapping(Outer, to_mapping(config)) == config
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    write_yaml(path, config)
    assert from_mapping(Outer, read_yaml(path)) == config


def test_defaults_are_the_dataclasses() -> None:
    assert from_mapping(Outer, {"name": "a"}) == Outer(name="a")
    assert from_mapping(Outer, {"name": "a", "inner": {"size": 7}}).inner.rate == 0.5


def test_an_instance_in_a_mapping_stays() -> None:
    inner = Inner(size=9)
    assert from_mapping(Outer, {"name": "a", "inner": inner}).inner is inner


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "stepz": 1}, r"Unknown configuration key 'stepz'. Did you mean 'steps'\?"),
        ({"name": "a", "inner": {"siz": 1}}, r"'inner.siz'. Did you mean 'size'\?"),
        ({"name": "a", "zzz": 1}, r"'zzz'. Known: anything, either, flag"),
        ({}, r"Missing configuration key 'name'"),
        ({"name": 5}, r"name must be of type str, got 5"),
        ({"name": "a", "flag": "yes"}, r"flag must be of type bool, got 'yes'"),
        ({"name": "a", "flag": 1}, r"flag must be of type bool"),
        ({"name": "a", "steps": 1.5}, r"steps must be of type int, got 1.5"),
        ({"name": "a", "steps": True}, r"steps must be of type int, got True"),
        ({"name": "a", "steps": None}, r"steps must be of type int, got None"),
        ({"name": "a", "steps": "many"}, r"steps must be of type int, got 'many'"),
        ({"name": "a", "steps": "inf"}, r"steps must be of type int"),
        ({"name": "a", "inner": {"rate": "nan"}}, r"inner.rate must be of type float"),
        ({"name": "a", "inner": {"rate": 10**400}}, r"inner.rate must be of type float"),
        ({"name": "a", "inner": {"rate": [1]}}, r"inner.rate must be of type float, got \[1\]"),
        ({"name": "a", "inner": {"kind": "rihgt"}}, r"inner.kind is 'rihgt'. Did you mean 'right'"),
        ({"name": "a", "inner": 3}, r"inner must be a mapping, got 3"),
        ({"name": "a", "inner": {"size": -1}}, r"inner.size must not be negative"),
        ({"name": "a", "names": "b"}, r"names must be a list, got 'b'"),
        ({"name": "a", "names": ["b", 2]}, r"names\[1\] must be of type str, got 2"),
        ({"name": "a", "inners": [{"size": "x"}]}, r"inners\[0\].size must be of type int"),
        ({"name": "a", "table": [1]}, r"table must be a mapping, got \[1\]"),
        ({"name": "a", "either": [1]}, r"either must be of type str, got \[1\]"),
        ({1: 2}, r"Unknown configuration key '1'"),
        ([1], r"The configuration must be a mapping, got \[1\]"),
    ],
)
def test_an_error_names_the_key_and_the_value(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(Outer, values)


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3), (3.0, 3), ("3", 3), ("1e3", 1000), (2**70, 2**70)]
)
def test_whole_numbers_may_be_written_in_any_way(value: Any, expected: int) -> None:
    assert from_mapping(Inner, {"size": value}).size == expected


@pytest.mark.parametrize(("value", "expected"), [(1, 1.0), ("1e-3", 1e-3), (None, None)])
def test_real_numbers_as_yaml_reads_them(value: Any, expected: float | None) -> None:
    assert from_mapping(Inner, {"rate": value}).rate == expected


def test_a_union_takes_the_first_kind_that_fits() -> None:
    assert from_mapping(Outer, {"name": "a", "either": "auto"}).either == "auto"
    assert from_mapping(Outer, {"name": "a", "either": 4}).either == 4


def test_overrides_read_their_values_as_yaml() -> None:
    values = {"inner": {"size": 1, "rate": 0.5}, "name": "a"}
    changed = override(
        values, ["inner.size=5", "inner.rate=null", "names=[b, c]", "flag=true", "maybe.size=2"]
    )
    assert from_mapping(Outer, changed) == Outer(
        name="a", flag=True, names=("b", "c"), inner=Inner(size=5, rate=None), maybe=Inner(size=2)
    )
    assert values == {"inner": {"size": 1, "rate": 0.5}, "name": "a"}, "the original stays"
    assert override({"name": "a"}, ["name=x=y"])["name"] == "x=y"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", r"Cannot read the override 'steps'; write it as a.b=value"),
        ("=3", r"write it as a.b=value"),
        ("name.first=b", r"Cannot set 'name.first': 'name' is not a section"),
        ("steps=[1", r"Cannot read the value of 'steps=\[1'"),
        ("steps=2024-99-99", r"Cannot read the value of 'steps=2024-99-99'"),
        ("steps=" + "[" * 1000, r"Cannot read the value"),
    ],
)
def test_a_bad_override_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override({"name": "a"}, [assignment])


def test_reading_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: 1\nb: {c: 2}\n")
    assert read_yaml(path) == {"a": 1, "b": {"c": 2}}
    path.write_text("# nothing yet\n")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"There is no configuration file '.*c.yaml'"),
        (b"a: [1", r"Cannot read the configuration '.*c.yaml'"),
        (b"\xff\xfe\xff", r"Cannot read the configuration"),
        (b"a: 2024-99-99", r"Cannot read the configuration"),
        (b"[" * 1000, r"Cannot read the configuration"),
        (b"!!python/object/apply:os.getcwd []", r"Cannot read the configuration"),
        (b"[1, 2]", r"must be a mapping of sections"),
    ],
)
def test_an_unreadable_file_is_an_error_with_its_name(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_sections_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().size = 4  # type: ignore[misc]


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x\n", "a: &a [*a]\n"])
def test_aliases_are_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"aliases \(\*name\) are not supported"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="aliases"):
        override({}, ["a=[&x 1, *x]"])


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path):
    levels = ["a0: &a0 [1, 1]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(levels))
    with pytest.raises(ConfigError, match="aliases"):
        read_yaml(path)


def test_a_huge_file_is_no_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"a: " + b"1" * 2**20)
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_yaml(path)
