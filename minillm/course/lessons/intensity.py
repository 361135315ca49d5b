"""How much a batch gets out of each byte: linear layers, attention and the whole decode step, counted and predicted."""

from __future__ import annotations

from typing import NamedTuple

from minillm.config import ModelConfig
from minillm.costs.steps import decode_step
from minillm.measure.counters import Counter
from minillm.measure.roof import attention_intensity, intensity
from minillm.measure.stepper import StepRunner, weightless

BYTES = 2  # per element: bfloat16


class BatchIntensity(NamedTuple):
    """FLOP per byte of one decode step; activations left out."""

    batch: int
    linear: float  # of the layers' matrices, over their weights
    attention: float  # over the keys and values that it reads
    step: float  # of everything, over weights and KV


def predict_intensity(config: ModelConfig, batch: int, context: int) -> BatchIntensity:
    """By formula: a weight of two bytes serves a multiplication and an addition for each request."""
    linear, attention = 2 * batch / BYTES, attention_intensity(config, BYTES)
    return BatchIntensity(batch, linear, attention, intensity(config, decode_step(context, batch), BYTES))


def count_intensity(config: ModelConfig, batch: int, context: int) -> BatchIntensity:
    """As the operators of a step ask for it, on a model without memory."""
    model = weightless(config)
    run = StepRunner(model, decode_step(context, batch))
    with Counter(model, kv=run.cache) as counted:
        run()
    parts, total = counted.by_part(), counted.total
    layers = [parts["projections"], parts["mlp"]]
    return BatchIntensity(
        batch,
        linear=sum(part.flops for part in layers) / sum(part.bytes.weights for part in layers),
        attention=parts["attention"].flops / total.bytes.kv_read,
        step=total.flops / total.bytes._replace(activations=0).total,
    )
