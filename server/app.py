"""The Flower server app: a whole federated run, from the first model to the summary."""

import fedcunet.environment  # isort: skip  # noqa: F401  (before Flower)

import functools
import logging
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fedcunet.attackers import attackers_of, refuse_attackers
from fedcunet.buffered import BufferedServer
from fedcunet.client_evaluation import ClientEvaluation
from fedcunet.config import RunConfig
from fedcunet.data import AnnotationSet, load
from fedcunet.data.crops import Crops
from fedcunet.errors import RunFailure, UserError
from fedcunet.measured import summary_figures
from fedcunet.metrics import balance_index
from fedcunet.privacy import check_accountant
from fedcunet.records import UNAVAILABLE
from fedcunet.replies import ClientLine, RoundLine
from fedcunet.roster import fleet
from fedcunet.rounds import Server
from fedcunet.saved import Saved
from fedcunet.terms import LOCAL_KEYS, evaluation_due, refuse_availability
from fedcunet.training.checkpoint import float32_bytes, model_bytes, tensors_sha256
from fedcunet.training.evaluation import (
    Evaluation,
    check_scorable,
    evaluate_mean_shape,
    predict,
    score_crops,
)
from fedcunet.training.local import crops_of
from fedcunet.training.network import build_network, get_vector, network_layout, set_vector
from fedcunet.training.packed import pack_network
from fedcunet.training.schedule import rate_factor
from server import deployment
from server.folder import folder_of_environment
from server.recorder import RunRecorder, finished, known_state
from server.run_folders import RUNS_DIR

app = ServerApp()

logger = logging.getLogger(__name__)

MOST_PROBLEMS = 5  # of a subset's images that are named
# What becomes of replies where nothing is wrong.
USUAL = ("accepted", "late", UNAVAILABLE)


class Display(Protocol):
    """Where progress is shown."""

    def begin(
        self,
        setting_name: str,
        num_rounds: int,
        metric_name: str,
        baseline_percent: float | None = None,
    ) -> None: ...
    def client_done(self, round: int, done: int, total: int) -> None: ...
    def round_done(self, line: dict[str, Any]) -> None: ...
    def end(self, summary: dict[str, Any]) -> None: ...


class NoDisplay:
    """Shows nothing."""

    def begin(self, *_: Any, **__: Any) -> None: ...
    def client_done(self, *_: Any) -> None: ...
    def round_done(self, line: dict[str, Any]) -> None: ...
    def end(self, summary: dict[str, Any]) -> None: ...


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the setting of Flower's run configuration.

    Into the folder that `python -m server run` asked for, or `.fedcunet/runs/flower-<run id>`.
    """
    config = RunConfig.from_flat(dict(context.run_config))
    refuse_attackers(config)
    refuse_availability(config)
    folder = folder_of_environment()
    if folder is not None:
        deployment.run(serve, grid, config, folder, context.run_id)
    else:
        out = RUNS_DIR / f"flower-{context.run_id}"
        serve(grid, config, out=out, name=out.name, display=NoDisplay())


def serve(
    grid: Grid,
    config: RunConfig,
    *,
    out: Path,
    name: str,
    display: Display,
    admitted: Mapping[int, int] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Runs `config` over the nodes of `grid` into the run folder `out`.

    Args:
        grid: where the clients are.
        config: the setting.
        out: run folder, new or empty.
        name: of the run.
        display: shows the progress.
        admitted: Flower's node number -> client id, where nodes were admitted by their keys.
        resume: go on with the run that `out` holds; the model ends as if it had not been stopped.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UserError: the folder is taken, or data cannot be used.
        RunFailure: no client can take part, or no round was committed.
    """
    begin = time.perf_counter()
    if resume and (done := finished(out, config)) is not None:
        display.end(done)
        if not done["rounds_committed"]:
            raise RunFailure(f"run {out}: no round was committed; see its clients.jsonl")
        return done
    check_accountant(config.privacy)
    test_data = TestData.load(config)
    recorder = RunRecorder(out, config, resume=resume)
    recorder.faults = lambda: getattr(grid, "faults", {})  # of the Ray engine
    token = _token(name)
    try:
        display.begin(
            name,
            config.federation.rounds,
            test_data.baseline.metric_name,
            test_data.baseline.percent,
        )
        run = _Run(config=config, test_data=test_data, recorder=recorder, display=display)
        kind = BufferedServer if config.federation.mode == "buffered" else Server
        server = kind(
            grid=grid,
            config=config,
            layout=network_layout(run.model),
            state_N=get_vector(run.model),
            learning_rate=lambda round_number: learning_rate(config, test_data.data, round_number),
            token=token,
            inference_model=run.inference_model,
            observer=run,
            admitted=admitted,
        )
        if recorder.saved:
            with known_state(out):
                server.restore(recorder.saved)
            run.restore(server.state_N)
        server.run()
        summary = run.summary(name, time.perf_counter() - begin)
        summary["left_out"] = server.left_out
        summary["fleet"] = fleet(server.clients, config)
        summary["workers_replaced"] = dict(recorder.workers_replaced())
        recorder.summary(summary)
        display.end(summary)
    finally:
        recorder.close()
    # In a simulation the clients' state lies on this machine. A run that was stopped may go on.
    shutil.rmtree(Path(config.federation.state_dir) / server.token, ignore_errors=True)
    if not summary["rounds_committed"]:
        why = run.first_problem or "see its clients.jsonl"
        raise RunFailure(f"run {out}: no round was committed; {why}")
    return summary


def learning_rate(config: RunConfig, data: AnnotationSet, round_number: int) -> float:
    """The clients' learning rate in a round: the schedule, with local epochs as epochs."""
    local_epochs = config.training.local_epochs
    return config.training.learning_rate * rate_factor(
        config.training.schedule,
        epoch=(round_number - 1) * local_epochs,
        num_epochs=config.federation.rounds * local_epochs,
        is_face=data.scheme.is_face,
    )


def read_subsets(config: RunConfig) -> tuple[AnnotationSet, AnnotationSet]:
    """The setting's training and test subset.

    Raises:
        UserError: one has no images, or none of the test images can be scored.
    """
    data = config.data
    train_set = load(data.name, data.root, data.train_subset, boxes=data.boxes)
    test_set = load(data.name, data.root, data.test_subset, boxes=data.boxes)
    for found in (train_set, test_set):
        if not found.annotations:
            raise UserError(f"data {data.root}: subset '{found.subset}' has no images")
    check_scorable(test_set)
    return train_set, test_set


@functools.cache
def _tell(subset: str, problems: tuple[str, ...]) -> None:
    """Warns of what is odd in a subset, once however many settings are run on it."""
    for problem in problems[:MOST_PROBLEMS]:
        logger.warning("%s: %s", subset, problem)
    if len(problems) > MOST_PROBLEMS:
        more = len(problems) - MOST_PROBLEMS
        logger.warning("%s: %d more; see fedcunet data check", subset, more)


def _token(name: str) -> str:
    """What names a run where clients keep their state, in the letters that they take."""
    return re.sub("[^A-Za-z0-9-]", "-", f"{name}-{secrets.token_hex(4)}")[-64:]


@dataclass(kw_only=True, slots=True)
class TestData:
    """The central test set, and what predicting the mean training shape achieves on it."""

    __test__ = False  # not a test case

    data: AnnotationSet
    crops: Crops
    baseline: Evaluation

    @classmethod
    def load(cls, config: RunConfig) -> "TestData":
        """Reads the setting's subsets. Raises UserError if one has no images."""
        train_set, test_set = read_subsets(config)
        for found in (train_set, test_set):
            _tell(found.subset, found.problems)
        train_crops, crops = (crops_of(config.data, found) for found in (train_set, test_set))
        baseline = evaluate_mean_shape(train_crops, test_set, crops)
        return cls(data=test_set, crops=crops, baseline=baseline)


class _Run:
    """Observes the rounds: evaluates, records, shows."""

    def __init__(
        self,
        *,
        config: RunConfig,
        test_data: TestData,
        recorder: RunRecorder,
        display: Display,
    ) -> None:
        self.model: nn.Module = build_network(config, test_data.data.scheme.num_landmarks)
        self._config, self._test_data = config, test_data
        self._recorder, self._display = recorder, display
        # Measured now: a setting whose step does not fit is known before its rounds begin.
        self._memory = summary_figures(config, test_data.data.scheme.num_landmarks)
        self.first_problem = ""  # why the first client was refused, for a run that fails
        self._last: Evaluation | None = None
        self._predicted_NK2: np.ndarray | None = None

    def restore(self, state_N: np.ndarray) -> None:
        """Takes up the global state of a run that goes on."""
        set_vector(self.model, state_N)
        self._evaluate()  # the last round may have been the last

    def _evaluate(self) -> Evaluation:
        begin = time.perf_counter()
        crops, scheme = self._test_data.crops, self._test_data.data.scheme
        self._predicted_NK2 = predict(self.model, crops, flip_test=self._config.data.flip_test)
        self._last = score_crops(self._predicted_NK2, crops, scheme.metric)
        self._recorder.seconds_of["evaluate"] += time.perf_counter() - begin
        return self._last

    def client_done(self, round_number: int, done: int, total: int) -> None:
        self._display.client_done(round_number, done, total)

    def round_done(
        self,
        line: RoundLine,
        clients: list[ClientLine],
        state_N: np.ndarray,
        client_evaluation: ClientEvaluation | None,
    ) -> None:
        scheme = self._test_data.data.scheme
        evaluation = None
        refused = next((client for client in clients if client.outcome not in USUAL), None)
        if refused is not None and not self.first_problem:
            self.first_problem = f"client {refused.client}: {refused.outcome}: {refused.detail}"
            logger.warning("round %d, %s", line.round, self.first_problem)
        if line.outcome == "committed":
            set_vector(self.model, state_N)
            self._recorder.checkpoint(self.model, scheme, line.round)
        if evaluation_due(self._config, line.round):
            set_vector(self.model, state_N)
            evaluation = self._evaluate()
        self._display.round_done(self._recorder.round(line, clients, evaluation, client_evaluation))

    def save(self, parts: dict[str, Saved]) -> None:
        self._recorder.save(parts)

    def inference_model(self, state_N: np.ndarray) -> bytes:
        """The packed file of a state, as clients get it to evaluate: weights at 1 or 2 bits."""
        set_vector(self.model, state_N)
        flat = {key: one for key, one in self._config.flat().items() if key not in LOCAL_KEYS}
        return pack_network(
            self.model, RunConfig.from_flat(flat), self._test_data.data.scheme
        ).content

    def tested(self, evaluation: ClientEvaluation | None) -> None:
        if evaluation is not None and self._last is not None:
            self._recorder.client_evaluation(evaluation, self._last.metric_name)

    def summary(self, name: str, seconds: float) -> dict[str, Any]:
        """The figures of the whole run, and the example pictures beside them."""
        assert self._last is not None
        assert self._predicted_NK2 is not None
        crops, scheme = self._test_data.crops, self._test_data.data.scheme
        self._recorder.examples(crops, self._predicted_NK2, self._last.error_N, scheme)
        recorder = self._recorder
        size, ratio = self._model_size()
        totals = recorder.totals
        committed, abandoned = totals["committed"], totals["abandoned"]
        layout = network_layout(self.model)
        up, down = (
            totals[f"bytes_{way}"] / max(totals[f"clients_{way}"], 1) for way in ("up", "down")
        )
        return {
            "name": name,
            "outcome": "completed" if committed else "failed",
            "rounds_committed": committed,
            "rounds_abandoned": abandoned,
            "metric_name": self._last.metric_name,
            self._last.metric_name: self._last.percent,
            "mean_shape_percent": self._test_data.baseline.percent,
            "auc": self._last.auc,
            "failure_percent": self._last.failure_percent,
            "images": len(crops),
            "images_left_out": self._last.images_left_out,
            "quantisation": self._config.quant.spec().name,
            "model_bytes": size,
            "model_ratio": ratio,
            **self._memory,
            "balance_index": self._balance_index(ratio),
            "bytes_up_per_client_round": up,
            "bytes_down_per_client_round": down,
            "bits_per_parameter_up": 8 * up / layout.num_parameters,
            "bits_per_parameter_down": 8 * down / layout.num_parameters,
            "replies": {"accepted": 0} | dict(recorder.replies),
            "attackers": dict(Counter(attackers_of(self._config).values())),
            "device_seconds_per_round": recorder.device_seconds / max(committed + abandoned, 1),
            "seconds": self._recorder.seconds_before + seconds,
            "seconds_of": dict(self._recorder.seconds_of),
            "checkpoints_failed": self._recorder.checkpoints_failed,
            **recorder.client_figures,
            **recorder.privacy,
            "checkpoint_sha256": tensors_sha256(self.model),
            "setting": self._config.flat(),
        }

    def _model_size(self) -> tuple[int | None, float | None]:
        """Bytes of the final model for inference, and their ratio to float32.

        None where training has driven its values beyond what the file can hold.
        """
        try:
            size = model_bytes(self.model, self._config, self._test_data.data.scheme)
        except UserError:
            return None, None
        return size, size / float32_bytes(self.model)

    def _balance_index(self, model_ratio: float | None) -> float | None:
        """Of the final model (the paper's Eq. 7); None for other metrics than NME."""
        memory_ratio = self._memory["training_peak_ratio"]
        assert self._last is not None
        if self._last.metric_name != "nme_percent" or memory_ratio is None or model_ratio is None:
            return None
        return balance_index(self._last.percent, memory_ratio, model_ratio)
