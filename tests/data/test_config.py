import pytest

from switchlm.config import from_mapping
from switchlm.data.config import DataConfig
from switchlm.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_length": 10**12}, r"data.input_length must lie in \[4, 65536\]"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"noise_density": 1.0}, "between 0 and 1, got 1.0"),
        ({"mean_span": 0.5}, "data.mean_span"),
        ({"held_out_share": 0.9}, "data.held_out_share"),
        ({"vocabulary_size": 10}, "data.vocabulary_size"),
        ({"text_column": ""}, "data.text_column"),
        ({"group_column": ""}, "data.group_column"),
        ({"mixing": "temprature"}, "Did you mean 'temperature'"),
        ({"batchsize": 3}, "Did you mean 'batch_size'"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(DataConfig, values)


def test_the_defaults_are_those_of_t5():
    config = from_mapping(DataConfig, {"sources": ["python:stdlib"]})
    assert (config.noise_density, config.mean_span, config.input_length) == (0.15, 3.0, 512)
