import sys
from pathlib import Path

import torch

from minillm import LLM, SamplingParams
from minillm.errors import MinillmError

llm = LLM("tiny", dtype="float32", device="cpu")
ids = llm.tokenizer.encode("def fib(n):")
raw = []
for p in (
    {"prompt": "def"},
    torch.tensor(ids),
    torch.tensor(ids).numpy(),
    (x for x in ["def"]),
    {"def"},
    None,
    [1.0, 2.0],
    Path("x"),
):
    try:
        llm.generate(p, SamplingParams(max_tokens=2), progress=False)
    except MinillmError:
        pass
    except Exception as e:
        raw.append(f"{type(p).__name__}: {type(e).__name__}")
print("prompts that end in a raw error:", "; ".join(raw))
sys.exit(bool(raw))
