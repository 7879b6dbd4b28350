"""Robust rules: values worked out by hand, breakdown points, honest ranges, order, memory."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcunet import update_file
from fedcunet.aggregation import MeanAccumulator
from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure, UserError
from fedcunet.layout import Layout
from fedcunet.robust import RULES, aggregate, breakdown, check_breakdown
from fedcunet.update_file import UpdateFile
from fedcunet.variances import to_logarithms, to_variances

TWO = Layout.vector(2)
NORM = Layout.from_tensors(
    {"conv.weight": (2,), "norm.running_mean": (1,), "norm.running_var": (1,)},
    fine={"norm.running_mean", "norm.running_var"},
)


def aggregated(
    rule: str,
    rows: Sequence[Sequence[float]] | np.ndarray,
    folder: Path,
    *,
    attackers: int = 1,
    layout: Layout = TWO,
    state: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    values = np.asarray(rows, dtype=np.float32)
    state_N = np.zeros(values.shape[1]) if state is None else np.asarray(state)
    with UpdateFile(folder, values.shape[1]) as updates:
        for row, weight in zip(values, weights or [1] * len(values), strict=True):
            updates.add_parts([(slice(0, row.size), row)], weight)
        return aggregate(rule, updates, attackers, layout, state_N.astype(np.float32))


FIVE = [[1, -1000], [2, 5], [3, 7], [4, 6], [1e9, 5]]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("trimmed-mean", [(2 + 3 + 4) / 3, (5 + 5 + 6) / 3]),
        ("median", [3, 5]),
    ],
)
def test_rules_of_each_coordinate_by_hand(rule: str, expected: list[float], tmp_path: Path) -> None:
    assert aggregated(rule, FIVE, tmp_path) == pytest.approx(expected, rel=1e-6)


def test_the_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle(tmp_path: Path) -> None:
    assert aggregated("median", FIVE[:4], tmp_path).tolist() == [2.5, 5.5]


def test_krum_takes_the_mean_of_those_nearest_to_their_neighbours(tmp_path: Path) -> None:
    # n = 5, f = 1: the two nearest of the others count, and two are taken. On the line at 0, 1, 3,
    # 4, 100 their squares sum to 1 + 9, 1 + 4, 4 + 1, 1 + 9, and far more.
    rows = [[x, 0] for x in (0, 1, 3, 4, 100)]
    assert aggregated("multi-krum", rows, tmp_path).tolist() == [2, 0]
    # At equal scores, here 0 + 1 of each of the first four, the lower ids win.
    assert aggregated("multi-krum", [[0, 0], [0, 0], [1, 0], [1, 0], [9, 0]], tmp_path)[0] == 0


def test_norms_are_clipped_to_their_median_and_the_mean_is_weighted(tmp_path: Path) -> None:
    # Norms 5, 10 and 50: the median is 10, and the third becomes a fifth of itself.
    rows = [[3, 4], [6, 8], [30, -40]]
    expected = [(3 * 1 + 6 * 1 + 6 * 2) / 4, (4 * 1 + 8 * 1 - 8 * 2) / 4]
    found = aggregated("norm-clipping", rows, tmp_path, weights=[1, 1, 2])
    assert found == pytest.approx(expected, rel=1e-6)
    # An update of zeros is no longer than any limit, and a limit of zero leaves nothing.
    assert aggregated("norm-clipping", [[0, 0], [9, 0], [9, 0]], tmp_path).tolist() == [6, 0]
    assert aggregated("norm-clipping", [[0, 0], [0, 0], [9, 0]], tmp_path).tolist() == [0, 0]


@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "multi-krum"])
def test_only_clipping_weights_by_examples_which_may_be_a_lie(rule: str, tmp_path: Path) -> None:
    plain = aggregated(rule, FIVE, tmp_path)
    lied = aggregated(rule, FIVE, tmp_path, weights=[1, 1, 1, 1, 1e6])
    assert plain.tolist() == lied.tolist()


def test_batchnorm_statistics_by_hand(tmp_path: Path) -> None:
    # Means 1, 2, 3 and the attacker's 1e6; variances 4, 6, 5 and 1e6; the state is 0 and 1.
    rows = np.array([[0, 0, 1, 4], [0, 0, 2, 6], [0, 0, 3, 5], [0, 0, 1e6, 1e6]])
    rows[:, 3] = to_logarithms(rows[:, 3])
    found = aggregated("median", rows, tmp_path, layout=NORM, state=[0, 0, 0, 0])
    # Mean (2 + 3) / 2; the mean of 5 and 6 in logarithms and the median of 2.25, 0.25, 0.25, huge.
    assert found[:3].tolist() == [0, 0, 2.5]
    assert to_variances(found[3:]) == pytest.approx([30**0.5 + (0.25 + 2.25) / 2], rel=1e-5)


@pytest.mark.parametrize("rule", ["multi-krum", "norm-clipping"])
def test_large_statistics_neither_decide_distances_nor_get_through(
    rule: str, tmp_path: Path
) -> None:
    rows = np.zeros((7, 4), dtype=np.float32)
    rows[:, 0] = 1
    rows[:5, 2:] = [[100 * k, np.log(5000 * k + 1)] for k in range(5)]  # honest, and far apart
    rows[5:, 2:] = [1e8, 1e9]  # the weights of two attackers are as those of the others
    found = aggregated(rule, rows, tmp_path, layout=NORM, attackers=2)
    assert found[:2].tolist() == [1, 0]
    assert found[2] == 300  # the median of 0 to 400 and twice 1e8
    assert 0 < found[3] <= np.log(20_001 + 400**2)


def test_without_attackers_trimming_is_the_mean_of_all_with_its_mixture(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    state = np.array([0, 0, 0.5, 4], dtype=np.float32)
    mean = MeanAccumulator(NORM, state)
    for row in rows:
        mean.add(row, 1)
    found = aggregated("trimmed-mean", rows, tmp_path, attackers=0, layout=NORM, state=state)
    assert found == pytest.approx(mean.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "attackers", "least"),
    [
        ("mean", 3, 1),
        ("trimmed-mean", 2, 5),
        ("median", 2, 5),
        ("norm-clipping", 2, 5),
        ("multi-krum", 2, 7),
        ("multi-krum", 0, 3),
    ],
)
def test_breakdown_points_are_those_of_the_papers(rule: str, attackers: int, least: int) -> None:
    assert breakdown(rule, attackers, least) == ""
    said = breakdown(rule, attackers, least - 1)
    assert said == f"{rule} against {attackers} attackers needs {least} updates, found {least - 1}"


def test_too_few_updates_are_never_aggregated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="median against 2 attackers needs 5 updates, found 4"):
        aggregated("median", FIVE[:4], tmp_path, attackers=2)


def test_a_round_too_small_for_the_rule_is_refused_in_one_line() -> None:
    config = RunConfig().replace(
        federation__aggregation="multi-krum",
        federation__assumed_attackers=0.3,
        federation__fraction=0.5,
    )
    check_breakdown(config, 20)
    with pytest.raises(UserError) as refusal:
        check_breakdown(config, 10)
    assert str(refusal.value) == (
        "federation.aggregation: multi-krum against 2 attackers needs 7 updates, found 5 in a round"
        " (0.3 of 5 clients, federation.assumed-attackers)"
    )


anything = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["trimmed-mean", "median"]), st.integers(1, 4))
def test_whatever_a_minority_sends_the_result_stays_within_the_honest_range(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rule: str, attackers: int
) -> None:
    honest = data.draw(st.integers(attackers + 1, attackers + 4))
    rows = data.draw(
        st.lists(
            st.tuples(anything, anything, anything, st.floats(-12, 22, width=32)),
            min_size=honest + attackers,
            max_size=honest + attackers,
        )
    )
    values = np.array(rows, dtype=np.float32)
    values[honest:, 3] *= 2.0**90
    order = data.draw(st.permutations(range(len(rows))))
    with np.errstate(over="ignore"):  # a square of 2^100 has no room in float32
        found = aggregated(
            rule, values[order], tmp_path_factory.getbasetemp(), attackers=attackers, layout=NORM
        )
    low, high = values[:honest].min(axis=0), values[:honest].max(axis=0)
    assert (low[:3] <= found[:3]).all()
    assert (found[:3] <= high[:3]).all()
    # The variance, as far as it can be told, to which the spread of the means adds.
    least, most = (
        to_variances(low[3:]),
        to_variances(high[3:]) + (float(high[2]) - float(low[2])) ** 2,
    )
    assert to_logarithms(least) - 1e-5 <= found[3] <= to_logarithms(most) + 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_blocks_of_coordinates_give_the_same_result(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(2).normal(size=(7, 301)).astype(np.float32)
    layout = Layout.vector(301)
    whole = aggregated(rule, rows, tmp_path, layout=layout, attackers=2)
    monkeypatch.setattr(update_file, "BLOCK_BYTES", 4 * 7 * 50)
    parts = aggregated(rule, rows, tmp_path, layout=layout, attackers=2)
    assert whole == pytest.approx(parts, abs=1e-7)
    assert aggregated(rule, rows, tmp_path, layout=layout, attackers=2).tolist() == parts.tolist()


def test_updates_come_back_from_parts_in_any_order_and_leave_no_file(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(2, 6)
    with UpdateFile(tmp_path / "new", 6) as updates:
        for row in rows:
            updates.add_parts([(slice(4, 6), row[4:]), (slice(0, 4), row[:4])], 1)
        assert updates.columns(slice(1, 5)).tolist() == rows[:, 1:5].tolist()
        blocks = [values for _, values in updates.blocks()]
        assert np.concatenate(blocks, axis=1).tolist() == rows.tolist()
        assert list((tmp_path / "new").iterdir()) == []  # it has no name


def test_a_folder_that_cannot_be_written_ends_the_run_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match=r"federation.scratch-dir .*file.*40 bytes for each"):
        UpdateFile(tmp_path / "file", 10)


def test_every_order_of_the_same_updates_gives_the_same_middle(tmp_path: Path) -> None:
    results = {
        rule: {
            tuple(aggregated(rule, [FIVE[k] for k in order], tmp_path).tolist())
            for order in itertools.permutations(range(5))
        }
        for rule in ("median", "trimmed-mean")
    }
    assert {rule: len(found) for rule, found in results.items()} == {"median": 1, "trimmed-mean": 1}
