"""The state that is saved: a model of GPT-2's shape and its AdamW, with values like those of a run.

Nothing is trained: weights, first and second moments are drawn at the scales that training gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GPT2_PARAMETERS = 124_439_808
_LAYERS = 12
_WIDTH = 768
_VOCABULARY = 50_257
_CONTEXT = 1024


def _block(width: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "ln_1": nn.LayerNorm(width),
            "attn_qkv": nn.Linear(width, 3 * width),
            "attn_proj": nn.Linear(width, width),
            "ln_2": nn.LayerNorm(width),
            "mlp_up": nn.Linear(width, 4 * width),
            "mlp_down": nn.Linear(4 * width, width),
        }
    )


def _model(parameters: int, device: str) -> nn.Module:
    """The modules of GPT-2 small, with width and vocabulary scaled to about `parameters`."""
    scale = math.sqrt(parameters / GPT2_PARAMETERS)
    width = max(64, 64 * round(_WIDTH * scale / 64))
    vocabulary = max(64, round(_VOCABULARY * scale))
    # On the meta device, for the default initialisation would be thrown away.
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(_CONTEXT, width),
                "h": nn.ModuleList(_block(width) for _ in range(_LAYERS)),
                "ln_f": nn.LayerNorm(width),
            }
        )
    return model.to_empty(device=device)


@dataclass(frozen=True)
class State:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.AdamW

    @classmethod
    def build(cls, parameters: int, device: str = "cpu") -> State:
        """About `parameters` parameters in fp32 and two moments of each: 12 bytes a parameter."""
        torch.manual_seed(20_240_229)
        model = _model(parameters, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.02)
                if ".ln_" in f".{name}" and name.endswith("weight"):
                    parameter.add_(1)
                gradient = 1e-3 * math.exp(torch.randn(()).item())
                moment = torch.empty_like(parameter).normal_(std=gradient / 3)
                variance = torch.empty_like(parameter).normal_(std=gradient).square_().mul_(0.1)
                optimizer.state[parameter] = {
                    "step": torch.tensor(200.0),
                    "exp_avg": moment,
                    "exp_avg_sq": variance,
                }
        return cls(model, optimizer)

    def parts(self) -> dict[str, Any]:
        """What a training program registers, by name."""
        return {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by a flat name."""
        tensors = {
            f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()
        }
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def advance(self) -> None:
        """Change every value, as a step of training does: no snapshot equals the one before."""
        for tensor in self.tensors().values():
            tensor.mul_(1 + 2**-10)
