import dataclasses
import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from damage import damaged

from params import PRESETS, Params, Sampling

ROOT = Path(__file__).parent.parent
PATHS = [path for folder in (ROOT, ROOT / "evaluation", ROOT / "sources") for path in folder.glob("*.py")]
SOURCE = "".join(path.read_text() for path in PATHS if path.name != "params.py")
FIELDS = [field.name for field in dataclasses.fields(Params)]
RANGES = {field.name: field.metadata["range"] for field in dataclasses.fields(Params) if "range" in field.metadata}


@pytest.mark.parametrize("field", RANGES)
def test_values_outside_the_range_are_refused_by_name_with_the_range(field):
    low, high = RANGES[field]
    for value in (low - 1, high + 1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"{field} = .*from {re.escape(str(low))} to {re.escape(str(high))}"):
            Params(**{field: value})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"CHANNELS": 2}, "CHANNELS = 2: allowed are 1, 3, 4"),
        ({"DIM_MULTS": ()}, r"DIM_MULTS = \(\)"),
        ({"DIM_MULTS": (1, 0)}, r"DIM_MULTS = \(1, 0\)"),
        ({"T_dim": 7}, "T_dim = 7.*even"),
        ({"H": 60}, "H = 60.*multiples of 8"),
        ({"W": 40, "PATCH": 2}, "W = 40.*multiples of 16"),
        ({"self_attention": (4,)}, r"self_attention = \(4,\).*0 to 3"),
        ({"cross_attention": (-1,)}, r"cross_attention = \(-1,\).*0 to 3"),
        ({"HEAD_DIM": 48}, "HEAD_DIM = 48.*256"),
        ({"prediction": "noise"}, "prediction = 'noise'.*eps, v, x0"),
        ({"compute": "float16"}, "compute = 'float16'.*float32, bfloat16"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr = True.*prediction = 'eps'"),
        ({"zero_terminal_snr": True, "prediction": "v", "loss_weight": "min_snr"}, "zero_terminal_snr.*min_snr"),
        ({"minutes": 5.0, "decay": "linear"}, "minutes = 5.0.*decay = 'linear'"),
        ({"REFINER": 8, "PATCH": 8}, "REFINER = 8: only with prediction = 'x0'.*prediction = 'eps'"),
        ({"REFINER": 8, "PATCH": 2, "prediction": "x0"}, "REFINER = 8.*PATCH of 4 or more.*PATCH = 2"),
        ({"accumulate": 5}, "accumulate = 5.*divisors of B = 64"),
    ],
)
def test_contradictions_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        Params(**wrong)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_configuration_survives_json(preset):
    assert Params.from_json(json.loads(json.dumps(preset.to_json()))) == preset


def test_a_field_of_another_version_is_named():
    with pytest.raises(ValueError, match=r"unknown fields .'colour'"):
        Params.from_json({**Params().to_json(), "colour": 1})


def test_fields_that_older_checkpoints_hold_are_passed_over():
    assert Params.from_json({**Params().to_json(), "max_bad": 0.1, "snr_gamma": 5.0, "heldout": 64}) == Params()


@pytest.mark.parametrize("whole", [PRESETS["cpu"], Sampling()], ids=["Params", "Sampling"])
def test_fields_of_any_kind_are_taken_or_refused_and_what_is_taken_can_be_compiled_in(whole):
    for saved in damaged(json.loads(json.dumps(whole.to_json()))):
        with suppress(ValueError):
            hash(type(whole).from_json(saved))
    assert repr(dataclasses.replace(PRESETS["cpu"], CHANNELS=3.0).CHANNELS) == "3"


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_read_somewhere(field):
    assert re.search(rf"\bconfig\.{field}\b", SOURCE)
