"""The commands `data make|check|show|partition`: what a data set holds and how it is dealt."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fedcunet.commands.data_check import check
from fedcunet.commands.data_options import Data, Root, Seed, Subset, kind_of, progress_of, say
from fedcunet.commands.data_partition import partition_command
from fedcunet.data import load
from fedcunet.data.augmentation import Augmentation
from fedcunet.data.crops import Crops
from fedcunet.data.drawing import contact_sheet, draw_landmarks
from fedcunet.data.images import write_image
from fedcunet.errors import UserError

app = typer.Typer(help="Make, check, show and deal data sets.", no_args_is_help=True)
make_app = typer.Typer(help="Make a procedural data set.", no_args_is_help=True)
app.add_typer(make_app, name="make")

app.command()(check)
app.command("partition")(partition_command)


@make_app.command("faces")
def make_faces_command(
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    num_train: Annotated[int, typer.Option("--num-train", min=3, help="Training faces.")] = 720,
    num_test: Annotated[int, typer.Option("--num-test", min=3, help="Test faces.")] = 160,
    seed: Seed = 0,
) -> None:
    """Draw procedural faces with 68 landmarks, in the folders of 300-W."""
    from fedcunet.data.procedural import make_faces

    with progress_of("faces") as report:
        counts = make_faces(out, num_train=num_train, num_test=num_test, seed=seed, progress=report)
    shown = ", ".join(f"{folder} {count}" for folder, count in counts.items())
    say(f"{out}: {sum(counts.values())} faces ({shown})")


@make_app.command("people")
def make_people_command(
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    num_train: Annotated[int, typer.Option("--num-train", help="Training people.")] = 1500,
    num_test: Annotated[int, typer.Option("--num-test", help="Test people.")] = 300,
    seed: Seed = 0,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Drawing at once; as many as cores, at most 8."),
    ] = None,
) -> None:
    """Draw procedural people with 16 joints, in the files of MPII."""
    from fedcunet.data.procedural import default_processes, make_people

    with progress_of("people") as report:
        counts = make_people(
            out,
            num_train=num_train,
            num_test=num_test,
            seed=seed,
            processes=default_processes() if processes is None else processes,
            progress=report,
        )
    shown = ", ".join(f"{part} {count}" for part, count in counts.items())
    say(f"{out}: {sum(counts.values())} people ({shown})")


@app.command()
def show(
    root: Root,
    out: Annotated[Path, typer.Option("--out", help="The picture to write (.png or .jpg).")],
    data: Data = None,
    subset: Subset = "train",
    count: Annotated[int, typer.Option("--count", min=1, help="How many crops.")] = 24,
    size: Annotated[
        int, typer.Option("--size", min=8, max=1024, help="Side of a crop in pixels.")
    ] = 64,
    augment: Annotated[bool, typer.Option("--augment", help="As in training.")] = False,
    seed: Seed = 0,
) -> None:
    """Draw crops chosen at random with their landmarks on one sheet."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{out}: expected a name ending in .png or .jpg")
    chosen_set = load(kind_of(data, root), root, subset)
    scheme = chosen_set.scheme
    crops = Crops(chosen_set.annotations, scheme, size=size)
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(crops))[:count]
    augmentation = Augmentation(flip=not scheme.is_face) if augment else None
    batch = crops.batch(chosen.tolist(), augmentation=augmentation, generator=generator)
    images_NHW3 = (batch.images_B3HW * 255).round().byte().permute(0, 2, 3, 1).numpy()
    zoom = max(1, round(192 / size))
    pictures = [
        draw_landmarks(image_HW3, points_K2, labelled_K, scheme, zoom=zoom)
        for image_HW3, points_K2, labelled_K in zip(
            images_NHW3, batch.points_BK2.numpy(), batch.labelled_BK.numpy(), strict=True
        )
    ]
    write_image(out, contact_sheet(pictures))
    say(f"{out}: {len(pictures)} of {len(crops)} crops")
