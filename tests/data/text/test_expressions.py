import time

import pytest

from switchlm.data.text.expressions import check_expression
from switchlm.errors import DataError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


@pytest.mark.parametrize(
    "pattern",
    [
        GPT2, QWEN, POSSESSIVE, " {2,}", r"\A +| +\z", r"\n+|▁*[\p{L}\p{M}\p{N}_]+|▁+",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))", r"[一-龥ぁ-ゖ]+", r"(?<=a)b",
        r"(?<n>ab)", r"(\d{3})+(?!\d)",
        r"\s+$", "(?=(a+))a*b",  # quadratic
        r" ?[^(\s|[.,!?…。、।])]+", r"(?:\r?\n)+(?!\r?\n)", "",
    ],
)  # fmt: skip
def test_expressions_of_tokenizers_in_use_pass(pattern):
    check_expression(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b", "(a*)*", "(.*)*x", "(x+x+)+y", r"([a-z]+)*\d", r"(\w\w*)+!", r"^(\w+\s?)*$",
        "(a{1,}){2,}", "a{1,3}+*", "((a{1000}){1000}){1000}", "a{100000}",
        "a*a*b", "(a|a)*b", "(?:a|aa)+$", r"\s+\s+\s+x", "x(a|a)*b", "(?:[ab]|[bc]|[ca])*d",
        r"(a+)\1", r"(?<n>a)\k<n>", r"(?<n>a\g<n>?b)", "(?~a)", "(?{x})",
        r"\p{Greek}{0,48}\p{Greek}{0,48}\p{Greek}{0,48}\p{Greek}{0,48}!", "(", ")", "[", "a" * 5000,
        "[ñü]{0,48}[ñü]{0,48}[ñü]{0,48}[ñü]{0,48}[çø]", "(?:é|í|éí){0,24}[çø]",
        "[éñ]{0,48}[íñ]{0,48}[óñ]{0,48}[úñ]{0,48}[çø]", "(?:éíó|é|í|ó|óú){0,24}[çø]",
        "[é-ñ]{0,48}[ñ-ü]{0,48}[ñ-ü]{0,48}[ñ-ü]{0,48}ç",
    ],
)  # fmt: skip
def test_expressions_that_take_time_without_bound_are_refused(pattern):
    start = time.thread_time()
    with pytest.raises(DataError, match="regular expression"):
        check_expression(pattern)
    assert time.thread_time() - start < 2
