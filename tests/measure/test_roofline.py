"""The points of the roofline: each is the step it says, counted as predicted, under the roof of the same rounds."""

from __future__ import annotations

import json

import pytest
import torch

from minillm.costs.formulas import least_bytes, step_flops
from minillm.costs.steps import decode_step, prefill_step
from minillm.errors import ConfigError
from minillm.measure import roofline
from minillm.measure.bench import Timing
from minillm.measure.hardware import Hardware
from minillm.measure.machine import describe_machine
from minillm.measure.roof import Roof
from minillm.measure.roofline import RooflineRun, measure_roofline
from tests.families import random_model


@pytest.fixture(scope="module")
def run() -> RooflineRun:
    """A measured run of a tiny model, with ceilings measured on buffers as small."""
    machine = describe_machine(torch.device("cpu"))
    hardware = Hardware(machine, 1e9, 1e9, {"float32": 1e9}, 1e-6, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "read_buffer", lambda *_: torch.ones(2**21, dtype=torch.bfloat16))
        return measure_roofline(
            random_model("qwen3"), hardware, name="x", prompts=[8, 20], batches=[1, 3], contexts=[64], repeats=2
        )


def test_each_point_is_its_step(run: RooflineRun) -> None:
    shapes = [(p.phase, p.batch, p.context) for p in run.points]
    assert shapes == [("prefill", 1, 8), ("prefill", 1, 20), ("decode", 1, 64), ("decode", 3, 64)]
    config = random_model("qwen3").config
    for point, step in zip(
        run.points, [prefill_step(8), prefill_step(20), decode_step(64), decode_step(64, 3)], strict=True
    ):
        assert point.flops == step_flops(config, step).total
        assert point.least_bytes == least_bytes(config, step, 4)
        assert point.counted._replace(activations=0) == point.predicted
        assert point.counted.activations > 0 and len(point.timing.times) == 2


def test_points_are_under_the_roof_of_the_same_rounds(run: RooflineRun) -> None:
    for point in run.points:
        assert 0 < run.share_of_roof(point) <= 1


def test_what_a_point_waits_for() -> None:
    roof = Roof(100.0, 10.0)  # ridge: 10
    make = roofline.Point

    def waits(flops: int, least: int, seconds: float) -> str | None:
        moved = roofline.Bytes(least, 0, 0)
        point = make("decode", 1, 1, Timing((seconds, 9 * seconds)), flops, least, moved, moved)
        return RooflineRun("", "", "", roof, 0, False, [point]).waits_for(point)

    assert waits(100, 100, seconds=11.0) == "bytes"  # 10 s of reading, 1 s of computing
    assert waits(1000, 10, seconds=11.0) == "arithmetic"
    assert waits(100, 100, seconds=25.0) is None


def test_a_run_is_plain_data(run: RooflineRun) -> None:
    data = json.loads(json.dumps(run.to_json()))
    assert data["roof"]["flops_per_second"] == run.roof.flops_per_second
    assert [p["batch"] for p in data["points"]] == [1, 1, 1, 3] and data["points"][0]["predicted_bytes"]["weights"] > 0


def test_lengths_beyond_the_model_are_refused() -> None:
    machine = describe_machine(torch.device("cpu"))
    hardware = Hardware(machine, 1e9, 1e9, {"float32": 1e9}, 1e-6, "")
    with pytest.raises(ConfigError, match="513"):
        measure_roofline(random_model(), hardware, name="x", prompts=[513], batches=[1], contexts=[16])
