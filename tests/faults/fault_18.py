import sys

from minillm import LLM, SamplingParams

llm = LLM("tiny", dtype="float32", device="cpu")
bad = []
right = llm.generate("def f():", SamplingParams(temperature=0, max_tokens=3), progress=False)[0].outputs[0].token_ids
for kw in ({"temperature": 1e-38}, {"temperature": 1e-300}, {"top_p": 1e-50}, {"repetition_penalty": 1e-300}):
    try:
        got = (
            llm.generate("def f():", SamplingParams(seed=0, max_tokens=3, **kw), progress=False)[0].outputs[0].token_ids
        )
    except ValueError:
        continue
    bad += [kw] if set(got) == {4095} else []
print("accepted values that make every token the last of the vocabulary:", bad)
sys.exit(bool(bad))
