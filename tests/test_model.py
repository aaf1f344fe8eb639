"""What a model says of answers, how it samples them, and how it is held in memory."""

import shutil
import weakref

import pytest
import torch
import transformers
from conftest import load_plain, load_script, naive_greedy, naive_logps, start

dpo = load_script("dpo")


def draw_rows(*lengths):
    """Rows (prompt, answer) of random tokens."""
    generator, rows = torch.Generator().manual_seed(1), []
    for prompt, answer in lengths:
        ids = torch.randint(2, 800, (prompt + answer,), generator=generator).tolist()
        rows.append((ids[:prompt], ids[prompt:]))
    return rows


def assert_naive(path, model, rows, atol):
    """Log-probabilities and their gradient are those of each row by itself; returns the plain model."""
    found, naive = dpo.token_logps(model, rows), load_plain(path)
    expected = [naive_logps(naive, *row) for row in rows]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-4, atol=atol)
    for logps in (found, expected):
        torch.cat(logps).sum().backward()
    for weight, other in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=atol)
    return naive


# How each family is run: packed rows, or one row after another with the model's own attention and head.
ATTENTION = dict.fromkeys(["llama", "llama-untied", "qwen3", "mistral", "mixtral", "gemma3", "gpt-neox"], "packed")
ATTENTION |= {"gpt2": "packed", "gemma2": "eager", "granite": "sdpa", "cohere": "sdpa"}


@pytest.mark.parametrize("family", ATTENTION)
def test_families(tiny_model, family):
    """Log-probabilities and their gradient are those of each row by itself, and sampling at temperature 0 is greedy."""
    path, rows = tiny_model(family), draw_rows((3, 4), (9, 1), (5, 12))
    run = start("dpo", path, max_new_tokens=6)
    model = dpo.load_model(run, path, trainable=True)
    assert model.config._attn_implementation == ATTENTION[family]
    naive = assert_naive(path, model, rows, atol=1e-3)
    with dpo.inference(model):
        answers = dpo.generate(run, model, [prompt for prompt, _ in rows], seed=5, temperature=1e-6)
    assert answers == [naive_greedy(naive, prompt, 6) for prompt, _ in rows]


def test_long_answers_pass_the_head_in_chunks(tiny_model):
    """2,500 tokens: values and gradients are those of one pass, and the head gets at most 2,048 at a time."""
    path = tiny_model(max_position_embeddings=4096)
    run, rows = start("dpo", path), draw_rows((3, 2500))
    model = dpo.load_model(run, path, trainable=True)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    assert_naive(path, model, rows, atol=1e-2)
    assert max(sizes) == 2048 and sum(sizes) >= 2500


def test_samples_have_the_frequencies_of_the_model(tiny_model, tmp_path):
    """The settings of a generation_config.json are ignored; its end-of-sequence tokens are not."""
    folder, model = shutil.copytree(tiny_model(), tmp_path / "model"), load_plain(tiny_model())
    greedy = naive_greedy(model, [8, 9], 9)
    assert len(set(greedy)) < 9  # so that a penalty for repetitions would be seen
    settings = {"do_sample": True, "top_k": 1, "top_p": 0.1, "repetition_penalty": 9.0, "suppress_tokens": greedy[:1]}
    transformers.GenerationConfig(**settings, eos_token_id=[0, greedy[-1]]).save_pretrained(folder)
    run = start("dpo", folder, max_new_tokens=12)
    loaded = dpo.load_model(run, folder)
    assert dpo.generate(run, loaded, [[8, 9]], seed=1, temperature=1e-6) == [greedy]
    run = start("dpo", folder, max_new_tokens=1)
    answers = dpo.generate(run, loaded, [[5, 6, 7]] * 4000, seed=3, temperature=0.7)
    probs = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor(answers)[:, 0], minlength=len(probs))
    for token in probs.topk(5).indices:
        expected = 4000 * probs[token].item()
        assert abs(counts[token].item() - expected) < 5 * expected**0.5


def test_batch_of_pairs(tiny_model, data):
    run = start("dpo", tiny_model(), dataset_name=str(data))
    model, naive, pairs = dpo.load_model(run, tiny_model()), load_plain(tiny_model()), dpo.load_pairs(run)[0][:5]
    pairs = [dpo.replace(pair, ref_logps=(-float(i), -2.0 * i)) for i, pair in enumerate(pairs)]
    batch = dpo.forward(model, pairs)
    for i, pair in enumerate(pairs):
        for side, answer in enumerate((pair.chosen_ids, pair.rejected_ids)):
            expected = naive_logps(naive, pair.prompt_ids, answer).sum()
            torch.testing.assert_close(batch.logps[side, i], expected, rtol=1e-5, atol=1e-4)
            assert batch.ref_logps[side, i] == -(1.0 + side) * i and batch.lengths[side, i] == len(answer)


def test_dropout_is_off(tiny_model):
    run = start("dpo", tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), gradient_checkpointing=True)
    model = dpo.load_model(run, run.args.model_name_or_path, trainable=True)
    rows = [([5, 6, 7], [8, 9])]
    assert torch.equal(dpo.token_logps(model, rows)[0], dpo.token_logps(model, rows)[0])


def test_weights_missing_from_the_files(tiny_model):
    run = start("dpo", tiny_model())
    with pytest.raises(SystemExit, match="has no weights for score.weight"):
        dpo.load_model(run, run.args.model_name_or_path, transformers.AutoModelForSequenceClassification)


def test_lora_holds_its_base_once_in_the_dtype_of_the_computation(tiny_model):
    run = start("dpo", tiny_model(), lora_rank=2, dtype="bfloat16")
    model = dpo.load_model(run, run.args.model_name_or_path, trainable=True)
    dtypes = {(weight.requires_grad, weight.dtype) for weight in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert run.args.learning_rate == 5e-6


def test_root_is_sharded_again_after_a_pass_without_gradients(tiny_model):
    """Else a checkpoint after an evaluation would hold the root's gathered copy, and the next update be lost."""
    run = start("dpo", tiny_model(), dtype="bfloat16")
    model = dpo.load_model(run, run.args.model_name_or_path, trainable=True)
    rows = [([5, 6, 7], [8, 9])]

    def assert_sharded():
        for weight in model.parameters():
            assert weight.dtype == torch.float32 and type(weight.data).__name__ == "DTensor"
            assert weight.grad is not None

    dpo.token_logps(model, rows)[0].sum().backward()
    with torch.no_grad():
        dpo.token_logps(model, rows)
    assert_sharded()
    with dpo.inference(model):
        dpo.token_logps(model, rows)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert_sharded()


def varlen_by_mask(query, key, value, ends, _, longest, __, window_size, scale, enable_gqa):
    """What varlen_attn computes on a GPU, with a mask over all tokens."""
    place = torch.arange(len(query))
    row, distance = torch.bucketize(place, ends, right=True), place[:, None] - place
    mask = (row[:, None] == row) & (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
    states = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*states, mask, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles for a CPU")
@torch._inductor.config.patch({"cpp.simdlen": 1})  # without vectors, so alike on all processors
@pytest.mark.parametrize("family, flags", [("qwen3", {"gradient_checkpointing": True}), ("gemma3", {"lora_rank": 2})])
def test_layers_compiled_as_on_a_gpu(tiny_model, monkeypatch, family, flags):
    """Gradients change no bit of a pass, other lengths recompile nothing, and a model no longer in use is freed."""
    path, judge = tiny_model(family), tiny_model(family, "SequenceClassification", num_labels=1)
    run, layer = start("dpo", path, dtype="bfloat16", **flags), type(load_plain(path).model.layers[0])
    # Restored after the test; but what FSDP makes of such a class stays, so no other test trains one in bfloat16.
    monkeypatch.setattr(layer, "forward", layer.forward)
    monkeypatch.setattr(dpo, "CUDA", True)
    monkeypatch.setattr(dpo, "varlen_attn", varlen_by_mask)
    model, pair = dpo.load_model(run, path, trainable=True), dpo.Pair(0, "Hello", {}, [], [], [], 1.0)
    with pytest.raises(RuntimeError, match="Detected recompile"), torch.compiler.set_stance("fail_on_recompile"):
        dpo.token_logps(model, draw_rows((3, 4)))
    for stance, lengths in [("default", (3, 4, 9)), ("fail_on_recompile", (2, 7, 30))]:
        rows = draw_rows(lengths[:2], lengths[1:])
        with torch.compiler.set_stance(stance):
            logps = torch.cat(dpo.token_logps(model, rows))
            with torch.no_grad():
                frozen = dpo.load_model(run, path)
                for other in (model, frozen):
                    assert torch.equal(torch.cat(dpo.token_logps(other, rows)), logps)
                dpo.judge(run, judge, [pair] * 2, ["Good.", "That is good." * lengths[0]])
    layer = weakref.ref(frozen.model.layers[0])
    del frozen, other
    assert layer() is None
