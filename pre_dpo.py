# region method: header
"""Pre-DPO, Pan et al. 2025, https://arxiv.org/abs/2504.15843

DPO with a reference that has seen the data. Stage 1 trains a guide from the initial policy on the pairs, by DPO or by
SimPO. Stage 2 starts again from the initial policy, on the same pairs, and is DPO with the frozen guide as pi_ref:

    h    = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]
    loss = -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h)

For p = 1 a pair's gradient has the weight sigmoid(-beta h), logged as weight, which is 1/2 for all pairs at the start
of DPO. Here it starts above 1/2 where the guide's margin log pi(y_w|x) - log pi(y_l|x) exceeds the policy's, and below
1/2 for pairs that the guide did not learn because they are hard or mislabelled. --label-smoothing and the column
preference_prob lower p from 1, in both stages. Where sources differ, this script
- uses DPO's batches and schedule in both stages: 64 pairs, warm-up 10 %, linear decay (authors: 128, 6 %, a cosine);
- takes beta 0.1 and learning rate 6e-7 (ten times that with LoRA) from the authors' code (the paper's best: 0.05 to
  0.2, and 6e-7 to 1e-6), for a DPO guide beta 0.01 (0.005 to 0.05); for a SimPO guide beta 2.5 and gamma / beta 0.48
  from the paper (0.4 to 0.56, at learning rates of 8e-7 to 1e-6);
- drops pairs over --max-length.
If both stages are DPO and reach their optimum, betas b1 and b2 amount to one DPO with 1/beta = 1/b1 + 1/b2: try that
too. Stage 1 logs its own loss and rewards/*, stage 2 those relative to the guide: compare kl, judge_score and win_rate.

    python pre_dpo.py                            # the built-in test bed, about two minutes on two CPU cores
    python pre_dpo.py --model-name-or-path Qwen/Qwen2.5-0.5B-Instruct --dataset-name trl-lib/ultrafeedback_binarized
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
    # --- Pre-DPO ---
    beta: float = 0.1  # strength of the pull to the guide
    label_smoothing: float = 0.0  # assumed share of flipped labels, in both stages
    learning_rate: float | None = None  # None = 6e-7 as in the authors' code (6e-6 with LoRA), 3e-4 on the test bed
    guide: Literal["dpo", "simpo"] = "dpo"  # loss that trains the guide
    guide_learning_rate: float | None = None  # None = the default of learning_rate
    guide_beta: float | None = None  # of a DPO guide; None = 0.01, 0.1 on the test bed
    guide_simpo_beta: float = 2.5  # beta of a SimPO guide
    guide_simpo_gamma_beta_ratio: float = 0.48  # margin gamma of a SimPO guide, divided by its beta
    guide_model_name_or_path: str | None = None  # an existing guide with the policy's vocabulary, in place of stage 1
    DEFAULTS = dict.fromkeys(["learning_rate", "guide_learning_rate"], (6e-7, 6e-6, 3e-4))
    DEFAULTS |= {"guide_beta": (0.01, 0.01, 0.1)}  # no flag: what None means for a real model, LoRA, the test bed
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
class Batch(NamedTuple):  # a micro-batch of B pairs, in float32
    logps: torch.Tensor  # (2, B), log-probabilities of the chosen and of the rejected answers
    ref_logps: torch.Tensor  # (2, B), the reference's
    lengths: torch.Tensor  # (2, B), tokens of these answers, for losses that average over tokens
    preference_prob: torch.Tensor  # (B,), how likely the chosen answer is the better one


def compute_loss(batch: Batch, beta: float, label_smoothing: float) -> tuple[torch.Tensor, dict]:
    """Loss and metrics of each pair, (B,). A micro-batch is only part of a step: no pair may depend on another."""
    chosen_logratios, rejected_logratios = batch.logps - batch.ref_logps
    h = chosen_logratios - rejected_logratios
    p = batch.preference_prob * (1 - label_smoothing) + (1 - batch.preference_prob) * label_smoothing
    losses = -p * F.logsigmoid(beta * h) - (1 - p) * F.logsigmoid(-beta * h)  # p = 1: Eq. 7 of arXiv:2305.18290
    metrics = {
        "rewards/chosen": beta * chosen_logratios,
        "rewards/rejected": beta * rejected_logratios,
        "rewards/margins": beta * h,
        "rewards/accuracies": (h > 0).float(),
        "weight": torch.sigmoid(-beta * h),
    }
    return losses, metrics


def compute_simpo_loss(batch: Batch, beta: float, gamma: float, label_smoothing: float) -> tuple[torch.Tensor, dict]:
    """For a SimPO guide: rewards are mean log-probabilities, without a reference (Eq. 6 of arXiv:2405.14734)."""
    chosen_rewards, rejected_rewards = beta * batch.logps / batch.lengths
    margins = chosen_rewards - rejected_rewards
    p = batch.preference_prob * (1 - label_smoothing) + (1 - batch.preference_prob) * label_smoothing
    losses = -p * F.logsigmoid(margins - gamma) - (1 - p) * F.logsigmoid(-margins - gamma)
    return losses, {"rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}


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


def forward(model: Any, pairs: list[Pair]) -> Batch:
    """The log-probabilities of a micro-batch of pairs, with the other inputs of the loss."""
    as_tensor = partial(torch.tensor, dtype=torch.float32, device=DEVICE)
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rows += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    logps = torch.stack([logps.sum() for logps in token_logps(model, rows)])
    if not logps.isfinite().all():
        sys.exit(f"error: a log-probability in rows {[pair.row for pair in pairs]} is not finite; nothing was updated")
    return Batch(
        logps=logps.view(2, -1),
        ref_logps=as_tensor([pair.ref_logps for pair in pairs]).T,
        lengths=as_tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs]).T,
        preference_prob=as_tensor([pair.preference_prob for pair in pairs]),
    )


def add_reference(run: Run, reference: Any, pairs: list[Pair], batches: list[list[int]]) -> list[Pair]:
    """All pairs, those of this process's micro-batches with the reference's log-probabilities; the others keep 0."""
    complete = {}
    with inference(reference):
        # In the micro-batches of the training, so that both are rounded alike and margins start at exactly 0.
        for batch in tqdm(batches, "reference", leave=False, delay=2, disable=RANK > 0):
            for indices in micro_batches([len(pairs[i]) for i in batch], run.args.micro_batch_tokens):
                new = [batch[k] for k in indices if batch[k] not in complete]  # in a later epoch few, or none
                if new:
                    logps = forward(reference, [pairs[i] for i in new]).logps.T.tolist()
                    complete |= {i: replace(pairs[i], ref_logps=tuple(two)) for i, two in zip(new, logps, strict=True)}
    return [complete.get(i, pair) for i, pair in enumerate(pairs)]


def train_stage(
    run: Run, policy: Any, loss_of: Callable, train_pairs: list, test_pairs: list, batches: list, lr: float, start: int
) -> None:
    """Train a model with a loss, in steps that are numbered from start + 1."""
    args, models, last_step = run.args, {"policy": policy}, start + len(batches)
    optimizer, learning_rates, done = start_training(run, models, lr, len(batches), start)
    if done == 0:
        run.log(0, evaluate(run, policy, test_pairs, loss_of, step=0))
    for step in tqdm(range(done + 1, last_step + 1), "training", total=last_step, initial=done, disable=RANK > 0):
        pairs, parts = [train_pairs[i] for i in batches[step - start - 1]], []  # the step's; below, this device's share
        for indices in micro_batches([len(pair) for pair in pairs], args.micro_batch_tokens):
            losses, metrics = loss_of([pairs[i] for i in indices])
            (losses.sum() * WORLD_SIZE / len(pairs)).backward()  # mean of the step: FSDP divides by WORLD_SIZE
            parts.append({"loss": losses} | metrics)
        metrics = update(run, models, optimizer, learning_rates[step])
        metrics |= means_of("train", parts, len(pairs))
        if step % args.eval_steps == 0 or step == last_step:
            metrics |= evaluate(run, policy, test_pairs, loss_of, step)
        run.log(step, metrics)
        if args.save_steps and (step % args.save_steps == 0 or step == last_step):
            save_checkpoint(run, models, optimizer, step)


def train_guide(run: Run, pairs: list[Pair], test_pairs: list[Pair], batches: list[list[int]]) -> str:
    """Stage 1: the initial policy becomes the guide; returns its folder, where stage 2 finds it, resumed or not."""
    args, folder = run.args, run.folder / "guide"
    if run.saved_step > len(batches):  # a checkpoint of stage 2: the guide was saved before it
        return str(folder)
    tqdm.write(f"stage 1: a guide by {args.guide}, {len(batches)} steps")
    guide = load_model(run, args.model_name_or_path, trainable=True)
    if args.guide == "dpo":
        pairs = add_reference(run, guide, pairs, batches)
        test_pairs = add_reference(run, guide, test_pairs, [list(range(len(test_pairs)))])

    def loss_of(pairs: list[Pair]) -> tuple[torch.Tensor, dict]:
        if args.guide == "dpo":
            return compute_loss(forward(guide, pairs), args.guide_beta, args.label_smoothing)
        gamma = args.guide_simpo_beta * args.guide_simpo_gamma_beta_ratio
        return compute_simpo_loss(forward(guide, pairs), args.guide_simpo_beta, gamma, args.label_smoothing)

    train_stage(run, guide, loss_of, pairs, test_pairs, batches, args.guide_learning_rate, start=0)
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed here
    save_model(run, guide, folder)
    dist.barrier()
    return str(folder)


# endregion
def main(args: Args) -> None:
    run = start_run(args)
    # region method: procedure
    args = run.args
    train_pairs, test_pairs = load_pairs(run)
    batches = plan_batches(args, len(train_pairs))
    start, guide_path = len(batches), args.guide_model_name_or_path
    if guide_path and AutoTokenizer.from_pretrained(guide_path).get_vocab() != run.tokenizer.get_vocab():
        sys.exit(f"error: the guide {guide_path} does not have the policy's vocabulary")
    open_folder(run, train_pairs + test_pairs + [len(batches)])  # devices may change the number of steps
    if guide_path is None:
        guide_path = train_guide(run, train_pairs, test_pairs, batches)
        gc.collect()  # FSDP's hooks keep the trained model alive
    else:
        start = 0  # otherwise stage 1's steps are counted too
    tqdm.write(f"stage 2: DPO with the guide as the reference, from the initial policy, {len(batches)} steps")
    guide = load_model(run, guide_path)
    train_pairs = add_reference(run, guide, train_pairs, batches)
    test_pairs = add_reference(run, guide, test_pairs, [list(range(len(test_pairs)))])
    del guide  # the policy needs the memory
    policy = load_model(run, args.model_name_or_path, trainable=True)

    def loss_of(pairs: list[Pair]) -> tuple[torch.Tensor, dict]:
        return compute_loss(forward(policy, pairs), args.beta, args.label_smoothing)

    train_stage(run, policy, loss_of, train_pairs, test_pairs, batches, args.learning_rate, start)
    # endregion
    save_model(run, policy, run.folder / "model")
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's thread must not outlive the interpreter


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
