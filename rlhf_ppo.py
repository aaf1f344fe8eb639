# region method: header
"""RLHF in three stages: supervised fine-tuning, reward model, PPO. Ouyang et al. 2022, https://arxiv.org/abs/2203.02155,
Stiennon et al. 2020, https://arxiv.org/abs/2009.01325; details after Huang et al. 2024, https://arxiv.org/abs/2403.17031

1. SFT on the chosen answers (--sft-epochs 0: none). Its result is PPO's starting point and frozen reference pi_ref.
2. A reward model r on the pairs, -log sigmoid(r(x, y_w) - r(x, y_l)): the SFT model with a scalar head, read at the
   end-of-sequence token. r is shifted so that SFT samples have mean 0. --reward-name-or-path replaces this stage by an
   existing reward model, or by a Python file (as for --judge-name-or-path), whose values are not shifted.
3. PPO. The policy answers prompts. A token's reward is -kl_coef * (log pi - log pi_ref), plus r at the last token, or
   --missing-eos-score if the answer does not end. Advantages are GAE's, from a value model that starts as a copy of r
   (if r is a Python file, of the SFT model, with a head of 0); then --ppo-epochs updates with ratio = pi / pi_old:
       policy: max(-A ratio, -A clip(ratio, 1 -+ clip))      value: max((V - R)^2, (clip(V, V_old -+ clip) - R)^2) / 2

As in Huang et al.: gamma 1, lambda 0.95, no entropy bonus, separate policy and value models, AdamW with eps 1e-5 and
learning rate 3e-6 in all stages (here ten times that with LoRA). Where sources differ, this script
- has no pretraining loss (Ouyang et al.: PPO-ptx), draws pairs singly (they: all pairs of a prompt), drops long ones;
- shifts r and the values by the mean of r over SFT samples (Huang et al.: over the data's answers);
- has a fixed coefficient for the KL, which k1 estimates token by token (Ziegler et al. 2019: an adaptive one);
- puts r on the last token, with value 0 after it (Huang et al.: a position later), and replaces it in unended answers;
- whitens advantages over the whole step (Huang et al.: on each device), but not rewards (Ziegler et al.: they do);
- averages losses over the step's tokens (Huang et al.: over a micro-batch's tokens, then over micro-batches);
- lets answers end, and samples 128 a step at temperature 1 (Huang et al.: 512 of fixed length, cut later, at 0.7);
- warms up over 10 % and clips gradients (they do not); SFT decays linearly, on 64 answers (a cosine, 128 with prompts).
PPO holds four models: policy and value model with AdamW (16 bytes a weight), reference and reward model in the compute
dtype. Where train/score rises and eval/judge_score falls, PPO exploits the reward model. eval/loss is SFT's.

    python rlhf_ppo.py                           # the built-in test bed, a few minutes on two CPU cores
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
    # --- SFT, reward model, PPO ---
    sft_epochs: int = 1  # passes over the chosen answers in stage 1; 0 = no stage 1; --max-steps limits each stage
    sft_learning_rate: float | None = None  # None = 3e-6 (3e-5 with LoRA), 3e-4 on the test bed
    reward_name_or_path: str | None = None  # reward model with the policy's vocabulary and template, or .py file
    reward_epochs: int = 1  # passes over the pairs in stage 2
    reward_learning_rate: float | None = None  # None = 3e-6 (3e-5 with LoRA), 3e-4 on the test bed
    learning_rate: float | None = None  # of PPO; None = 3e-6 (3e-5 with LoRA), 3e-4 on the test bed
    rollouts_per_step: int = 128  # prompts to answer in each step of PPO; --num-train-epochs = passes over all prompts
    ppo_epochs: int = 4  # updates on the answers of each step
    kl_coef: float = 0.05  # cost of a nat of KL divergence to the reference, in units of reward
    missing_eos_score: float = -1.0  # score of an answer that does not end; a reward model's scores start at mean 0
    gamma: float = 1.0  # discount factor
    gae_lambda: float = 0.95  # of generalised advantage estimation
    clip_range: float = 0.2  # of the policy's ratio
    value_clip_range: float = 0.2  # of the values, around those of the rollout
    value_coef: float = 0.1  # weight of the value loss
    # In place of None: for a real model, with LoRA, on the test bed.
    DEFAULTS = dict.fromkeys(["sft_learning_rate", "reward_learning_rate", "learning_rate"], (3e-6, 3e-5, 3e-4))
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
def compute_reward_loss(chosen: torch.Tensor, rejected: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Bradley-Terry loss and metrics of each pair, (B,), from the rewards of its answers; p is preference_prob."""
    margins = chosen - rejected
    losses = -p * F.logsigmoid(margins) - (1 - p) * F.logsigmoid(-margins)
    return losses, {"rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}


def estimate_advantages(rewards: torch.Tensor, values: torch.Tensor, gamma: float, gae_lambda: float) -> tuple:
    """Generalised advantage estimates and returns, (N, C). Rewards and values are 0 after an answer's end."""
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_values = F.pad(values[:, 1:], (0, 1))  # nothing comes after the last token
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values[:, t] - values[:, t]
        following = advantages[:, t] = delta + gamma * gae_lambda * following
    return advantages, advantages + values


def compute_loss(
    logps: torch.Tensor,
    values: torch.Tensor,
    old_logps: torch.Tensor,
    old_values: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    clip_range: float,
    value_clip_range: float,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's policy loss, value loss and metrics of each token of some answers; all tensors have the same shape."""
    ratio = torch.exp(logps - old_logps)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy_losses = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)  # Eq. 7 of arXiv:1707.06347
    clipped_values = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    value_losses = 0.5 * torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)
    metrics = {
        "policy_loss": policy_losses,
        "value_loss": value_losses,
        "clip_fraction": (ratio != clipped_ratio).float(),
        "approx_kl": 0.5 * (logps - old_logps) ** 2,
        "ratio_error": (ratio - 1).abs(),  # exactly 0 in the first pass over the answers; the last pass is logged
    }
    return policy_losses, value_losses, metrics


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
    pairs, count = [], 0
    for row in rows:
        where = f"row {count} of split {split}"
        prompt, chosen, rejected = split_row(row, where)
        prob = 1.0 if row.get("preference_prob") is None else row["preference_prob"]
        if not isinstance(prob, int | float) or not 0 <= prob <= 1:
            sys.exit(f"error: {where}: preference_prob is {prob!r}, not a number from 0 to 1")
        texts = render(run.tokenizer, prompt, chosen, rejected)
        prompt_ids, *answers = run.tokenizer(texts, add_special_tokens=False).input_ids  # [1:] drops render's EOS
        chosen_ids, rejected_ids = [cut_answer(ids[1:] + run.stop_ids[:1], run.stop_ids) for ids in answers]
        columns = {name: value for name, value in row.items() if name not in ("prompt", "chosen", "rejected")}
        longest = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        if longest <= run.args.max_length and chosen_ids != rejected_ids:
            pairs.append(Pair(count, prompt, columns, prompt_ids, chosen_ids, rejected_ids, prob))
        count += 1
    tqdm.write(f"{split}: {len(pairs)} of {count} rows; {count - len(pairs)} dropped: too long, or chosen = rejected")
    return pairs


def split_row(row: dict, where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a row, all as strings or all as lists of chat messages."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        shared = 0  # two conversations: what they have in common is the prompt
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    parts = (prompt, chosen, rejected)
    lasts = [part[-1] if part and isinstance(part, list) else {"content": part} for part in parts]
    said = [last.get("content") or last.get("tool_calls") for last in lasts]  # a message may call tools instead
    if {type(part) for part in parts} not in ({str}, {list}) or not all(said):
        sys.exit(f"error: {where} needs full prompt, chosen, rejected, text or chat; has {[k for k in row if row[k]]}")
    return parts


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
import gc  # noqa: E402 - the shared imports above do not need it


def train_on_pairs(
    run: Run, models: dict, loss_of: Callable, measure: Callable, all_pairs: list, batches: list, lr: float, start: int
) -> None:
    """Stages 1 and 2: train a model on pairs, in steps that are numbered from start + 1."""
    args, last_step = run.args, start + len(batches)
    optimizer, learning_rates, done = start_training(run, models, lr, len(batches), start, eps=1e-5)
    if done == 0:
        run.log(0, measure(step=0))
    for step in tqdm(range(done + 1, last_step + 1), "training", total=last_step, initial=done, disable=RANK > 0):
        pairs, parts = [all_pairs[i] for i in batches[step - start - 1]], []  # the step's; below, this device's share
        for indices in micro_batches([len(pair) for pair in pairs], args.micro_batch_tokens):
            losses, metrics = loss_of([pairs[i] for i in indices], pairs)
            (losses.sum() * WORLD_SIZE / len(pairs)).backward()  # mean of the step: FSDP divides by WORLD_SIZE
            parts.append({"loss": losses} | metrics)
        metrics = update(run, models, optimizer, learning_rates[step])
        metrics |= means_of("train", parts, len(pairs))
        if step % args.eval_steps == 0 or step == last_step:
            metrics |= measure(step=step)
        run.log(step, metrics)
        if args.save_steps and (step % args.save_steps == 0 or step == last_step):
            save_checkpoint(run, models, optimizer, step)


def save_stage(run: Run, model: Any, kind: Any, base_path: str, tokenizer: Any, name: str) -> str:
    """Write a stage's model for later stages, whole (LoRA merged); returns its folder."""
    folder = run.folder / name
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed here
    save_model(run, model, folder)
    if RANK == 0:
        tokenizer.save_pretrained(folder)
        if run.args.lora_rank > 0:
            base = kind.from_pretrained(base_path, dtype="auto")
            peft.PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(folder)
            for file in folder.glob("adapter_*"):
                file.unlink()
    dist.barrier()
    return str(folder)


# --- Stage 1: SFT ---


def sft_loss_of(policy: Any, pairs: list[Pair], step_pairs: list[Pair]) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of each chosen answer, (B,), scaled: its mean over a step's answers is that over their tokens."""
    logps = token_logps(policy, [(pair.prompt_ids, pair.chosen_ids) for pair in pairs])
    mean_length = statistics.fmean([len(pair.chosen_ids) for pair in step_pairs])
    return -torch.stack([logps_of_answer.sum() for logps_of_answer in logps]) / mean_length, {}


def train_sft(run: Run, pairs: list[Pair], test_pairs: list[Pair]) -> tuple[str, int]:
    """Make the chosen answers likely; returns the result's folder and the last step."""
    args, path = run.args, run.args.model_name_or_path
    batches = plan_batches(replace(args, num_train_epochs=args.sft_epochs), len(pairs))
    if run.saved_step > len(batches):  # a later checkpoint: this stage was saved before it
        return str(run.folder / "sft"), len(batches)
    tqdm.write(f"stage 1: SFT, {len(batches)} steps")
    policy = load_model(run, path, trainable=True)
    loss_of = partial(sft_loss_of, policy)
    measure = partial(evaluate, run, policy, test_pairs, partial(sft_loss_of, policy, step_pairs=test_pairs))
    train_on_pairs(run, {"policy": policy}, loss_of, measure, pairs, batches, args.sft_learning_rate, start=0)
    return save_stage(run, policy, AutoModelForCausalLM, path, run.tokenizer, "sft"), len(batches)


# --- Stage 2: reward model ---


def add_head(run: Run, path: str) -> str:
    """Write the language model at a path with a new scalar head, as Huang et al. initialise it; returns the folder."""
    folder = run.folder / "reward_model_init"
    if RANK == 0:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype="auto")
        torch.manual_seed(run.args.seed)
        model.score.weight.data.normal_(std=1 / math.sqrt(model.score.in_features + 1))
        # Transformers reads the score at the last token that is not padding, so no answer may end with padding.
        model.config.pad_token_id = min(set(range(10)) - set(run.stop_ids))
        model.save_pretrained(folder)
    dist.barrier()
    return str(folder)


def judge_tokenizer(run: Run, prompt: str | list[dict]) -> Any:
    """The reward model's tokenizer: its chat template writes what the model was trained on, up to the stop token."""
    tokenizer, answer = AutoTokenizer.from_pretrained(run.args.model_name_or_path), ""
    if isinstance(prompt, str):
        template = render(tokenizer, "")[0] + "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    else:
        template = tokenizer.chat_template
        answer = render(tokenizer, prompt, [{"role": "assistant", "content": "."}])[1]
    ids = tokenizer(answer, add_special_tokens=False).input_ids[1:]
    stop = tokenizer.convert_ids_to_tokens(cut_answer(ids + run.stop_ids[:1], run.stop_ids)[-1])  # as in encode_rows
    text = f"text.rsplit('{stop}', 1)[0]" if set(ids) & set(run.stop_ids) else "text"  # it may write more after it
    tokenizer.chat_template = "{% set text %}" + template + "{% endset %}{{ " + text + f" + '{stop}' }}}}"
    return tokenizer


def load_scorer(run: Run, path: str, trainable: bool = False) -> Any:
    """A model with a scalar head, for packed rows; they must get the same scores as in its own forward."""
    gc.collect()  # models of earlier stages, which FSDP's hooks keep alive
    model = load_model(run, path, AutoModelForSequenceClassification, trainable)
    rows, alone = [([5, 6, 7], [8, 9]), ([10, 11], [12, 13, 14])], []
    with inference(model), torch.compiler.set_stance("force_eager"):
        for prompt, answer in rows:
            alone.append(model(input_ids=torch.tensor([prompt + answer], device=DEVICE)).logits[0].float())
        model.set_attn_implementation("packed")
        error = (rewards_of(model, rows) - torch.cat(alone)).abs().max()
    if not error < (1e-3 if run.args.dtype == "float32" else 0.05 * torch.cat(alone).abs().max().clamp(min=4)):
        sys.exit(f"error: rows of {path} cannot be packed, as a reward or value model's must be")
    return model


def token_scores(model: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
    """A scalar head's outputs before each of the answer's C tokens, for each row (prompt, answer), (C,) in float32."""
    return read_answers(model, rows, lambda states, tokens: model.score(states).squeeze(-1).float())


def rewards_of(model: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The scores at the last tokens of N rows (prompt, answer), (N,): those before one more token."""
    return torch.cat(token_scores(model, [(prompt + answer, [0]) for prompt, answer in rows]))


def reward_loss_of(model: Any, pairs: list[Pair], step_pairs: list[Pair]) -> tuple[torch.Tensor, dict]:
    """Loss and metrics of each pair, (B,); the step's pairs are not needed here."""
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rows += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    chosen, rejected = rewards_of(model, rows).chunk(2)
    return compute_reward_loss(chosen, rejected, torch.tensor([p.preference_prob for p in pairs], device=DEVICE))


def measure_reward_model(run: Run, model: Any, test_pairs: list[Pair], step: int) -> dict[str, float]:
    """Loss and accuracy on the test pairs."""
    parts = []
    with inference(model):
        for indices in micro_batches([len(pair) for pair in test_pairs], run.args.micro_batch_tokens):
            losses, metrics = reward_loss_of(model, [test_pairs[i] for i in indices], test_pairs)
            parts.append({"loss": losses} | metrics)
    return means_of("eval/reward_model", parts, len(test_pairs))


def train_reward_model(run: Run, path: str, pairs: list[Pair], test_pairs: list[Pair], start: int) -> tuple[str, int]:
    """A reward model that starts from a language model; returns its folder and the last step."""
    args = run.args
    batches = plan_batches(replace(args, num_train_epochs=args.reward_epochs), len(pairs))
    if run.saved_step > start + len(batches):
        return str(run.folder / "reward_model"), start + len(batches)
    tqdm.write(f"stage 2: reward model, {len(batches)} steps")
    path = add_head(run, path)
    model = load_scorer(run, path, trainable=True)
    loss_of, measure = partial(reward_loss_of, model), partial(measure_reward_model, run, model, test_pairs)
    train_on_pairs(run, {"reward_model": model}, loss_of, measure, pairs, batches, args.reward_learning_rate, start)
    kind, tokenizer = AutoModelForSequenceClassification, judge_tokenizer(run, pairs[0].prompt)
    return save_stage(run, model, kind, path, tokenizer, "reward_model"), start + len(batches)


# --- Stage 3: PPO ---


class Rollout(NamedTuple):
    """An answer of the policy. The tensors hold a value for each of its C tokens, (C,), on the CPU."""

    prompt_ids: list[int]
    answer_ids: list[int]
    logps: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


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


def groups_of(run: Run, rows: list) -> list[list[int]]:
    """Indices of this process's rows or rollouts in micro-batches, for the policy and the value model together."""
    return micro_batches([2 * (len(row[0]) + len(row[1])) for row in rows], run.args.micro_batch_tokens)


def find_rewards(run: Run, reward_model: Any, pairs: list[Pair], rows: list) -> list[float]:
    """Rewards of rows (prompt, answer), one for each pair, by the reward model or, if it is None, a Python file."""
    if reward_model is None:
        own = range(RANK, len(rows), WORLD_SIZE)
        texts = run.tokenizer.batch_decode([rows[i][1] for i in own], skip_special_tokens=True)
        rewards = judge(run, run.args.reward_name_or_path, [pairs[i] for i in own], texts)
        return gather(dict(zip(own, rewards, strict=True)))
    share = {}
    with inference(reward_model):
        for indices in groups_of(run, rows):
            share |= dict(zip(indices, rewards_of(reward_model, [rows[i] for i in indices]).tolist(), strict=True))
    return gather(share)


def find_shift(run: Run, reward_model: Any, reference: Any, pairs: list[Pair]) -> float:
    """Mean reward of the SFT model's own answers to the pairs' prompts; only answers that end count, if any do."""
    rows = respond(run, reference, [pair.prompt_ids for pair in pairs], run.args.seed)
    ended = [row for row in rows if row[1][-1] in run.stop_ids]
    return statistics.fmean(find_rewards(run, reward_model, pairs, ended if len(ended) >= WORLD_SIZE else rows))


def roll_out(run: Run, models: dict, shift: float, pairs: list[Pair], seed: int) -> tuple[list[Rollout], dict]:
    """Let the policy answer the prompts, and estimate the advantage of each token."""
    args, share = run.args, {}
    rows = respond(run, models["policy"], [pair.prompt_ids for pair in pairs], seed)
    with inference(models["policy"]), inference(models["value_model"]):
        # The same micro-batches as in the updates: so rounding is the same, and the first ratios are exactly 1.
        for indices in groups_of(run, rows):
            some = [rows[i] for i in indices]
            logps, ref_logps = token_logps(models["policy"], some), token_logps(models["reference"], some)
            values = token_scores(models["value_model"], some)
            for k, i in enumerate(indices):
                share[i] = (logps[k].cpu(), ref_logps[k].cpu(), values[k].cpu() - shift)
    logps, ref_logps, values = zip(*gather(share), strict=True)
    rewards = find_rewards(run, models["reward_model"], pairs, rows)
    ended = [response[-1] in run.stop_ids for _, response in rows]
    scores = [reward - shift if end else args.missing_eos_score for reward, end in zip(rewards, ended, strict=True)]
    kls = [logp - ref_logp for logp, ref_logp in zip(logps, ref_logps, strict=True)]  # k1, token by token
    token_rewards = [-args.kl_coef * kl for kl in kls]
    for reward, score in zip(token_rewards, scores, strict=True):
        reward[-1] += score  # on the last token, usually the stop token
    tables = [torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in (token_rewards, values)]  # (N, C)
    advantages, returns = estimate_advantages(*tables, args.gamma, args.gae_lambda)
    flat = torch.cat([line[: len(value)] for line, value in zip(advantages, values, strict=True)])
    advantages = (advantages - flat.mean()) * torch.rsqrt(flat.var(correction=0) + 1e-8)  # whitened over the step
    rollouts = []
    for i, (prompt, response) in enumerate(rows):
        end = len(response)
        rollouts.append(Rollout(prompt, response, logps[i], values[i], advantages[i, :end], returns[i, :end]))
    metrics = {
        "train/kl": statistics.fmean([kl.sum().item() for kl in kls]),
        "train/entropy": -torch.cat(logps).mean().item(),  # per token, estimated from the samples
        "train/score": statistics.fmean(scores),
        "train/value": torch.cat(values).mean().item(),
        "train/eos_rate": statistics.fmean(ended),
        "train/response_length": statistics.fmean([len(response) for _, response in rows]),
    }
    return rollouts, metrics


def ppo_loss_of(run: Run, models: dict, shift: float, rollouts: list[Rollout], mean_length: float) -> tuple:
    """Loss and metrics of each answer, (B,), scaled: their mean over a step's answers is that over their tokens."""
    args, rows = run.args, [(rollout.prompt_ids, rollout.answer_ids) for rollout in rollouts]
    logps = torch.cat(token_logps(models["policy"], rows))
    values = torch.cat(token_scores(models["value_model"], rows)) - shift
    old_logps = torch.cat([rollout.logps for rollout in rollouts]).to(DEVICE)
    old_values = torch.cat([rollout.values for rollout in rollouts]).to(DEVICE)
    advantages = torch.cat([rollout.advantages for rollout in rollouts]).to(DEVICE)
    returns = torch.cat([rollout.returns for rollout in rollouts]).to(DEVICE)
    policy_losses, value_losses, metrics = compute_loss(
        logps, values, old_logps, old_values, advantages, returns, args.clip_range, args.value_clip_range
    )
    lengths = [len(answer) for _, answer in rows]

    def of_answers(tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.sum() for part in tokens.split(lengths)]) / mean_length

    losses = of_answers(policy_losses + args.value_coef * value_losses)
    return losses, {name: of_answers(tokens) for name, tokens in metrics.items()}


def train_ppo(run: Run, sft_path: str, reward_path: str, pairs: list[Pair], test_pairs: list[Pair], start: int) -> Any:
    """The policy after PPO on the pairs' prompts."""
    args, reward_model, shift = run.args, None, 0.0
    batches = plan_batches(replace(args, batch_size=args.rollouts_per_step), len(pairs))
    last_step = start + len(batches)
    tqdm.write(f"stage 3: PPO, {len(batches)} steps")
    reference = load_model(run, sft_path)
    if reward_path.endswith(".py"):
        value_model = load_scorer(run, add_head(run, sft_path), trainable=True)
        for head in [weight for name, weight in value_model.named_parameters() if "score" in name]:
            head.data.zero_()  # at first, advantages come from the rewards only
    else:
        value_model, reward_model = load_scorer(run, reward_path, trainable=True), load_scorer(run, reward_path)
        shift = find_shift(run, reward_model, reference, pairs[:256])
    policy = load_model(run, sft_path, trainable=True)
    trained = {"policy": policy, "value_model": value_model}
    models = trained | {"reference": reference, "reward_model": reward_model}
    measure = partial(evaluate, run, policy, test_pairs, partial(sft_loss_of, policy, step_pairs=test_pairs))
    optimizer, learning_rates, done = start_training(run, trained, args.learning_rate, len(batches), start, eps=1e-5)
    for step in tqdm(range(done + 1, last_step + 1), "training", total=last_step, initial=done, disable=RANK > 0):
        batch = [pairs[i] for i in batches[step - start - 1]]
        rollouts, facts = roll_out(run, models, shift, batch, 1_000_003 * args.seed + step)
        for _ in range(args.ppo_epochs):
            parts = []
            for indices in groups_of(run, rollouts):
                some = [rollouts[i] for i in indices]
                losses, metrics = ppo_loss_of(run, models, shift, some, facts["train/response_length"])
                (losses.sum() * WORLD_SIZE / len(rollouts)).backward()  # mean of the step: FSDP divides by WORLD_SIZE
                parts.append({"loss": losses} | metrics)
            metrics = update(run, trained, optimizer, learning_rates[step])
            metrics |= means_of("train", parts, len(rollouts))
        metrics |= facts
        if step % args.eval_steps == 0 or step == last_step:
            metrics |= measure(step=step)
        run.log(step, metrics)
        if args.save_steps and (step % args.save_steps == 0 or step == last_step):
            save_checkpoint(run, trained, optimizer, step)
    return policy


# endregion
def main(args: Args) -> None:
    run = start_run(args)
    # region method: procedure
    args = run.args
    train_pairs, test_pairs = load_pairs(run)
    if args.rollouts_per_step < WORLD_SIZE:
        sys.exit(f"error: --rollouts-per-step {args.rollouts_per_step} is less than the number of devices")
    reward_path, reward_text = args.reward_name_or_path, []  # where it cannot be used, the run ends before stage 1
    if reward_path and reward_path.endswith(".py"):
        reward_text = [Path(reward_path).read_text()]  # resuming checks it
        judge(run, reward_path, train_pairs[:1], run.tokenizer.batch_decode([train_pairs[0].chosen_ids[:-1]]))
    elif reward_path:
        if AutoTokenizer.from_pretrained(reward_path).get_vocab() != run.tokenizer.get_vocab():
            sys.exit(f"error: the reward model {reward_path} does not have the policy's vocabulary")
        load_scorer(run, reward_path)
    sizes = (args.batch_size, args.rollouts_per_step)
    counts = [len(plan_batches(replace(args, batch_size=size), len(train_pairs))) for size in sizes]
    open_folder(run, train_pairs + test_pairs + reward_text + counts)  # devices may change the number of steps
    sft_path, step = train_sft(run, train_pairs, test_pairs)
    if reward_path is None:
        reward_path, step = train_reward_model(run, sft_path, train_pairs, test_pairs, step)
    policy = train_ppo(run, sft_path, reward_path, train_pairs, test_pairs, step)
    # endregion
    save_model(run, policy, run.folder / "model")
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's thread must not outlive the interpreter


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
