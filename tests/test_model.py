"""What a model says of answers, how it samples them, and how it is held in memory."""

import pytest
import torch
import transformers
from conftest import load_script, start

dpo = load_script("dpo")


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen3", "gemma2", "granite", "cohere", "gpt2"])
def test_token_logps_and_samples_are_those_of_single_rows(tiny_model, family):
    """Padding, the mask of logits and the cache change nothing: a row alone, without any of them, gives the same."""
    run = start("dpo", tiny_model(family), max_new_tokens=12)
    model = dpo.load_model(run, run.args.model_name_or_path)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prompt, answer in ((3, 4), (9, 1), (5, 12)):
        ids = torch.randint(2, 800, (prompt + answer,), generator=generator).tolist()
        rows.append((ids[:prompt], ids[prompt:]))
    with torch.no_grad():
        found = dpo.token_logps(model, rows).sum(-1)
        answers = dpo.generate(run, model, [prompt for prompt, _ in rows], seed=5, temperature=0.7)
        uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(5))
        for i, (prompt, answer) in enumerate(rows):
            logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = sum(logps[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer))
            assert found[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)
            sampled = []
            while len(sampled) < 12 and (not sampled or sampled[-1] not in run.stop_ids):
                cdf = (model(torch.tensor([prompt + sampled])).logits[0, -1] / 0.7).softmax(-1).cumsum(-1)
                sampled.append(torch.searchsorted(cdf, uniforms[i, len(sampled)] * cdf[-1], right=True).item())
            assert answers[i] == sampled


def test_pairs_pass_together_as_on_a_gpu_or_apart(tiny_model, data, monkeypatch):
    run = start("dpo", tiny_model(), dataset_name=str(data))
    model, pairs = dpo.load_model(run, run.args.model_name_or_path), dpo.load_pairs(run)[0][:5]
    apart = dpo.forward(model, pairs)
    monkeypatch.setattr(dpo, "CUDA", True)
    for together, value in zip(dpo.forward(model, pairs), apart, strict=True):
        torch.testing.assert_close(together, value, rtol=1e-5, atol=1e-4)
    for i, pair in enumerate(pairs):
        for name, logps in (("chosen_ids", apart.chosen_logps), ("rejected_ids", apart.rejected_logps)):
            expected = dpo.token_logps(model, [(pair.prompt_ids, getattr(pair, name))]).sum()
            torch.testing.assert_close(logps[i], expected, rtol=1e-5, atol=1e-4)


def test_dropout_is_off(tiny_model):
    run = start("dpo", tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    model = dpo.load_model(run, run.args.model_name_or_path, trainable=True).train()
    rows = [([5, 6, 7], [8, 9])]
    assert torch.equal(dpo.token_logps(model, rows), dpo.token_logps(model, rows))


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

    dpo.token_logps(model, rows).sum().backward()
    with torch.no_grad():
        dpo.token_logps(model, rows)
    assert_sharded()
    with dpo.inference(model):
        dpo.token_logps(model, rows)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert_sharded()
