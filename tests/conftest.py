"""What the tests share. `python -m pytest` runs the fast tier, `-m slow` the other one."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# Before torch and transformers are imported: they read these once. A GPU is hidden, so that the tests are the same
# everywhere, but for those of test_gpu.py. One thread, since tiny models gain nothing from more.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
SCRIPTS = ["dpo", "ipo", "simpo", "pre_dpo", "spin", "kto", "oaif", "grpo", "rlhf_ppo"]
# Shared text is tested with dpo.py in the fast tier, and with its siblings in the slow one.
DPO_AND_SLOWLY_THE_OTHERS = [pytest.param(name, marks=[] if name == "dpo" else pytest.mark.slow) for name in SCRIPTS]

SIZES = {"vocab_size": 900, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 6}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 6}),
    "granite": ("GraniteConfig", {"logits_scaling": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.7}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {}),
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs of many seconds; `-m slow` selects them")
    if config.args_source == config.ArgsSource.INVOCATION_DIR:
        config.args = [str(ROOT / "tests")]


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def group():
    """The scripts make a process group for themselves; one that ended early left it behind."""
    yield
    leave_group()


def leave_group():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@cache
def load_script(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(name, model, **flags):
    """A script's Run with a model, as main makes it."""
    leave_group()
    script = load_script(name)
    return script.start_run(script.Args(model_name_or_path=str(model), **flags))


def run_script(script, *flags, processes=1, cwd=ROOT, gpu=""):
    """A script in a process of its own, or in several by torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    command = [*launcher, str(script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def finish(name, folder, *flags, **options):
    """A run of a script to its end, in a folder."""
    ended = run_script(ROOT / f"{name}.py", "--output-dir", folder, *flags, **options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def chat(*texts):
    """A conversation: user and assistant in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


THINGS = ["hotel", "phone", "film", "museum", "restaurant", "camera", "soup", "book"]


def text_pairs(count):
    """Pairs of strings, of different lengths."""
    rows = []
    for i in range(count):
        thing = THINGS[i % len(THINGS)]
        prompt = f"Please review the {thing}{', and be brief' * (i % 3)}."
        chosen, rejected = f" I liked the {thing}. It was great, really great.", f" The {thing} was bad."
        rows.append({"prompt": prompt, "chosen": chosen * (1 + i % 2), "rejected": rejected * (1 + i % 4)})
    return rows


# The text of a Python file as a judge, in the form of TRL's rewards: how often an answer has the `word` of its row.
WORD_COUNT = """
def reward(prompts, completions, word, **others):
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    assert [type(text) for text in completions] == [type(prompt) for prompt in prompts]
    return [text.count(wanted) for text, wanted in zip(texts, word, strict=True)]
"""


def make_batch(count=5, **changes):
    """A Batch of random numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps = 3 * torch.randn(2, 2, count, generator=generator, dtype=torch.float64) - 20
    lengths = torch.randint(1, 10, (2, count), generator=generator).double()
    fields = {"logps": logps, "ref_logps": ref_logps, "lengths": lengths, "preference_prob": torch.ones_like(logps[0])}
    return load_script("dpo").Batch(**fields | changes)


def bandit_optimum(compute_loss, options, reference, pairs=None, weights=1.0, **fields):
    """Log-probabilities of the policy over single answers of lowest loss on some pairs (chosen, rejected) or all."""
    answers = range(len(reference))
    sides = torch.tensor(pairs or [(chosen, rejected) for chosen in answers for rejected in answers]).T
    theta = torch.zeros_like(reference, requires_grad=True)
    settings = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([theta], **settings)

    def closure():
        optimizer.zero_grad()
        logps, ref_logps = theta.log_softmax(-1)[sides], reference[sides]
        batch = make_batch(sides.shape[1], logps=logps, ref_logps=ref_logps, **fields)
        loss = (weights * compute_loss(batch, *options)[0]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach().log_softmax(-1)


def load_plain(path, head="CausalLM"):
    """A model as transformers loads it. Rows are passed one by one, so that a score is that of the last token."""
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(path, dtype=torch.float32)
    model.config.pad_token_id = None
    return model


def naive_logps(model, prompt, answer):
    """Log-probability of each token of an answer."""
    logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return logps[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer]


@torch.no_grad()
def naive_greedy(model, prompt, length):
    """The likeliest answer, by a pass without cache for each token, up to the stop token 0."""
    answer = []
    while len(answer) < length and 0 not in answer:
        answer.append(model(torch.tensor([prompt + answer])).logits[0, -1].argmax().item())
    return answer


def weights_of(folder):
    """Weights of a saved model or adapter."""
    (file,) = Path(folder).glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Makes folders with a small random model and the test bed's tokenizer: tiny_model(family, head, **config)."""

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


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with 20 training and 8 test pairs of the test bed."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", read_rows(TOY / "train.jsonl")[:20])
    write_rows(folder / "test.jsonl", read_rows(TOY / "test.jsonl")[:8])
    return folder
