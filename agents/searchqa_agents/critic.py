"""The critic: values of the states in which tokens are chosen."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from searchqa_agents.models import save_model
from searchqa_agents.policy import Policy, last_hidden_states, make_value_head, values_of

_VALUE_HEAD = "value_head.safetensors"


class Critic(nn.Module):
    """A trunk of its own with a value head.

    Parameters
    ----------
    trunk
        A decoder of transformers; its last hidden state at a position, which has read everything up to there, is what the value is a function of.
    value_head
        From the trunk's hidden size to 1, float32.
    """

    def __init__(self, trunk: nn.Module, value_head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.value_head = value_head

    @classmethod
    def of_policy(cls, policy: Policy) -> Critic:
        """A critic whose trunk is a copy of the policy's and whose values are all 0."""
        trunk: Any = copy.deepcopy(policy.model.get_decoder())  # type: ignore[no-untyped-call]
        return cls(trunk, make_value_head(trunk.config.hidden_size, policy.device))

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, chosen: Tensor, gradient_checkpointing: bool = False) -> Tensor:
        """float32[N], see :class:`~searchqa_agents.micro_batches.ForwardPass`."""
        hidden = last_hidden_states(self.trunk, input_ids, position_ids, gradient_checkpointing=gradient_checkpointing)
        return values_of(self.value_head, hidden[chosen])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trunk as a folder of transformers, and the value head beside it."""
        folder = Path(path)
        trunk: Any = self.trunk
        save_model(trunk, folder)
        save_file(self.value_head.state_dict(), folder / _VALUE_HEAD)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Critic:
        """A critic from a folder that :meth:`save` wrote."""
        trunk: Any = AutoModel.from_pretrained(path, dtype=dtype)
        trunk.to(device).train(False)
        head = make_value_head(trunk.config.hidden_size, torch.device(device))
        head.load_state_dict(load_file(Path(path) / _VALUE_HEAD, device=str(device)))
        return cls(trunk, head)
