"""ckpt.pt: everything that train.py needs to go on, written in one piece and checked when it is read."""
import dataclasses

import torch

from console import UserError
from model import GPTConfig
from weights import atomic_file

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16", "float64")


def trainable(model):
    """The parameters that training changes, by name: all, or under LoRA the adapter's."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(path, **state):
    """Tensors and plain values only, so that loading executes nothing; an older checkpoint stays until this one is
    complete on disk."""
    try:
        with atomic_file(path) as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
    except RuntimeError as error:  # torch's, in the midst of a failed write
        reason = str(error.__context__ or error).splitlines()[0][:80]
        raise UserError(f"cannot write {path} ({reason}); is the disk full?") from None


def load_checkpoint(path, config_class):
    """What save_checkpoint wrote, checked; `config_class` is the dataclass whose values are its config."""
    if not path.is_file():
        raise UserError(f"--resume: {path} is not there; name the run's --out_dir, or start one without --resume")
    remedy = remedy_for(path)
    path.open("rb").close()  # where that is not permitted, the file may be whole
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["format_version"]
        checkpoint.setdefault("before", [])  # an early one has none
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); {remedy}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, this program reads {FORMAT_VERSION}; {remedy}")
    kinds = dict(step=int, config=dict, data=dict, model_config=dict, base=dict, dtype=str, model=dict, optimizer=dict,
                 scaler=dict, best_val_loss=float, elapsed=float, crc=int, total_steps=int, before=list)
    if wrong := [name for name, kind in kinds.items() if type(checkpoint.get(name)) is not kind]:
        raise UserError(f"{path} is damaged ({', '.join(wrong)}); {remedy}")
    if unknown := checkpoint["config"].keys() - kinds_of(config_class).keys():
        raise UserError(f"{path} has flags that this program lacks ({', '.join(map(str, unknown))}); {remedy}")
    checkpoint["config"] = {**dataclasses.asdict(config_class()), **checkpoint["config"]}
    right = dict(config=fits(checkpoint["config"], config_class), base=type(checkpoint["base"].get("name")) is str,
                 model_config=fits(checkpoint["model_config"], GPTConfig)
                 and min(checkpoint["model_config"].values()) >= 0 < checkpoint["model_config"]["n_head"],
                 step=checkpoint["step"] >= 0, dtype=checkpoint["dtype"] in DTYPES)
    if wrong := [name for name, found in right.items() if not found]:
        raise UserError(f"{path} is damaged ({', '.join(wrong)}); {remedy}")
    return checkpoint


def kinds_of(config_class):
    return {field.name: field.type for field in dataclasses.fields(config_class)}


def fits(values, config_class):
    """Whether a dict has a dataclass's names, and values of their types; an int may stand for a float."""
    kinds = kinds_of(config_class)
    return values.keys() == kinds.keys() and all(
        isinstance(value, (int, float) if kinds[name] is float else kinds[name]) for name, value in values.items())


def restore(checkpoint, path, model, optimizer, scaler):
    """Puts the weights and states of a checkpoint in their places; UserError where they do not fit."""
    try:
        missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
        optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"],  # the settings are this run's own
                                   "param_groups": optimizer.state_dict()["param_groups"]})
        scaler.load_state_dict(checkpoint["scaler"])
        sound = not unexpected and not trainable(model).keys() & set(missing) and all(
            state["step"].dim() == 0 and state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
            for p, state in optimizer.state.items())
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # torch's, for what it cannot load
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged (its states do not fit its model); {remedy_for(path)}")


def remedy_for(path):
    return f"start anew with --overwrite, or from its weights with --init_from={path.parent}"
