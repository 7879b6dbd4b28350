"""What each table of the paper compares, and the figures that it prints.

Tang et al., "Quantized Densely Connected U-Nets for Efficient Landmark Localization" (ECCV 2018,
https://arxiv.org/abs/1808.02194). None stands where the paper gives no figure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Supervision = Literal["regression", "detection"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A network of a table, and what the paper prints for it."""

    key: str  # its folder, and its name in JSON
    name: str  # as the paper calls it; {n} is the number of U-Nets, {k} the order
    unets: int  # the paper's n
    kind: Literal["dunet", "stacked"] = "dunet"
    order: int | None = 1  # None: n - 1, every U-Net linked with all before it
    supervision: Supervision = "regression"
    iterative: bool = False
    refined_supervision: Supervision = "regression"
    bits: str = "32,32,32"
    alpha: bool = False
    percent: float | None = None  # the paper's NME of the full set, or its PCKh or PCK
    parameters_millions: float | None = None  # of convolutions
    # Further columns of the paper: easy, hard, memory_ratio, size_ratio, balance_index, megabytes.
    further: Mapping[str, float] = field(default_factory=dict)
    # Table 3: percent after these epochs on the training and on the validation set.
    train_curve: Mapping[int, float] = field(default_factory=dict)
    validation_curve: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table or figure of the paper that is trained anew."""

    key: str
    source: str  # where it stands in the paper
    question: str
    data: str  # what the paper trained and measured on
    metric: Literal["nme", "pckh", "pck"]  # the paper's
    reference: str  # key of the row that ratios are over
    rows: tuple[Row, ...]
    small_unets: int  # n of the smallest network where the user names none

    @property
    def paper_unets(self) -> int:
        """The paper's smallest n; the rows' n shrink in proportion to it."""
        return min(row.unets for row in self.rows)


def _iterative(key: str, first: Supervision, second: Supervision, *figures: float) -> Row:
    full, easy, hard = figures
    return Row(
        key=key,
        name=f"{first.capitalize()} {second.capitalize()}",
        unets=4,
        supervision=first,
        iterative=True,
        refined_supervision=second,
        percent=full,
        parameters_millions=4.1,
        further={"easy": easy, "hard": hard},
    )


def _bits(key: str, name: str, bits: str, *figures: float) -> Row:
    full, easy, hard, memory, size, index = figures
    return Row(
        key=key,
        name=name,
        unets=4,
        bits=bits,
        alpha="α" in name,
        percent=full,
        further={
            "easy": easy,
            "hard": hard,
            "memory_ratio": memory,
            "size_ratio": size,
            "balance_index": index,
        },
    )


def _stacked(unets: int, percent: float | None, millions: float | None = None) -> Row:
    return Row(
        key=f"stacked-{unets}",
        name="Stacked U-Nets({n})",
        unets=unets,
        kind="stacked",
        percent=percent,
        parameters_millions=millions,
    )


def _dunet(unets: int, percent: float, millions: float | None = None, *, bw: bool = False) -> Row:
    return Row(
        key=f"dunet-{unets}{'-bw-alpha' if bw else ''}",
        name=f"DU-Net{'-BW-α' if bw else ''}({{n}})",
        unets=unets,
        bits="32,1,32" if bw else "32,32,32",
        alpha=bw,
        percent=percent,
        parameters_millions=millions,
    )


TABLE1 = Table(
    key="table1",
    source="Table 1, section 4.1",
    question="Is a DU-Net as accurate as as many stacked U-Nets, with 30 % of the parameters?",
    data="MPII validation set",
    metric="pckh",
    reference="stacked-4",
    small_unets=1,
    rows=(
        _stacked(16, None, 50.5),  # the paper could not train it
        _dunet(16, 89.9, 15.9),
        _stacked(8, 89.3, 25.5),
        _dunet(8, 89.5, 7.9),
        _stacked(4, 88.3, 12.9),
        _dunet(4, 88.2, 3.9),
    ),
)

TABLE2 = Table(
    key="table2",
    source="Table 2, section 4.4",
    question="Detection or regression, and does a second, refined pass lower the error?",
    data="300-W",
    metric="nme",
    reference="regression",
    small_unets=4,
    rows=(
        Row(
            key="detection",
            name="Detection only",
            unets=4,
            supervision="detection",
            percent=4.01,
            parameters_millions=3.9,
            further={"easy": 3.63, "hard": 5.60},
        ),
        Row(
            key="regression",
            name="Regression only",
            unets=4,
            percent=3.34,
            parameters_millions=3.9,
            further={"easy": 2.91, "hard": 5.12},
        ),
        _iterative("detection-detection", "detection", "detection", 3.93, 3.52, 5.59),
        _iterative("detection-regression", "detection", "regression", 3.37, 2.95, 5.12),
        _iterative("regression-regression", "regression", "regression", 3.28, 2.87, 4.97),
    ),
)

TABLE3 = Table(
    key="table3",
    source="Table 3, section 4.2",
    question="Do links from every U-Net to all later ones overfit the training set?",
    data="MPII, training and validation set",
    metric="pckh",
    reference="order-1",
    small_unets=4,
    rows=(
        Row(
            key="order-1",
            name="Order-{k} DU-Net({n})",
            unets=8,
            percent=87.1,
            train_curve={1: 20.3, 50: 83.2, 100: 87.7, 150: 91.7},
            validation_curve={1: 29.4, 50: 82.8, 100: 85.7, 150: 87.1},
        ),
        Row(
            key="order-all",
            name="Order-{k} DU-Net({n})",
            unets=8,
            order=None,
            percent=86.7,
            train_curve={1: 25.2, 50: 84.7, 100: 89.3, 150: 93.1},
            validation_curve={1: 36.6, 50: 84.0, 100: 85.1, 150: 86.7},
        ),
    ),
)

TABLE4 = Table(
    key="table4",
    source="Table 4, section 4.4",
    question="Is an iterative DU-Net as accurate as one of twice as many U-Nets?",
    data="300-W",
    metric="nme",
    reference="dunet-4",
    small_unets=2,
    rows=(
        Row(
            key="dunet-4",
            name="DU-Net({n})",
            unets=4,
            percent=3.34,
            parameters_millions=3.9,
            further={"easy": 2.91, "hard": 5.12},
        ),
        Row(
            key="iterative-4",
            name="Iter. DU-Net({n})",
            unets=4,
            iterative=True,
            percent=3.28,
            parameters_millions=4.1,
            further={"easy": 2.87, "hard": 4.97},
        ),
        Row(
            key="dunet-8",
            name="DU-Net({n})",
            unets=8,
            percent=3.26,
            parameters_millions=7.9,
            further={"easy": 2.82, "hard": 5.07},
        ),
    ),
)

TABLE5 = Table(
    key="table5",
    source="Table 5, section 4.5",
    question="Which bit widths balance accuracy, training memory and model size?",
    data="300-W",
    metric="nme",
    reference="float32",
    small_unets=2,
    rows=(
        _bits("float32", "DU-Net({n})", "32,32,32", 3.38, 2.95, 5.13, 1.00, 1.00, 11.4),
        _bits("bw-qig-616", "BW-QIG(616)", "6,1,6", 5.93, 5.10, 9.34, 0.17, 0.03, 0.18),
        _bits("bw-qig-818", "BW-QIG(818)", "8,1,8", 4.30, 3.67, 6.86, 0.25, 0.03, 0.14),
        _bits("bw-alpha-qig-818", "BW-α-QIG(818)", "8,1,8", 4.47, 3.75, 7.40, 0.25, 0.03, 0.15),
        _bits("bw", "BW", "32,1,32", 3.75, 3.20, 5.99, 1.00, 0.03, 0.42),
        _bits("bw-alpha", "BW-α", "32,1,32", 3.58, 3.12, 5.45, 1.00, 0.03, 0.38),
        _bits("tw", "TW", "32,2,32", 3.73, 3.21, 5.85, 1.00, 0.06, 0.83),
        _bits("tw-qig-626", "TW-QIG(626)", "6,2,6", 4.27, 3.70, 6.59, 0.17, 0.06, 0.19),
        _bits("tw-qig-828", "TW-QIG(828)", "8,2,8", 4.13, 3.55, 6.50, 0.25, 0.06, 0.26),
    ),
)

TABLE7 = Table(
    key="table7",
    source="Table 7, section 4.6 (Newell et al., and the paper's own two)",
    question="What do binary weights cost a deep DU-Net, beside stacked U-Nets, on people?",
    data="MPII test set",
    metric="pckh",
    reference="stacked-8",
    small_unets=1,
    rows=(_stacked(8, 90.9), _dunet(16, 91.2), _dunet(16, 91.0, bw=True)),
)

TABLE8 = Table(
    key="table8",
    source="Table 8, section 4.6 (HGs(4), and the paper's own two)",
    question="What do binary weights cost a DU-Net, beside stacked U-Nets, on faces?",
    data="300-W",
    metric="nme",
    reference="stacked-4",
    small_unets=1,
    rows=(_stacked(4, 3.35), _dunet(8, 3.26), _dunet(8, 3.46, bw=True)),
)

# The curves of Figure 4 are drawn, not printed: no percentages.
FIGURE4 = Table(
    key="fig4",
    source="Figure 4, section 4.2 (its values are drawn, not printed)",
    question="How do accuracy and parameters change with the order K?",
    data="MPII validation set",
    metric="pckh",
    reference="order-0",
    small_unets=4,
    rows=tuple(
        Row(key=f"order-{order}", name="Order-{k} DU-Net({n})", unets=8, order=order)
        for order in range(8)
    ),
)

TABLES = {
    table.key: table for table in (TABLE1, TABLE2, TABLE3, TABLE4, TABLE5, TABLE7, TABLE8, FIGURE4)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeRow:
    """A network of Table 6, or one that the paper cites there and this program does not have."""

    key: str
    name: str
    parameters_millions: float
    megabytes: float
    row: Row | None  # None: a network of others


_OTHERS = (
    ("yang", "Yang et al. [42]", 28.0, 110.2),
    ("wei", "Wei et al. [39]", 29.7, 116.9),
    ("bulat", "Bulat et al. [4]", 58.1, 228.7),
    ("chu", "Chu et al. [8]", 58.1, 228.7),
)
TABLE6_SOURCE = "Table 6, section 4.5"
TABLE6 = (
    *(
        SizeRow(key=key, name=name, parameters_millions=millions, megabytes=size, row=None)
        for key, name, millions, size in _OTHERS
    ),
    SizeRow(
        key="newell",
        name="Newell et al. [23]",
        parameters_millions=25.5,
        megabytes=100.5,
        row=_stacked(8, None),
    ),
    SizeRow(
        key="dunet-16",
        name="Order-1 DU-Net(16)",
        parameters_millions=15.9,
        megabytes=62.6,
        row=Row(key="dunet-16", name="DU-Net({n})", unets=16),
    ),
    SizeRow(
        key="dunet-16-bw-alpha",
        name="DU-Net-BW-α(16)",
        parameters_millions=15.9,
        megabytes=2.0,
        row=Row(
            key="dunet-16-bw-alpha", name="DU-Net-BW-α({n})", unets=16, bits="32,1,32", alpha=True
        ),
    ),
)
