"""LoRA against peft, and what training leaves of the base; adapters in sample.py and plain weights out of them."""
import csv
import json
import math
import shutil

import peft
import pytest
import torch
import transformers
from conftest import colour_records, randomise, tiny
from safetensors.torch import load_file
from test_train import NO_SCALER, plain_loop, same_weights, stop_after

import sample
import train
import watch
from console import UserError
from dataset import Shards, load_meta
from model import GPT, LoraLinear, optimizer_groups
from prepare_data import get_encoding
from sample import SampleConfig
from train import TrainConfig, learning_rate_at
from watch import Forgetting

IDX = torch.arange(48)[None]


def lora_model(base, rank=4, alpha=6.0, targets=("c_attn", "c_proj", "c_fc"), seed=3):
    """The base with a LoRA update whose every value is random."""
    model = base.add_lora(rank, alpha, 0.0, targets)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.eval()


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
                             batch_size=4, lora_rank=4, lora_targets="c_attn,c_proj,c_fc", learning_rate=1e-2,
                             eval_interval=3, forget_text="none")
        return train.main(TrainConfig(**{**settings, **flags}))
    run.data = data
    return run


def logits(path_or_model):
    model = path_or_model if isinstance(path_or_model, torch.nn.Module) else GPT.from_pretrained(path_or_model)
    with torch.no_grad():
        return model.eval()(IDX)


def peft_logits(base, adapter):
    model = peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(IDX).logits


def test_live_merged_and_reloaded_agree(base, tmp_path):
    model = lora_model(GPT.from_pretrained(base))
    live = logits(model)
    assert (live - logits(base)).abs().max() > 0.1
    model.save_adapter(tmp_path / "adapter", str(base))
    assert torch.equal(logits(tmp_path / "adapter"), live)
    assert torch.allclose(logits(model.merge_lora()), live, atol=1e-5 * live.std())
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "merged")  # the tied head stays tied
    assert torch.allclose(logits(tmp_path / "merged"), live, atol=1e-5 * live.std())


@pytest.mark.parametrize("targets", [("c_attn", "c_proj", "c_fc"), ("c_attn",), ("attn.c_proj",)])
def test_our_adapter_gives_the_same_logits_in_peft(base, tmp_path, targets):
    model = lora_model(GPT.from_pretrained(base), targets=targets)
    model.save_adapter(tmp_path / "adapter", str(base))
    ours = logits(model)
    assert (peft_logits(base, tmp_path / "adapter") - ours).abs().max() < 1e-4 * ours.std()
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        f"base_model.model.transformer.{name}.weight" for name, _ in model.named_parameters() if "lora" in name}


def peft_model(base, **options):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base, attn_implementation="eager", resid_pdrop=0.0,
                                                          embd_pdrop=0.0, attn_pdrop=0.0)
    config = dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
                  task_type="CAUSAL_LM")
    return peft.get_peft_model(theirs, peft.LoraConfig(**{**config, **options}))


def test_an_adapter_made_by_peft_loads_here(base, tmp_path):
    theirs = peft_model(base)
    randomise(theirs.base_model.model.transformer.h, seed=9)
    with torch.no_grad():
        expected = theirs.eval()(IDX).logits
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.unload().save_pretrained(base)
    ours = logits(tmp_path / "adapter")
    assert (ours - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("options, name", [
    (dict(use_rslora=True), "use_rslora=True"), (dict(use_dora=True), "use_dora=True"),
    (dict(bias="all"), "bias='all'"),
    (dict(modules_to_save=["wte"]), "modules_to_save"), (dict(rank_pattern={"c_attn": 2}), "rank_pattern")])
def test_options_of_pefts_that_we_do_not_have_are_refused_by_name(options, name, base, tmp_path):
    peft_model(base, **options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"the adapter's option {name}"):
        GPT.from_pretrained(tmp_path / "adapter")


def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path):
    lora_model(tiny(n_embd=64, block_size=128)).save_adapter(tmp_path / "adapter", str(base))
    with pytest.raises(UserError, match=r"adapter's h.0.attn.c_attn does not fit this model or its rank 4"):
        GPT.from_pretrained(tmp_path / "adapter")


def test_every_update_has_a_gradient_and_the_base_has_neither_gradient_nor_optimizer_state(fit, base):
    model = GPT.from_pretrained(base).add_lora(4, 8.0, 0.0, ["c_attn", "c_proj", "c_fc"])
    shards = Shards(fit.data, load_meta(fit.data), "train")
    optimizer = torch.optim.AdamW(optimizer_groups(model, 0.1))
    train.gradients(model, NO_SCALER, [shards.batch(range(4))], 10)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            assert p.grad.norm() > 0, name
        assert (p.grad is None) == ("lora" not in name)
    optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state) == 2 * 2 * 4


def test_twenty_steps_equal_a_peft_loop(fit, base, tmp_path, monkeypatch):
    theirs = peft_model(base)
    theirs.save_pretrained(tmp_path / "start")
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    real = GPT.add_lora

    def same_start(self, *args):
        real(self, *args)
        for name, module in self.named_modules():
            if isinstance(module, LoraLinear):
                module.lora_A.data = start[f"base_model.model.transformer.{name}.lora_A.weight"].clone()
        return self
    monkeypatch.setattr(GPT, "add_lora", same_start)
    fit(dtype="float64", max_steps=20, lora_alpha=6.0, batch_size=8, grad_clip=0.1, warmup_steps=3, seed=5, epochs=10)
    losses = plain_loop(theirs.double().train(), Shards(fit.data, load_meta(fit.data), "train"), 20, 8, 5,
                        lambda step: learning_rate_at(step, step / 20, 1e-2, 0, "cosine", 3, 20), 0.1, 0.1)
    with open(tmp_path / "out" / "log.csv", newline="") as file:
        ours = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert ours == pytest.approx(losses, rel=2e-7)
    weights = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]
    expected = {name.removeprefix("base_model.model.transformer.").replace(".default.weight", ""): p
                for name, p in theirs.named_parameters() if p.requires_grad}
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in weights) < 1e-9


def test_only_the_adapter_is_saved_and_the_trainable_share_is_right(fit, base, tmp_path, capsys):
    fit()
    learned = 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    total = learned + sum(p.numel() for p in GPT.from_pretrained(base).parameters())
    assert f"{learned / 1e6:,.2f} M of them trainable ({learned / total:.2%})" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out" / "best").iterdir()} == {"adapter_config.json",
                                                                            "adapter_model.safetensors", "prompt.json"}
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert all("lora_" in name for name in state["model"]) and len(state["optimizer"]["state"]) == len(state["model"])
    assert (peft_logits(base, tmp_path / "out" / "best") - logits(tmp_path / "out")).abs().max() < 1e-4
    assert json.loads((tmp_path / "out" / "best" / "prompt.json").read_text())["base_name"] == str(base)


def test_a_resumed_adapter_equals_the_straight_one_bit_for_bit(fit, base, tmp_path):
    flags = dict(dropout=0.1, lora_dropout=0.1, max_steps=8)
    straight = fit("straight", **flags)
    with pytest.raises(SystemExit), stop_after(3):
        fit("parts", **flags)
    resumed = fit("parts", resume=True)
    assert {**resumed, "seconds": 0} == {**straight, "seconds": 0}
    assert same_weights(tmp_path / "straight", tmp_path / "parts")
    shutil.copytree(base, tmp_path / "moved")  # the same base by another name
    config = TrainConfig(resume=True, out_dir=tmp_path / "straight", init_from=tmp_path / "moved", max_steps=9)
    assert train.main(config)["step"] == 9
    tiny(block_size=128, seed=8).save_pretrained(base)
    with pytest.raises(UserError, match="is not the file that this adapter was begun on; name that with --init_from"):
        fit("parts", resume=True, max_steps=9)
    with pytest.raises(UserError, match="was trained on other weights than"):
        sample.main(SampleConfig(model=str(tmp_path / "parts"), prompt="x", device="cpu"))


def test_adapters_answer_side_by_side_over_one_base_and_export_as_plain_weights(fit, tmp_path, base, capsys):
    fit("a")
    fit("b", seed=2, lora_rank=2)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    flags = dict(prompt="Say red 1.", max_new_tokens=12, device="cpu", dtype="float32")
    alone = [sample.main(SampleConfig(model=name, **flags))[0] for name in (a, b)]
    assert sample.main(SampleConfig(model=str(base), adapter=f"{a},{b}", **flags)) == alone
    assert sample.main(SampleConfig(adapter=f"{a},{b}", **flags)) == alone and alone[0] != alone[1]
    assert f"{a}: {alone[0]}" in capsys.readouterr().out
    tiny(block_size=128, seed=8).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="a.best was trained on other weights than .*safetensors holds; name those"):
        sample.main(SampleConfig(model=str(tmp_path / "other"), adapter=a, **flags))
    voices = sample.load(SampleConfig(adapter=f"{a},{b}", device="cpu", dtype="float32"))
    assert voices[0].model.wte.weight is voices[1].model.wte.weight
    sample.main(SampleConfig(model=a, export=str(tmp_path / "plain"), device="cpu", dtype="float32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(IDX).logits, logits(tmp_path / "a"), atol=1e-4)
    assert sample.main(SampleConfig(model=str(tmp_path / "plain"), **flags)) == alone[:1]


def test_wrong_use_of_lora_gets_one_line(fit, tmp_path):
    fit("done")
    for flags, message in ((dict(init_from="scratch"), "--lora_rank needs weights to adapt"),
                           (dict(lora_targets="q_proj"), "--lora_targets: .q_proj. names no layer"),
                           (dict(init_from=str(tmp_path / "done")), "is itself a LoRA adapter: make it plain weights")):
        with pytest.raises(UserError, match=message):
            fit("new", **flags)


def test_bits_per_byte_are_what_a_uniform_guess_costs(fit, tmp_path):
    model, out = tiny(), tmp_path / "out"
    out.mkdir()
    for p in model.parameters():
        p.data.zero_()
    (tmp_path / "text.txt").write_text("é" * 50 + "a" * 100)
    config = TrainConfig(forget_text=str(tmp_path / "text.txt"))
    forgetting = Forgetting(config, {"name": "x"}, get_encoding("bytes"), out, 0)
    assert f"{math.log2(257):.3f} bits per byte" in forgetting.measure(model, 0)  # 200 bytes in 4 blocks, each once
    fit("run", forget_text=str(tmp_path / "text.txt"))
    rows = watch.read_rows(tmp_path / "run" / "forget.csv")
    assert [row["step"] for row in rows] == [0, 3, 6] and len({row["bits_per_byte"] for row in rows}) == 3
