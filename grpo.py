# region method: header
"""Group-relative policy optimisation (GRPO), Shao et al. 2024, https://arxiv.org/abs/2402.03300, and three of its kin

Reinforcement learning from a reward function, without a value model. In each step the policy, as pi_old, answers each
of the step's prompts G = --num-generations times. The reward r of an answer is compared only with those of its group,
which gives its advantage A, the same for all its tokens. Then come --num-iterations updates, each on all answers of the
step. An answer's loss is a sum over its tokens, divided as the table says; a step's loss is the mean over its answers:

    -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A) + beta k3        with ratio = pi / pi_old
    k3 = pi_ref / pi - log(pi_ref / pi) - 1, which estimates the KL divergence from pi_ref, the initial policy

    --loss-type  A                          sum divided by             beta
    grpo         (r - mean) / (std + 1e-4)  the answer's length        0.04
    dr_grpo      r - mean                   --max-new-tokens           0     Liu et al., arXiv:2503.20783
    rloo         r - mean of the others     1                          0.03  Ahmadian et al., arXiv:2402.14740
    dapo         as grpo                    the step's mean length     0     Yu et al., arXiv:2503.14476

By default there is one update, as in GRPO's paper (DAPO's: 16, each on different answers). Then all ratios are 1,
nothing is clipped, and dapo's epsilon_high, 0.28, has no effect. rloo subtracts beta log(pi_old / pi_ref) of an answer
from its reward, and has no k3; its paper has neither ratio nor clip. This script has only DAPO's loss (its paper
divides by a group's tokens) and its filter of overlong answers, --mask-truncated-completions, but neither its sampling
until a group's rewards differ nor its length penalty. std is over G - 1, as in TRL. TRL 1.16 multiplies k3 by the
ratio, so that k3's gradient is that of KL(pi || pi_ref); here, at ratio 1, it is that of KL(pi_ref || pi). With beta 0
there is no reference. This script has 64 answers a step (GRPO's authors: 1,024, with G 64), temperature 1, AdamW,
gradient norm 1, 10 % warm-up and linear decay. In a healthy run train/reward rises and train/reward_std stays away from
0; train/loss says little.

    python grpo.py                               # the built-in test bed, a few minutes on two CPU cores
    python grpo.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name PROMPTS.jsonl \
        --reward-name-or-path REWARD.py
"""
# endregion

import contextlib
import hashlib
import json
import math
import os
import runpy
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import tyro
import wandb
from datasets import load_dataset
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# Outside of `# region method` ... `# endregion` all scripts are the same: read the regions and main first. A training
# step is micro_batches (this device's share), forward or token_logps, compute_loss, .backward(), and finally update.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
TOY = Path(__file__).resolve().parent / "toy"


@dataclass
class Args:
    # region method: args
    # --- GRPO ---
    reward_name_or_path: str | None = None  # reward model, or .py file with reward(prompts, completions, **columns)
    loss_type: Literal["grpo", "dr_grpo", "rloo", "dapo"] = "grpo"  # see above
    num_generations: int = 8  # answers to each prompt, G; --batch-size counts answers, and must be a multiple of G
    num_iterations: int = 1  # updates on the answers of each step
    epsilon: float = 0.2  # the ratio is clipped at 1 - epsilon
    epsilon_high: float | None = None  # the ratio is clipped at 1 + this; None = epsilon, 0.28 for dapo
    beta: float | None = None  # KL coefficient; None = 0.04, 0, 0.03 or 0, see above
    mask_truncated_completions: bool = False  # answers cut off at --max-new-tokens have no gradient
    learning_rate: float | None = None  # None = 1e-6 (1e-5 with LoRA), 3e-4 on the test bed
    DEFAULTS = {  # no flag: what None means for a real model, LoRA, the test bed
        "learning_rate": (1e-6, 1e-5, 3e-4),
        "reward_name_or_path": (None, None, str(TOY / "reward.py")),
        "max_steps": (None, None, 80),
    }
    # endregion
    # --- model ---
    model_name_or_path: str = str(TOY / "policy")  # initial policy: a causal language model, as hub id or folder
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if CUDA else "float32"  # of the computation
    lora_rank: int = 0  # train LoRA adapters of this rank (alpha twice that) on all linear layers; 0 = all weights
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower
    # --- data ---
    dataset_name: str = str(TOY)  # preference pairs: hub id, .jsonl, .json, .csv or .parquet file, or folder of these
    dataset_train_split: str = "train"  # split to train on
    dataset_test_split: str = "test"  # split to evaluate on; if there is none, the last 10 % of the pairs, at most 512
    max_length: int = 1024  # most tokens of prompt and answer, up to the model's positions; longer pairs are dropped
    # --- optimisation ---
    batch_size: int = 64  # pairs per optimiser step, over all devices
    micro_batch_tokens: int | None = None  # tokens in a pass, about; None = 1024, on a GPU by memory and hidden size
    num_train_epochs: int = 1  # passes over the training pairs
    max_steps: int | None = None  # maximum number of optimiser steps; 0 = only evaluate
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"  # constant: no warm-up, no decay
    warmup_ratio: float = 0.1  # share of the steps over which the learning rate rises
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 = no clipping
    # --- evaluation ---
    eval_steps: int = 50  # steps between evaluations; the first and the last step are always evaluated
    num_eval_prompts: int = 256  # test pairs to evaluate on, and prompts to answer; 0 = all pairs, but no answers
    max_new_tokens: int = 128  # longest sampled response, in tokens
    judge_name_or_path: str | None = None  # reward model, or .py file with reward(prompts, completions, **columns)
    # --- run ---
    seed: int = 1  # for the order of the data, sampling, and LoRA's initial weights
    output_dir: str | None = None  # folder of the run; None = runs/<script>__<seed>__<time>
    save_steps: int = 0  # steps between checkpoints, of which the newest is kept; 0 = none
    resume: bool = False  # go on from the last checkpoint in --output-dir, if any; all other flags as before
    track: bool = False  # log to Weights & Biases as well


# region method: loss
def group_advantages(rewards: torch.Tensor, loss_type: str) -> torch.Tensor:
    """Advantages of the G answers to each of P prompts from their rewards, both (P, G)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if loss_type == "dr_grpo":
        return centred
    if loss_type == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)  # r less the mean of the others
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def compute_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float,
    epsilon_high: float,
    beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and metrics of each token of some answers; all tensors have the same shape."""
    ratio = torch.exp(logps - old_logps)
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    k3 = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1
    losses = -torch.minimum(ratio * advantages, clipped_ratio * advantages) + beta * k3  # Eq. 3 of arXiv:2402.03300
    clipped = clipped_ratio * advantages < ratio * advantages
    return losses, {"kl": k3, "clip_fraction": clipped.float(), "ratio": ratio}


# endregion
@dataclass(frozen=True)  # what stays the same throughout a run
class Run:
    args: Args  # with a value for each flag that was None
    folder: Path
    tokenizer: Any
    stop_ids: list[int]  # tokens that end an answer
    saved_step: int  # step of the checkpoint to resume from, 0 if there is none

    def append(self, file: str, rows: list[dict]) -> None:
        if RANK == 0:
            with (self.folder / file).open("a") as stream:
                stream.writelines([json.dumps(row) + "\n" for row in rows])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.append("metrics.jsonl", [{"step": step} | metrics])
        wandb.log(metrics, step=step)
        shown = [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in metrics.items() if "eval/" in name]
        if shown:
            tqdm.write(f"step {step:4}: {', '.join(shown)}")


@dataclass(frozen=True)
class Pair:
    row: int  # its index in the split
    prompt: str | list[dict]  # as read: a judge has its own chat template
    columns: dict[str, Any]  # the row's other fields, for a judge
    prompt_ids: list[int] = field(repr=False)  # not part of open_folder's hash: it may hold today's date
    chosen_ids: list[int]
    rejected_ids: list[int]
    preference_prob: float
    ref_logps: tuple[float, float] = (0.0, 0.0)  # of both answers, where a method has a reference

    def __len__(self) -> int:
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)  # tokens in its two rows


def load_pairs(run: Run) -> tuple[list[Pair], list[Pair]]:
    args, path = run.args, Path(run.args.dataset_name)
    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if kind and not (path.is_file() and path.stat().st_size > 0):
        sys.exit(f"error: there is no file {path}, or it is empty")
    source = {"path": kind, "data_files": str(path)} if kind else {"path": args.dataset_name}
    splits = load_dataset(**source, streaming=path.exists() and path.suffix != ".json")  # why not .json: docs/data.md
    train_pairs = encode_rows(run, splits[args.dataset_train_split], args.dataset_train_split)
    if args.dataset_test_split in splits or args.dataset_test_split != Args.dataset_test_split:
        test_pairs = encode_rows(run, splits[args.dataset_test_split], args.dataset_test_split)
    else:
        kept = len(train_pairs) - min(512, math.ceil(len(train_pairs) / 10))
        train_pairs, test_pairs = train_pairs[:kept], train_pairs[kept:]
    if min(len(train_pairs), len(test_pairs), args.batch_size, args.num_eval_prompts or WORLD_SIZE) < WORLD_SIZE:
        sys.exit(f"error: there are too few pairs to train on, to test on, or in a step (devices: {WORLD_SIZE})")
    return train_pairs, test_pairs[: args.num_eval_prompts or None]


# region method: rows
def encode_rows(run: Run, rows: Iterable[dict], split: str) -> list[Pair]:
    """The prompts of a split's rows as token ids, in Pairs without answers."""
    pairs, count = [], 0
    for row in rows:
        prompt, columns = row.get("prompt"), {name: value for name, value in row.items() if name != "prompt"}
        if isinstance(row.get("chosen"), list) and not isinstance(prompt, list):  # conversations that end with answers
            prompt = row["chosen"][:-1]
        if not isinstance(prompt, str | list) or not prompt:
            sys.exit(f"error: row {count} of split {split} needs a prompt; has {[k for k in row if row[k]]}")
        (text,) = render(run.tokenizer, prompt)
        prompt_ids = run.tokenizer(text, add_special_tokens=False).input_ids
        if len(prompt_ids) + run.args.max_new_tokens <= run.args.max_length:
            pairs.append(Pair(count, prompt, columns, prompt_ids, [], [], 1.0))
        count += 1
    tqdm.write(f"{split}: {len(pairs)} of {count} prompts; {count - len(pairs)} dropped: too long")
    return pairs


# endregion
def render(tokenizer: Any, prompt: str | list[dict], *answers: str | list[dict]) -> list[str]:
    """Texts of the prompt and its answers. An EOS before an answer, dropped later, keeps out SentencePiece's space."""
    if isinstance(prompt, str):
        bos = tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
        return [bos + prompt.removeprefix(bos), *(tokenizer.eos_token + answer for answer in answers)]
    head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    texts = [tokenizer.apply_chat_template(prompt + answer, tokenize=False) for answer in answers]
    if not all(text.startswith(head) for text in texts):
        sys.exit("error: the tokenizer's chat template renders a prompt differently when an answer follows")
    return [head, *(tokenizer.eos_token + text.removeprefix(head) for text in texts)]


def cut_answer(ids: list[int], stop_ids: list[int]) -> list[int]:
    """An answer up to and including its first stop token."""
    stops = [place for place, token in enumerate(ids) if token in stop_ids]
    return ids[: stops[0] + 1] if stops else ids


def plan_batches(args: Args, num_pairs: int) -> list[list[int]]:
    """Indices of the pairs of each optimiser step, in an order that depends on the seed and the epoch alone."""
    batches, starts = [], range(0, num_pairs - WORLD_SIZE + 1, args.batch_size)  # a step has a pair for each device
    for epoch in range(args.num_train_epochs):
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + epoch)
        order = torch.randperm(num_pairs, generator=generator).tolist()
        batches += [order[start : start + args.batch_size] for start in starts]
    return batches[: args.max_steps]


def micro_batches(lengths: list[int], tokens: int, rank: int = RANK, world_size: int = WORLD_SIZE) -> list[list[int]]:
    """Indices of this process's items in groups of about `tokens` tokens; each process has equally many groups."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = min(math.ceil(sum(lengths) / tokens / world_size), len(lengths) // world_size) * world_size
    return [longest_first[group::groups] for group in range(rank, groups, world_size)]  # dealt in turn, like cards


@torch.compiler.set_stance("force_eager")  # the few passes in here are not worth compiling
def load_model(run: Run, path: str, kind: Any = AutoModelForCausalLM, trainable: bool = False) -> Any:
    """A model without dropout (in eval mode): to be trained and sharded, or whole, frozen, in the run's dtype."""
    args, compute_dtype = run.args, getattr(torch, run.args.dtype)
    dtype = torch.float32 if trainable and args.lora_rank == 0 else compute_dtype
    model, info = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        sys.exit(f"error: {path} has no weights for {min(info['missing_keys'])}, it is not a {type(model).__name__}")
    model.to(DEVICE).eval().requires_grad_(trainable)
    model.within_forward = lambda function: function()  # FSDP, below, gathers the weights around it
    if kind is AutoModelForCausalLM:  # packed rows must get the same log-probabilities as row by row in its own forward
        rows, own_attention = [([5, 6, 7], [8, 9]), ([10, 11], [12, 13, 14])], model.config._attn_implementation
        own_logps = torch.cat(token_logps(model, rows)).detach()
        model.set_attn_implementation("packed")
        error = (torch.cat(token_logps(model, rows)) - own_logps).abs().max().item()
        if not error < (1e-3 if dtype == torch.float32 else 0.05 * own_logps.abs().max()):  # or NaN; e.g. capped logits
            model.set_attn_implementation(own_attention)
            if trainable and WORLD_SIZE > 1:  # row by row, the processes would get out of step
                sys.exit(f"error: rows of {path} cannot be packed ({type(model).__name__}): train it on one device")
            tqdm.write(f"rows of {path} cannot be packed ({type(model).__name__}): each passes by itself, more slowly")
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    options = {"emulate_precision_casts": True}  # rounded alike with and without gradients
    for layer_class in {type(layer) for layer in layers} if CUDA and compute_dtype == torch.bfloat16 else []:
        layer_class.forward = torch.compile(layer_class.forward, dynamic=True, recompile_limit=64, options=options)
    if not trainable:
        return model
    if args.lora_rank > 0:
        torch.manual_seed(args.seed)
        lora = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        if kind is AutoModelForSequenceClassification:
            lora.task_type, model.score = "SEQ_CLS", model.score.float()  # the head is trained as well
        model = peft.get_peft_model(model, lora).eval()  # adapters are float32, all other weights frozen
    for layer in layers if args.gradient_checkpointing else []:
        layer.forward = partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    if WORLD_SIZE > 1 or compute_dtype != torch.float32:  # on one device, FSDP only does mixed precision
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        frozen = {weight for weight in model.parameters() if WORLD_SIZE == 1 and not weight.requires_grad}  # not copied
        for module in [*layers, model]:  # the root reshards too: weights that stay gathered would miss the next update
            fully_shard(module, mp_policy=precision, ignored_params=frozen, reshard_after_forward=True)
        register_fsdp_forward_method(model, "within_forward")  # the root's weights are gathered in it, as in model()
    return model


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """For sampling and scoring: no gradients, and whole weights, so that the processes need not keep in step."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    with torch.no_grad():
        yield
    for module in sharded:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def packed_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs) -> tuple:
    """Causal attention within each row packed into (1, heads, T, size), as (1, T, heads, size); in sampling, SDPA."""
    if "cu_seq_lens_q" not in kwargs:  # sampling: padded rows, with a cache
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling)
    ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]  # 0 and where rows end, (rows + 1,); their longest
    states, settings, outputs = (query, key, value), {"scale": scaling, "enable_gqa": True}, []
    if CUDA and query.dtype == torch.bfloat16:
        states, window = [tensor[0].transpose(0, 1) for tensor in states], ((sliding_window or 0) - 1, 0)  # -1: all
        return varlen_attn(*states, ends, ends, longest, longest, window_size=window, **settings)[None], None
    for row in zip(*[tensor.split(ends.diff().tolist(), dim=2) for tensor in states], strict=True):
        length, mask = row[0].shape[2], None
        if sliding_window and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril().triu(1 - sliding_window)
        outputs.append(F.scaled_dot_product_attention(*row, mask, is_causal=mask is None, **settings))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


transformers.AttentionInterface.register("packed", packed_attention)
transformers.AttentionMaskInterface.register("packed", transformers.AttentionMaskInterface()["sdpa"])


def read_answers(model: Any, rows: list[tuple[list[int], list[int]]], read: Callable) -> tuple[torch.Tensor, ...]:
    """`read` maps hidden states (n, D) and the n tokens they predict to n values; a tensor of these for each answer."""
    ids, positions, ends, places = [], [], [0], []
    for prompt, answer in rows:
        ids += prompt + answer
        positions += range(len(prompt) + len(answer))
        places += range(ends[-1] + len(prompt) - 1, len(ids) - 1)  # the state before a token predicts it
        ends.append(len(ids))
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    inputs |= {"cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32), "attention_mask": torch.ones(1, 1, 1, 1)}
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}  # without the mask, a (T, T) one is built

    def read_chunks() -> torch.Tensor:
        output = model.get_decoder()(**inputs, max_length_q=max(positions) + 1, use_cache=False)
        states, tokens = output.last_hidden_state[0, places], inputs["input_ids"][0].roll(-1)[places]
        if len(places) <= 2048:
            return read(states, tokens)
        chunks = zip(states.split(2048), tokens.split(2048), strict=True)  # all logits at once take too much memory
        return torch.cat([torch.utils.checkpoint.checkpoint(read, *chunk, use_reentrant=False) for chunk in chunks])

    return model.within_forward(read_chunks).split([len(answer) for _, answer in rows])


def token_logps(model: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of the answer's tokens, for each row (prompt, answer): a tensor (len(answer),) in float32."""

    def logps_of(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = model.get_output_embeddings()(states).float()  # a bfloat16 softmax errs by up to 0.1 nats a token
        return -F.cross_entropy(logits, tokens, reduction="none")

    if model.config._attn_implementation == "packed":
        return read_answers(model, rows, logps_of)
    logps = []  # by the model's own attention and head, row by row
    for prompt, answer in rows:
        ids = torch.tensor([prompt + answer], device=DEVICE)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, -1 - len(answer) : -1]
        logps.append(-F.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="none"))
    return tuple(logps)


def start_training(run: Run, models: dict, lr: float, steps: int, start: int = 0, eps: float = 1e-8) -> tuple:
    """AdamW (from the checkpoint, if there is one), the learning rate of each step, and the number of steps done."""
    optimizer = torch.optim.AdamW(torch.nn.ModuleDict(models).parameters(), lr=lr, eps=eps, weight_decay=0, fused=True)
    warmup_steps = math.ceil(run.args.warmup_ratio * steps)  # steps + 1 below: a schedule is 0 at its first and last
    schedule = transformers.get_scheduler(run.args.lr_scheduler_type, optimizer, warmup_steps, steps + 1).lr_lambdas[0]
    if run.saved_step > start:
        reader = dcp.HuggingFaceStorageReader(str(run.folder / f"checkpoint-{run.saved_step}"))
        dcp.load(training_state(models, optimizer), storage_reader=reader)
    return optimizer, {start + i: lr * schedule(i) for i in range(1, steps + 1)}, max(start, run.saved_step)


def update(run: Run, models: dict, optimizer: torch.optim.Optimizer, learning_rate: float) -> dict[str, float]:
    """Clip the gradients of each model, take AdamW's step, and return what to log of it."""
    metrics = {"train/learning_rate": learning_rate}
    for name, model in models.items():
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.args.max_grad_norm or math.inf).item()
        if not math.isfinite(norm):
            sys.exit(f"error: the gradient of the {name} is not finite; nothing was updated")
        metrics["train/grad_norm" if name == "policy" else f"train/{name}_grad_norm"] = norm
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def means_of(kind: str, parts: list[dict[str, torch.Tensor]], count: int) -> dict[str, float]:
    """Means over `count` items, of which this process holds some, in parts; kind is train or eval, as in train/loss."""
    by_metric = zip(*[part.values() for part in parts], strict=True)  # for each metric its tensors, one a part
    totals = torch.stack([torch.cat(tensors).detach().double().sum() for tensors in by_metric])
    dist.all_reduce(totals)
    return {f"{kind}/{name}": total / count for name, total in zip(parts[0], totals.tolist(), strict=True)}


def generate(run: Run, model: Any, prompts: list[list[int]], seed: int, temperature: float) -> list[list[int]]:
    """A response to each prompt, in token ids; call it inside inference(). The model's own settings do not count."""
    config = dict.fromkeys(model.generation_config.to_diff_dict()) | {"do_sample": True, "top_k": 0, "num_beams": 1}
    config |= {"max_new_tokens": run.args.max_new_tokens, "eos_token_id": run.stop_ids, "pad_token_id": run.stop_ids[0]}
    lengths, answers = [len(prompt) + run.args.max_new_tokens for prompt in prompts], {}
    torch.manual_seed(seed)
    for group in micro_batches(lengths, max(8192, 2 * run.args.micro_batch_tokens), rank=0, world_size=1):
        width = max([len(prompts[i]) for i in group])  # padding, on the left, is -1 at first
        padded = torch.tensor([[-1] * (width - len(prompts[i])) + prompts[i] for i in group], device=DEVICE)
        inputs = {"input_ids": padded.clamp(min=0), "attention_mask": (padded >= 0).long(), "synced_gpus": False}
        sample = partial(model.generate, **config | inputs | {"temperature": temperature, "use_cache": True})
        output = model.within_forward(sample) if run.args.lora_rank > 0 else sample()  # peft's bypasses FSDP's root
        answers |= {i: cut_answer(ids, run.stop_ids) for i, ids in zip(group, output[:, width:].tolist(), strict=True)}
    return [answers[i] for i in range(len(prompts))]


@torch.compiler.set_stance("force_eager")  # a Python file may hold models of its own
def judge(run: Run, path: str, pairs: list[Pair], responses: list[str], model: Any = None) -> list[float]:
    """Scores of responses to the prompts of pairs, by reward() of a Python file or by a reward model."""
    prompts, columns, scores = [pair.prompt for pair in pairs], {}, []
    answers = [[{"role": "assistant", "content": response}] for response in responses]
    if path.endswith(".py"):
        for name in pairs[0].columns:
            columns[name] = [pair.columns[name] for pair in pairs]
        completions = [a if isinstance(p, list) else r for p, a, r in zip(prompts, answers, responses, strict=True)]
        scores = list(runpy.run_path(path)["reward"](prompts=prompts, completions=completions, **columns))
    else:
        model = model or load_model(run, path, AutoModelForSequenceClassification)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model.config.pad_token_id = None  # one text at a time: its last token counts, whichever it is
        for prompt, answer in zip(prompts, answers, strict=True):
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(messages + answer, return_tensors="pt").input_ids
            scores.append(model(input_ids=ids.to(DEVICE), use_cache=False).logits.item())
    bad = [pair.row for pair, score in zip(pairs, scores, strict=False) if score is None or not math.isfinite(score)]
    if bad or len(scores) != len(pairs):
        sys.exit(f"error: {path} has {len(scores)} scores for {len(pairs)} answers, not finite in rows {bad or 'none'}")
    return [float(score) for score in scores]


def evaluate(run: Run, policy: Any, test_pairs: list[Pair], loss_of: Callable, step: int) -> dict[str, float]:
    """Loss and metrics on test pairs; KL to the initial model, score and win rate of a response to each prompt."""
    args, parts = run.args, []
    with inference(policy):
        for indices in micro_batches([len(pair) for pair in test_pairs], args.micro_batch_tokens):
            losses, metrics = loss_of([test_pairs[i] for i in indices])
            parts.append({"loss": losses} | metrics)
        means = means_of("eval", parts, len(test_pairs))
        if args.num_eval_prompts == 0:
            return means
        initial = load_model(run, args.model_name_or_path)  # read again each time: training needs the memory
        with torch.compiler.set_stance("force_eager"):  # generate has passes of a token each
            prompts, samples = [pair.prompt_ids for pair in test_pairs], [{} for _ in test_pairs]
            answers = generate(run, policy, prompts, args.seed, temperature=1.0)
            texts = run.tokenizer.batch_decode(answers, skip_special_tokens=True)
            lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
            for indices in micro_batches(lengths, args.micro_batch_tokens, rank=0, world_size=1):  # all, everywhere
                some = [(prompts[i], answers[i]) for i in indices]
                for i, new, old in zip(indices, token_logps(policy, some), token_logps(initial, some), strict=True):
                    samples[i] |= {"step": step, "prompt": run.tokenizer.decode(prompts[i]), "response": texts[i]}
                    samples[i] |= {"kl": (new - old).sum().item(), "response_length": len(answers[i])}  # nats, tokens
                    samples[i]["eos_rate"] = float(answers[i][-1] in run.stop_ids)
    if args.judge_name_or_path and RANK == 0:  # as only this process writes
        scores = judge(run, args.judge_name_or_path, test_pairs, texts)
        logged = [json.loads(line) for line in (run.folder / "samples.jsonl").open()] if step > 0 else samples
        for sample, first, score in zip(samples, logged[: len(samples)], scores, strict=True):  # the first are step 0's
            sample["judge_score"] = score
            tie = sample["response"] == first["response"] or score == first["judge_score"]
            sample["win_rate"] = 0.5 if tie else float(score > first["judge_score"])
        means["eval/win_rate_ci95"] = 1.96 * statistics.pstdev([s["win_rate"] for s in samples]) / len(samples) ** 0.5
    run.append("samples.jsonl", samples)
    wandb.log({"eval/samples": wandb.Table(list(samples[0]), [list(s.values()) for s in samples])}, step=step)
    for name in [name for name in samples[0] if name not in ("step", "prompt", "response")]:
        means[f"eval/{name}"] = statistics.fmean([sample[name] for sample in samples])
    tqdm.write(f"response to the first test prompt: {texts[0]}")
    return means


def training_state(models: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Trained weights and AdamW's moments by name: a checkpoint is written from them, and read into them."""
    tensors = {}
    for name, weight in torch.nn.ModuleDict(models).named_parameters():
        if weight.requires_grad:
            if not optimizer.state[weight]:  # before the first step
                zeros = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                optimizer.state[weight] = zeros | {"step": torch.zeros((), device=DEVICE)}
            for key, value in {"weight": weight.detach(), **optimizer.state[weight]}.items():
                tensors[f"{name}.{key}"] = value
    return tensors


def save_checkpoint(run: Run, models: dict[str, Any], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write all that training changes, to another folder that is then renamed: no half checkpoint is ever left."""
    folder, unfinished = run.folder / f"checkpoint-{step}", run.folder / "unfinished"
    writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
    dcp.save(training_state(models, optimizer), storage_writer=writer)
    if RANK == 0:
        unfinished.rename(folder)
        for older in set(run.folder.glob("checkpoint-*")) - {folder}:
            shutil.rmtree(older)
    dist.barrier()


def start_run(args: Args) -> Run:
    """Connect the processes, check the flags, and fill in those that are None."""
    own_group = {} if WORLD_SIZE > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", **own_group)
    if CUDA:
        torch.cuda.set_device(DEVICE)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each new length for longer than it computes
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # only rank 0 prints
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.resume and args.output_dir is None:
        sys.exit("error: --resume needs --output-dir")
    path = args.model_name_or_path
    config, tokenizer = AutoConfig.from_pretrained(path).get_text_config(), AutoTokenizer.from_pretrained(path)
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    for flag, value in asdict(args).items():  # of any script; other values would train nonsense, silently
        low = 1 if flag.endswith(("batch_size", "_tokens", "eval_steps", "ppo_epochs", "per_step", "iterations")) else 0
        high = {"label_smoothing": 1, "warmup_ratio": 1, "max_length": positions}.get(flag, sys.float_info.max)
        numbers = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int | float)]
        if not all(low <= x <= high for x in numbers) and not flag.endswith("score"):  # a score may be negative
            sys.exit(f"error: --{flag.replace('_', '-')} {value} is not from {low} to {high:g}")
    stop_ids = [tokenizer.eos_token_id]
    if transformers.utils.cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        listed = transformers.GenerationConfig.from_pretrained(path).eos_token_id  # chat models may name several
        stop_ids += [listed] if isinstance(listed, int) else listed or []
    toy = getattr(config, "cleanpo_toy", False)
    shared = [{"output_dir": f"runs/{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"}]
    shared[0]["micro_batch_tokens"] = torch.cuda.mem_get_info()[1] // (3500 * config.hidden_size) if CUDA else 1024
    dist.broadcast_object_list(shared)  # those of rank 0: clock and memory may differ
    settled = {flag: values[2 if toy else 1 if args.lora_rank else 0] for flag, values in args.DEFAULTS.items()}
    settled |= {"judge_name_or_path": str(TOY / "judge") if toy and TOY.exists() else None} | shared[0]
    settled = {flag: value for flag, value in settled.items() if getattr(args, flag) is None}
    tqdm.write(", ".join([f"{flag} {value}" for flag, value in settled.items()]))
    args = replace(args, **settled)
    steps = [int(folder.name.split("-")[1]) for folder in Path(args.output_dir).glob("checkpoint-*")]
    return Run(args, Path(args.output_dir), tokenizer, stop_ids, max(steps, default=0) if args.resume else 0)


def open_folder(run: Run, data: list) -> None:
    """Take the run's folder, and record flags, data and version in it; refuse to resume with others."""
    file, args = run.folder / "args.json", asdict(run.args) | {"resume": False}
    record = {"args": args, "data": hashlib.sha256(repr(data).encode()).hexdigest(), "torch": torch.__version__}
    stored = json.loads(file.read_text()) if file.exists() else None
    dist.barrier()  # all have looked before the first one writes
    if stored and (not run.args.resume or (run.folder / "model").exists()):
        sys.exit(f"error: {run.folder} holds a run: name another --output-dir, or --resume it if it has no model/ yet")
    if stored and stored != record:
        changed = [name for name, value in args.items() if stored["args"].get(name) != value]
        sys.exit(f"error: {', '.join(changed) or 'data, devices or torch'} changed since the run in {run.folder} began")
    tag = run.folder.name if run.args.track and RANK == 0 else None  # before there is a folder, since a login may fail
    wandb.init(id=tag, name=tag, resume="allow" if stored else "never", config=record, mode=None if tag else "disabled")
    tqdm.write(f"first row: {run.tokenizer.decode(data[0].prompt_ids + data[0].chosen_ids + data[0].rejected_ids)!r}")
    tqdm.write(f"the run is in {run.folder}" + (f" and goes on at step {run.saved_step}" if stored else ""))
    if RANK == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / Path(__file__).name).write_text(Path(__file__).read_text())
        shutil.rmtree(run.folder / "unfinished", ignore_errors=True)
        for log in [f for f in run.folder.glob("*.jsonl") if stored and f.stem in ("metrics", "samples", "annotated")]:
            lines = [line for line in log.open() if line.endswith("\n") and json.loads(line)["step"] <= run.saved_step]
            log.write_text("".join(lines if run.saved_step > 0 else []))  # from the start, step 0 is logged again too
        file.write_text(json.dumps(record, indent=1))
    dist.barrier()


def save_model(run: Run, model: Any, folder: Path) -> None:
    """Save a model (with LoRA only the adapter) in the dtype of the computation, and its tokenizer."""
    names, unfinished = model.state_dict().keys(), run.folder / "unfinished"
    with inference(model):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        if RANK == 0:
            tensors = {name: tensors[name].to("cpu", copy=True) for name in names if name in tensors}
            model.save_pretrained(unfinished, state_dict=tensors)
            run.tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)


# region method: functions
class Rollout(NamedTuple):
    """An answer of the policy. The tensors hold a value for each of its C tokens, (C,), on the CPU."""

    prompt_ids: list[int]
    answer_ids: list[int]
    advantage: float
    weight: float  # 0 for no gradient, else 1
    old_logps: torch.Tensor
    ref_logps: torch.Tensor  # equal to old_logps where there is no reference


def gather(share: dict[int, Any]) -> list:
    """The items of all processes in the order of their keys; each process passes its own."""
    shares = [None] * WORLD_SIZE
    dist.all_gather_object(shares, list(share.items()))
    return [item for _, item in sorted(sum(shares, []))]


def respond(run: Run, model: Any, prompts: list[list[int]], seed: int) -> list[tuple[list[int], list[int]]]:
    """A row (prompt, response) for each prompt; each process answers a part of the prompts."""
    share = range(RANK, len(prompts), WORLD_SIZE)
    with inference(model), torch.compiler.set_stance("force_eager"):  # generate has passes of a token each
        responses = generate(run, model, [prompts[i] for i in share], seed * WORLD_SIZE + RANK, temperature=1.0)
    return list(zip(prompts, gather(dict(zip(share, responses, strict=True))), strict=True))


def score_answers(run: Run, reward_model: Any, pairs: list[Pair], rows: list) -> list[float]:
    """Rewards of the answers in rows (prompt, answer), one row for each pair; each process scores a part of them."""
    share = range(RANK, len(rows), WORLD_SIZE)
    texts = run.tokenizer.batch_decode([rows[i][1] for i in share], skip_special_tokens=True)
    rewards = judge(run, run.args.reward_name_or_path, [pairs[i] for i in share], texts, reward_model)
    return gather(dict(zip(share, rewards, strict=True)))


def find_logps(run: Run, model: Any, rows: list) -> list[torch.Tensor]:
    """Log-probabilities of the answers in rows (prompt, answer), (C,) each, in the same micro-batches as updates."""
    lengths, share = [len(prompt) + len(answer) for prompt, answer in rows], {}
    with inference(model):
        for indices in micro_batches(lengths, run.args.micro_batch_tokens):
            logps = token_logps(model, [rows[i] for i in indices])
            share |= dict(zip(indices, [logp.cpu() for logp in logps], strict=True))
    return gather(share)


def sample_groups(run: Run, policy: Any, reference: Any, reward_model: Any, pairs: list[Pair], seed: int) -> tuple:
    """Let the policy answer each prompt several times, and compare the answers' rewards in each group."""
    args, size = run.args, run.args.num_generations
    pairs = [pairs[i // size] for i in range(size * len(pairs))]  # group after group
    rows = respond(run, policy, [pair.prompt_ids for pair in pairs], seed)
    old_logps = find_logps(run, policy, rows)
    ref_logps = old_logps if reference is None else find_logps(run, reference, rows)
    rewards = torch.tensor(score_answers(run, reward_model, pairs, rows), dtype=torch.float64)
    scores = rewards.clone()
    if args.loss_type == "rloo":
        scores -= args.beta * torch.stack([(old - ref).sum() for old, ref in zip(old_logps, ref_logps, strict=True)])
    ended = torch.tensor([float(answer[-1] in run.stop_ids) for _, answer in rows])
    advantages = group_advantages(scores.view(-1, size), args.loss_type).flatten()
    rollouts = []
    for i, (prompt, answer) in enumerate(rows):
        weight = ended[i].item() if args.mask_truncated_completions else 1.0
        logps = {"old_logps": old_logps[i], "ref_logps": ref_logps[i]}
        rollouts.append(Rollout(prompt, answer, advantages[i].item(), weight, **logps))
    metrics = {
        "train/reward": rewards.mean().item(),
        "train/reward_std": rewards.view(-1, size).std(1).mean().item(),
        "train/equal_groups": (rewards.view(-1, size).amax(1) == rewards.view(-1, size).amin(1)).float().mean().item(),
        "train/entropy": -torch.cat(old_logps).mean().item(),  # per token, estimated from the samples
        "train/response_length": statistics.fmean([len(answer) for _, answer in rows]),
        "train/eos_rate": ended.mean().item(),
    }
    return rollouts, metrics


def loss_of_answers(run: Run, policy: Any, rollouts: list[Rollout], mean_length: float) -> tuple[torch.Tensor, dict]:
    """Loss and metrics of each answer, (B,): their means over a step are its loss, and means over its tokens."""
    args, lengths = run.args, [len(rollout.answer_ids) for rollout in rollouts]
    logps = torch.cat(token_logps(policy, [(rollout.prompt_ids, rollout.answer_ids) for rollout in rollouts]))
    old_logps = torch.cat([rollout.old_logps for rollout in rollouts]).to(DEVICE)
    ref_logps = torch.cat([rollout.ref_logps for rollout in rollouts]).to(DEVICE)
    advantages = torch.cat([torch.full_like(rollout.old_logps, rollout.advantage) for rollout in rollouts]).to(DEVICE)
    beta = 0.0 if args.loss_type == "rloo" else args.beta  # rloo has its KL in the reward
    tensors = {"logps": logps, "old_logps": old_logps, "ref_logps": ref_logps, "advantages": advantages}
    losses, metrics = compute_loss(**tensors, epsilon=args.epsilon, epsilon_high=args.epsilon_high, beta=beta)
    weights = torch.tensor([rollout.weight for rollout in rollouts], device=DEVICE)

    def sum_of_answers(tokens: torch.Tensor) -> torch.Tensor:
        return weights * torch.stack([part.sum() for part in tokens.split(lengths)])

    # What the sum over an answer's tokens is divided by: a number, or one for each answer.
    divisors = {"grpo": lengths, "dr_grpo": args.max_new_tokens, "rloo": 1.0, "dapo": mean_length}
    losses = sum_of_answers(losses) / torch.tensor(divisors[args.loss_type], device=DEVICE)
    return losses, {name: sum_of_answers(tokens) / mean_length for name, tokens in metrics.items()}


def measure(run: Run, policy: Any, test_pairs: list[Pair], step: int) -> dict[str, float]:
    """Judge's score, KL and so on of sampled responses. There is no loss on test prompts: evaluate gets zeros."""
    metrics = evaluate(run, policy, test_pairs, lambda pairs: (torch.zeros(len(pairs), device=DEVICE), {}), step)
    del metrics["eval/loss"]
    return metrics


# endregion
def main(args: Args) -> None:
    run = start_run(args)
    # region method: procedure
    args = run.args
    if args.reward_name_or_path is None:
        sys.exit("error: --reward-name-or-path is needed: a reward model, or a .py file with reward()")
    if args.num_generations < 2 or args.batch_size % args.num_generations:
        sys.exit("error: --batch-size must be a multiple of --num-generations, which is 2 or more")
    beta = {"grpo": 0.04, "dr_grpo": 0.0, "rloo": 0.03, "dapo": 0.0}[args.loss_type] if args.beta is None else args.beta
    high = (0.28 if args.loss_type == "dapo" else args.epsilon) if args.epsilon_high is None else args.epsilon_high
    scorer = args.judge_name_or_path or args.reward_name_or_path
    args = replace(args, beta=beta, epsilon_high=high, judge_name_or_path=scorer)
    run = replace(run, args=args)
    train_pairs, test_pairs = load_pairs(run)
    batches = plan_batches(replace(args, batch_size=args.batch_size // args.num_generations), len(train_pairs))
    policy = load_model(run, args.model_name_or_path, trainable=True)
    reference = load_model(run, args.model_name_or_path) if beta > 0 else None
    if args.reward_name_or_path.endswith(".py"):
        reward_model, reward_text = None, [Path(args.reward_name_or_path).read_text()]  # resuming checks it
    else:
        reward_model, reward_text = load_model(run, args.reward_name_or_path, AutoModelForSequenceClassification), []
    open_folder(run, train_pairs + test_pairs + reward_text + [len(batches)])  # devices may change the number of steps
    tqdm.write(f"{args.loss_type}: beta {beta}, clipped below 1 - {args.epsilon} and above 1 + {high}")

    models, last_step = {"policy": policy}, len(batches)
    optimizer, learning_rates, done = start_training(run, models, args.learning_rate, last_step)
    if done == 0:
        run.log(0, measure(run, policy, test_pairs, step=0))
    for step in tqdm(range(done + 1, last_step + 1), "training", total=last_step, initial=done, disable=RANK > 0):
        prompts = [train_pairs[i] for i in batches[step - 1]]
        rollouts, facts = sample_groups(run, policy, reference, reward_model, prompts, 1_000_003 * args.seed + step)
        mean_length = (
            statistics.fmean([rollout.weight * len(rollout.answer_ids) for rollout in rollouts]) or 1.0
        )  # if all are masked
        lengths = [len(rollout.prompt_ids) + len(rollout.answer_ids) for rollout in rollouts]
        for _ in range(args.num_iterations):  # each over all answers; the last one is logged
            parts = []
            for indices in micro_batches(lengths, args.micro_batch_tokens):
                losses, metrics = loss_of_answers(run, policy, [rollouts[i] for i in indices], mean_length)
                (losses.sum() * WORLD_SIZE / len(rollouts)).backward()  # mean of the step: FSDP divides by WORLD_SIZE
                parts.append({"loss": losses} | metrics)
            metrics = update(run, models, optimizer, learning_rates[step])
            metrics |= means_of("train", parts, len(rollouts))
        if step % args.eval_steps == 0 or step == last_step:
            metrics |= measure(run, policy, test_pairs, step)
        run.log(step, facts | metrics)
        if args.save_steps and (step % args.save_steps == 0 or step == last_step):
            save_checkpoint(run, models, optimizer, step)
    # endregion
    save_model(run, policy, run.folder / "model")
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's thread must not outlive the interpreter


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
