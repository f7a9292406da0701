"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) through peft, which the extra ``lora`` installs."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from searchqa_agents.policy import Policy


def add_lora(
    policy: Policy, *, rank: int = 16, alpha: float = 32.0, target_modules: str | Sequence[str] = "all-linear", seed: int = 0
) -> None:
    """From here on only new low-rank adapters of the policy's model are trained; at first they change nothing.

    There is no dropout: it would make sampled and evaluated log-probabilities differ. Adapters of a bfloat16 model are float32, so that small steps
    are not rounded away.

    Parameters
    ----------
    rank, alpha
        Each adapted weight becomes ``W + alpha / rank * B @ A``, with B of ``rank`` columns.
    target_modules
        Names of linear layers, a regular expression of whole names, or ``all-linear``: all but the output layer.
    seed
        Determines the first A; the global random state of torch is left as it was.

    Raises
    ------
    ConfigurationError
        If peft is missing, the policy has adapters already, no layer has such a name, or one shares its weight with the embeddings.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigurationError("LoRA needs peft, which is not installed: pip install 'searchqa-gym[lora]'.") from error
    model = policy.model
    if has_lora(model):
        raise ConfigurationError("The policy has LoRA adapters already; they can be added once.")
    _check_tied(model, target_modules)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")  # type: ignore[arg-type]  # alpha may be a fraction
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            model.add_adapter(settings)
        except ValueError as error:
            raise ConfigurationError(
                f"target_modules must name linear layers of the model; got {target_modules!r}. peft: {error}"
            ) from error
    for adapter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        adapter.data = adapter.data.to(torch.promote_types(adapter.dtype, torch.float32))
    model.train(False)


def _check_tied(model: PreTrainedModel, target_modules: str | Sequence[str]) -> None:
    embeddings: Any = (model.get_output_embeddings(), model.get_input_embeddings())  # type: ignore[no-untyped-call]
    if target_modules == "all-linear" or embeddings[0].weight is not embeddings[1].weight:
        return
    for name, module in model.named_modules():
        if isinstance(target_modules, str):
            named = re.fullmatch(target_modules, name) is not None
        else:
            named = any(name == target or name.endswith(f".{target}") for target in target_modules)
        if named and any(module is one for one in embeddings):
            raise ConfigurationError(
                f"{name} shares its weight with the embeddings, so that it cannot have an adapter of its own; got target_modules={target_modules!r}. "
                "Leave it out."
            )


def has_lora(module: nn.Module) -> bool:
    """Whether there are adapters in it."""
    return any(type(part).__module__.startswith("peft.") for part in module.modules())


@contextlib.contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The module without its adapters: the model as it was before them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_model(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model with the adapters added to its weights; it shares all other weights with ``model``, which is left as it is."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(_merged_weights(model), assign=True)
    plain.tie_weights()
    if hasattr(model, "generation_config"):
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain


def with_adapters(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapters that peft has saved in ``folder`` added to its weights, in place."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigurationError(f"{folder} holds LoRA adapters, which need peft: pip install 'searchqa-gym[lora]'.") from error
    merged: PreTrainedModel = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return merged


@torch.no_grad()
def _merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    from peft.tuners.lora import LoraLayer

    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = weight + layer.get_delta_weight("default").to(weight.dtype)
    return weights
