"""Fig. 5 and the settings of a sweep: lines by hand, and that every row is a setting."""

from pathlib import Path

import pytest

import fedcunet.sweep as sweep
from fedcunet.config import RunConfig
from fedcunet.measured import NotMeasured, StepNeed
from fedcunet.sweep import draw_figure, fit_line, lines, settings, sweep_depths, swept


def test_the_deepest_network_is_where_the_line_meets_the_budget() -> None:
    line = fit_line("s", {2: 220, 3: 330, 4: 430}, {}, 1000)
    assert line is not None
    assert line.bytes_per_unet == 100
    assert line.deepest == 9  # 430 + 5 * 100 <= 1000 < 430 + 6 * 100
    assert line.deepest_is == "extrapolated"
    assert line.at(9) == 930
    # The line through 3 and 4 says 230 where 220 was measured.
    assert line.linearity_error == pytest.approx(10 / 220)


def test_what_fits_to_the_byte_fits_where_the_slope_is_a_fraction() -> None:
    measured = {2: 5285, 5: 5866}
    line = fit_line("s", measured, {}, 0)
    assert line is not None
    full = fit_line("s", measured, {}, line.at(16))
    assert full is not None
    assert full.deepest == 16


def test_what_was_measured_on_both_sides_of_the_budget_is_no_extrapolation() -> None:
    line = fit_line("s", {2: 200, 3: 300, 4: 400}, {}, 350)
    assert line is not None
    assert (line.deepest, line.deepest_is) == (3, "measured")
    apart = fit_line("s", {2: 200, 4: 400}, {}, 350)
    assert apart is not None
    assert (apart.deepest, apart.deepest_is) == (3, "extrapolated")
    assert apart.linearity_error is None
    assert fit_line("s", {2: 200}, {3: "too large"}, 350) is None


def test_every_row_is_a_setting_of_a_dunet() -> None:
    configs = {name: RunConfig().replace(**values) for name, values in settings().items()}
    assert len({str(config.quant) for config in configs.values()}) == len(configs)
    assert {config.quant.storage for config in configs.values()} == set(sweep.LEVELS)
    assert configs["float32"] == RunConfig()
    assert set(lines()) <= set(configs)
    for config in configs.values():
        spec = config.quant.spec()
        assert config.quant.storage == "float32" or spec.source_bits == spec.input_bits


def test_rows_and_lines_keep_the_scale_of_gradients_alone() -> None:
    config = RunConfig().replace(quant__bits="4,1,4", quant__gradient_scale="tensor")
    for values in settings().values():
        found = swept(config, values)
        assert found == RunConfig().replace(quant__gradient_scale="tensor", **values)


def test_depths_beyond_the_memory_are_not_measured_and_said_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def need(config: RunConfig, num_landmarks: int, device: str) -> StepNeed:
        unets, naive = config.model.unets, config.quant.storage == "float32"
        if naive and unets > 3:
            raise NotMeasured("too large")
        peak = (100 if naive else 20) * unets
        return StepNeed(peak_bytes=peak, static_bytes=1, resident_bytes=1, growth_bytes=1)

    monkeypatch.setattr(sweep, "measure_need", need)
    found = {line.name: line for line in sweep_depths(RunConfig(), 16, [2, 3, 4, 5], 1000)}
    assert set(found) == set(lines())
    assert found["float32"].measured == {2: 200, 3: 300}
    assert found["float32"].not_measured == {4: "too large", 5: "too large"}
    assert found["float32"].deepest == 10
    assert found["float32 recomputed"].deepest == 50
    assert found["float32 recomputed"].linearity_error == 0
    draw_figure(tmp_path / "deep" / "fig5.png", list(found.values()), "a title", 1000)
    assert (tmp_path / "deep" / "fig5.png").read_bytes().startswith(b"\x89PNG")
