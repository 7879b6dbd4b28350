"""Settings: defaults, files, Flower's flat form, and what is refused."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from fedcunet.config import QuantConfig, RunConfig
from fedcunet.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SETTINGS = sorted((ROOT / "simulations" / "settings").rglob("*.toml"))


def test_defaults_in_pyproject_are_those_of_the_dataclasses() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"] == RunConfig().nested()


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_shipped_settings_are_valid(path: Path) -> None:
    RunConfig.from_toml(path)


def test_the_settings_of_table_5_are_those_of_the_paper() -> None:
    found = {
        path.stem: RunConfig.from_toml(path) for path in SETTINGS if path.parent.name == "table5"
    }
    names = {name: config.quant.spec().name for name, config in found.items()}
    assert names == {
        "float32": "float32",
        "bw-qig-616": "BW-QIG(616)",
        "bw-qig-818": "BW-QIG(818)",
        "bw-alpha-qig-818": "BW-α-QIG(818)",
        "bw": "BW",
        "bw-alpha": "BW-α",
        "tw": "TW",
        "tw-qig-626": "TW-QIG(626)",
        "tw-qig-828": "TW-QIG(828)",
    }
    # They differ in what the table compares, and in the rate that quantised weights need.
    for config in found.values():
        same = config.replace(training__learning_rate=1e-3)
        assert dataclasses.replace(same, quant=QuantConfig()) == found["float32"].replace(
            training__learning_rate=1e-3
        )
        packed = config.quant.spec().input_bits != 32
        assert config.quant.storage == ("packed" if packed else "float32")


def test_flat_form_gives_the_setting_back() -> None:
    config = RunConfig().replace(seed=3, quant__bits="8,1,8", training__learning_rate=0.5)
    assert RunConfig.from_flat(config.flat()) == config
    assert config.training.learning_rate == 0.5


def test_values_as_typed_on_a_command_line_change_the_setting() -> None:
    typed = ["federation.partition=activity", "training.batch-size=4", "quant.bits=8,1,8"]
    config = RunConfig().with_values([*typed, "quant.alpha = true", "training.learning-rate=1e-3"])
    assert config.federation.partition == "activity"
    assert config.training.batch_size == 4
    assert config.quant == QuantConfig(bits="8,1,8", alpha=True)
    assert config.training.learning_rate == 1e-3
    hostile = RunConfig().with_values(["federation.attack=nan", "federation.attackers=0.2"])
    assert hostile.federation.attack == "nan"  # in TOML this is a number


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("federation.partition", "--set: expected key=value, found 'federation.partition'"),
        ("federation.partion=iid", "did you mean 'federation.partition'?"),
        ("training.batch-size=x", "expected a whole number, found 'x'"),
        ("update.bits=1" + 400 * "0", "expected a number, found 1000"),
        ("update.bits=1" + 5000 * "0", "expected a number, found '1000"),
        ("update.bits=" + 3000 * "[", "expected a number, found '[[["),
        ("training.batch-size=1", "expected 2 or more with crops of 64 pixels"),
        ("training.schedule=bla", "training.schedule: expected paper, constant, cosine or"),
    ],
)
def test_a_wrong_value_on_a_command_line_is_refused(typed: str, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        RunConfig().with_values([typed])
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[training]\nlearnin-rate = 1.0", "did you mean 'training.learning-rate'?"),
        ("[trainin]\n", "did you mean 'training'?"),
        ("seed = 1" + 5000 * "0", "wrong.toml: "),
        ("seed = " + 3000 * "[", "wrong.toml: "),
        ("[federation]\nvalidation-fraction = 0.8\ntest-fraction = 0.2", "expected 0 to 0.1"),
        ("[data]\ncache-dir = ''", "data.cache-dir: expected a folder"),
        ("[training]\nlearning_rate = 1.0", "unknown key 'training.learning_rate'"),
        ("[training]\nbatch-size = 'x'", "expected a whole number, found 'x'"),
        ("[training]\nbatch-size = true", "expected a whole number, found True"),
        ("[training]\noptimizer = 'rmsprob'", "expected one of rmsprop, sgd, adam"),
        ("training = 3", "'training': expected a table, found 3"),
        ("[quant]\nbits = '0,1,8'", "input bits: expected 2 to 16, or 32 for float32, found 0"),
        ("[quant]\nbits = '8,1,33'", "gradient bits: expected 2 to 16"),
        ("[quant]\nbits = '8,3,8'", "weight bits: expected 1 (binary), 2 (ternary) or 32"),
        ("[quant]\nbits = '8,1'", "expected three whole numbers I,W,G"),
        ("[quant]\nalpha = true", "expected with weights at 1 or 2 bits"),
        ("[quant]\ninput-range = 3.0", "expected a power of two"),
        ("[update]\ncodec = 'edn'", "unknown codec 'edn'; there are: float32"),
        ("[update]\nbits = 33", "must be a whole number from 1 to 8, not 33"),
        ("[update]\nfine-bits = 1", "expected 0, 2 to 16, or 32, found 1"),
        ("[data]\nsize = 100", "expected a multiple of 64, found 100"),
        ("[model]\norder = 2", "model.order: expected 0 to 1, found 2"),
        ("[federation]\nfraction = nan", "federation.fraction: expected 1e-06 to 1, found nan"),
        ("seed = -1", "seed: expected 0 to"),
        ("seed = = 1", "setting file"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_with_its_place(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        RunConfig.from_toml(path)
    assert said in str(refusal.value)
    assert str(refusal.value).startswith(f"setting file {path}")
    assert "\n" not in str(refusal.value)


def test_single_examples_are_trained_on_where_the_innermost_map_is_wide_enough() -> None:
    assert RunConfig().replace(training__batch_size=1, data__size=128).training.batch_size == 1


def test_a_missing_setting_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.toml: not found"):
        RunConfig.from_toml(tmp_path / "absent.toml")


def test_error_feedback_is_chosen_by_codec_and_participation() -> None:
    trellis = RunConfig().replace(update__codec="trellis", update__bits=0.5, federation__rounds=15)
    assert (trellis.error_feedback, trellis.update_codec) == (True, "trellis-wiener")
    rarely = trellis.replace(federation__fraction=0.5)
    assert (rarely.error_feedback, rarely.update_codec) == (False, "trellis")
    assert rarely.replace(update__error_feedback="on").update_codec == "trellis-wiener"
    assert trellis.replace(update__error_feedback="off").update_codec == "trellis"
    sign = rarely.replace(update__codec="sign", update__bits=1)
    assert (sign.error_feedback, sign.update_codec) == (True, "sign")
    assert not RunConfig().error_feedback
    assert RunConfig().replace(update__error_feedback="on").update_codec == "eden"


def test_prediction_and_long_differences_are_refused_where_they_make_no_sense() -> None:
    with pytest.raises(UserError, match=r"update\.prediction: expected a downlink\.codec"):
        RunConfig().replace(update__prediction=True)
    with pytest.raises(UserError, match=r"downlink\.bits: expected at most snapshot-bits, 8, fo"):
        RunConfig().replace(downlink__codec="float16", downlink__bits=16)
    with pytest.raises(UserError, match=r"downlink\.snapshot-bits: expected 4 to 8, found 9"):
        RunConfig().replace(downlink__snapshot_bits=9.0)
