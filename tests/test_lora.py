"""LoRA against peft, and what training leaves of the base; adapters side by side, and plain weights out of them."""
import shutil

import peft
import pytest
import torch
import transformers
from conftest import colour_records, tiny
from safetensors.torch import load_file
from test_train import plain_loop, same_weights, stop_after

import sample
import train
from model import GPT, LoraLinear
from nanosft.console import UserError
from nanosft.files import read_json
from nanosft.optimizer import AdamW
from nanosft.report import read_rows
from nanosft.shards import Shards, load_meta
from sample import SampleConfig
from train import TrainConfig, learning_rate_at

IDX = torch.arange(48)[None]
ALL = ("c_attn", "c_proj", "c_fc")


def lora_model(base, targets=ALL, seed=3):
    """The base with a LoRA update whose every value is random."""
    model, generator = base.add_lora(4, 6.0, 0.0, targets), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def logits(model):
    model = model if isinstance(model, torch.nn.Module) else GPT.from_pretrained(model)
    with torch.no_grad():
        found = model.eval()(IDX)
    return found if isinstance(found, torch.Tensor) else found.logits


def peft_logits(base, adapter):
    return logits(peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel.from_pretrained(base), adapter))


@pytest.fixture
def base(tmp_path):
    tiny(block_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


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

def test_live_merged_and_reloaded_agree(base, tmp_path):
    model = lora_model(GPT.from_pretrained(base))
    live = logits(model)
    assert (live - logits(base)).abs().max() > 0.1
    model.save_adapter(tmp_path / "adapter", str(base))
    assert torch.equal(logits(tmp_path / "adapter"), live)
    assert torch.allclose(logits(model.merge_lora()), live, atol=1e-5 * live.std())
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "merged")
    for merged in (GPT, transformers.GPT2LMHeadModel):  # in both the head stays tied
        assert torch.allclose(logits(merged.from_pretrained(tmp_path / "merged")), live, atol=1e-5 * live.std())


def peft_model(base):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base, attn_implementation="eager", resid_pdrop=0.0,
                                                          embd_pdrop=0.0, attn_pdrop=0.0)
    return peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(ALL),
                                                       fan_in_fan_out=True, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_update_has_a_gradient_and_the_base_has_neither_gradient_nor_optimizer_state(fit, base, dtype):
    model = GPT.from_pretrained(base).add_lora(4, 8.0, 0.0, ALL)
    before = {name: parameter.detach().to(dtype, copy=True) for name, parameter in model.named_parameters()}
    optimizer = AdamW(model, dtype)
    loss = train.accumulate(model, optimizer, [fit.shards.batch([i]) for i in range(4)], 10)
    optimizer.step(1e-2, loss, 1.0)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == torch.equal(parameter, before[name]) == ("lora" not in name), name
        assert "lora_B" not in name or parameter.grad.norm() > 0, name  # that of A is zero while B is
    names = {name for name in before if "lora" in name}
    assert len(names) == 2 * 2 * 4 and all(
        set(optimizer.state_dict()[kind]) == names for kind in ("masters", "means", "squares"))


# ---- training -------------------------------------------------------------------------------------------------------

def test_twenty_steps_equal_a_peft_loop(fit, base, tmp_path, monkeypatch):
    theirs = peft_model(base)
    theirs.save_pretrained(tmp_path / "start")
    start, add_lora = load_file(tmp_path / "start" / "adapter_model.safetensors"), GPT.add_lora

    def add_the_same(self, *args):
        add_lora(self, *args)
        for name, module in self.named_modules():
            if isinstance(module, LoraLinear):
                module.lora_A.data = start[f"base_model.model.transformer.{name}.lora_A.weight"].clone()
        return self

    monkeypatch.setattr(GPT, "add_lora", add_the_same)
    fit(dtype="float64", max_steps=20, lora_alpha=6.0, batch_size=8, grad_clip=0.1, warmup_steps=3, seed=5, epochs=10,
        eval_interval=0)
    losses = plain_loop(theirs.double().train(), fit.shards, 20, 8, 5,
                        lambda step: learning_rate_at(step, 20, 1e-2, 0, "cosine", 3), 0.1, 0.1)
    ours = [float(row["train_loss"]) for row in read_rows(tmp_path / "out" / "log.csv")]
    assert ours == pytest.approx(losses, rel=2e-7)
    masters = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["tensors"]["masters"]
    expected = {name.removeprefix("base_model.model.transformer.").replace(".default.weight", ""): p
                for name, p in theirs.named_parameters() if p.requires_grad}
    assert masters.keys() == expected.keys()
    assert max((masters[name] - expected[name]).abs().max().item() for name in masters) < 1e-9


def test_only_the_adapter_is_saved_and_the_trainable_share_is_right(fit, base, tmp_path, capsys):
    fit()
    learned = 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    total = learned + sum(p.numel() for p in GPT.from_pretrained(base).parameters())
    assert f"{learned / 1e6:,.2f} M of them trainable ({learned / total:.2%})" in capsys.readouterr().out
    best = tmp_path / "out" / "best"
    assert {path.name for path in best.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "prompt.json"}
    tensors = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["tensors"]
    assert all("lora_" in name for kind in ("masters", "means", "squares") for name in tensors[kind])
    assert (peft_logits(base, best) - logits(tmp_path / "out")).abs().max() < 1e-4
    assert read_json(best / "prompt.json")["base_name"] == str(base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_adapter_equals_the_straight_one_bit_for_bit(dtype, fit, tmp_path):
    flags = dict(dropout=0.1, lora_dropout=0.1, max_steps=8, dtype=dtype)
    straight = fit("straight", **flags)
    with pytest.raises(SystemExit), stop_after(3):
        fit("parts", **flags)
    resumed = fit("parts", resume=True)
    assert (resumed.step, resumed.train_loss, resumed.best_val_loss) == (
        straight.step, straight.train_loss, straight.best_val_loss)
    assert same_weights(tmp_path / "straight", tmp_path / "parts")


def test_an_adapter_goes_on_only_over_the_weights_that_it_was_begun_on(fit, base, tmp_path):
    fit()
    shutil.copytree(base, tmp_path / "moved")  # the same base by another name
    assert fit(resume=True, init_from=str(tmp_path / "moved"), max_steps=7).step == 7
    tiny(block_size=128, seed=8).save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="is not the file that this adapter was begun on; name that with --init_from"):
        fit(resume=True, max_steps=8)
    with pytest.raises(UserError, match="was trained on other weights than"):
        sample.main(SampleConfig(model=str(tmp_path / "out"), prompt="x", device="cpu"))


def test_adapters_answer_side_by_side_and_export_as_plain_weights(fit, tmp_path, capsys):
    fit("a")
    fit("b", seed=2, lora_rank=2)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    flags = dict(prompt="Say red 1.", max_new_tokens=12, device="cpu", dtype="float32")
    alone = [sample.main(SampleConfig(model=name, **flags))[0] for name in (a, b)]
    assert sample.main(SampleConfig(model=f"{a},{b}", **flags)) == alone and alone[0] != alone[1]
    assert f"{a}: {alone[0]}" in capsys.readouterr().out
    sample.main(SampleConfig(model=a, export=str(tmp_path / "plain"), device="cpu", dtype="bfloat16"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert theirs.dtype == torch.float32 and torch.allclose(logits(theirs), logits(a), atol=1e-4)
    assert sample.main(SampleConfig(model=str(tmp_path / "plain"), **flags)) == alone[:1]


def test_wrong_use_of_lora_gets_one_line(fit, tmp_path):
    fit("done")
    for flags, message in ((dict(init_from="scratch"), "--lora_rank needs weights to adapt"),
                           (dict(lora_targets="q_proj"), "--lora_targets: .q_proj. names no layer"),
                           (dict(init_from=str(tmp_path / "done")), "is itself a LoRA adapter: make it plain weights")):
        with pytest.raises(UserError, match=message):
            fit("new", **flags)
    assert not (tmp_path / "new" / "ckpt.pt").exists()
