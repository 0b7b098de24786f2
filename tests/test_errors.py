import pytest

from switchlm import errors
from switchlm.errors import MissingExtraError, SwitchLMError, nearest


def test_a_similar_name_is_suggested() -> None:
    known = ["capacity_factor", "d_model", "num_experts"]
    assert nearest("capacity_facto", known) == " Did you mean 'capacity_factor'?"
    assert nearest("num_expert", known) == " Did you mean 'num_experts'?"


def test_without_a_similar_name_all_are_listed_in_order() -> None:
    assert nearest("zzz", {"beta", "alpha"}) == " Known: alpha, beta."


def test_a_missing_extra_names_the_command_to_install_it() -> None:
    error = MissingExtraError("pyarrow", "data", "Reading Parquet")
    assert str(error) == (
        "Reading Parquet needs the package 'pyarrow', which is not installed. "
        "Install it with: pip install 'switchlm[data]'"
    )


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if getattr(kind, "__module__", "") == errors.__name__ and isinstance(kind, type)
    ],
)
def test_every_error_is_the_packages_own(kind: type) -> None:
    assert issubclass(kind, SwitchLMError)
    assert kind.__doc__
