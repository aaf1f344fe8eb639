"""Memory: of a model of real size, and from step to step."""

import ctypes
import re
import shutil
from pathlib import Path

import pytest
import transformers
from conftest import SLOW_SIBLINGS, TOY, write_rows
from test_durable import finish, new_folder

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")

# The shape of SmolLM2-135M.
SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SHAPE |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048}

# The peak of the process itself: getrusage counts that of the process which started it, too.
PEAK = """
import atexit
atexit.register(lambda: print(pathlib.Path("/proc/self/status").read_text()))
"""
# What malloc has given out and not got back. The resident size has, besides, what malloc keeps for later: it differs
# by tens of megabytes between equal runs, and drifts. PYTHONMALLOC=malloc: Python's objects are counted, too.
EACH_STEP = """
import ctypes, gc
class Mallinfo2(ctypes.Structure):  # malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
def note(*args, **options):
    gc.collect()
    info = libc.mallinfo2()
    print("in use", info.uordblks + info.hblkhd)
at(script, "log", 0, note)
"""


@pytest.fixture(scope="module")
def model():
    folder = new_folder()
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TOY / "policy").save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def pair_of(prompt_tokens, completion_tokens):
    """A pair of these lengths, with the completion's end."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOY / "policy")
    pair = {"prompt": " the" * prompt_tokens}
    pair |= {"chosen": " A" + " the" * (completion_tokens - 2), "rejected": " I" + " the" * (completion_tokens - 2)}
    lengths = [len(tokenizer(text).input_ids) for text in pair.values()]
    assert lengths == [prompt_tokens, completion_tokens - 1, completion_tokens - 1]
    return pair


# Runs differ by 0.1 GB or more; one more copy of the weights would add 0.54.
@pytest.mark.parametrize("flag, limit", [("--no-gradient-checkpointing", 4.8e9), ("--gradient-checkpointing", 3.8e9)])
@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_peak_of_a_model_of_real_size(name, flag, limit, model):
    folder = new_folder()
    write_rows(folder.parent / "data" / "train.jsonl", [pair_of(64, 448)])
    write_rows(folder.parent / "data" / "test.jsonl", [pair_of(1, 3)])
    flags = ["--model-name-or-path", model, "--dataset-name", folder.parent / "data", "--judge-name-or-path", None]
    flags += ["--batch-size", 1, "--micro-batch-tokens", 1024, "--save-steps", 1, "--max-new-tokens", 2, flag]
    ended = finish(name, folder, *flags, patch=PEAK)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", ended.stdout)[1]) * 1024
    print(f"peak: {peak / 1e9:.2f} GB")
    assert peak < limit
    shutil.rmtree(folder)  # gigabytes


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 or later counts the memory")
@pytest.mark.parametrize("flags", [[], ["--lora-rank", 4]], ids=["full", "lora"])
@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_nothing_grows(name, flags, monkeypatch):
    """30 steps with the same pairs, with evaluations and checkpoints."""
    monkeypatch.setenv("PYTHONMALLOC", "malloc")
    folder = new_folder()
    write_rows(folder.parent / "data" / "train.jsonl", [pair_of(8, 40)] * 8)
    write_rows(folder.parent / "data" / "test.jsonl", [pair_of(8, 40)] * 2)
    flags = [*flags, "--dataset-name", folder.parent / "data", "--num-train-epochs", 30]
    ended = finish(name, folder, *flags, "--save-steps", 3, patch=EACH_STEP)
    in_use = list(map(int, re.findall(r"in use (\d+)", ended.stdout)))
    print([round(size / 1e6, 2) for size in in_use])
    assert len(in_use) == 31
    assert max(in_use[20:]) < max(in_use[5:15]) + 1e6
