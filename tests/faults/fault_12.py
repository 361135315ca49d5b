import sys; from minillm import LLM, SamplingParams
llm = LLM("tiny", dtype="float32", device="cpu"); bad = []
for what, kw, p in (("unhashable salt", {"cache_salt": ["a"]}, [1, 2]), ("float ids", {}, [1.0, 2.0])):
    try: llm.engine.add(p, SamplingParams(max_tokens=2), request_id=what, **kw)
    except ValueError: continue
    try: llm.generate("def f():", SamplingParams(max_tokens=2), progress=False)
    except Exception as e: bad.append(f"{what}: {type(e).__name__}")
    llm.engine.abort(what)
print("accepted by add, then every other request fails, too:", bad); sys.exit(bool(bad))
