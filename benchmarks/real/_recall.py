"""Shared by the checks of causal operators: recall of pairs and a byte model on real text, in one minimal block.

The same two-layer transformer takes any operator: a short causal convolution, projections to queries, keys, values and to
whatever gates the operator asks for, the operator, a norm without weights, the output projection, a channel mixer. The width of
the channel mixers is chosen so that all operators have the same number of parameters (to one unit of width).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkv
from qkv.bench.fitting import fit
from qkv.bench.texts import held_out, pairs, random_windows, text_bytes
from qkv.core.operator import Operator


@dataclass(frozen=True)
class Choice:
    """One mixer to compare.

    method: a setting (``"gla:chunk_size=64"``), or a function of (layer, layers) that gives one, or a plain function of
    (q, k, v). key_width: D per head, None: the width of the model over the heads. gates: which axes each extra takes, e.g.
    ``{"log_decay": "bhn"}``. features: applied to queries and keys; query_features: to queries alone. learned: shapes of
    extras that are parameters, e.g. ``{"codebook": (4, 64, 32)}``, by name.
    """

    name: str
    method: Any
    key_width: int | None = None
    gates: Mapping[str, str] = field(default_factory=dict)
    features: Callable[[Tensor], Tensor] | None = None
    query_features: Callable[[Tensor], Tensor] | None = None
    learned: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def at(self, layer: int, layers: int) -> Operator | Callable[..., Tensor]:
        """The operator of a layer."""
        if isinstance(self.method, str):
            return qkv.method(self.method)
        if isinstance(self.method, Operator):
            return self.method
        found = self.method(layer, layers)
        return qkv.method(found) if isinstance(found, str) else found


def window(width: int) -> Callable[[int, int], Callable[..., Tensor]]:
    """Softmax attention over the last `width` tokens, as a `Choice.method`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = torch.arange(q.shape[2], device=q.device)
        age = t[:, None] - t
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(age >= 0) & (age < width))

    return lambda layer, layers: attend


def gate(name: str, raw: Tensor) -> Tensor:
    """A valid value of an extra from a projection of the tokens."""
    if name == "log_decay":
        return F.logsigmoid(raw + 4.0)
    if name == "eta":
        return 0.2 * F.softplus(raw)
    return F.softplus(raw)


class Mixer(nn.Module):
    """Convolution, projections, operator, norm, projection."""

    def __init__(self, choice: Choice, dim: int, heads: int, layer: int, layers: int) -> None:
        super().__init__()
        self.choice, self.heads, self.method = choice, heads, choice.at(layer, layers)
        self.key_width, self.value_width = choice.key_width or dim // heads, dim // heads
        self.conv = nn.Conv1d(dim, dim, 4, groups=dim, padding=3)
        self.qk = nn.Linear(dim, 2 * heads * self.key_width, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        sizes = {"bhn": 1, "bhnd": self.key_width, "bhne": self.value_width}
        self.learned = nn.ParameterDict({n: torch.randn(shape) for n, shape in choice.learned.items()})
        self.gates = nn.ModuleDict({n: nn.Linear(dim, heads * sizes[axes]) for n, axes in choice.gates.items()})

    def heads_of(self, x: Tensor) -> Tensor:
        """``[B, N, H w]`` -> ``[B, H, N, w]``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k, v and gates of tokens ``[B, N, dim]``."""
        x = x + F.silu(self.conv(x.mT)[..., : x.shape[1]].mT)
        q, k = (self.heads_of(y) for y in self.qk(x).chunk(2, -1))
        if self.choice.features is not None:
            q, k = self.choice.features(q), self.choice.features(k)
        if self.choice.query_features is not None:
            q = self.choice.query_features(q)
        extras: dict[str, Any] = dict(self.learned.items())
        for name, axes in self.choice.gates.items():
            raw = gate(name, self.heads_of(self.gates[name](x)))
            extras[name] = raw.squeeze(-1) if axes == "bhn" else raw
        return q, k, self.heads_of(self.v(x)), extras

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, extras = self.inputs(x)
        out = self.method(q, k, v, **extras)
        out = out.transpose(1, 2).flatten(2)
        return self.out(F.rms_norm(out, out.shape[-1:], eps=1e-6))


class Model(nn.Module):
    """Embedding, blocks of a mixer and a channel mixer, tied to one operator; logits ``[B, N, vocabulary]``."""

    def __init__(self, choice: Choice, *, vocabulary: int, dim: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.mixers = nn.ModuleList(Mixer(choice, dim, heads, i, layers) for i in range(layers))
        self.up = nn.ModuleList(nn.Linear(dim, hidden, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(hidden, dim, bias=False) for _ in range(layers))
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for mixer, up, down in zip(self.mixers, self.up, self.down, strict=True):
            x = x + mixer(_norm(x))
            x = x + down(F.silu(up(_norm(x))))
        return self.head(_norm(x))

    @torch.no_grad()
    def state_bytes(self) -> int:
        """Bytes one row's recurrent states hold in all layers; 0 for an operator without a state."""
        total = 0
        for block in self.mixers:
            mixer: Any = block
            method = mixer.method
            if isinstance(method, Operator) and method.spec.initial is not None:
                q, k, v, extras = mixer.inputs(self.embedding.weight[None, :1])
                total += method(q, k, v, **extras, return_state=True)[1].bytes
        return total


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def model(
    choice: Choice, *, parameters: int, vocabulary: int, dim: int, heads: int, device: str, seed: int, layers: int = 2
) -> Model:
    """A model with about `parameters` parameters: what the operator's gates take, the channel mixers give."""
    sizes = {"vocabulary": vocabulary, "dim": dim, "heads": heads, "layers": layers}
    bare = sum(p.numel() for p in Model(choice, **sizes, hidden=1).parameters())
    hidden = 1 + round((parameters - bare) / (2 * dim * layers))
    if hidden < 8:
        raise SystemExit(
            f"{choice.name}: {parameters} parameters leave no room for channel mixers ({bare} without them)"
        )
    torch.manual_seed(seed)
    return Model(choice, **sizes, hidden=hidden).to(device)


def train(net: Model, batch: Callable[[int], tuple[Tensor, Tensor]], steps: int, rate: float, name: str) -> float:
    """Next-token training, targets of -1 do not count. Returns seconds a step."""

    def loss(ids: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(net(ids).flatten(0, 1).float(), target.flatten(), ignore_index=-1)

    done = fit(net, loss, batch, steps, rate=rate)
    print(f"  {name}: {steps} steps, loss {done.loss:.4f}, {1e3 * done.seconds:.1f} ms a step", flush=True)
    return done.seconds


def recall(choice: Choice, a: argparse.Namespace, *, number: int, length: int = 128, dim: int = 64, heads: int = 2,
           steps: int = 800, rows: int = 128, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Train on recall of `number` pairs and return the accuracy on new ones with parameters, state bytes and ms a step."""
    if a.quick:
        steps, rows = 4, 8
    vocabulary = 4 * max(16, number) + 2
    net = model(choice, parameters=130_000, vocabulary=vocabulary, dim=dim, heads=heads, device=a.device, seed=seed)
    rng = torch.Generator(a.device).manual_seed(seed)
    seconds = train(
        net, lambda i: pairs(rows, number, length, vocabulary, rng), steps, 3e-3, f"{choice.name}, {number} pairs"
    )
    with torch.no_grad():
        ids, target = pairs(4 * rows, number, length, vocabulary, torch.Generator(a.device).manual_seed(seed + 10_000))
        right = (net(ids).argmax(-1) == target)[target >= 0].float().mean().item()
    size = sum(p.numel() for p in net.parameters())
    return {"operator": choice.name, "pairs": number, "accuracy": round(right, 4), "parameters": size,
            "state (bytes)": net.state_bytes(), "ms per step": round(1e3 * seconds, 2)}  # fmt: skip


def language(choice: Choice, a: argparse.Namespace, *, length: int = 256, dim: int = 128, heads: int = 4, steps: int = 600,
             rows: int = 64, seed: int = 0, longer: int = 4, layers: int = 2) -> dict[str, Any]:  # fmt: skip
    """Train a byte model and return its held-out loss (nats a byte) at the training length and at `longer` times it."""
    if a.quick:
        length, steps, rows = 64, 4, 4
    net = model(choice, parameters=200_000 * layers, vocabulary=256, dim=dim, heads=heads, device=a.device, seed=seed,
                layers=layers)  # fmt: skip
    data, held = text_bytes(a.device)
    rng = torch.Generator(a.device).manual_seed(seed)

    seconds = train(net, lambda i: random_windows(data, rows, length, rng), steps, 2e-3, choice.name)
    size = sum(p.numel() for p in net.parameters())
    few = (4, 1) if a.quick else (128, 32)
    near, far = (
        round(held_out(net, held, n * length, count, 16), 4) for n, count in zip((1, longer), few, strict=True)
    )
    return {"operator": choice.name, "loss (nats/byte)": near, f"loss at {longer} x length": far, "parameters": size,
            "state (bytes)": net.state_bytes(), "tokens per second": round(rows * length / seconds)}  # fmt: skip


def arguments(description: str | None) -> argparse.Namespace:
    """--device, --quick, --folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps on tiny batches, for a look")
    parser.add_argument("--folder", default="benchmarks/results/real")
    return parser.parse_args()
