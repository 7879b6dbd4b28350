"""How much a table's networks are trained here, and the setting of each of them."""

from dataclasses import dataclass

from fedcunet.config import RunConfig, check_range
from fedcunet.data import AnnotationSet
from fedcunet.data.annotations import Annotation
from fedcunet.errors import UserError
from fedcunet.paper.tables import Row, Table

# The paper's rate, 2.5e-4, is made for 100 epochs and more; and latent weights of binary filters,
# which start at +-1 / sqrt(fan-in), hardly change sign at it within a few hundred steps.
SHORT_RATE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What every network of a table gets alike."""

    data: str = "faces"
    root: str = ".fedcunet/data/faces"
    boxes: str = "landmarks"
    limit_train: int = 240  # training images; 0: all
    limit_test: int = 0  # test images; 0: all
    size: int = 64  # side of the crops, pixels
    epochs: int = 4
    batch_size: int = 8
    learning_rate: float = SHORT_RATE  # the first
    optimizer: str = "rmsprop"  # the paper's
    schedule: str = "cosine"
    input_quantizer: str = "source"
    storage: str = "float32"  # of the rows whose inputs have few bits; the others keep floats
    threads: int = 1
    unets: int | None = None  # n of the table's smallest network; None: the table's own default
    max_unets: int | None = None  # rows with more U-Nets are left out
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        check_range("--limit-train", self.limit_train, 0, 10**9)
        check_range("--limit-test", self.limit_test, 0, 10**9)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError("--seeds: expected different whole numbers such as 0,1,2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A row as it is trained here."""

    row: Row
    name: str
    config: RunConfig  # with the first seed


def make_plans(table: Table, budget: Budget) -> tuple[list[Plan], list[str]]:
    """The rows to train, and the names of those that --max-unets leaves out.

    The rows' U-Nets shrink in one proportion: `unets` over the paper's smallest n.

    Raises:
        UserError: for a value out of range, or if fewer than two different networks are left.
    """
    smallest = table.small_unets if budget.unets is None else budget.unets
    check_range("--unets", smallest, 1, 64)
    plans, left_out = [], []
    for row in table.rows:
        unets = max(1, row.unets * smallest // table.paper_unets)
        if row.kind == "dunet" and row.order is not None and row.order >= unets > 1:
            continue  # an order that so few U-Nets do not have
        config = row_config(row, unets, budget)
        name = row.name.format(n=unets, k=config.model.order)
        if budget.max_unets is not None and unets > budget.max_unets:
            left_out.append(name)
        else:
            plans.append(Plan(row=row, name=name, config=config))
    if len({(plan.config.model, plan.config.quant) for plan in plans}) < max(2, len(plans)):
        raise UserError(
            f"{table.key}: expected at least two networks that differ, found "
            f"{', '.join(plan.name for plan in plans) or 'none'}; raise --unets or --max-unets"
        )
    return plans, left_out


def row_config(row: Row, unets: int, budget: Budget) -> RunConfig:
    """The setting of a row with `unets` U-Nets."""
    order = unets - 1 if row.order is None else min(row.order, unets - 1)
    return RunConfig().replace(
        seed=budget.seeds[0],
        model__kind=row.kind,
        model__unets=unets,
        model__order=order if row.kind == "dunet" else None,
        model__supervision=row.supervision,
        model__iterative=row.iterative,
        model__refined_supervision=row.refined_supervision,
        quant__bits=row.bits,
        quant__alpha=row.alpha,
        quant__input_quantizer=budget.input_quantizer,
        quant__storage="float32" if row.bits.startswith("32,") else budget.storage,
        data__name=budget.data,
        data__root=budget.root,
        data__boxes=budget.boxes,
        data__size=budget.size,
        training__epochs=budget.epochs,
        training__batch_size=budget.batch_size,
        training__learning_rate=budget.learning_rate,
        training__optimizer=budget.optimizer,
        training__schedule=budget.schedule,
        training__threads=budget.threads,
    )


def limited(found: AnnotationSet, count: int) -> AnnotationSet:
    """The set with `count` of its annotations, evenly spread over its order; all if 0.

    Every part of the data set keeps its share, and the choice follows from `count` alone.
    """
    total = len(found.annotations)
    if count in (0, total):
        return found
    if count > total:
        raise UserError(f"{found.name} '{found.subset}': {count} images asked for, it has {total}")
    chosen: tuple[Annotation, ...] = tuple(
        found.annotations[place * total // count] for place in range(count)
    )
    return AnnotationSet(
        name=found.name,
        subset=found.subset,
        scheme=found.scheme,
        annotations=chosen,
        problems=found.problems,
    )
