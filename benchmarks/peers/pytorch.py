"""PyTorch: a MeZO step, or one of LoRA by back-propagation, on a decoder of SmolLM2-135M's shape.

Weights are random: neither time nor memory depends on what was learnt. MeZO is as its authors
describe it: weights are moved in place along a direction that is drawn again from its seed each
time, to one side, to the other, back, and by the step; two forward passes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers.turns import serve

_LAYERS, _WIDTH, _HIDDEN, _HEADS, _PAIRS, _VOCABULARY = 30, 576, 1536, 9, 3, 49152
_HEAD = _WIDTH // _HEADS
_BASE = 1e5  # of rotary positions


class Linear(nn.Module):
    """A matrix, and adapters of a rank beside it, if there are any."""

    def __init__(self, inputs: int, outputs: int, rank: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.down = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5) if rank else None
        self.up = nn.Parameter(torch.zeros(outputs, rank)) if rank else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, self.weight)
        if self.down is None:
            return y
        return y + functional.linear(functional.linear(x, self.down), self.up)


class Layer(nn.Module):
    """Attention of grouped heads, and a gated network."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(_WIDTH, eps=1e-5) for _ in range(2))
        self.q = Linear(_WIDTH, _WIDTH, rank)
        self.k = Linear(_WIDTH, _PAIRS * _HEAD)
        self.v = Linear(_WIDTH, _PAIRS * _HEAD, rank)
        self.o = Linear(_WIDTH, _WIDTH)
        self.gate, self.up = Linear(_WIDTH, _HIDDEN), Linear(_WIDTH, _HIDDEN)
        self.down = Linear(_HIDDEN, _WIDTH)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        y = self.norms[0](x)
        by_head = (f(y).view(n, length, -1, _HEAD) for f in (self.q, self.k, self.v))
        q, k, v = (z.transpose(1, 2) for z in by_head)
        q, k = (z * cos + _turned(z) * sin for z in (q, k))
        k, v = (z.repeat_interleave(_HEADS // _PAIRS, 1) for z in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, length, _WIDTH))
        y = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Each pair of entries, half a head apart, by a quarter of a turn."""
    return torch.cat([-x[..., _HEAD // 2 :], x[..., : _HEAD // 2]], -1)


class Model(nn.Module):
    """A decoder whose last matrix is its embedding."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(_VOCABULARY, _WIDTH) * 0.02)
        self.layers = nn.ModuleList(Layer(rank) for _ in range(_LAYERS))
        self.norm = nn.RMSNorm(_WIDTH, eps=1e-5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits after each sequence."""
        x = self.embedding[tokens]
        rates = _BASE ** (-torch.arange(0, _HEAD, 2) / _HEAD)
        angles = torch.outer(torch.arange(tokens.shape[1]), rates).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.norm(x[:, -1]), self.embedding)


def ready(job: dict[str, Any]) -> Callable[[], Any]:
    """What is called.

    Args:
        job: "what": "mezo", of all weights, or "lora", of adapters of rank 8 of q and v by Adam;
            "dtype"; "sequences" of "tokens" each; "threads".
    """
    torch.manual_seed(0)
    torch.set_num_threads(job["threads"])
    is_lora = job["what"] == "lora"
    model = Model(8 if is_lora else 0).to(getattr(torch, job["dtype"]))
    tokens = torch.randint(0, _VOCABULARY, (job["sequences"], job["tokens"]))

    def loss() -> torch.Tensor:
        return functional.cross_entropy(model(tokens).float(), tokens[:, 0])

    if is_lora:
        trained = []
        for name, x in model.named_parameters():
            is_adapter = name.endswith((".q.down", ".q.up", ".v.down", ".v.up"))
            x.requires_grad_(is_adapter)
            trained += [x] if is_adapter else []
        adam = torch.optim.Adam(trained, lr=1e-4)

        def lora() -> None:
            adam.zero_grad()
            loss().backward()
            adam.step()

        return lora

    weights, seed = list(model.parameters()), 0

    def move(far: float) -> None:
        torch.manual_seed(seed)
        for x in weights:
            x.add_(torch.randn_like(x), alpha=far)

    @torch.no_grad()
    def mezo() -> None:
        nonlocal seed
        seed += 1
        move(1e-3)
        plus = loss()
        move(-2e-3)
        minus = loss()
        move(1e-3)
        move(-1e-6 * float(plus - minus) / 2e-3)

    return mezo


if __name__ == "__main__":
    serve(f"torch {torch.__version__}", ready)
