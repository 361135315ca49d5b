import sys

from minillm import LLM, SamplingParams
from minillm.errors import RequestError

llm = LLM("tiny", dtype="float32", device="cpu")
raw = []
for kw in ({"top_k": 2**63}, {"logprobs": 2.5}, {"logprobs": 2.0}, {"stop": 5}, {"stop_token_ids": 5}):
    try:
        llm.generate("def f():", SamplingParams(max_tokens=2, **kw), progress=False)
    except RequestError:
        pass
    except Exception as e:
        raw.append(f"{kw}: {type(e).__name__}")
print("raw errors:", "; ".join(raw))
sys.exit(bool(raw))
