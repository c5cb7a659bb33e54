"""The config of an SAE in JSON."""

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from r1sae_fast.errors import CheckpointError
from r1sae_fast.sae import MODES, SaeConfig

configs = st.integers(1, 1000).flatmap(
    lambda d_sae: st.builds(
        SaeConfig,
        st.integers(1, 1000),
        st.just(d_sae),
        st.integers(0, d_sae),
        st.sampled_from(MODES),
        st.booleans(),
    )
)


@given(configs)
def test_round_trip(config: SaeConfig) -> None:
    data = json.loads(json.dumps(config.to_json()))
    assert SaeConfig.from_json(data, "here") == config
    assert SaeConfig.from_json({**data, "later": 1}, "here") == config


GOOD = SaeConfig(4, 8, 2).to_json()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([1], "here is not the config of an SAE: found format 'list'"),
        ({}, "found format None"),
        ({**GOOD, "format": "other"}, "'other'"),
        ({**GOOD, "version": 3}, "version 3; this release reads versions up to 2"),
        ({**GOOD, "version": 2}, "here lacks transcoder, skip_connection"),
        ({key: value for key, value in GOOD.items() if key != "k"}, "here lacks k"),
        ({**GOOD, "k": 9}, "here: k is 9; expected 0 to d_sae = 8"),
        ({**GOOD, "k": "2"}, "here: k is '2'; expected an int"),
        ({**GOOD, "d_in": None}, "d_in is None"),
        ({**GOOD, "mode": "relu"}, "mode is 'relu'"),
        ({**GOOD, "mode": ["topk"]}, "mode is"),
        ({**GOOD, "tied": "yes"}, "tied is 'yes'"),
    ],
)
def test_bad_configs_are_refused(data: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        SaeConfig.from_json(data, "here")
