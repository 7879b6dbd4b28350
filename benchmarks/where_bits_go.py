"""Which allocation of an update's bits pays: by tensor, channel, latent weight, or prediction.

    python benchmarks/where_bits_go.py [--data 300w --root DIR] [--cache FILE.npz]
        [--rounds N] [--clients N] [--examples N] [--out FILE.json]

Collects updates of DU-Net(1) at 64x64 from a few clients by the project's own training (binary
weights, with a scale for each filter, ternary; Adam, RMSprop, SGD), of the second and of the last
round, into the cache file, and measures on them. With a cache file that is there, trains nothing.

All codings are `trellis` at the same bits, real bodies; only the convolutions' latent weights are
coded (what `fine-bits` calls the other tensors). Every allocation is one that both sides can
compute from the model they share:

tensor     a step for each tensor (what the codec does)
channel    a step for each output channel
latent     a step for each quarter of a tensor's weights, by their distance from the threshold of
           the quantiser; the same with the nearest quarter coded at half the step (`latent-fine`)
predicted  the difference from a share of the previous global update

`saved` is the share of bits that the lower error of the same bytes is worth at equal error, from
the change of 1/2·log2(1 + 1/NMSE); `flips` the share of quantised weights that differ from those
of the exact update; `loss` that of a batch after the decoded update, less that after the exact one.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import nn

from fedcunet.codecs import CODECS, make_seed
from fedcunet.config import RunConfig
from fedcunet.data import load
from fedcunet.data.annotations import LandmarkScheme
from fedcunet.data.crops import Crops, CropSubset
from fedcunet.data.procedural import make_faces
from fedcunet.quant.functions import TERNARY_THRESHOLD
from fedcunet.training.local import (
    STRIDE,
    augmentation_of,
    crops_of,
    make_optimizer,
    train_pass,
)
from fedcunet.training.losses import make_targets, supervised_loss, supervisions_of
from fedcunet.training.network import build_network, get_vector, network_layout, set_vector

SETTINGS = {"BW": ("8,1,8", False), "BW-alpha": ("8,1,8", True), "TW": ("8,2,8", False)}
RATES = {"adam": 4e-3, "rmsprop": 1e-3, "sgd": 0.05}


def setting(data: str, root: str, name: str, optimizer: str, clients: int) -> RunConfig:
    bits, alpha = SETTINGS[name]
    return RunConfig.from_flat(
        {
            "model.unets": 1,
            "model.order": 0,
            "quant.bits": bits,
            "quant.alpha": alpha,
            "quant.input-quantizer": "ranged",  # as in the figures of docs/codecs.md
            "data.name": data,
            "data.root": root,
            "data.cache-dir": str(Path(root) / ".cache"),
            "data.disk-cache-bytes": 0,
            "training.optimizer": optimizer,
            "training.batch-size": 8,
            "federation.clients": clients,
        },
        "benchmark",
    )


def collect(
    config: RunConfig, crops: Crops, scheme: LandmarkScheme, rate: float, rounds: int, examples: int
) -> dict[str, np.ndarray]:
    """Start, updates and previous global update of round 2 and of the last one."""
    model = build_network(config, scheme.num_landmarks)
    state_N = get_vector(model)
    previous_N = np.zeros_like(state_N)
    kept = {}
    clients = config.federation.clients
    for number in range(1, rounds + 1):
        updates = []
        for client in range(clients):
            set_vector(model, state_N)
            own = CropSubset(crops, list(range(client * examples, (client + 1) * examples)))
            train_pass(
                model,
                own,
                make_optimizer(model, config.training, rate),
                batch_size=config.training.batch_size,
                num_epochs=1,
                sigma=config.data.sigma,
                augmentation=augmentation_of(config.data, scheme),
                seed=(config.seed, number, client),
            )
            updates.append(get_vector(model) - state_N)
        if number in (2, rounds):
            kept[f"{number}/start"] = state_N
            kept[f"{number}/previous"] = previous_N
            kept[f"{number}/update"] = updates[0]
            kept[f"{number}/other"] = updates[1]
        previous_N = np.mean(updates, axis=0)
        state_N = state_N + previous_N
    return kept


def collect_all(arguments: argparse.Namespace, crops: Crops, scheme: LandmarkScheme) -> None:
    found: dict[str, np.ndarray] = {}
    for name in SETTINGS:
        for optimizer, rate in RATES.items():
            begin = time.process_time()
            config = setting(arguments.data, arguments.root, name, optimizer, arguments.clients)
            kept = collect(
                config,
                crops,
                scheme,
                rate,
                arguments.rounds,
                arguments.examples,
            )
            found |= {f"{name}/{optimizer}/{key}": value for key, value in kept.items()}
            print(f"{name} {optimizer}: {time.process_time() - begin:.0f} s", flush=True)
    np.savez(arguments.cache, **found)


def coded(x: np.ndarray, segments: list[int], bits: float, **more: Any) -> np.ndarray:
    seed = make_seed(0, 1, 0, "update")
    codec = CODECS["trellis"]
    body = codec.encode(x, bits=bits, seed=seed, segments=segments, **more)
    return codec.decode(body, length=x.size, bits=bits, seed=seed, segments=segments, **more)


def distances(latent: np.ndarray, shapes: list[tuple[int, ...]], name: str) -> np.ndarray:
    """Of the weights' magnitudes above the threshold of their filter's quantiser."""
    found, position = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        magnitude = np.abs(latent[position : position + size]).reshape(shape[0], -1)
        mean = magnitude.mean(axis=1, keepdims=True) if name == "TW" else 0
        found.append((magnitude - TERNARY_THRESHOLD * mean).reshape(-1))
        position += size
    return np.concatenate(found)


def quantised(latent: np.ndarray, shapes: list[tuple[int, ...]], name: str) -> np.ndarray:
    """-1, 0 or 1 for each weight, without the filters' scales."""
    sign = np.where(latent >= 0, 1, -1)
    return sign * (distances(latent, shapes, name) > 0) if name == "TW" else sign


def loss_of(model: nn.Module, crops: Crops, config: RunConfig, vector_N: np.ndarray) -> float:
    """Loss of the first 64 images, normalised by their own statistics."""
    set_vector(model, vector_N)
    supervisions = supervisions_of(model)
    batch = crops.batch(list(range(min(64, len(crops)))))
    targets = make_targets(
        supervisions,
        batch.points_BK2,
        batch.labelled_BK,
        side=batch.images_B3HW.shape[-1] // STRIDE,
        stride=STRIDE,
        sigma=config.data.sigma,
    )
    model.train()
    with torch.no_grad():
        output = model(batch.images_B3HW)
        return float(supervised_loss(output, supervisions, targets, batch.labelled_BK))


def allocations(
    x: np.ndarray,
    latent: np.ndarray,
    shapes: list[tuple[int, ...]],
    name: str,
    bits: float,
    previous: np.ndarray,
) -> dict[str, np.ndarray]:
    """The decoded update by each allocation."""
    lengths = [int(np.prod(shape)) for shape in shapes]
    channels = [length // shape[0] for length, shape in zip(lengths, shapes, strict=True)
                for _ in range(shape[0])]  # fmt: skip
    distance = np.abs(distances(latent, shapes, name))
    stops = np.cumsum(lengths)
    order = np.concatenate([
        stop - length + np.argsort(distance[stop - length : stop], kind="stable")
        for stop, length in zip(stops, lengths, strict=True)
    ])  # fmt: skip
    quarters, near = [], []
    for length in lengths:
        sizes = [part.size for part in np.array_split(np.arange(length), 4)]
        quarters += sizes
        near += [np.repeat([2.0, 1, 1, 1], sizes)]
    weight = np.concatenate(near).astype(np.float32)

    def reordered(factor: np.ndarray | float) -> np.ndarray:
        back = np.empty_like(x)
        back[order] = coded((x[order] * factor).astype(np.float32), quarters, bits) / factor
        return back

    return {
        "tensor": coded(x, lengths, bits),
        "channel": coded(x, channels, bits),
        "latent": reordered(1.0),
        "latent-fine": reordered(weight),
        "predicted": coded(x, lengths, bits, reference=previous),
    }


def rows_of(
    kept: dict[str, np.ndarray],
    name: str,
    optimizer: str,
    number: int,
    crops: Crops,
    scheme: LandmarkScheme,
    config: RunConfig,
    bits: float,
) -> dict[str, Any]:
    """All measures of one update."""
    model = build_network(config, scheme.num_landmarks)
    layout = network_layout(model)
    parts = {
        key: layout.gather(kept[f"{name}/{optimizer}/{number}/{key}"], fine=False)
        for key in ("start", "update", "other", "previous")
    }
    shapes = [shape for shape, fine in zip(layout.shapes, layout.fine, strict=True) if not fine]
    x, start, previous = parts["update"], parts["start"], parts["previous"]
    prefix = f"{name}/{optimizer}/{number}"
    whole_N = kept[f"{prefix}/start"] + kept[f"{prefix}/update"]
    exact_loss = loss_of(model, crops, config, whole_N)
    fine = layout.gather(whole_N, fine=True)
    target = quantised(start + x, shapes, name)
    energy = float(np.square(x, dtype=np.float64).sum())
    tensors = np.split(x.astype(np.float64), np.cumsum([np.prod(s) for s in shapes])[:-1])
    variances = np.array([np.mean(t * t) for t in tensors])
    sizes = np.array([t.size for t in tensors])
    mean_log = float((sizes * np.log2(np.maximum(variances, 1e-30))).sum() / sizes.sum())
    found: dict[str, Any] = {
        "setting": name, "optimizer": optimizer, "round": number, "values": int(x.size),
        "flips_of_update": float(np.mean(quantised(start, shapes, name) != target)),
        "cosine_clients": cosine(x, parts["other"]), "cosine_previous": cosine(x, previous),
        "tensor_gain_bits": 0.5 * (np.log2(energy / x.size) - mean_log),
        "deviations_least_to_greatest": float(np.sqrt(variances.min() / variances.max())),
    }  # fmt: skip
    base = 0.0
    for kind, decoded in allocations(x, start, shapes, name, bits, previous).items():
        error = float(np.square(decoded.astype(np.float64) - x).sum()) / energy
        rate = 0.5 * np.log2(1 + 1 / error)
        base = base or rate
        state_N = layout.scatter(start + decoded, fine)
        found[kind] = {
            "nmse": error,
            "saved_percent": 100 * (rate - base) / bits,
            "flips": float(np.mean(quantised(start + decoded, shapes, name) != target)),
            "loss": loss_of(model, crops, config, state_N) - exact_loss,
        }
    found["bits_for_flips_of_latent_fine"] = bits_for_flips(
        found["latent-fine"]["flips"], found["tensor"]["flips"], x, start, shapes, name, bits
    )
    return found


def bits_for_flips(
    wanted: float, flips: float, x: np.ndarray, start: np.ndarray,
    shapes: list[tuple[int, ...]], name: str, bits: float,
) -> float | None:  # fmt: skip
    """Bits at which steps for each tensor alone give the flips `wanted`; None beyond 1.5 times."""
    exact = quantised(start + x, shapes, name)
    lengths = [int(np.prod(shape)) for shape in shapes]
    before = bits
    while flips > wanted and before < 1.5 * bits:
        following = before + bits / 8
        decoded = coded(x, lengths, following)
        reached = float(np.mean(quantised(start + decoded, shapes, name) != exact))
        if reached <= wanted:
            return before + (flips - wanted) / (flips - reached) * (following - before)
        before, flips = following, reached
    return bits if flips <= wanted and before == bits else None


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    product = float(np.dot(a, b))
    return product / (float(np.linalg.norm(a) * np.linalg.norm(b)) or 1.0)


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['setting']} {row['optimizer']} round {row['round']}: flips"
            f" {100 * row['flips_of_update']:.2f} %, cosine with another client"
            f" {row['cosine_clients']:.2f}, with the previous update {row['cosine_previous']:.2f};"
            f" tensors' variances are worth {row['tensor_gain_bits']:.3f} bit; the flips of"
            f" latent-fine take {row['bits_for_flips_of_latent_fine']} bits by tensor",
            flush=True,
        )
        for kind in ("tensor", "channel", "latent", "latent-fine", "predicted"):
            one = row[kind]
            print(f"    {kind:<12} NMSE {one['nmse']:.4f}  saved {one['saved_percent']:+5.1f} %  "
                  f"flips {100 * one['flips']:.2f} %  loss {one['loss']:+.2e}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="faces", help="drawn faces, or a data set")
    parser.add_argument("--root", default=".fedcunet/data/faces-bits", help="its folder")
    parser.add_argument("--cache", type=Path, default=Path(".fedcunet/updates.npz"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--examples", type=int, default=32, help="of a client")
    parser.add_argument("--bits", type=float, default=1)
    parser.add_argument("--out", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if arguments.clients < 2 or arguments.rounds < 2:
        parser.error("expected 2 or more clients and rounds, to be compared with each other")
    torch.set_num_threads(1)
    if arguments.data == "faces" and not Path(arguments.root).exists():
        make_faces(Path(arguments.root), num_train=120, num_test=4, seed=0)
    config = setting(arguments.data, arguments.root, "BW", "adam", arguments.clients)
    annotations = load(arguments.data, arguments.root, "train", boxes=config.data.boxes)
    crops = crops_of(config.data, annotations)
    needed = arguments.clients * arguments.examples
    if len(crops) < needed:
        parser.error(f"{arguments.root}: expected {needed} images or more, found {len(crops)}")
    if not arguments.cache.exists():
        arguments.cache.parent.mkdir(parents=True, exist_ok=True)
        collect_all(arguments, crops, annotations.scheme)
    rows = []
    with np.load(arguments.cache) as kept:
        for name in SETTINGS:
            for optimizer in RATES:
                config = setting(arguments.data, arguments.root, name, optimizer, arguments.clients)
                for number in (2, arguments.rounds):
                    rows.append(
                        rows_of(
                            kept,
                            name,
                            optimizer,
                            number,
                            crops,
                            annotations.scheme,
                            config,
                            arguments.bits,
                        )
                    )
                    print_rows(rows[-1:])
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
