"""What the tests share. `python -m pytest` runs the fast tier, `-m slow` and `-m full` the others."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# Before transformers is imported: it reads these once. One thread, since tiny models gain nothing from more.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
MINIMAL = ["dpo", "ipo", "simpo"]  # the second edition
SCRIPTS = ["pre_dpo", "spin", "oaif", "rlhf_ppo"]  # the first edition, whose tests these are but for test_minimal.py
# Tests that cost seconds a script are in the slow tier; what costs more, and is about shared text alone,
# is in the full one, since test_minimal.py has it for dpo.py. rlhf_ppo.py trains in stages of its own and has its own.
SIBLINGS = [name for name in SCRIPTS if name != "rlhf_ppo"]
SIBLINGS_BY_TIER = [pytest.param(name, marks=pytest.mark.slow) for name in SIBLINGS]
SLOW_SIBLINGS = [pytest.param(name, marks=pytest.mark.full) for name in SIBLINGS]

SIZES = {"vocab_size": 900, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 6}),
    "granite": ("GraniteConfig", {"logits_scaling": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.7}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "gpt2": ("GPT2Config", {}),
    "bert": ("BertConfig", {}),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs of many seconds; `-m slow` selects them")
    config.addinivalue_line("markers", "full: slow tests of dpo.py for the other scripts; `-m full` selects them")
    if config.args_source == config.ArgsSource.INVOCATION_DIR:
        config.args = [str(ROOT / "tests")]


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def signals():
    """The scripts set signal handlers: give pytest its own back."""
    own = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in own.items():
        signal.signal(number, handler)


@cache
def load_script(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(script, *flags, cwd=ROOT):
    """A script in a process of its own."""
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_folder(folder):
    """All files of a folder with their content."""
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def text_pairs(count):
    """Pairs of strings, of different lengths."""
    prompts = [f"Please review the {thing}{', and be brief' * (i % 3)}." for i, thing in enumerate(THINGS * count)][
        :count
    ]
    good, bad = " I liked the {}. It was great, really great.", " The {} was bad."
    return [
        {"prompt": prompt, "chosen": good.format(thing) * (1 + i % 2), "rejected": bad.format(thing) * (1 + i % 4)}
        for i, (prompt, thing) in enumerate(zip(prompts, THINGS * count, strict=False))
    ]


def make_batch(count=5, seed=0, **changes):
    """A Batch of random numbers in float64."""
    import torch

    fields, generator = load_script("dpo").Batch._fields, torch.Generator().manual_seed(seed)
    values = {name: torch.randn(count, generator=generator, dtype=torch.float64) * 3 - 20 for name in fields}
    values["preference_prob"] = torch.ones(count, dtype=torch.float64)
    return load_script("dpo").Batch(**values | changes)


def minimise(loss, size):
    """Where a convex function of a vector has its minimum; it starts at 0."""
    import torch

    theta = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    settings = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([theta], **settings)

    def closure():
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach()


def weights_of(path):
    """Weights of a saved language model, in float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def naive_logps(path, pairs):
    """Sums of log-probabilities of (chosen, rejected) in a saved model, one sequence at a time, (len(pairs), 2)."""
    import torch
    import transformers

    model, sums = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), []
    for pair in pairs:
        for completion in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + completion])
            with torch.no_grad():
                logps = model(ids).logits[0].log_softmax(-1)
            start = len(pair.prompt_ids)
            sums.append(sum(logps[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
    return torch.tensor(sums).view(-1, 2)


THINGS = ["hotel", "phone", "film", "museum", "restaurant", "camera", "soup", "book"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Makes folders with a small random model and the test bed's tokenizer: tiny_model(family, head, **config)."""
    import torch
    import transformers

    @cache
    def make(family="llama", head="CausalLM", **changes):
        folder = tmp_path_factory.mktemp(f"{family}-{head}")
        name, settings = FAMILIES[family]
        tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.3}
        config = getattr(transformers, name)(**SIZES | tokens | settings | changes)
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
        with torch.no_grad():
            for weight in model.parameters():  # so that norms and biases count too
                weight.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(TOY / "policy").save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def tiny_copy(tiny_model, tmp_path):
    """Makes a copy of a tiny model that a test may spoil."""

    def make(*names, **changes):
        return Path(shutil.copytree(tiny_model(*names, **changes), tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"))

    return make


@pytest.fixture
def start(tmp_path):
    """Starts a run as the scripts do, up to its policy: start(script, model, **flags) gives (run, policy)."""

    def make(script, model, **flags):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        flags = {"judge_name_or_path": None, "max_length": 512, "output_dir": str(folder)} | flags
        run = script.start_run(script.Args(model_name_or_path=model, **flags))
        return run, script.load_policy(run, model)

    return make
