"""What the benchmarks share: lists of numbers, medians with their spread, and the file of results."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm.cli.console import number, use_threads
from minillm.cli.screen import PICTURES, check_destination, err, out, plain
from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.measure.bench import Quartiles, Timing
    from minillm.measure.hardware import Hardware
    from minillm.measure.roof import Roof
    from minillm.model.decoder import Decoder

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write everything measured to a file.")]
Against = Annotated[str, typer.Option(help="A rival of the same shape: transformers.", metavar="NAME")]
RIVALS = ("transformers",)


@dataclass(frozen=True)
class Subject:
    """The model of a benchmark and the machine it runs on."""

    name: str
    model: Decoder
    hardware: Hardware

    @classmethod
    def load(
        cls, name: str, *, device: str, dtype: str, seed: int, threads: int | None, kernels: str = "auto"
    ) -> Subject:
        """Load the model and measure the machine, with a line on the terminal."""
        from minillm.measure.hardware import measure_hardware
        from minillm.model.loader import load_model

        use_threads(threads)
        model = load_model(name, device=device, dtype=dtype, seed=seed, kernels=kernels)
        with err.waiting("Measuring the machine …"):
            return cls(name, model, measure_hardware(str(model.device)))

    @property
    def dtype(self) -> str:
        from minillm.measure.hardware import dtype_name

        return dtype_name(self.model.dtype)

    @property
    def roof(self) -> Roof:
        """This machine's roof for products in the model's dtype."""
        return self.hardware.roof(self.dtype)

    def print_title(self) -> None:
        """The line above every result: what ran on what."""
        machine = self.hardware.machine
        out.print(plain(f"{self.name}, {self.dtype}, threads: {machine.threads}, {machine.name}", style="bold"))

    def write(self, path: Path | None, benchmark: str, setting: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        """Write the report, if a file is wanted."""
        if path is not None:
            setting = {"model_id": self.name, "dtype": self.dtype, **setting}
            write_report(path, benchmark, setting, self.hardware, results)


def lengths(option: str, text: str) -> list[int]:
    """ "128,1024" as numbers; nothing for an empty text. Raises ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} {text!r} is no list of numbers. Write them like 128,1024.") from None


def check_rival(against: str) -> None:
    """Raise ConfigError for a rival that is unknown; an empty name means no rival."""
    if against not in ("", *RIVALS):
        raise ConfigError(
            f"--against {against!r} is unknown. Choose {', '.join(RIVALS)}, or leave it out to run alone."
        )


def check_file(path: Path | None) -> None:
    """Raise ConfigError for a file of results that cannot be written; none is fine."""
    if path is not None:
        check_destination(path)


def check_plot(path: Path | None) -> Path | None:
    """Where a picture will be written. Raises ConfigError for one that cannot be; none is fine."""
    return None if path is None else check_destination(path, endings=PICTURES)


def spread(scale: float, values: Timing | Quartiles) -> str:
    """Median and quartiles: 26.0 (25.8–26.4)."""
    low, median, high = (number(scale * value) for value in (values.low, values.median, values.high))
    return f"{median} ({low}–{high})"


def write_report(
    path: Path, benchmark: str, setting: Mapping[str, Any], hardware: Hardware, results: Mapping[str, Any]
) -> None:
    """Everything that was measured, with what it was measured on. `setting` names at least the "model_id"."""
    report = {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["minillm", *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in ("minillm-course", "torch", "transformers")},
        "weights": "random" if setting["model_id"].startswith("random:") else "checkpoint",
        **setting,
        "hardware": asdict(hardware),
        **results,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
