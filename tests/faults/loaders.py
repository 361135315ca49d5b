"""Damaged and hostile model folders: what comes out of load_model / load_tokenizer. One fork per case.

`python tests/faults/loaders.py` runs all, `… c_,t_` those whose names begin so, `… --sample 20 7` twenty, drawn from
seed 7. Each must be right ("?") or end in a named error (" "); "!" is a fault, "$" took over 2 s or 1 GB.
"""
import json, os, random, resource, shutil, signal, struct, sys, tempfile, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
import minillm
from minillm.errors import MinillmError
from minillm.llm import LLM
from minillm.model.loader import load_model
from minillm.model.tokenizer import load_tokenizer
from minillm.sampling import SamplingParams
TINY = Path(minillm.__file__).parent / "checkpoints" / "tiny"
ROOT = Path(tempfile.mkdtemp()) / "loaders"; ROOT.mkdir()
BASE = json.loads((TINY / "config.json").read_text())
TOK = json.loads((TINY / "tokenizer.json").read_text())
CASES = []
def folder(name):
    d = ROOT / name; d.mkdir()
    for f in ("config.json", "tokenizer.json", "tokenizer_config.json"): shutil.copy(TINY / f, d)
    os.symlink(TINY / "model.safetensors", d / "model.safetensors")
    return d
def config(name, text=None, **change):
    d = folder("c_" + name)
    data = {**BASE, **change}
    for k, v in change.items():
        if v == "DROP": del data[k]
    (d / "config.json").unlink()
    (d / "config.json").write_text(text if text is not None else json.dumps(data)) if not isinstance(text, bytes) else (d / "config.json").write_bytes(text)
    CASES.append((d, "model"))
    return d
# ---- config.json
for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
    for label, v in (("huge", 10**15), ("string", "64"), ("nan", float("nan")), ("true", True), ("list", [1]), ("bigger", 10**30)):
        if key == "max_position_embeddings" or label in ("huge", "true", "bigger") or key == "hidden_size":
            config(f"{key}_{label}", **{key: v})
config("layers_1e6", num_hidden_layers=10**6); config("layers_2e5", num_hidden_layers=2 * 10**5)
for key in ("num_key_value_heads", "head_dim"):
    for label, v in (("string", "2"), ("negative", -2), ("float", 2.0), ("list", [2]), ("huge", 10**12), ("dict", {}), ("true", True)):
        config(f"{key}_{label}", **{key: v})
for label, v in (("string", "abc"), ("null", None), ("nan", float("nan")), ("negative", -1.0), ("dict", {"a": 1})):
    config(f"eps_{label}", rms_norm_eps=v); config(f"theta_{label}", rope_theta=v)
for label, v in (("list", [1, 2]), ("string", "llama3"), ("missing", {"rope_type": "llama3"}), ("zero", {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 1, "original_max_position_embeddings": 8192}), ("strings", {"rope_type": "llama3", "factor": "x", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8}), ("type_list", {"rope_type": ["llama3"]})):
    config(f"rope_scaling_{label}", rope_scaling=v)
for label, v in (("int", 5), ("dict", {"a": 1}), ("nested", [["Qwen3ForCausalLM"]]), ("string", "Qwen3ForCausalLM"), ("empty", [])):
    config(f"architectures_{label}", architectures=v)
for label, v in (("string", "0"), ("nested", [[0]]), ("dict", {"a": 1}), ("float", 0.5), ("huge", 10**30), ("strings", ["x"])):
    config(f"eos_{label}", eos_token_id=v)
config("layer_types_int", layer_types=5); config("layer_types_nested", layer_types=[["full_attention"]], use_sliding_window=True)
for label, v in (("string", "abc"), ("zero", 0), ("negative", -5), ("float", 1.5)):
    config(f"mistral_window_{label}", architectures=["MistralForCausalLM"], sliding_window=v)
config("nested", text="[" * 200000 + "]" * 200000); config("nested_object", text='{"a":' * 100000 + "1" + "}" * 100000)
config("ten_mb", text=json.dumps({**BASE, "x": "y" * (10 << 20)})); config("bigint", text=json.dumps(BASE)[:-1] + ', "z": ' + "9" * 5000 + "}")
config("utf16", text=json.dumps(BASE).encode("utf-16")); config("list", text="[1]"); config("null", text="null"); config("nanjson", text="NaN")
config("duplicate", text=json.dumps(BASE)[:-1] + ', "hidden_size": 7}')
for k in ("hidden_size", "vocab_size", "architectures"): config(f"missing_{k}", **{k: "DROP"})
d = folder("c_directory"); (d / "config.json").unlink(); (d / "config.json").mkdir(); CASES.append((d, "model"))
d = folder("c_link_to_passwd"); (d / "config.json").unlink(); os.symlink("/etc/passwd", d / "config.json"); CASES.append((d, "model"))
d = folder("c_link_to_zero"); (d / "config.json").unlink(); os.symlink("/dev/zero", d / "config.json"); CASES.append((d, "model"))
d = folder("c_fifo"); (d / "config.json").unlink(); os.mkfifo(d / "config.json"); CASES.append((d, "model"))
for label, text in (("list", "[]"), ("broken", "{"), ("strings", '{"eos_token_id": ["a"]}'), ("nested", '{"eos_token_id": [[1]]}'), ("huge", '{"eos_token_id": 1e999}'), ("dict", '{"eos_token_id": {"a": 1}}')):
    d = folder("g_generation_" + label); (d / "generation_config.json").write_text(text); CASES.append((d, "llm"))
# ---- safetensors
real = (TINY / "model.safetensors").read_bytes(); n = struct.unpack("<Q", real[:8])[0]; HEADER = json.loads(real[8:8 + n]); BODY = real[8 + n:]
def tensors(name, header=None, raw=None, body=BODY, length=None):
    d = folder("s_" + name); (d / "model.safetensors").unlink()
    if raw is None:
        h = header if isinstance(header, bytes) else json.dumps(header).encode()
        raw = struct.pack("<Q", len(h) if length is None else length) + h + body
    (d / "model.safetensors").write_bytes(raw); CASES.append((d, "model"))
first = next(k for k in HEADER if k != "__metadata__"); norm = "model.norm.weight"
def changed(name, **change): return {**HEADER, name: {**HEADER[name], **change}}
tensors("header_huge", HEADER, length=2**63); tensors("header_all_ones", HEADER, length=2**64 - 1); tensors("header_zero", b""); tensors("empty", raw=b""); tensors("seven", raw=b"1234567")
tensors("header_longer_than_file", HEADER, length=len(real) + 10); tensors("cut", raw=real[: len(real) // 2]); tensors("trailing", raw=real + b"x" * 100)
tensors("overlap", changed(norm, data_offsets=HEADER[first]["data_offsets"])); tensors("negative", changed(norm, data_offsets=[-8, 504])); tensors("reversed", changed(norm, data_offsets=HEADER[norm]["data_offsets"][::-1]))
tensors("offset_huge", changed(norm, data_offsets=[2**63, 2**63 + 512])); tensors("shape_overflow", changed(norm, shape=[2**40, 2**40])); tensors("shape_zero", changed(norm, shape=[0])); tensors("shape_scalar", changed(norm, shape=[])); tensors("shape_negative", changed(norm, shape=[-256]))
tensors("shape_1e6_dims", changed(norm, shape=[1] * 100000 + [256])); tensors("shape_65_dims", changed(norm, shape=[1] * 65 + [256]))
for dt in ("F4", "F8_E8M0", "F6_E2M3", "F6_E3M2", "C64", "BOOL", "I16", "U16", "F16", "X9", "F8_E4M3"):
    size = HEADER[norm]["data_offsets"]; nb = size[1] - size[0]
    shape = {"F4": [nb * 2], "F8_E8M0": [nb], "F6_E2M3": [nb * 4 // 3], "F6_E3M2": [nb * 4 // 3], "C64": [nb // 8], "BOOL": [nb], "F8_E4M3": [nb]}.get(dt, [256])
    tensors("dtype_" + dt, changed(norm, dtype=dt, shape=shape))
text = json.dumps(HEADER); tensors("duplicate_keys", (text[:-1] + ', "model.norm.weight": ' + json.dumps(HEADER[norm]) + "}").encode()); tensors("not_json", b"{" * 100); tensors("nested", b"[" * 100000); tensors("metadata_int", {**HEADER, "__metadata__": {"a": 1}}); tensors("header_list", b"[]"); tensors("extra_tensor", {**HEADER, "evil": {"dtype": "F32", "shape": [0], "data_offsets": [len(BODY), len(BODY)]}})
no = {k: v for k, v in HEADER.items()}; no["renamed"] = no.pop(norm); tensors("renamed", no)
tensors("pickle", raw=b"\x80\x04\x95" + b"a" * 100); tensors("zip", raw=b"PK\x03\x04" + b"a" * 1000)
d = folder("s_nan_weights"); (d / "model.safetensors").unlink(); (d / "model.safetensors").write_bytes(real[: 8 + n] + b"\xff" * len(BODY)); CASES.append((d, "generate"))
d = folder("s_directory"); (d / "model.safetensors").unlink(); (d / "model.safetensors").mkdir(); CASES.append((d, "model"))
d = folder("s_link_to_zero"); (d / "model.safetensors").unlink(); os.symlink("/dev/zero", d / "model.safetensors"); CASES.append((d, "model"))
d = folder("s_dangling"); (d / "model.safetensors").unlink(); os.symlink("/nowhere", d / "model.safetensors"); CASES.append((d, "model"))
def index(name, content):
    d = folder("i_" + name); (d / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content)); CASES.append((d, "model"))
names = [k for k in HEADER if k != "__metadata__"]
for label, target in (("passwd", "../../etc/passwd"), ("absolute", "/etc/passwd"), ("dotdot", ".."), ("empty", ""), ("dot", "."), ("nul", "a\0b"), ("long", "a" * 300), ("missing", "shard.safetensors"), ("config", "config.json"), ("int", 5), ("list", ["model.safetensors"]), ("surrogate", "\ud800")):
    index(label, {"weight_map": {k: target for k in names}})
index("map_is_list", {"weight_map": ["model.safetensors"]}); index("map_is_string", {"weight_map": "model.safetensors"}); index("map_is_int", {"weight_map": 3}); index("nested", '{"weight_map":' * 100000)
d = folder("i_wrong_shard"); shutil.copy(TINY.with_name("tiny-draft") / "model.safetensors", d / "other.safetensors"); (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {k: "other.safetensors" for k in names}})); CASES.append((d, "model"))
empty = struct.pack("<Q", 2) + b"{}"
d = folder("i_tensor_not_in_shard"); (d / "other.safetensors").write_bytes(empty); (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {k: "other.safetensors" for k in names}})); CASES.append((d, "model"))
# ---- tokenizer
def tok(name, content, what="tokenizer", **more):
    d = folder("t_" + name); (d / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    for k, v in more.items(): (d / f"{k}.json").write_text(v if isinstance(v, str) else json.dumps(v))
    CASES.append((d, what)); return d
tok("empty", ""); tok("list", "[]"); tok("nested", "[" * 200000); tok("object_nested", '{"a":' * 200000); tok("null_model", {**TOK, "model": None}); tok("wrong_types", {**TOK, "added_tokens": 5}); tok("vocab_list", {**TOK, "model": {**TOK["model"], "vocab": ["a"]}})
tok("merges_unknown", {**TOK, "model": {**TOK["model"], "merges": [["zzz", "yyy"]]}}); tok("merges_short", {**TOK, "model": {**TOK["model"], "merges": [["a"]]}}); tok("ids_negative", {**TOK, "model": {**TOK["model"], "vocab": {"a": -1}}})
tok("ids_huge", {**TOK, "model": {**TOK["model"], "vocab": {**TOK["model"]["vocab"], "a": 2**32 - 1}, "merges": []}}); tok("ids_same", {**TOK, "model": {**TOK["model"], "vocab": {k: 0 for k in TOK["model"]["vocab"]}, "merges": []}})
tok("vocab_empty", {**TOK, "model": {**TOK["model"], "vocab": {}, "merges": []}}); tok("added_huge_id", {**TOK, "added_tokens": [{"id": 2**31, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}]})
deep = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
for _ in range(50): deep = {"type": "Sequence", "pretokenizers": [deep]}
tok("sequences_50_deep", {**TOK, "pre_tokenizer": deep})
text = json.dumps({**TOK, "pre_tokenizer": "HERE"}); tok("sequences_20000_deep", text.replace('"HERE"', '{"type": "Sequence", "pretokenizers": [' * 20000 + json.dumps(deep) + "]}" * 20000))
tok("regex_bomb", {**TOK, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(a|a|aa)*(a|a)*b$"}, "behavior": "Isolated", "invert": False}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}}, "encode")
tok("regex_broken", {**TOK, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False}})
tok("regex_repeat", {**TOK, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((((a{1,100}){1,100}){1,100}){1,100})"}, "behavior": "Isolated", "invert": False}}, "encode")
tok("precompiled", {**TOK, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "encode"); tok("precompiled_bad", {**TOK, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "////" * 100}}, "encode")
tok("replace_grow", {**TOK, "normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaaaaaaaa"}] * 7}}, "encode")
tok("unigram", {**TOK, "model": {"type": "Unigram", "unk_id": 999, "vocab": [["a", -1.0]], "byte_fallback": False}}, "encode"); tok("unigram_empty", {**TOK, "model": {"type": "Unigram", "unk_id": 0, "vocab": [], "byte_fallback": False}}, "encode"); tok("unigram_nan", {**TOK, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["Ċ", float("-inf")], ["a", 1e308]], "byte_fallback": False}}, "encode")
tok("wordpiece", {**TOK, "model": {"type": "WordPiece", "vocab": {"Ċ": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}, "encode"); tok("no_spelling", {**TOK, "model": {**TOK["model"], "vocab": {"a": 0}, "merges": []}})
tok("truncation_stride", {**TOK, "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 10}}, "encode"); tok("padding_huge", {**TOK, "padding": {"strategy": {"Fixed": 10**8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}}, "encode")
tok("odd_letters", {**TOK, "model": {**TOK["model"], "vocab": {**TOK["model"]["vocab"], "日本": 4096}, "merges": TOK["model"]["merges"]}}, "decode")
big = {f"t{i}": i for i in range(3_000_000)}; big["Ċ"] = 3_000_000
tok("vocab_3e6", {**TOK, "model": {**TOK["model"], "vocab": big, "merges": []}}); del big
TC = json.loads((TINY / "tokenizer_config.json").read_text())
def tc(name, what="tokenizer", **change): return tok("tc_" + name, json.dumps(TOK), what, tokenizer_config={**TC, **change})
tc("auto_map", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"); (ROOT / "t_tc_auto_map" / "evil.py").write_text(f"open({str(ROOT / 'EVIL_RAN')!r},'w')\nclass Evil: pass\n")
tc("class_int", tokenizer_class=5); tc("class_unknown", tokenizer_class="os.system"); tc("eos_list", eos_token=["a", "b"]); tc("eos_dict", eos_token={"a": 1}); tc("max_length_string", model_max_length="abc"); tc("added_decoder", added_tokens_decoder={"x": 5}); tc("added_decoder2", added_tokens_decoder={"99999999999": {"content": "a"}}); tc("chat_int", chat_template=5)
tok("tc_list", json.dumps(TOK), tokenizer_config="[]"); tok("tc_nested", json.dumps(TOK), tokenizer_config='{"a":' * 100000); tok("tc_ten_mb", json.dumps(TOK), tokenizer_config={**TC, "x": "y" * (10 << 20)})
CHAT = {"attr": "{{ messages.__class__.__mro__[-1].__subclasses__() }}", "attr_filter": "{{ (messages|attr('__class__'))|attr('__mro__') }}", "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "format_map": "{{ ('{x.__class__}'.format_map)({'x': messages}) }}", "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}", "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "namespace": "{{ namespace.__init__.__globals__ }}", "tojson": "{{ raise_exception.__globals__ }}", "strftime": "{{ strftime_now.__globals__['__builtins__'] }}", "strftime_big": "{{ strftime_now('%500000000d') }}",
  "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "range": "{% for i in range(10**9) %}x{% endfor %}", "mult": "{{ 'a' * 20000000000 }}", "mult_list": "{{ [0] * 4000000000 }}", "power": "{{ 9**9**9 }}", "center": "{{ 'a'.center(20000000000) }}", "printf": "{{ '%20000000000d' % 1 }}", "doubling": "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}", "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "raise": "{{ raise_exception('roles must alternate') }}", "syntax": "{% for %}", "undefined": "{{ nothing.at.all }}", "include": "{% include '/etc/passwd' %}", "import": "{% import 'os' as os %}", "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "many": "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "mutate": "{{ messages.clear() }}{{ messages.append(1) }}", "lone": "{{ '\\ud800' }}", "indent": "{{ 'a' | indent(2000000000, true) }}", "wordwrap": "{{ ('a'*1000000) | wordwrap(1) | length }}"}
for label, template in CHAT.items(): tc("chat_" + label, "chat", chat_template=template)
d = tc("chat_file", "chat"); (d / "chat_template.jinja").write_text("{{ 'a' * 20000000000 }}")
d = tc("chat_file_link", "chat"); os.symlink("/etc/passwd", d / "chat_template.jinja")
MB = 1 << 20
def attempt(d, what):
    if what == "model": load_model(d, device="cpu", dtype="float32", progress=False); return "loaded"
    if what in ("llm", "generate"):
        llm = LLM(d, device="cpu", dtype="float32", num_blocks=16)
        return "wrote " + repr(llm.generate("def f", SamplingParams(max_tokens=3, temperature=0), progress=False)[0].outputs[0].token_ids)
    t = load_tokenizer(d)
    if what == "encode": return f"{len(t.encode('a' * 5000))} tokens"
    if what == "decode": return repr(t.decode(range(len(t.vocabulary)))[-20:])
    if what == "chat": return repr(t.apply_chat_template([{"role": "user", "content": "hello"}]))[:80]
    return f"vocabulary {len(t.vocabulary)}"
load_tokenizer(TINY.parent / "tiny"); folder("warm"); load_tokenizer(ROOT / "warm")   # imports
part = sys.argv[1] if len(sys.argv) == 2 else ""
if sys.argv[1:2] == ["--sample"]:
    CASES = random.Random(int(sys.argv[3])).sample(CASES, int(sys.argv[2]))
LIMIT_S, LIMIT_MB = 6, 3000
vm = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
bad = 0
for d, what in CASES:
    if part and not d.name.startswith(tuple(part.split(","))): continue
    r, w = os.pipe(); t0 = time.time()
    pid = os.fork()
    if pid == 0:
        os.close(r); null = os.open("/dev/null", os.O_RDWR); os.dup2(null, 0); os.dup2(null, 1); os.dup2(null, 2)
        resource.setrlimit(resource.RLIMIT_AS, (vm + LIMIT_MB * MB,) * 2); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 1))
        try: out = "OK " + attempt(d, what)
        except MinillmError as e: out = f"NAMED {type(e).__name__}: {e}"
        except BaseException as e:
            at = [f for f in traceback.extract_tb(e.__traceback__) if "minillm" in f.filename][-1:]
            out = f"UNNAMED {type(e).__name__}: {str(e)[:150]} @ {at[0].filename.rpartition('/')[2]}:{at[0].lineno}" if at else f"UNNAMED {type(e).__name__}: {str(e)[:150]}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        os.write(w, f"{peak}|{out}".encode("utf8", "replace")[:60000]); os._exit(0)
    os.close(w); os.set_blocking(r, False); data = b""; dead = False
    while True:
        p, s = os.waitpid(pid, os.WNOHANG)
        if p: break
        if time.time() - t0 > LIMIT_S + 4: os.kill(pid, signal.SIGKILL); dead = True; os.waitpid(pid, 0); break
        time.sleep(0.01)
    try: data = os.read(r, 1 << 16)
    except BlockingIOError: pass
    os.close(r)
    took = time.time() - t0
    peak, _, out = data.decode("utf8", "replace").partition("|")
    if not out: out = "HANG killed after %.0f s" % took if dead else f"DIED signal {os.WTERMSIG(s) if os.WIFSIGNALED(s) else 'exit ' + str(s)}"
    flag = " " if out.startswith("NAMED") else "!" if not out.startswith("OK") else "?"
    if flag != "!" and (took > 2 or (peak and int(peak) > 1000)): flag = "$"
    bad += flag == "!"
    print(f"{flag} {d.name:34} {took:5.1f}s {peak or '?':>5}MB {out[:230]!r}", flush=True)
print("bad", bad, "EVIL_RAN", (ROOT / "EVIL_RAN").exists())
shutil.rmtree(ROOT.parent, ignore_errors=True)
sys.exit(bool(bad))
