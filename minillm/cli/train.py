"""`minillm train`: train the embedded models again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minillm.cli.console import Device, Seed
from minillm.cli.screen import check_destination, err, out


def train(
    shape: Annotated[str, typer.Argument(help="tiny or tiny-draft.")] = "tiny",
    minutes: Annotated[float, typer.Option(help="How long to train, over all runs of the same --work.")] = 60.0,
    directory: Annotated[
        Path | None, typer.Option("--out", help="Where the model goes; by default runs/SHAPE.", metavar="FOLDER")
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Tokenizer, tokens and the checkpoint that a later run resumes.", metavar="FOLDER")
    ] = Path("runs/work"),
    seed: Seed = 0,
    device: Device = "auto",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = True,
) -> None:
    """Train a small model on the Python source of this machine. You may stop it: the same command continues."""
    from minillm.course.training.train import TrainConfig
    from minillm.course.training.train import train as run
    from minillm.model.loader import choose_device

    folder = directory or Path("runs") / shape
    place = choose_device(device).type
    config = TrainConfig(shape, folder, work, minutes=minutes, seed=seed, compile=compiled, device=place)
    check_destination(folder, folder=True)
    check_destination(work, folder=True)
    work.mkdir(parents=True, exist_ok=True)
    plot = check_destination(work / f"{shape}-losses.png")
    command = f"minillm train {shape} --minutes {minutes:g} --seed {seed}"
    history = run(config, command=command, plot=plot, console=err)
    losses = history.held_out_losses
    out.print(f"{history.step} steps, {history.tokens} tokens, held-out loss {losses[-1][1]:.3f} nats per token")
    out.print(f"Model: {folder.resolve()}", f"Losses: {plot.resolve()}", sep="\n", soft_wrap=True)
