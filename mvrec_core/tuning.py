"""Which parameters of a text encoder learn, and how what they have learnt is kept.

frozen    none
last_n    the last layers
lora      low-rank updates of the query and value projections (Hu et al. 2022), by peft
adalora   the same, in the form of an SVD whose ranks go where they matter (Zhang et al. 2023), by peft
adapter   a bottleneck behind each layer's feed-forward part (Houlsby et al. 2019; one a layer: Pfeiffer et al. 2021)
full      all

A directory of an encoder is what transformers writes; or, where `adapter.json` is in it, a base encoder, there or
elsewhere, with the learnt parameters in `adapter.safetensors`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mvrec_core.config import TextEncoderConfig
from mvrec_core.errors import ConfigError

ADAPTER = "adapter.json"
WEIGHTS = "adapter.safetensors"
LOW_RANK = ("lora", "adalora")
ORTHOGONAL = 0.1  # weight of AdaLoRA's regulariser, one of those in the paper
WARM, FINAL = 0.1, 0.3  # shares of the steps before AdaLoRA prunes, and after it has pruned


class Bottleneck(nn.Module):
    """h [..., H] -> h + up(gelu(down(h))); the identity at first, as `up` is zero (Houlsby et al. 2019, 2.1)."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.down, self.up = nn.Linear(size, width), nn.Linear(width, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(nn.functional.gelu(self.down(h)))


def prepared(encoder: Any, config: TextEncoderConfig) -> Any:
    """The encoder, changed so that just the parameters of config.tune learn. Raises ConfigError."""
    encoder.requires_grad_(config.tune == "full")
    if config.tune == "last_n":
        every = layers(encoder)
        if config.last_n > len(every):
            raise ConfigError(
                f"model.text.last_n: expected at most the encoder's {len(every)} layers, found {config.last_n}"
            )
        every[-config.last_n :].requires_grad_(True)
    if config.tune == "adapter":
        for layer in layers(encoder):
            dense = layer.output.dense
            if not isinstance(dense, nn.Sequential):  # else it has learnt before and goes on
                parts = OrderedDict(base=dense, adapter=Bottleneck(dense.out_features, config.rank))
                layer.output.dense = dense = nn.Sequential(parts)
            dense.adapter.requires_grad_(True)
    if config.compile:  # layer by layer: they are alike, so what is compiled for one serves all
        if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
            raise ConfigError(
                "model.text.compile: expected a C compiler on this machine (CC, cc, gcc, clang), found none"
            )
        for layer in layers(encoder):
            layer.compile()
    return _low_rank(encoder, config) if config.tune in LOW_RANK else encoder


def learnt(encoder: Any) -> dict[str, Tensor]:
    """The parameters that learn, by name."""
    return {name: value.detach() for name, value in encoder.named_parameters() if value.requires_grad}


def merged(encoder: Any, config: TextEncoderConfig) -> Any:
    """The encoder with low-rank updates merged into its weights, in place: nothing of peft is left."""
    return encoder.merge_and_unload() if config.tune in LOW_RANK else encoder


def fingerprint(encoder: Any) -> str:
    """sha256 of the weights by name, whatever files they come from."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# AdaLoRA


def allocate_ranks(encoder: Any, optimiser: torch.optim.Optimizer, steps: int, done: int = 0) -> None:
    """From now on each step of the optimiser also keeps AdaLoRA's singular vectors near orthogonal (the gradient of
    equation 4 is added) and then shares out ranks; the budget falls from config.rank * 1.5 to config.rank a matrix.

    steps: of the whole training, about; done: of them, before now. Every worker does the same: gradients are equal.
    """
    settings = encoder.peft_config["default"]
    settings.total_step, settings.tinit, settings.tfinal = steps, int(steps * WARM), int(steps * FINAL)
    vectors = [p for name, p in encoder.named_parameters() if "lora_A" in name or "lora_B" in name]
    count = itertools.count(done)

    def regularise(*_: Any) -> None:
        with torch.enable_grad():
            loss = ORTHOGONAL * torch.stack([_skew(p) for p in vectors]).sum()
        for parameter, slope in zip(vectors, torch.autograd.grad(loss, vectors), strict=True):
            assert parameter.grad is not None
            parameter.grad += slope

    def allocate(*_: Any) -> None:
        encoder.base_model.update_and_allocate(next(count))

    optimiser.register_step_pre_hook(regularise)
    optimiser.register_step_post_hook(allocate)


def allocation(encoder: Any) -> tuple[dict[str, Tensor], dict[str, list[bool]]]:
    """What AdaLoRA knows beside its parameters: how much each of them matters, and the ranks in use since the last
    pruning, {} before the first."""
    allocator = encoder.base_model.rankallocator
    tensors = {f"importance.{name}": value for name, value in allocator.exp_avg_ipt.items()}
    tensors |= {f"uncertainty.{name}": value for name, value in allocator.exp_avg_unc.items()}
    return tensors, dict(encoder.peft_config["default"].rank_pattern or {})


def restore_allocation(encoder: Any, tensors: dict[str, Tensor], ranks: dict[str, list[bool]]) -> None:
    """Takes back what `allocation` gave."""
    allocator = encoder.base_model.rankallocator
    allocator.reset_ipt()
    for name, value in tensors.items():
        kind, _, parameter = name.partition(".")
        (allocator.exp_avg_ipt if kind == "importance" else allocator.exp_avg_unc)[parameter] = value.clone()
        allocator.ipt[parameter] = torch.zeros_like(value)  # made anew by each step
    encoder.peft_config["default"].rank_pattern = ranks


def ranks(encoder: Any) -> dict[str, list[bool]]:
    """Of each matrix that AdaLoRA updates, which of its singular values are in use."""
    pairs = ((name, value) for name, value in encoder.named_parameters() if "lora_E" in name)
    return {name: (value.detach().flatten() != 0).tolist() for name, value in pairs}


def _skew(vectors: Tensor) -> Tensor:
    """|P P' - I|^2 of the r rows (or columns, as there are fewer) of a matrix."""
    rows = vectors if vectors.shape[0] <= vectors.shape[1] else vectors.T
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).pow(2).sum()


def _low_rank(encoder: Any, config: TextEncoderConfig) -> Any:
    from peft import AdaLoraConfig, LoraConfig, get_peft_model  # here, as importing it takes seconds

    targets = ["query", "value"]
    if config.tune == "lora":
        update = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=targets)
    else:
        more = config.rank + max(1, config.rank // 2)  # total_step: until `allocate_ranks` knows it
        update = AdaLoraConfig(
            target_r=config.rank, init_r=more, lora_alpha=2 * more, target_modules=targets, total_step=1
        )
    try:
        return get_peft_model(encoder, update)
    except ValueError as error:
        raise ConfigError(f"model.text.tune: {config.tune} does not fit a {type(encoder).__name__}: {error}") from None


# directories


def load(path: str) -> tuple[Any, Any]:
    """The tokenizer and the bare encoder (fp32, no pooler) in a local directory. Raises ConfigError."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    directory = Path(path)
    encoder = _adapted(directory) if (directory / ADAPTER).is_file() else _transformer(path)
    with _quiet(path):
        return AutoTokenizer.from_pretrained(path), encoder


def save(directory: Path, tokenizer: Any, encoder: Any, config: TextEncoderConfig, base: str | None) -> None:
    """Writes what `load` reads: with config.save "whole" all of it, with "adapter" just what was learnt beside the
    base, whose fingerprint is `base`."""
    directory.mkdir(parents=True, exist_ok=True)
    tree: dict[str, Any] = {"tune": config.tune, "rank": config.rank, "last_n": config.last_n}
    if config.save == "adapter":
        weights, tree["base"] = learnt(encoder), {"path": config.path, "sha256": base}
        if config.tune == "adalora":
            tree["ranks"] = ranks(encoder)
    else:
        encoder = merged(copy.deepcopy(encoder), config)
        weights, width = _without_bottlenecks(encoder)
        tree |= {"tune": "adapter", "rank": width, "base": None}
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            encoder.save_pretrained(directory)
    if weights or config.save == "adapter":
        save_file({name: value.cpu().contiguous() for name, value in weights.items()}, directory / WEIGHTS)
        (directory / ADAPTER).write_text(json.dumps(tree, indent=1), encoding="utf-8")
    tokenizer.save_pretrained(directory)


def _transformer(path: str) -> Any:
    from transformers import AutoModel

    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"model.text.path: expected a directory of a BERT-family model with config.json, found '{path}'"
        )
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    with _quiet(path):
        try:
            return AutoModel.from_pretrained(path, add_pooling_layer=False, **options)
        except TypeError:  # a family without a pooler
            return AutoModel.from_pretrained(path, **options)


def _adapted(directory: Path) -> Any:
    tree = json.loads((directory / ADAPTER).read_text(encoding="utf-8"))
    base = tree["base"]
    if base is None:
        encoder = _transformer(str(directory))
    else:
        needs = f"{directory / ADAPTER}: needs the base encoder '{base['path']}' with sha256 {base['sha256'][:12]}…"
        if not Path(base["path"]).is_dir():
            raise ConfigError(f"{needs}, found no such directory")
        _, encoder = load(base["path"])
        if (found := fingerprint(encoder)) != base["sha256"]:
            raise ConfigError(f"{needs}, found {found[:12]}…")
    config = TextEncoderConfig(tune=tree["tune"], rank=tree["rank"], last_n=tree["last_n"])
    encoder = prepared(encoder, config)
    weights, places = load_file(directory / WEIGHTS), learnt(encoder)
    if weights.keys() != places.keys():
        raise ConfigError(f"{directory / WEIGHTS}: expected {len(places)} parameters of {config.tune}, found others")
    for name, value in weights.items():
        places[name].copy_(value)
    return merged(encoder, config)


def layers(encoder: Any) -> Any:
    """Those of a bare encoder, a ModuleList. Raises ConfigError for a family whose layers lie elsewhere."""
    found = getattr(getattr(encoder, "encoder", None), "layer", None)
    if found is None:
        raise ConfigError(
            "model.text.tune: last_n and adapter, and model.text.compile, expect a model of BERT's layers, "
            f"found {type(encoder).__name__}"
        )
    return found


def _without_bottlenecks(encoder: Any) -> tuple[dict[str, Tensor], int]:
    """Takes them out of the encoder: their weights by name, and their width."""
    weights = {name: value for name, value in encoder.state_dict().items() if ".dense.adapter." in name}
    width = 0
    for layer in layers(encoder) if weights else ():
        width = layer.output.dense.adapter.down.out_features
        layer.output.dense = layer.output.dense.base
    return weights, width


@contextlib.contextmanager
def _quiet(path: str) -> Iterator[None]:
    """Without transformers' progress bars and notices; what it cannot load is a ConfigError."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.text.path: '{path}' cannot be loaded: {str(error).splitlines()[0]}") from None
