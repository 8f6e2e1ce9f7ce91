"""LoRA against peft, and what training leaves of the base; adapters side by side, and plain weights out of them."""
import shutil

import peft
import pytest
import torch
import transformers
from conftest import FAMILIES, assert_same_logits, colour_records, logits, theirs, tiny, with_lora
from safetensors.torch import load_file
from test_train import plain_loop

import sample
import train
from model import GPT, LoraLinear
from nanosft.console import UserError
from nanosft.files import read_json
from nanosft.optimizer import AdamW
from nanosft.report import read_rows
from nanosft.shards import Shards, load_meta
from nanosft.weights import file_name
from sample import SampleConfig
from train import TrainConfig, learning_rate_at


@pytest.fixture
def base(request, tmp_path):
    """The directory of a model in bfloat16: a GPT-2, or the family that the test is marked with."""
    model = FAMILIES[getattr(request, "param", "gpt2")](block_size=128)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


both = pytest.mark.parametrize("base", FAMILIES, indirect=True)


@pytest.fixture
def fit(prepare, base, tmp_path):
    data = prepare(colour_records(60))

    def run(out="out", **flags):
        settings = dict(data_dir=str(data), out_dir=str(tmp_path / out))
        if not flags.get("resume"):
            settings |= dict(init_from=str(base), device="cpu", dtype="float32", compile="off", max_steps=6,
                             batch_size=4, lora_rank=4, learning_rate=1e-2, eval_interval=3)
        return train.main(TrainConfig(**{**settings, **flags}))
    run.shards = Shards(data, load_meta(data), "train")
    return run


# ---- the layer ------------------------------------------------------------------------------------------------------

@both
def test_live_merged_and_reloaded_agree(base, tmp_path):
    model = with_lora(GPT.from_pretrained(base))
    live = logits(model)
    assert (live - logits(base)).abs().max() > 0.1
    model.save_adapter(tmp_path / "adapter", str(base))
    assert torch.equal(logits(tmp_path / "adapter"), live)
    assert torch.allclose(logits(model.merge_lora()), live, atol=1e-5 * live.std())
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "merged")
    for merged in (GPT.from_pretrained(tmp_path / "merged"), theirs(tmp_path / "merged").float()):
        assert torch.allclose(logits(merged), live, atol=1e-5 * live.std())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_update_has_a_gradient_and_the_base_has_neither_gradient_nor_optimizer_state(dtype, fit, base):
    model = GPT.from_pretrained(base).add_lora(4, 8.0, 0.0, [])
    before = {name: parameter.detach().to(dtype, copy=True) for name, parameter in model.named_parameters()}
    optimizer = AdamW(model, dtype)
    loss = train.accumulate(model, optimizer, [fit.shards.batch([i]) for i in range(4)], 10)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(gradient.norm() > 0 for name, gradient in gradients.items() if "lora_B" in name)  # A's is 0 while B is
    optimizer.step(1e-2, loss, 1.0)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(gradients) == {name for name in before if "lora" in name} and len(changed) == 2 * 2 * (
        4 if model.config.fused_qkv else 7)
    assert all(set(optimizer.state_dict()[kind]) == changed for kind in ("masters", "means", "squares"))


# ---- training -------------------------------------------------------------------------------------------------------

@both
def test_twenty_steps_equal_a_peft_loop(fit, base, tmp_path, monkeypatch):
    others = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    others = peft.get_peft_model(others, peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear",
                                                         task_type="CAUSAL_LM"))
    others.save_pretrained(tmp_path / "start")
    start, add_lora = load_file(tmp_path / "start" / "adapter_model.safetensors"), GPT.add_lora

    def add_the_same(self, *args):
        add_lora(self, *args)
        for name, module in self.named_modules():
            if isinstance(module, LoraLinear):
                module.lora_A.data = start[f"base_model.model.{file_name(self.config, name)}.lora_A.weight"].clone()
        return self

    monkeypatch.setattr(GPT, "add_lora", add_the_same)
    fit(dtype="float64", max_steps=20, lora_alpha=6.0, batch_size=8, grad_clip=0.1, warmup_steps=3, seed=5, epochs=10,
        eval_interval=0)
    losses = plain_loop(others.double().train(), fit.shards, 20, 8, 5,
                        lambda step: learning_rate_at(step, 20, 1e-2, 0, "cosine", 3), 0.1, 0.1)
    ours = [float(row["train_loss"]) for row in read_rows(tmp_path / "out" / "log.csv")]
    assert ours == pytest.approx(losses, rel=2e-7)
    masters = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["tensors"]["masters"]
    expected = {name.removeprefix("base_model.model.").replace(".default.weight", ""): p
                for name, p in others.named_parameters() if p.requires_grad}
    names = {name: file_name(GPT.from_pretrained(base).config, name) for name in masters}
    assert set(names.values()) == expected.keys()
    assert max((masters[name] - expected[names[name]]).abs().max().item() for name in masters) < (
        1e-6 if "gate_proj" in str(names) else 1e-9)  # transformers' RMSNorm is float32 whatever comes in


@pytest.mark.parametrize("base, learned", [
    ("gpt2", 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))),
    ("llama", 2 * 4 * (2 * (32 + 64) + 2 * (32 + 32) + 3 * (32 + 48)))], indirect=["base"])
def test_a_base_in_16_bits_stays_as_it_is_and_the_adapter_alone_is_saved(base, learned, fit, tmp_path, monkeypatch,
                                                                         capsys):
    built, real, best = [], train.build_model, tmp_path / "out" / "best"
    monkeypatch.setattr(train, "build_model", lambda *args: built.append(real(*args)) or built[0])
    fit(dtype="bfloat16")
    parameters, frozen = dict(built[0][0].named_parameters()), GPT.from_pretrained(base, dtype=torch.bfloat16)
    for name, parameter in frozen.named_parameters():
        assert parameters[name].dtype == torch.bfloat16 and torch.equal(parameters[name], parameter), name
    total = learned + sum(parameter.numel() for parameter in frozen.parameters())
    assert f"{learned / 1e6:,.2f} M of them trainable ({learned / total:.2%})" in capsys.readouterr().out
    assert {path.name for path in best.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "prompt.json"}
    tensors = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["tensors"]
    for kind in ("masters", "means", "squares"):
        assert sum(tensor.numel() for tensor in tensors[kind].values()) == learned
        assert all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors[kind].items())
    assert_same_logits(tmp_path / "out", peft.PeftModel.from_pretrained(theirs(base).float(), best))
    assert read_json(best / "prompt.json")["base_name"] == str(base)


def test_an_adapter_goes_on_only_over_the_weights_that_it_was_begun_on(fit, base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    fit(init_from=base.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert fit(resume=True, max_steps=7).step == 7
    shutil.move(base, tmp_path / "moved")  # the same base by another name
    with pytest.raises(UserError, match=f"--resume: the base {base} is not there; say with --init_from where it is"):
        fit(resume=True, max_steps=8)
    assert fit(resume=True, init_from=str(tmp_path / "moved"), max_steps=8).step == 8
    tiny(block_size=128, seed=8).save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="this adapter was not begun on .*; name its base with --init_from"):
        fit(resume=True, max_steps=9)
    for use in (lambda path: sample.main(SampleConfig(model=path, prompt="x", device="cpu")), GPT.from_pretrained):
        with pytest.raises(UserError, match="was trained on other weights than"):
            use(str(tmp_path / "out"))


def test_adapters_drop_in_training_alone_and_targets_are_as_named():
    model = tiny().add_lora(4, 6.0, 0.5, ["c_attn", "mlp.c_proj"])
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".", 2)[2].rsplit(".", 1)[0] for name in learned} == {"attn.c_attn", "mlp.c_proj"}
    for parameter in learned.values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    idx = torch.arange(48)[None]
    assert torch.equal(model.eval()(idx), model(idx)) and not torch.equal(model.train()(idx), model(idx))
