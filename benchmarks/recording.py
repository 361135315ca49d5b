"""What the scripts here share: measured rows go to the screen as they come, and into a JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from minillm.measure.hardware import measure_hardware

Row = dict[str, Any]


def result_file(benchmark: str, args: argparse.Namespace) -> Path:
    """`--out`, or a file of the benchmark's and the device's name beside the recorded results."""
    return args.out or Path(__file__).parent / "results" / f"{benchmark}_{args.device}.json"


def record(benchmark: str, rows: Iterable[Row], describe: Callable[[Row], str], args: argparse.Namespace) -> None:
    """Print each row as it comes; write them all with the machine, its ceilings and the date."""
    kept = []
    for row in rows:
        print(describe(row), flush=True)
        kept.append(row)
    hardware = asdict(measure_hardware(args.device))
    about = {"benchmark": benchmark, "date": date.today().isoformat(), "repeats": args.repeats, "hardware": hardware}
    out = result_file(benchmark, args)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(about | {"rows": kept}, indent=1) + "\n")
    print(f"Written to {out}")
