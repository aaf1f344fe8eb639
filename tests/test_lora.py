"""LoRA adapters and gradient checkpointing."""

import copy
import json

import peft
import pytest
import torch
import transformers
from conftest import SIBLINGS, SLOW_SIBLINGS, TOY, read_rows
from safetensors.torch import load_file
from test_distributed import LORA, assert_close
from test_durable import assert_same, copy_of, finish, killed_run, metrics_of, new_folder, whole_run

# Keeps the token ids of the last responses, and looks at the base weights at the end.
PATCH = """
generate = script.generate
def kept(*args, **options):
    completions = generate(*args, **options)
    pathlib.Path("completions.json").write_text(script.json.dumps(completions))
    return completions
script.generate = kept

def compare(run, policy, name):
    initial = script.load_model(run, run.args.model_name_or_path, run.dtype).state_dict()
    base = policy.get_base_model().state_dict()
    base = {key.replace("base_layer.", ""): value for key, value in base.items() if "lora_" not in key}
    assert base.keys() == initial.keys()
    assert all(base[key].equal(value) for key, value in initial.items())
    print("the base weights are as they were")
at(script, "save_model", 1, compare)
"""


def logps_of(model, prompt_ids, completion_ids):
    """Log-probability of a completion, by the shortest way."""
    ids = torch.tensor([prompt_ids + completion_ids])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :].sum().item()


def encode(tokenizer, prompt, completion=()):
    """Token ids of messages: of the prompt and of what follows."""
    head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    texts = [head]
    if completion:
        texts.append(tokenizer.apply_chat_template(prompt + completion, tokenize=False).removeprefix(head))
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@pytest.fixture(scope="module")
def base():
    return transformers.AutoModelForCausalLM.from_pretrained(TOY / "policy", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TOY / "policy")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_saved_adapter_gives_the_numbers_of_the_evaluation(name, base, tokenizer):
    folder = new_folder()
    ended = finish(name, folder, "--lora-rank", "8", "--save-steps", "1", patch=PATCH)
    assert "the base weights are as they were" in ended.stdout
    (checkpoint,) = folder.glob("checkpoint-*")
    assert all("lora_" in key for key in load_file(checkpoint / "tensors.safetensors") if key.startswith("policy."))

    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "model")
    assert model.peft_config["default"].r == 8
    merged = model.merge_and_unload()
    rows = read_rows(folder / "samples.jsonl")
    metrics = [row for row in metrics_of(folder) if "eval/kl" in row]
    rows = [row for row in rows if row["step"] == metrics[-1]["step"]]
    completions = json.loads((folder.parent / "completions.json").read_text())
    logratios = []
    for row, completion in zip(rows, completions, strict=True):
        (prompt,) = encode(tokenizer, row["prompt"])
        assert (row["length"], row["ended"]) == (len(completion), completion[-1] == tokenizer.eos_token_id)
        assert tokenizer.decode(completion, skip_special_tokens=True) == row["response"]
        logratios.append(logps_of(merged, prompt, completion) - logps_of(base, prompt, completion))
        assert row["logratio"] == pytest.approx(logratios[-1], abs=1e-4)
    assert max(map(abs, logratios)) > 1e-2
    assert metrics[-1]["eval/kl"] == pytest.approx(sum(logratios) / len(rows), abs=1e-4)
    assert metrics[0]["eval/kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_lost_reference_is_that_of_the_initial_model(name):
    folder = copy_of(killed_run(name, *LORA))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    finish(name, folder, "--resume", *LORA)
    assert_same(folder, whole_run(name, *LORA))


@pytest.mark.parametrize("flags", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", SLOW_SIBLINGS)
def test_gradient_checkpointing_changes_no_result(name, flags):
    assert_close(whole_run(name, *flags, "--gradient-checkpointing"), whole_run(name, *flags))
