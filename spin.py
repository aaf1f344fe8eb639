# region method: header
"""Self-Play fine-tuning (SPIN), Chen et al. 2024, https://arxiv.org/abs/2401.01335

Supervised data only: the policy learns to prefer the ground truth y of a prompt x to its own answer y'. In iteration t
the opponent pi_t, which is the policy as it stands then, answers the prompts at temperature 1. The policy is trained on
these pairs with pi_t as the frozen reference, and its result is the opponent pi_t+1:

    h    = [log pi(y|x) - log pi_t(y|x)] - [log pi(y'|x) - log pi_t(y'|x)]
    loss = -log sigmoid(beta h)

Trained to the end on its own answers alone, an iteration gives p_t (p_data / p_t)^(1/beta) up to a factor (the paper's
Section 5, where beta is lambda): beta 1 arrives at once, beta 2 halves the gap of log-probabilities, and below 0.5 each
iteration overshoots further, so that with the paper's 0.1 small learning rates hold the policy. The test bed has 1.

Where sources differ, this script
- takes betas and learning rates from the authors' scripts, 0.1 0.1 0.1 5 and 5e-7 5e-7 1e-7 1e-7 (ten times the
  latter with LoRA), but 3 iterations instead of 4;
- starts each iteration from the policy of the last one, and adds the pairs of the last one to the new ones;
- draws prompts anew for each iteration (paper: the same 50,000 in all);
- samples at temperature 1, as the theory wants (authors: generate.py is greedy, generate_vllm.py samples at 1); cut
  answers get no end-of-sequence token, empty ones and the ground truth itself are left out;
- makes one pass over the pairs of an iteration (paper 2, code 6 and stopped by hand) with AdamW (RMSprop).
A truth longer than --max-new-tokens is told from cut answers by that alone, so allow as many tokens as the truths have.
eval/loss and eval/rewards/* are relative to an iteration's opponent: compare kl, judge_score and win_rate.
--max-steps limits each iteration by itself.

    python spin.py                                 # the built-in test bed, some minutes on two CPU cores
    python spin.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name trl-lib/ultrafeedback_binarized \
        --judge-name-or-path None --max-new-tokens 512   # a real model; `messages` or `completion` will do too
    torchrun --nproc-per-node 8 spin.py ...        # several GPUs
"""
# endregion

import contextlib
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import jinja2
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# Shapes: B pairs, N = 2B sequences, T tokens, C completion tokens, V vocabulary.
# Everything outside `# region method` ... `# endregion` is the same in all scripts (rlhf_ppo.py: but for train).
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TOY = Path(__file__).resolve().parent / "toy"

# === Arguments ===


@dataclass
class Args:
    # --- run ---
    exp_name: str = Path(__file__).stem  # name of the run
    seed: int = 1  # seed of the data order, the sampling and LoRA's initial weights
    output_dir: str | None = None  # folder of the run; None = runs/<exp_name>__<seed>__<time>
    resume: bool = False  # go on with the run in --output-dir from its last checkpoint
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "cleanpo"  # project of Weights & Biases
    wandb_entity: str | None = None  # team of Weights & Biases; None = your default

    # --- model ---
    model_name_or_path: str = str(TOY / "policy")  # initial policy: a causal language model, as hub id or folder
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; auto = bfloat16 on CUDA, else float32
    attn_implementation: str | None = None  # of transformers, such as flash_attention_2; None = sdpa where it exists
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    lora_rank: int = 0  # train LoRA adapters of this rank (alpha twice that) on all linear layers; 0 = all weights
    chat_template: str | None = None  # file with a Jinja chat template, in place of the tokenizer's own

    # --- data ---
    dataset_name: str = str(TOY)  # preference pairs: hub id, .jsonl, .json or .parquet file, or folder of such files
    dataset_train_split: str = "train"  # split to train on
    dataset_test_split: str = "test"  # split to evaluate on; if there is none, the last 10 % of the rows, at most 512
    max_length: int = 1024  # longest prompt with completion, in tokens
    overlong: Literal["drop", "truncate"] = "drop"  # longer pairs: drop them, or cut their completions on the right

    # --- optimisation ---
    batch_size: int = 64  # pairs per optimiser step, over all devices
    micro_batch_tokens: int = 0  # padded tokens per forward pass and device (speed, memory); 0 = 16384, CPU 2048
    num_train_epochs: int = 1  # passes over the training pairs
    max_steps: int = -1  # most optimiser steps; -1 = no limit, 0 = only evaluate
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"  # decay after warm-up; constant has neither
    warmup_ratio: float = 0.1  # share of the steps over which the learning rate rises
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm

    # --- generation and evaluation ---
    eval_steps: int = 50  # steps between evaluations; the first and the last step are always evaluated
    num_eval_prompts: int = 256  # test pairs to evaluate on, with their prompts to answer
    eval_prompts: str | None = None  # file of rows with `instruction` or `prompt`: all are answered instead
    max_new_tokens: int = 128  # longest sampled response, in tokens
    judge_name_or_path: str | None = str(TOY / "judge")  # reward model that scores the responses; None = no judging

    # --- logging and checkpoints ---
    logging_steps: int = 1  # steps between logged rows
    save_steps: int = 0  # steps between checkpoints; 0 = only on SIGTERM and Ctrl-C

    # region method: args
    # --- SPIN ---
    num_iterations: int = 3  # times that the policy answers and is trained; the paper has 4
    learning_rate: tuple[float, ...] | None = None  # an iteration's, the last for all later; None = the authors'
    beta: tuple[float, ...] | None = None  # pull to the opponent, likewise; None = the authors', 1 on the test bed
    prompts_per_iteration: int = 2000  # prompts to answer in each iteration; the paper has 50,000
    rollout_temperature: float = 1.0  # of the opponent's answers
    mix_previous: bool = True  # train on the pairs of the last iteration as well


PAPER_LEARNING_RATES, PAPER_BETAS = (5e-7, 5e-7, 1e-7, 1e-7), (0.1, 0.1, 0.1, 5.0)
RANGES = {"num_iterations": (1, 1e9), "prompts_per_iteration": (1, 1e9), "rollout_temperature": (1e-9, 1e9)}
# endregion

RANGES |= {"seed": (0, 2**32), "max_steps": (-1, 1e9), "warmup_ratio": (0, 1), "max_grad_norm": (1e-9, 1e9)}
RANGES |= dict.fromkeys(["lora_rank", "micro_batch_tokens", "weight_decay", "save_steps"], (0, 1e9))
RANGES |= dict.fromkeys(["batch_size", "num_train_epochs", "eval_steps", "num_eval_prompts", "logging_steps"], (1, 1e9))
RANGES |= dict.fromkeys(["max_length", "max_new_tokens"], (1, 1e9))
FREE_ON_RESUME = ["resume", "output_dir", "track", "wandb_project_name", "wandb_entity", "micro_batch_tokens"]
FREE_ON_RESUME += ["save_steps", "logging_steps"]


def fail(message: str) -> NoReturn:
    """End the run with one line on stderr and exit status 1."""
    for bar in list(getattr(tqdm, "_instances", ())):  # private: tqdm has no public list of open bars
        bar.close()  # its line ends, so that the message has one of its own
    if RANK > 0:
        time.sleep(5)  # rank 0 speaks first, since torchrun ends all processes when one has failed
    sys.exit(f"error: {message}")


def brief(error: Exception) -> str:
    """A message in one line of bearable length."""
    return " ".join(str(error).split())[:300]


def say(text: str) -> None:
    """Print once, above the progress bar."""
    if RANK == 0:
        tqdm.write(text)


# === Run ===


@dataclass
class Run:
    """The set-up that the functions share, and how far the run has come."""

    args: Args
    folder: Path
    device: torch.device
    dtype: torch.dtype  # of the computation; trained weights are float32
    micro_batch_tokens: int
    tokenizer: Any
    stop_ids: list[int] = field(default_factory=list)
    positions: int = sys.maxsize  # most tokens that the policy can read
    rollout: Any = None  # plain model that is given the policy's weights, for sampling and scoring
    test_pairs: list = field(default_factory=list)
    eval_prompts: list = field(default_factory=list)  # (prompt as read, its token ids)
    checkpoint: Path | None = None  # to go on from
    tracker: Any = None  # of Weights & Biases
    method_metrics: dict[str, float] = field(default_factory=dict)  # of the method alone, for the next logged row
    signals: list[int] = field(default_factory=list)  # that ask the run to stop after its next step
    epoch_pairs: int = 1  # training pairs of an epoch
    step: int = 0
    pairs: int = 0  # trained on so far
    seconds: float = 0.0  # of training and evaluation so far


def check_args(args: Args) -> None:
    """End the run if a flag is out of range or names what is not there."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must be from {low:g} to {high:g}, not {value}")
    for name in ("model_name_or_path", "dataset_name", "judge_name_or_path", "chat_template", "eval_prompts"):
        value = getattr(args, name)
        is_file = name in ("chat_template", "eval_prompts")
        if not value or (Path(value).expanduser().is_file() if is_file else Path(value).expanduser().exists()):
            continue
        if value == getattr(Args, name):
            others = "--model-name-or-path, --dataset-name and --judge-name-or-path (a reward model or None)"
            fail(f"the built-in test bed is not at {TOY}: give {others}")
        if is_file or value.startswith((".", "/", "~")) or value.endswith((".json", ".jsonl", ".parquet")):
            fail(f"--{name.replace('_', '-')} {value}: no such file or folder")
    if args.resume and args.output_dir is None:
        fail("--resume needs the --output-dir of the run to go on with")
    if args.batch_size < WORLD_SIZE:
        fail(f"--batch-size {args.batch_size} is less than a pair for each of the {WORLD_SIZE} devices")


def start_run(args: Args) -> Run:
    """Check the flags; find the devices, the tokenizer, and the run to go on with if there is one."""
    check_args(args)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if WORLD_SIZE > 1:
        dist.init_process_group(backend)
    elif half:  # mixed precision is FSDP's, on one device too
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    name = gather({RANK: f"{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"}, WORLD_SIZE)[0]
    folder = Path(args.output_dir or f"runs/{name}").expanduser()
    if not next(path for path in (folder, *folder.absolute().parents) if path.exists()).is_dir():
        fail(f"--output-dir {folder} is, or is below, a file")
    tokenizer = load_tokenizer(args.model_name_or_path)
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {args.model_name_or_path} has no end-of-sequence token, so no answer could end")
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).expanduser().read_text(encoding="utf-8")
    tokens = args.micro_batch_tokens or (16384 if device.type == "cuda" else 2048)
    run = Run(args, folder, device, torch.bfloat16 if half else torch.float32, tokens, tokenizer)
    if (folder / "args.json").exists():
        find_checkpoint(run)
    barrier()
    return run


def gather(share: dict[int, Any], count: int) -> list:
    """Put together a list of which every process holds some items, by index."""
    shares = [share] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(shares, share)
    whole = {index: item for share in shares for index, item in share.items()}
    return [whole[index] for index in range(count)]


def barrier() -> None:
    gather({RANK: None}, WORLD_SIZE)


# === Data ===

ROW_FORMS = (
    "`prompt`, `chosen` and `rejected` as strings or chat messages, or `chosen` and `rejected` as conversations with "
    "a common beginning (messages, or text with '\\n\\nHuman:' and '\\n\\nAssistant:' turns)"
)


@dataclass
class Pair:
    row: int  # where it stands in the data
    prompt: str | list[dict]  # as read: a judge has its own chat template
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    preference_prob: float = 1.0
    ref_chosen_logps: float = 0.0
    ref_rejected_logps: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


def read_file(path: Path) -> list[dict]:
    """Rows of a .parquet file, or of a .json or .jsonl file with a list or an object a line."""
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        fail(f"{path} is neither .jsonl nor .json nor .parquet")
    rows, line = [], 0
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        for piece in [text] if text.lstrip().startswith("[") else text.split("\n"):
            value = json.loads(piece) if piece.strip() else []
            rows += value if isinstance(value, list) else [value]
            line += 1
    except json.JSONDecodeError as error:
        fail(f"{path}, line {line + error.lineno}: malformed JSON: {error.msg}")
    except ValueError as error:  # of UTF-8 or of the parquet format
        fail(f"{path} cannot be read: {brief(error)}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            fail(f"{path}, row {number}: a JSON object is needed, not {json.dumps(row)[:60]}")
    return rows


def read_split(args: Args, split: str) -> list[dict] | None:
    """Rows of a split of --dataset-name, None if there is no such split; a file is its own train split."""
    path = Path(args.dataset_name).expanduser()
    if path.is_file():
        return read_file(path) if split == args.dataset_train_split else None
    if path.is_dir() and not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        files = [path / f"{split}{suffix}" for suffix in (".jsonl", ".json", ".parquet")]
        return next((read_file(file) for file in files if file.exists()), None)
    import datasets

    try:
        data = datasets.load_from_disk(str(path)) if path.exists() else datasets.load_dataset(args.dataset_name)
    except (OSError, ValueError, RuntimeError) as error:
        fail(f"--dataset-name {args.dataset_name}: {brief(error)}")
    if isinstance(data, datasets.Dataset):
        data = {args.dataset_train_split: data}
    return data[split].to_list() if split in data else None


def are_messages(value: Any) -> bool:
    """Whether a value is a list of chat messages."""
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value or [None]
    )


def split_row(row: dict, chat: bool) -> tuple[Any, Any, Any] | None:
    """Prompt, chosen and rejected of a row, as strings or as lists of messages; None if it has none of ROW_FORMS."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return prompt, chosen, rejected
        cut = os.path.commonprefix([chosen, rejected]).rfind("\n\nAssistant:") + len("\n\nAssistant:")
        if prompt is not None or cut < len("\n\nAssistant:"):
            return None
        answers = [side[cut:].split("\n\nHuman:")[0] for side in (chosen, rejected)]
        if not chat:
            return chosen[:cut], *answers
        turns = re.split(r"\n\n(Human|Assistant):", chosen[:cut])[1:-2]
        roles = ["user" if speaker == "Human" else "assistant" for speaker in turns[::2]]
        prompt = [{"role": role, "content": text.strip()} for role, text in zip(roles, turns[1::2], strict=True)]
        return prompt, *([{"role": "assistant", "content": answer.strip()}] for answer in answers)
    if not (
        are_messages(chosen)
        and are_messages(rejected)
        and (prompt is None or isinstance(prompt, str) or are_messages(prompt))
    ):
        return None
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        same = [a == b for a, b in zip(chosen[:-1], rejected[:-1], strict=False)]
        prompt = chosen[: [*same, False].index(False)]
    chosen, rejected = (side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in (chosen, rejected))
    answered = all(side and side[0]["role"] == "assistant" for side in (chosen, rejected))
    return (prompt, chosen, rejected) if prompt and answered else None


def apply_template(tokenizer: Any, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """Text of a conversation by the tokenizer's chat template."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, ValueError) as error:
        why = brief(error) if tokenizer.chat_template else "there is none: give one with --chat-template"
        fail(f"chat template of {tokenizer.name_or_path}: {why}; the messages are {json.dumps(messages)[:200]}")


def render(tokenizer: Any, prompt: str | list[dict], *completions: str | list[dict]) -> list[str]:
    """Texts of a prompt and of its completions: messages by the chat template, strings after the tokenizer's BOS."""
    if isinstance(prompt, str):
        bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
        return [bos + prompt.removeprefix(bos), *completions]
    head = apply_template(tokenizer, prompt, add_generation_prompt=True)
    texts = [apply_template(tokenizer, prompt + completion) for completion in completions]
    if not all(text.startswith(head) for text in texts):
        fail("the chat template renders a prompt otherwise once it is answered: give another with --chat-template")
    return [head, *(text[len(head) :] for text in texts)]


def encode_rows(run: Run, rows: list[dict], source: str, first_row: int = 0) -> list[Pair]:
    """Pairs of token ids; says how many rows were dropped or cut."""
    tokenizer, limit, texts, pairs = run.tokenizer, run.args.max_length, [], []
    for number, row in enumerate(rows, first_row):
        where, parts = f"{source}, row {number}", split_row(row, bool(tokenizer.chat_template))
        if parts is None:
            fail(f"{where} has the keys {sorted(row)} in none of the accepted forms: {ROW_FORMS}")
        if not all((part if isinstance(part, str) else part[-1]["content"]).strip() for part in parts):
            fail(f"{where} has an empty prompt or completion")
        prob = 1.0 if row.get("preference_prob") is None else row["preference_prob"]
        if not isinstance(prob, (int, float)) or not 0 <= prob <= 1:
            fail(f"{where}: preference_prob must be a number from 0 to 1, not {prob!r}")
        texts += render(tokenizer, *parts)
        pairs.append(Pair(number, parts[0], [], [], [], prob))
    ids = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    kept, cut = [], 0
    for pair, prompt_ids, *completions in zip(pairs, ids[::3], ids[1::3], ids[2::3], strict=True):
        for i, tokens in enumerate(completions):  # a completion ends with its first stop token, as a sampled one does
            stop = next((k for k, token in enumerate(tokens) if token in run.stop_ids), len(tokens))
            completions[i] = tokens[:stop] + (tokens[stop : stop + 1] or [tokenizer.eos_token_id])
        room = limit - len(prompt_ids)
        long = max(map(len, completions)) > room
        if not long or (run.args.overlong == "truncate" and room > 0):
            pair.prompt_ids, pair.chosen_ids, pair.rejected_ids = prompt_ids, *(c[:room] for c in completions)
            kept.append(pair)
            cut += long
    say(f"{source}: {len(rows)} rows, {len(rows) - len(kept)} dropped and {cut} cut for having over {limit} tokens")
    return kept


def read_splits(args: Args) -> tuple[list[dict], list[dict], int]:
    """Rows of --dataset-name to train on, rows to test on, and the number of the first of the latter."""
    train_rows = read_split(args, args.dataset_train_split)
    if train_rows is None:
        fail(f"--dataset-name {args.dataset_name} has no split {args.dataset_train_split!r}: see --dataset-train-split")
    if args.dataset_test_split == args.dataset_train_split:
        return train_rows, train_rows, 0
    test_rows = read_split(args, args.dataset_test_split)
    if test_rows is not None:
        return train_rows, test_rows, 0
    kept = len(train_rows) - min(512, max(1, len(train_rows) // 10))
    return train_rows[:kept], train_rows[kept:], kept


def load_pairs(
    run: Run, train_rows: list[dict], test_rows: list[dict], first_test_row: int
) -> tuple[list[Pair], list[Pair]]:
    """Training and test pairs."""
    name = run.args.dataset_name
    pairs = [encode_rows(run, train_rows, f"{name} for training")]
    pairs += [encode_rows(run, test_rows, f"{name} for testing", first_test_row)]
    train_pairs, test_pairs = ([pair for pair in part if pair.chosen_ids != pair.rejected_ids] for part in pairs)
    if equal := sum(map(len, pairs)) - len(train_pairs) - len(test_pairs):
        say(f"  {equal} dropped for having chosen = rejected")
    if not train_pairs or not test_pairs:
        fail(f"--dataset-name {name}: no pair is left to {'test' if train_pairs else 'train'} on")
    lengths = sorted(map(len, train_pairs))
    half, most = lengths[(len(lengths) - 1) // 2], lengths[(len(lengths) - 1) * 95 // 100]
    say(f"  tokens of prompt and longer completion: half up to {half}, 95 % up to {most}, all up to {lengths[-1]}")
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        text = run.tokenizer.decode(getattr(train_pairs[0], name))
        say(f"  the first pair's {name}: {text if len(text) <= 400 else f'{text[:300]} [...] {text[-60:]}'!r}")
    return train_pairs, test_pairs[: run.args.num_eval_prompts]


def load_eval_prompts(run: Run, test_pairs: list[Pair]) -> list[tuple[str | list[dict], list[int]]]:
    """Prompts to answer in evaluations, as read and as token ids."""
    prompts, file = [(pair.prompt, pair.prompt_ids) for pair in test_pairs], run.args.eval_prompts
    if file:
        prompts = []
        for number, row in enumerate(read_file(Path(file).expanduser())):
            prompt = row.get("instruction", row.get("prompt"))
            if not are_messages(prompt) and not (isinstance(prompt, str) and prompt.strip()):
                fail(f"{file}, row {number}: `instruction` or `prompt` is needed, a text or chat messages")
            if isinstance(prompt, str) and run.tokenizer.chat_template:
                prompt = [{"role": "user", "content": prompt}]
            ids = run.tokenizer(render(run.tokenizer, prompt)[0], add_special_tokens=False).input_ids
            prompts.append((prompt, ids))
    longest = max((len(ids) for _, ids in prompts), default=0)
    if longest == 0:
        fail(f"--eval-prompts {file} holds no rows")
    if longest + run.args.max_new_tokens > run.positions:
        fail(f"a prompt of {longest} tokens leaves no room for --max-new-tokens in {run.positions} positions")
    return prompts


def plan_batches(args: Args, pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs of each optimiser step, in an order that depends on the seed and the epoch alone."""
    batches = []
    for epoch in range(args.num_train_epochs):
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
        order = torch.randperm(len(pairs), generator=generator).tolist()
        batches += [[pairs[i] for i in order[k : k + args.batch_size]] for k in range(0, len(pairs), args.batch_size)]
    return batches[: args.max_steps] if args.max_steps >= 0 else batches


def cut_by_length(lengths: list[int], rows_each: int, tokens: int, rank: int = RANK) -> list[list[int]]:
    """Micro-batches for a process: indices, longest first, in groups of at most `tokens` padded tokens (or of one)."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))[rank::WORLD_SIZE]:
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] * rows_each > tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


# === Model ===


def load_tokenizer(path: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"tokenizer of {path}: {brief(error)}")


def read_model(run: Run, path: str, dtype: torch.dtype, auto_class: Any, **changes: Any) -> tuple[Any, list[str]]:
    """A model without dropout and with changes to its configuration, and the names of weights that its files lack."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)
        for part in (config, config.get_text_config()):
            rates = [name for name in vars(part) if "dropout" in name or name.endswith("pdrop")]
            vars(part).update({name: 0.0 for name in rates if isinstance(getattr(part, name), float)})
        options = {"attn_implementation": run.args.attn_implementation, "use_safetensors": True}
        model, info = auto_class.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        fail(f"model {path}: {brief(error)}")
    return model.to(run.device).eval(), sorted(info["missing_keys"])


def load_model(run: Run, path: str, dtype: torch.dtype) -> torch.nn.Module:
    """A causal language model without dropout."""
    model, missing = read_model(run, path, dtype, transformers.AutoModelForCausalLM)
    if missing:
        fail(f"model {path} has no weights for {missing[0]}: it is no causal language model")
    return model


@torch.no_grad()
def check_model(run: Run, model: torch.nn.Module) -> None:
    """End the run if the model cannot serve as policy."""
    args, path = run.args, run.args.model_name_or_path
    run.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or run.positions
    for flag, tokens in (("--max-length", args.max_length), ("--max-new-tokens", args.max_new_tokens)):
        if tokens > run.positions:
            fail(f"{flag} {tokens} is more than the {run.positions} positions of {path}")
    if len(run.tokenizer) > model.get_input_embeddings().num_embeddings:
        fail(f"the tokenizer of {path} has {len(run.tokenizer)} tokens, more than the model has embeddings")
    ids = torch.arange(16, device=run.device)[None]
    alone, followed = (model(input_ids=ids[:, :n], use_cache=False).logits[:, :8].float() for n in (8, 16))
    if not torch.allclose(alone, followed, rtol=0.01, atol=0.01, equal_nan=True):
        fail(f"{path} is no causal language model: what it predicts depends on later tokens")
    if not any(weight.requires_grad for weight in model.parameters()) and args.max_steps != 0:
        fail(f"{path} is a LoRA adapter with frozen weights: merge it into its base model to train on")
    toy = getattr(model.config, "cleanpo_toy", False)
    if args.judge_name_or_path == Args.judge_name_or_path and not toy:
        fail("the test bed's judge cannot judge real text: give --judge-name-or-path a reward model or None")


def load_policy(run: Run, path: str) -> torch.nn.Module:
    """The policy, to be trained. Sets run.rollout and run.stop_ids.

    run.rollout is a plain model in the compute dtype that is given the policy's weights when it is to sample or score;
    on a single device in float32 it is the policy itself.
    """
    policy = load_model(run, path, torch.float32)
    check_model(run, policy)
    run.rollout = load_model(run, path, run.dtype) if dist.is_initialized() else policy
    stop_ids = policy.generation_config.eos_token_id
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
    run.stop_ids = list(dict.fromkeys([run.tokenizer.eos_token_id, *stop_ids]))
    policy, run.rollout = make_trainable(run, policy, run.rollout, "CAUSAL_LM")
    return policy


def make_trainable(
    run: Run, model: torch.nn.Module, plain: torch.nn.Module, task_type: str
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Add LoRA's adapters to a model with float32 weights and its plain copy, and shard the model over the devices."""
    args, sharded, path = run.args, plain is not model, model.name_or_path
    if args.lora_rank > 0:
        from peft import LoraConfig, get_peft_model

        options = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank, "target_modules": "all-linear"}
        torch.manual_seed(args.seed)
        model = get_peft_model(model, LoraConfig(**options, task_type=task_type))
        plain = get_peft_model(plain, LoraConfig(**options, task_type=task_type)) if sharded else model
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    size = (4 * total + 12 * trained) / WORLD_SIZE + sharded * total * run.dtype.itemsize
    say(f"{path}: {total:,} parameters, {trained:,} trained, on {WORLD_SIZE} x {run.device.type}")
    say(f"  {size / 2**30:.2f} GB a device for weights, gradients and AdamW, computation in {run.dtype}")
    if sharded:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        precision = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32)
        for module in list(model.modules()):
            if type(module).__name__ in (plain._no_split_modules or []):
                fully_shard(module, mp_policy=precision)
        fully_shard(model, mp_policy=precision)
    return model, plain


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; all processes have to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def refresh_rollout(run: Run, policy: torch.nn.Module) -> None:
    """Give run.rollout the policy's weights and make it ready to sample."""
    run.rollout.eval()
    if run.rollout is not policy:
        for copy, weight in zip(run.rollout.parameters(), policy.parameters(), strict=True):
            if weight.requires_grad:
                copy.copy_(full_tensor(weight))


def completion_logits(
    model: torch.nn.Module, prompts: list[list[int]], completions: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict the completions' tokens, row after row, (their number, V) in float32, and these tokens.

    Rows are padded on the right and there is no attention mask: no token that counts sees the padding behind it, and
    attention can use its kernel for plain causal masks. The head computes logits for the completions alone.
    """
    device = model.get_input_embeddings().weight.device
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    ids = pad_sequence(rows, batch_first=True)  # (N, T)
    starts = torch.tensor([[len(prompt)] for prompt in prompts])
    lengths = torch.tensor([[len(completion)] for completion in completions])
    position = torch.arange(ids.shape[1])
    row, column = ((position >= starts - 1) & (position < starts - 1 + lengths)).nonzero(as_tuple=True)
    targets, row, column = ids[row, column + 1].to(device), row.to(device), column.to(device)
    # A hook, because backbone and head called apart would miss the scales and soft caps that some models put on logits.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][row, column][None],))
    try:
        logits = model(input_ids=ids.to(device), use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits.float(), targets  # float32: bfloat16 would err by up to 0.1 nats a token


def spread(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Put values of rows that follow one another into rows of their own, (N, max(lengths)), 0 behind each."""
    inside = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(values.device)
    return torch.zeros(inside.shape, device=values.device).masked_scatter(inside, values)


def token_logps(model: torch.nn.Module, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """Log-probability of each completion token given all before it, (N, C) in float32, 0 behind the completion."""
    logits, targets = completion_logits(model, prompts, completions)
    return spread(-F.cross_entropy(logits, targets, reduction="none"), list(map(len, completions)))


def sequence_logps(model: torch.nn.Module, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """Log-probability of each completion given its prompt, (N,) in float32."""
    return token_logps(model, prompts, completions).sum(-1)


@torch.no_grad()
def score(run: Run, model: torch.nn.Module, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """sequence_logps of many rows, (N,) on the CPU: in micro-batches, by all devices."""
    logps = {}
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    groups = cut_by_length(lengths, 1, run.micro_batch_tokens)
    for group in tqdm(groups, "scoring", leave=False, disable=RANK > 0 or None):
        values = sequence_logps(model, [prompts[i] for i in group], [completions[i] for i in group])
        logps |= zip(group, values.tolist(), strict=True)
    return torch.tensor(gather(logps, len(prompts)))


class PairBatch(NamedTuple):
    """B pairs; each field is (B,) in float32, log-probabilities are sums over the completion's tokens."""

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    preference_prob: torch.Tensor


def score_pairs(run: Run, model: torch.nn.Module, pairs: list[Pair], loss_fn: Callable) -> dict[str, torch.Tensor]:
    """Loss and metrics of each pair, (len(pairs),). With gradients enabled it also backpropagates the mean loss.

    The devices share the work in micro-batches; how these are cut changes the result by rounding alone.
    """
    plans = [cut_by_length(list(map(len, pairs)), 2, run.micro_batch_tokens, rank) for rank in range(WORLD_SIZE)]
    groups, values = plans[RANK], []
    for k in range(max(map(len, plans))):
        # FSDP wants all processes in every pass: one that has no micro-batch left takes a pair that counts for nothing.
        group = groups[k] if k < len(groups) else []
        batch = [pairs[i] for i in group or [0]]
        prompts = [pair.prompt_ids for pair in batch]  # apart, as chosen and rejected often differ much in length
        chosen_logps = sequence_logps(model, prompts, [pair.chosen_ids for pair in batch])
        rejected_logps = sequence_logps(model, prompts, [pair.rejected_ids for pair in batch])
        known = [(p.ref_chosen_logps, p.ref_rejected_logps, len(p.chosen_ids), len(p.rejected_ids)) for p in batch]
        known = [(*numbers, pair.preference_prob) for numbers, pair in zip(known, batch, strict=True)]
        losses, metrics = loss_fn(PairBatch(chosen_logps, rejected_logps, *torch.tensor(known).T.to(run.device)))
        if torch.is_grad_enabled():
            weight = WORLD_SIZE / len(pairs) if group else 0.0  # FSDP averages gradients over the devices
            (losses.sum() * weight).backward()
        values.append(torch.stack([losses.detach(), *metrics.values()], dim=1)[: len(group)])
    indices = [i for group in groups for i in group]
    table = gather(dict(zip(indices, torch.cat(values).tolist(), strict=True)), len(pairs))
    return dict(zip(["loss", *metrics], torch.tensor(table).T, strict=True))


@torch.no_grad()
def add_reference(run: Run, model: torch.nn.Module, batches: list[list[Pair]], name: str) -> None:
    """Give each pair the reference's log-probabilities: as stored in the run's folder, else of this model.

    The batches are those of the training: with the same micro-batches the rounding is the same too, and the margins of
    a policy that is still the reference are exactly 0.
    """
    file, logps = run.folder / f"{name}.safetensors", {}  # by id, since pairs come again in later epochs

    def only_logps(batch: PairBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return batch.chosen_logps, {"rejected": batch.rejected_logps}  # in place of losses and metrics

    if not file.exists():
        for batch in tqdm(batches, "reference", leave=False, disable=RANK > 0 or None):
            pairs = [pair for pair in batch if id(pair) not in logps]
            if pairs:
                table = score_pairs(run, model, pairs, only_logps)
                logps |= zip(map(id, pairs), torch.stack(list(table.values()), dim=1), strict=True)
        if RANK == 0:
            save_file({"chosen_rejected": torch.stack(list(logps.values()))}, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
        barrier()
    pairs = {id(pair): pair for batch in batches for pair in batch}.values()
    for pair, (chosen, rejected) in zip(pairs, load_file(file)["chosen_rejected"].tolist(), strict=True):
        pair.ref_chosen_logps, pair.ref_rejected_logps = chosen, rejected


def summarise(table: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over the pairs, and the margin and accuracy of the implicit rewards."""
    margins = table["rewards/chosen"] - table["rewards/rejected"]
    table = table | {"rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}
    return {name: values.mean().item() for name, values in table.items()}


# === Method ===

# region method: method


def compute_loss(batch: PairBatch, beta: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and metrics of the pairs, (B,) each."""
    chosen_logratios = batch.chosen_logps - batch.ref_chosen_logps
    rejected_logratios = batch.rejected_logps - batch.ref_rejected_logps
    h = chosen_logratios - rejected_logratios
    losses = -F.logsigmoid(beta * h)  # Section 4 of arXiv:2401.01335 with the logistic loss
    metrics = {
        "rewards/chosen": beta * chosen_logratios.detach(),
        "rewards/rejected": beta * rejected_logratios.detach(),
        "logps/chosen": batch.chosen_logps.detach(),
        "logps/rejected": batch.rejected_logps.detach(),
    }
    return losses, metrics


def load_truths(run: Run, train_rows: list[dict], test_rows: list[dict], first_test_row: int) -> list[list[Pair]]:
    """Training and test prompts with their ground truth, which stands in for the answers that are still to come."""
    args, splits = run.args, []
    for rows, purpose, first_row in ((train_rows, "training", 0), (test_rows, "testing", first_test_row)):
        truths = []
        for number, row in enumerate(rows, first_row):
            if are_messages(row.get("messages")):
                truth = row | {"prompt": row["messages"][:-1], "chosen": row["messages"][-1:]}
            else:
                truth = row | {"chosen": row.get("completion") or row.get("chosen")}
            truths.append(truth | {"rejected": truth["chosen"]})
            if split_row(truths[-1], bool(run.tokenizer.chat_template)) is None:
                forms = "`messages` that end with an answer, `prompt` and `completion`, or a preference pair"
                fail(f"{args.dataset_name} for {purpose}, row {number} has the keys {sorted(row)}: needed are {forms}")
        pairs = encode_rows(run, truths, f"{args.dataset_name} for {purpose}", first_row)
        splits.append([pair for pair in pairs if len(pair.prompt_ids) + args.max_new_tokens <= run.positions])
        if len(splits[-1]) < len(pairs):
            say(f"  {len(pairs) - len(splits[-1])} of them leave no room for an answer of {args.max_new_tokens} tokens")
    if not all(splits):
        fail(f"--dataset-name {args.dataset_name}: no row is left to {'test' if splits[0] else 'train'} on")
    return [splits[0], splits[1][: args.num_eval_prompts]]


def play(run: Run, truths: list[Pair], name: str, seed: int) -> list[Pair]:
    """Pairs of ground truth and run.rollout's answer, which are written to a file, or read from it on resuming."""
    file = run.folder / f"{name}.jsonl"
    if not file.exists():
        answers = generate(run, [truth.prompt_ids for truth in truths], run.args.rollout_temperature, seed)
        rows = []
        for i, (truth, answer) in enumerate(zip(truths, answers, strict=True)):
            texts = [run.tokenizer.decode(ids, skip_special_tokens=True) for ids in (truth.chosen_ids, answer)]
            if answer == truth.chosen_ids or not texts[1].strip():
                continue
            if isinstance(truth.prompt, list):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            row = {"prompt": truth.prompt, "chosen": texts[0], "rejected": texts[1]}
            rows.append(json.dumps(row | {"rejected_ids": answer, "truth": i}) + "\n")
        if RANK == 0:
            file.parent.mkdir(exist_ok=True)
            replace_file(file, "".join(rows))
        barrier()
    pairs = []
    for row in map(json.loads, file.read_text().splitlines()):
        truth = truths[row["truth"]]
        pairs.append(Pair(truth.row, truth.prompt, truth.prompt_ids, truth.chosen_ids, row["rejected_ids"]))
    if not pairs:
        fail(f"{file}: all answers are empty or equal to the ground truth")
    return pairs


def log_iteration(run: Run, iteration: int, pairs: list[Pair], asked: int, first_step: int) -> None:
    """Log what the iteration has brought: against its opponent on the evaluation's prompts, and its training pairs."""
    metrics = {"method/iteration": iteration, "method/dropped_answers": asked - len(pairs)}
    metrics["method/true_length"] = sum(len(pair.chosen_ids) for pair in pairs) / len(pairs)
    metrics["method/own_length"] = sum(len(pair.rejected_ids) for pair in pairs) / len(pairs)
    text = ""
    if RANK == 0 and run.args.judge_name_or_path:
        before, after = (read_rows(run.folder / "samples.jsonl", step) for step in (first_step, run.step))
        scores = [(a["score"], b["score"]) for a, b in zip(after, before, strict=True)]
        metrics["method/win_rate_previous"] = sum((a > b) + 0.5 * (a == b) for a, b in scores) / len(scores)
        text = f"; win rate against it {metrics['method/win_rate_previous']:.3f}"
    lengths = [f"{metrics[f'method/{whose}_length']:.1f}" for whose in ("own", "true")]
    say(f"iteration {iteration} is done: its opponent's answers had {lengths[0]} tokens, the truth {lengths[1]}{text}")
    log(run, metrics)


# endregion


# === Generation and judging ===


class InverseCDF(transformers.LogitsProcessor):
    """Keeps the one token that a uniform random number picks, so that greedy search samples, and alike in any batch."""

    def __init__(self, uniforms: torch.Tensor, prompt_length: int, temperature: float) -> None:
        self.uniforms, self.prompt_length, self.temperature = uniforms, prompt_length, temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cdf = (scores.float() / self.temperature).softmax(-1).cumsum(-1)  # (N, V)
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None]
        picked = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
        return torch.full_like(scores, -math.inf).scatter_(1, picked, 0.0)


@torch.no_grad()
def generate(run: Run, prompts: list[list[int]], temperature: float, seed: int) -> list[list[int]]:
    """Sample a completion of each prompt from run.rollout, with its stop token if it came to one."""
    model = run.rollout.get_base_model() if run.args.lora_rank > 0 else run.rollout
    own_config = model.generation_config
    model.generation_config = transformers.GenerationConfig()  # else its own top_k, penalties and the like would count
    options = {"do_sample": False, "eos_token_id": run.stop_ids, "pad_token_id": run.stop_ids[0]}
    config = transformers.GenerationConfig(max_new_tokens=run.args.max_new_tokens, **options)
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(len(prompts), run.args.max_new_tokens, generator=generator)
    # Only the key-value cache grows with the batch here, so it may hold four times the tokens of a forward pass.
    lengths = [len(prompt) + run.args.max_new_tokens for prompt in prompts]
    groups, completions = cut_by_length(lengths, 1, 4 * run.micro_batch_tokens), {}
    for group in tqdm(groups, "sampling", leave=False, disable=RANK > 0 or None):
        width = max(len(prompts[i]) for i in group)
        padding = [[0] * (width - len(prompts[i])) for i in group]
        ids = torch.tensor([pad + prompts[i] for pad, i in zip(padding, group, strict=True)])
        mask = torch.tensor([pad + [1] * (width - len(pad)) for pad in padding])
        picker = transformers.LogitsProcessorList([InverseCDF(uniforms[group].to(run.device), width, temperature)])
        output = model.generate(
            ids.to(run.device), attention_mask=mask.to(run.device), generation_config=config, logits_processor=picker
        )
        for i, row in zip(group, output[:, width:].tolist(), strict=True):
            stop = next((k for k, token in enumerate(row) if token in run.stop_ids), len(row))
            completions[i] = row[: stop + 1]
    model.generation_config = own_config
    return gather(completions, len(prompts))


def load_judge(run: Run, path: str) -> tuple[torch.nn.Module, Any]:
    """A reward model and its tokenizer."""
    model, missing = read_model(run, path, run.dtype, transformers.AutoModelForSequenceClassification)
    if missing or model.config.num_labels != 1:
        why = "has no score head" if missing else f"has {model.config.num_labels} outputs"
        fail(f"judge {path} {why}: a sequence classifier with one output is needed")
    return model, load_tokenizer(path)


@torch.no_grad()
def judge(
    run: Run, model: torch.nn.Module, tokenizer: Any, prompts: list[str | list[dict]], responses: list[str]
) -> list[float]:
    """Scores that a reward model gives to the responses."""
    rows, scores = [], {}
    for prompt, response in zip(prompts, responses, strict=True):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if tokenizer.chat_template:
            text = apply_template(tokenizer, [*messages, {"role": "assistant", "content": response}])
            rows.append(tokenizer(text, add_special_tokens=False).input_ids)  # the template writes them
        else:
            rows.append(tokenizer("\n\n".join(message["content"] for message in messages), response).input_ids)
    # Classifiers read their last token that is not padding, so no row may end in the padding token.
    pad = model.config.pad_token_id = min(set(range(len(tokenizer))) - {row[-1] for row in rows})
    for group in cut_by_length(list(map(len, rows)), 1, run.micro_batch_tokens):
        ids = pad_sequence([torch.tensor(rows[i]) for i in group], batch_first=True, padding_value=pad)
        mask = pad_sequence([torch.ones(len(rows[i]), dtype=torch.long) for i in group], batch_first=True)
        logits = model(input_ids=ids.to(run.device), attention_mask=mask.to(run.device)).logits
        scores |= zip(group, logits[:, 0].tolist(), strict=True)
    return gather(scores, len(rows))


# === Evaluation ===


@torch.no_grad()
def evaluate(run: Run, policy: torch.nn.Module, loss_fn: Callable) -> dict[str, float]:
    """Loss and accuracy on the test pairs; judge's score, win rate and KL to the initial model on sampled responses."""
    refresh_rollout(run, policy)
    metrics = summarise(score_pairs(run, run.rollout, run.test_pairs, loss_fn))
    if not math.isfinite(metrics["loss"]):
        fail(f"after step {run.step} the loss on the test pairs is not finite; checkpoints are kept")
    prompts, prompt_ids = zip(*run.eval_prompts, strict=True)
    responses = generate(run, prompt_ids, 1.0, run.args.seed)
    logratios = score(run, run.rollout, prompt_ids, responses)
    if run.args.lora_rank > 0 and run.rollout.get_base_model().name_or_path == run.args.model_name_or_path:
        with run.rollout.disable_adapter():
            logratios -= score(run, run.rollout, prompt_ids, responses)
    else:  # loaded anew for each evaluation, so that training has its memory
        initial = load_model(run, run.args.model_name_or_path, run.dtype)
        logratios -= score(run, initial, prompt_ids, responses)
        del initial
    texts = [run.tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    path = run.args.judge_name_or_path
    scores = judge(run, *load_judge(run, path), prompts, texts) if path else [None] * len(texts)
    rows = [
        {"step": run.step, "prompt": prompt, "response": text, "score": points, "logratio": logratio}
        | {"length": len(response), "ended": response[-1] in run.stop_ids}
        for prompt, text, points, logratio, response in zip(
            prompts, texts, scores, logratios.tolist(), responses, strict=True
        )
    ]
    metrics["kl"] = logratios.mean().item()
    metrics["response_length"] = sum(row["length"] for row in rows) / len(rows)
    metrics["eos_rate"] = sum(row["ended"] for row in rows) / len(rows)
    if RANK == 0:
        append_rows(run.folder / "samples.jsonl", rows)
    if RANK == 0 and path:
        initial_scores = [row["score"] for row in read_rows(run.folder / "samples.jsonl", 0)]
        wins = torch.tensor([(a > b) + 0.5 * (a == b) for a, b in zip(scores, initial_scores, strict=True)])
        metrics["judge_score"] = sum(scores) / len(scores)
        metrics["win_rate"] = wins.mean().item()
        metrics["win_rate_ci95"] = 1.96 * wins.std(correction=0).item() / math.sqrt(len(wins))
    return {f"eval/{name}": value for name, value in metrics.items()}


# === Logging and checkpoints ===


def append_rows(file: Path, rows: list[dict]) -> None:
    with file.open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(file: Path, step: int) -> list[dict]:
    return [row for row in map(json.loads, file.read_text().splitlines()) if row["step"] == step]


def replace_file(file: Path, text: str) -> None:
    """Write a file in one piece, so that a killed run leaves the old one or the new one."""
    Path(f"{file}.tmp").write_text(text)
    os.replace(f"{file}.tmp", file)


def log(run: Run, metrics: dict[str, float]) -> None:
    """Write the row of the present step."""
    row = {"step": run.step, **metrics, **run.method_metrics}
    run.method_metrics = {}
    if RANK == 0:
        append_rows(run.folder / "metrics.jsonl", [row])
    if run.tracker:
        run.tracker.log(row)
    shown = ("loss", "rewards/accuracies", "judge_score", "win_rate", "kl", "response_length", "eos_rate")
    values = [f"{name} {metrics[f'eval/{name}']:.3f}" for name in shown if f"eval/{name}" in metrics]
    if values:
        say(f"step {run.step:4}: {', '.join(values)}")


def open_folder(run: Run, resolved: dict[str, Any]) -> None:
    """Write down what is needed to repeat the run, and start the tracker."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__}
    if RANK == 0 and not (run.folder / "args.json").exists():
        run.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(__file__, run.folder)
        commit = os.popen(f'git -C "{TOY.parent}" rev-parse HEAD 2> {os.devnull}').read().strip()
        name = torch.cuda.get_device_name() if run.device.type == "cuda" else run.device.type
        resolved = resolved | {"dtype": str(run.dtype), "micro_batch_tokens": run.micro_batch_tokens}
        record = {"args": asdict(run.args), "resolved": resolved, "versions": versions}
        record |= {"device": f"{WORLD_SIZE} x {name}", "git_commit": commit}
        replace_file(run.folder / "args.json", json.dumps(record, indent=2))
    barrier()
    if run.args.track and RANK == 0:
        import wandb

        run.tracker = wandb.init(
            project=run.args.wandb_project_name,
            entity=run.args.wandb_entity,
            name=run.folder.name,
            id=re.sub(r"\W", "-", run.folder.name),
            resume="allow",
            dir=run.folder,
            config=asdict(run.args) | resolved | versions,
            settings=wandb.Settings(silent=True),
        )
        run.tracker.define_metric("*", step_metric="step")


def find_checkpoint(run: Run) -> None:
    """Find the checkpoint from which to go on with the run in run.folder, and cut its .jsonl files back to there."""
    if not run.args.resume:
        fail(f"{run.folder} holds a run: go on with it by --resume, or name another --output-dir")
    stored = json.loads((run.folder / "args.json").read_text())["args"]
    for name, value in json.loads(json.dumps(asdict(run.args))).items():
        if name not in FREE_ON_RESUME and stored.get(name) != value:
            fail(f"--{name.replace('_', '-')} is {value}, but the run in {run.folder} has {stored.get(name)}")
    if (run.folder / "model_outputs.json").exists():
        say(f"the run in {run.folder} is finished")
        sys.exit(0)
    last, sizes = -1, {}
    for folder in run.folder.glob("checkpoint-*"):
        try:
            with safe_open(folder / "tensors.safetensors", "pt"):
                counters = json.loads((folder / "counters.json").read_text())
        except (OSError, ValueError, SafetensorError) as error:
            say(f"{folder} is damaged and not used: {error}")
            continue
        if counters["step"] > last:
            run.checkpoint, last, sizes = folder, counters["step"], counters["sizes"]
    say(f"going on with the run in {run.folder} {f'after step {last}' if last > 0 else 'from its start'}")
    for file in run.folder.glob("*.jsonl") if RANK == 0 else []:
        os.truncate(file, sizes.get(file.name, 0))
    barrier()


def trained_tensors(modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The trained weights and their AdamW moments (zero before the first step), by name."""
    tensors = {}
    for module_name, module in modules.items():
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                state = optimizer.state[weight]
                if not state:
                    state |= {"step": torch.zeros((), device=weight.device)}
                    state |= {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                tensors[f"{module_name}.{name}"] = weight.detach()
                tensors |= {f"{module_name}.{name}.{key}": value for key, value in state.items()}
    return tensors


def save_checkpoint(run: Run, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Write all that changes in training; data order and sampling depend on the seed and the step alone."""
    tensors = {}
    for name, tensor in trained_tensors(modules, optimizer).items():
        whole = full_tensor(tensor)
        if RANK == 0:
            tensors[name] = whole.cpu()
    if RANK == 0:
        folder, unfinished = run.folder / f"checkpoint-{run.step}", run.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        save_file(tensors, unfinished / "tensors.safetensors")
        sizes = {file.name: file.stat().st_size for file in run.folder.glob("*.jsonl")}
        counters = {"step": run.step, "pairs": run.pairs, "seconds": run.seconds, "sizes": sizes}
        (unfinished / "counters.json").write_text(json.dumps(counters))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        for older in set(run.folder.glob("checkpoint-*")) - {folder}:
            shutil.rmtree(older)
    barrier()


@torch.no_grad()
def load_checkpoint(run: Run, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Read run.checkpoint into the modules, the optimiser and the counters."""
    with safe_open(run.checkpoint / "tensors.safetensors", "pt") as file:
        for name, tensor in trained_tensors(modules, optimizer).items():
            value = file.get_tensor(name).to(tensor.device)
            if hasattr(tensor, "placements"):
                value = dist.tensor.distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)
    counters = json.loads((run.checkpoint / "counters.json").read_text())
    run.step, run.pairs, run.seconds = counters["step"], counters["pairs"], counters["seconds"]


def save_model(run: Run, policy: torch.nn.Module, name: str) -> None:
    """Write the policy (with LoRA its adapter) and its tokenizer, to be read by from_pretrained.

    It is written as it was evaluated, in the compute dtype; only checkpoints hold float32 weights on a GPU.
    """
    refresh_rollout(run, policy)
    if RANK == 0:
        shutil.rmtree(run.folder / "unfinished", ignore_errors=True)
        run.rollout.save_pretrained(run.folder / "unfinished")
        run.tokenizer.save_pretrained(run.folder / "unfinished")
        shutil.rmtree(run.folder / name, ignore_errors=True)
        os.replace(run.folder / "unfinished", run.folder / name)
    barrier()


def finish_run(run: Run, policy: torch.nn.Module) -> None:
    """Save the policy and its last responses, and show what has changed."""
    if run.step > 0:
        save_model(run, policy, "model")
    if RANK == 0:
        samples = [read_rows(run.folder / "samples.jsonl", step) for step in (0, run.step)]
        prompts = [p if isinstance(p, str) else p[-1]["content"] for p in (row["prompt"] for row in samples[1])]
        texts = [[row["response"] for row in rows] for rows in samples]
        for prompt, before, after in list(zip(prompts, *texts, strict=True))[:3]:
            say(f"\nprompt: {prompt}\nbefore: {before}\nafter:  {after}")
        first, last = (read_rows(run.folder / "metrics.jsonl", step)[0] for step in (0, run.step))
        say(f"\n{'':24}{'initial':>10}{'final':>10}")
        for name in (name for name in last if name.startswith("eval/") and name in first):
            say(f"{name.removeprefix('eval/'):24}{first[name]:10.4f}{last[name]:10.4f}")
        if run.tracker:
            import wandb

            table = wandb.Table(["prompt", "before", "after"], [list(row) for row in zip(prompts, *texts, strict=True)])
            run.tracker.log({"step": run.step, "samples": table})
            run.tracker.finish()
        outputs = [
            {"instruction": prompt, "output": text, "generator": run.folder.name}
            for prompt, text in zip(prompts, texts[1], strict=True)
        ]
        replace_file(run.folder / "model_outputs.json", json.dumps(outputs, indent=2))
        say(f"\n{run.seconds:.0f} s of training and evaluation; the run is in {run.folder}")
    leave_group()


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.1)  # for gloo's worker thread, which must not outlive the interpreter


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Say in one line what to do about full memory and a full disk."""
    try:
        yield
    except torch.OutOfMemoryError:
        fail("out of GPU memory: lower --micro-batch-tokens, or try --gradient-checkpointing or --lora-rank 8")
    except Exception as error:
        if "No space left" not in str(error):
            raise
        fail(f"{error}: the last whole checkpoint is kept, make room and go on with --resume")


# === Training ===


def pick_learning_rate(args: Args, model: torch.nn.Module, asked: float | None, paper: float) -> float:
    """The one asked for; else the paper's, ten times that with LoRA, and 3e-4 for the tiny model of the test bed."""
    if asked is not None:
        return asked
    return 3e-4 if getattr(model.config, "cleanpo_toy", False) else paper * (10 if args.lora_rank > 0 else 1)


def schedule(args: Args, step: int, num_steps: int) -> float:
    """Share of the peak learning rate in a step, counted from 0."""
    warmup = math.ceil(args.warmup_ratio * num_steps)
    if args.lr_scheduler_type == "constant":
        return 1.0
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - (step - warmup) / (num_steps - warmup)
    return left if args.lr_scheduler_type == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far, on the GPU or else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(
    run: Run,
    policy: torch.nn.Module,
    pairs_at: Callable[[int], list[Pair]],
    num_steps: int,
    loss_fn: Callable,
    learning_rate: float,
    known_loss: float | None = None,
) -> None:
    """Train for num_steps steps, step k on pairs_at(k), with a fresh optimiser.

    Methods of several stages call this for each of them, and run.step counts on; a resumed run skips the stages before
    its checkpoint. known_loss, that of a policy equal to its reference, is shown beside the first step's.
    """
    args, first_step, last_step = run.args, run.step, run.step + num_steps
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=args.weight_decay, fused=True)
    if run.checkpoint:
        if int(run.checkpoint.name.removeprefix("checkpoint-")) > last_step:  # this stage was over before it
            run.step = last_step
            return
        load_checkpoint(run, {"policy": policy}, optimizer)
        run.checkpoint = None
    elif run.step == 0:
        log(run, evaluate(run, policy, loss_fn))
    clock = time.perf_counter()
    for number in (signal.SIGTERM, signal.SIGINT):  # a second signal ends the run at once
        signal.signal(number, lambda number, _: os._exit(128 + number) if run.signals else run.signals.append(number))
    bar = tqdm(total=last_step, initial=run.step, desc="training", mininterval=1, disable=RANK > 0)
    while run.step < last_step:
        start, pairs = time.perf_counter(), pairs_at(run.step - first_step)
        policy.train()
        table = score_pairs(run, policy, pairs, loss_fn)  # forward and backward passes
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)).item()
        if not math.isfinite(grad_norm) or not table["loss"].isfinite().all():
            bad = [pair.row for pair, loss in zip(pairs, table["loss"], strict=True) if not loss.isfinite()]
            rows = sorted(bad or [pair.row for pair in pairs])[:16]
            what = f"{'loss' if bad else 'gradient'} of rows {rows}"
            fail(f"step {run.step + 1}: the {what} is not finite; nothing was updated and checkpoints are kept")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(args, run.step - first_step, num_steps)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
        metrics = {f"train/{name}": value for name, value in summarise(table).items()}
        metrics |= {"train/grad_norm": grad_norm, "train/learning_rate": optimizer.param_groups[0]["lr"]}
        if run.step == first_step and known_loss is not None:
            say(f"loss before the first update: {metrics['train/loss']:.6f} (expected: {known_loss:.6f})")
        run.step, run.pairs = run.step + 1, run.pairs + len(pairs)
        metrics |= {"progress/epoch": run.pairs / run.epoch_pairs, "progress/pairs": run.pairs}
        metrics |= {"perf/tokens_per_second": tokens / (time.perf_counter() - start)}
        bar.set_postfix(loss=metrics["train/loss"], accuracy=metrics["train/rewards/accuracies"], refresh=False)
        bar.update()
        if run.step % args.eval_steps == 0 or run.step == last_step:
            metrics |= evaluate(run, policy, loss_fn)
        now = time.perf_counter()
        run.seconds, clock = run.seconds + now - clock, now
        metrics |= {"progress/seconds": run.seconds, "perf/peak_memory_gb": peak_memory(run.device) / 2**30}
        if "eval/kl" in metrics or run.step == 1 or run.step % args.logging_steps == 0:
            log(run, metrics)
        stop = sum(gather({RANK: run.signals[:1]}, WORLD_SIZE), [])  # of any process
        if stop or (args.save_steps and (run.step % args.save_steps == 0 or run.step == last_step)):
            save_checkpoint(run, {"policy": policy}, optimizer)
        if stop:
            say(f"stopped by a signal after step {run.step}: go on with --resume --output-dir {run.folder}")
            leave_group()
            sys.exit(128 + stop[0])
    bar.close()


@readable_errors()
def main(args: Args) -> None:
    run = start_run(args)
    policy = load_policy(run, args.model_name_or_path)
    # region method: procedure
    truths, test_truths = load_truths(run, *read_splits(args))
    run.eval_prompts, run.epoch_pairs = load_eval_prompts(run, test_truths), len(truths)
    rates = args.learning_rate or [pick_learning_rate(args, policy, None, rate) for rate in PAPER_LEARNING_RATES]
    toy = getattr(policy.config, "cleanpo_toy", False)
    betas = ((1.0,) if toy else PAPER_BETAS) if args.beta is None else args.beta
    if min(betas, default=0) <= 0 or min(rates) < 0:
        fail("--beta must be above 0 and --learning-rate at least 0 in each iteration")
    open_folder(run, {"learning_rate": list(rates), "beta": list(betas)})
    previous = []
    for t in range(args.num_iterations if args.max_steps != 0 else 1):
        beta, learning_rate = betas[min(t, len(betas) - 1)], rates[min(t, len(rates) - 1)]
        seed, first_step = 1_000_003 * args.seed + 2 * t, run.step
        drawn = torch.randperm(len(truths), generator=torch.Generator().manual_seed(seed))
        asked = [truths[i] for i in drawn[: args.prompts_per_iteration].tolist()]
        refresh_rollout(run, policy)  # the opponent, and the reference
        pairs = play(run, asked, f"iteration-{t}/train", seed)
        run.test_pairs = play(run, test_truths, f"iteration-{t}/test", seed + 1)
        batches = plan_batches(args, pairs + previous)
        add_reference(run, run.rollout, [*batches, run.test_pairs], f"iteration-{t}/reference_logps")
        say(f"iteration {t}: beta {beta}, learning rate {learning_rate:g}, {len(batches)} steps")
        loss_fn = partial(compute_loss, beta=beta)
        train(run, policy, batches.__getitem__, len(batches), loss_fn, learning_rate, known_loss=math.log(2))
        if batches and run.checkpoint is None:
            log_iteration(run, t, pairs, len(asked), first_step)
        previous = pairs if args.mix_previous else []
    # endregion
    finish_run(run, policy)


if __name__ == "__main__":
    main(tyro.cli(Args))
