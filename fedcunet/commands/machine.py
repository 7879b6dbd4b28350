"""The commands `sizes` (how large a network is) and `checks` (is this machine fit)."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from fedcunet.commands.options import (
    IterativeOption,
    JsonOption,
    ModelOption,
    OrderOption,
    SupervisionsOption,
    UnetsOption,
    order_of,
)
from fedcunet.config import RunConfig
from fedcunet.data import FACE68, SCHEMES
from fedcunet.errors import RunFailure
from fedcunet.models.dunet import convolution_parameters
from fedcunet.training.checkpoint import float32_bytes, model_bytes
from fedcunet.training.network import build_network

NEEDED = ("torch", "numpy", "opencv-python-headless", "scipy", "safetensors", "matplotlib")
FOR_FEDERATION = ("flwr", "ray", "tensorboard", "tomli-w")
MIN_FREE_BYTES = 2 * 10**9  # disk for made data, caches and a few runs


def sizes(
    model: ModelOption = "dunet",
    unets: UnetsOption = 4,
    order: OrderOption = None,
    supervisions: SupervisionsOption = 0,
    iterative: IterativeOption = False,
    landmarks: Annotated[
        int, typer.Option("--landmarks", min=1, max=1000, help="68: faces, 16: MPII.")
    ] = 16,
    bits: Annotated[str, typer.Option("--bits", help="Inputs, weights, gradients.")] = "32,1,32",
    alpha: Annotated[bool, typer.Option("--alpha", help="A scale for each filter.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Counts a network's parameters, and its bytes in float32 and at its weight bits.

    bytes_packed is the length of the file that `fedcunet export` writes of the network with its
    first weights: quantised weights at 1 or 1.6 bits, alpha and BatchNorm at 8, first and last
    convolutions in float16, header and setting. Training moves it by some bytes, for values that
    no grid of 8 bits suits. With weights at 32 bits it is the float32 state.
    """
    config = RunConfig().replace(
        model__kind=model,
        model__unets=unets,
        model__order=order_of(model, unets, order),
        model__supervisions=supervisions,
        model__iterative=iterative,
        quant__bits=bits,
        quant__alpha=alpha,
    )
    spec = config.quant.spec()
    network = build_network(config, landmarks)
    schemes = {scheme.num_landmarks: scheme for scheme in SCHEMES.values()}
    # Of the scheme only the name takes part in the length.
    scheme = schemes.get(landmarks, FACE68)
    result = {
        "conv_parameters": convolution_parameters(network),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "bytes_float32": float32_bytes(network),
        "bytes_packed": model_bytes(network, config, scheme),
    }
    if as_json:
        print(json.dumps(result))
        return
    name = f"DU-Net({unets}), order {config.model.order}"
    if model == "stacked":
        name = f"{unets} stacked U-Nets"
    name += ", iterative" if iterative else ""
    table = Table(title=f"{name}, {landmarks} landmarks", box=None)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("convolution parameters", f"{result['conv_parameters']:,}")
    table.add_row("all parameters", f"{result['parameters']:,}")
    table.add_row("state in float32", f"{result['bytes_float32'] / 1e6:.2f} MB")
    table.add_row(
        f"as a file, weights at {spec.weight_bits} bits", f"{result['bytes_packed'] / 1e6:.2f} MB"
    )
    Console().print(table)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str
    ok: bool
    advice: str = ""


def checks(as_json: JsonOption = False) -> None:
    """Says what this machine has, and whether all is in order for training and simulations."""
    results = [
        _python(),
        *[_package(name, needed=True) for name in NEEDED],
        *[_package(name, needed=False) for name in FOR_FEDERATION],
        Check(name="processors", found=str(len(os.sched_getaffinity(0))), ok=True),
        _memory(),
        _disk(Path.cwd()),
        Check(
            name="GPU",
            found=torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else "none (not needed)",
            ok=True,
        ),
        _step(),
    ]
    failed = [check for check in results if not check.ok]
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in results]}))
    else:
        table = Table(box=None)
        for title in ("", "what", "found", ""):
            table.add_column(title)
        for check in results:
            mark = "[green]ok[/]" if check.ok else "[red]no[/]"
            table.add_row(mark, check.name, check.found, check.advice)
        Console().print(table)
    if failed:
        raise RunFailure(f"not in order: {', '.join(check.name for check in failed)}")


def _python() -> Check:
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    advice = "" if ok else "use Python 3.11 or 3.12"
    return Check(name="Python", found=platform.python_version(), ok=ok, advice=advice)


def _package(name: str, *, needed: bool) -> Check:
    try:
        return Check(name=name, found=importlib.metadata.version(name), ok=True)
    except importlib.metadata.PackageNotFoundError:
        advice = "pip install ." if needed else "for simulations: pip install '.[federated]'"
        return Check(name=name, found="not installed", ok=not needed, advice=advice)


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    ok = memory.available > 2e9
    return Check(name="memory", found=found, ok=ok, advice="" if ok else "2 GB are needed")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    ok = free >= MIN_FREE_BYTES
    advice = "" if ok else f"{MIN_FREE_BYTES / 1e9:.0f} GB are needed in {folder}"
    return Check(name="disk", found=f"{free / 1e9:.1f} GB free here", ok=ok, advice=advice)


def _step() -> Check:
    """Trains one quantised step on noise: torch and the quantisers work together."""
    from fedcunet.models import DUNet
    from fedcunet.quant import QuantSpec, quantise_network

    spec = QuantSpec(input_bits=8, weight_bits=1, gradient_bits=8, alpha=True)
    model = quantise_network(DUNet(1, 0, 2), spec)
    loss = model(torch.zeros(2, 3, 64, 64))[-1].square().mean()
    loss.backward()
    finite = all(
        parameter.grad is not None and bool(parameter.grad.isfinite().all())
        for parameter in model.parameters()
    )
    return Check(name="training step 8-1-8", found="finite" if finite else "not finite", ok=finite)
