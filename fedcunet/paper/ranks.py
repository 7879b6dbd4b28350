"""Whether two orders of merit are the same: ranks, pairs that agree, Kendall's tau."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Our order of some rows beside the paper's, over the rows that have both figures."""

    pairs: int
    agree: int  # pairs that both put in the same order
    differ: tuple[tuple[str, str], ...]  # pairs in the other order: (better in the paper, worse)
    tied: int  # pairs that are equal in one of the two
    kendall_tau: float | None  # tau-b; None with fewer than two rows, or all equal


def ranks(values: Mapping[str, float | None], *, lower_is_better: bool) -> dict[str, int | None]:
    """Order of merit from 1; equal values share the better rank, None has none."""
    sign = 1 if lower_is_better else -1
    known = [sign * value for value in values.values() if value is not None]
    return {
        name: None if value is None else 1 + sum(other < sign * value for other in known)
        for name, value in values.items()
    }


def agreement(
    ours: Mapping[str, float | None],
    papers: Mapping[str, float | None],
    *,
    ours_lower: bool,
    papers_lower: bool,
) -> Agreement:
    """Compares the merit of the rows that have a figure on both sides."""
    merit = {
        name: ((-1 if ours_lower else 1) * value, (-1 if papers_lower else 1) * paper)
        for name, value in ours.items()
        if value is not None and (paper := papers.get(name)) is not None
    }
    agree, tied, differ = 0, 0, []
    for (name, (a, paper_a)), (other, (b, paper_b)) in itertools.combinations(merit.items(), 2):
        product = (a - b) * (paper_a - paper_b)
        agree += product > 0
        tied += product == 0
        if product < 0:
            differ.append((name, other) if paper_a > paper_b else (other, name))
    tau = None
    if all(len({pair[side] for pair in merit.values()}) > 1 for side in (0, 1)):
        from scipy.stats import kendalltau  # a second, which every command would wait

        own, others = zip(*merit.values(), strict=True)
        tau = float(kendalltau(own, others).statistic)
    return Agreement(
        pairs=agree + tied + len(differ),
        agree=agree,
        differ=tuple(differ),
        tied=tied,
        kendall_tau=tau,
    )
