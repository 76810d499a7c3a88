"""When sinks emerge: small language models of bytes, trained from nothing, their sink rate measured as they learn.

Four layers, width 256, four heads, RMSNorm, rotary positions, SwiGLU; windows of 256 bytes of plays. Several seeds train at once
as one model whose every weight has a leading axis of seeds; nothing is shared between them, not even the clipping of gradients.

Axes: S seeds, B rows, T tokens, H heads, D head width, C width, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _recall import text_bytes
from _resume import kept
from _streams import clock
from torch import Tensor, nn

from qkv.bench.environment import write_json
from qkv.bench.record import Figure
from qkv.probes.attention_sink_emergence import reference, row_normalised

V, C, H, LAYERS, HIDDEN = 256, 256, 4, 4, 688
T, ROWS = 256, 64
PROBED, TEXTS = 64, 100


@dataclass(frozen=True)
class Variant:
    """One training run. attention: softmax, bias (a learned key with value 0), one (a logit of 0 with value 0), or sigmoid."""

    name: str
    attention: str = "softmax"
    rate: float = 4e-4
    decay: float = 0.1
    share: float = 1.0
    window: int | None = None


VARIANTS = {
    "a": Variant("softmax"),
    "h": Variant("softmax with a learned key bias", attention="bias"),
    "i": Variant("sigmoid, not normalised", attention="sigmoid"),
    "b": Variant("softmax, learning rate / 10", rate=4e-5),
    "c0": Variant("softmax, weight decay 0", decay=0.0),
    "c5": Variant("softmax, weight decay 0.5", decay=0.5),
    "d": Variant("softmax, 5 % of the data", share=0.05),
    "g": Variant("softmax, window of 16", window=16),
    "j": Variant("softmax off by one", attention="one"),
}


class Stack(nn.Module):
    """The models of all seeds; tokens ``[S, B, T]`` -> logits ``[S, B, T, V]``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, variant: Variant, seeds: Sequence[int]) -> None:
        super().__init__()
        self.variant = variant
        draws = [torch.Generator().manual_seed(s) for s in seeds]

        def normal(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.stack([0.02 * scale * torch.randn(shape, generator=g) for g in draws]))

        deep = (2 * LAYERS) ** -0.5
        self.embedding = normal(V, C)
        self.qkv = nn.ParameterList(normal(C, 3 * C) for _ in range(LAYERS))
        self.out = nn.ParameterList(normal(C, C, scale=deep) for _ in range(LAYERS))
        self.up = nn.ParameterList(normal(C, 2 * HIDDEN) for _ in range(LAYERS))
        self.down = nn.ParameterList(normal(HIDDEN, C, scale=deep) for _ in range(LAYERS))
        self.head = normal(C, V)
        self.norms = nn.Parameter(torch.ones(len(seeds), 2 * LAYERS + 1, C))
        self.bias = nn.ParameterList(normal(H, C // H) for _ in range(LAYERS if variant.attention == "bias" else 0))
        angle = torch.arange(T + 1)[:, None] * 10000.0 ** (-torch.arange(0, C // H, 2) / (C // H))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, see: Callable[[Tensor], None] | None = None) -> Tensor:
        """see: gets the attention map of each layer, ``[S, B, H, T, T]`` or with the bias as column 0 ``[S, B, H, T, 1 + T]``."""
        s, b, t = ids.shape
        places = ids + V * torch.arange(s, device=ids.device)[:, None, None]
        x = F.embedding(places.flatten(1), self.embedding.flatten(0, 1))  # [S, B T, C]
        for l in range(LAYERS):
            q, k, v = torch.bmm(self.norm(x, 2 * l), self.qkv[l]).chunk(3, -1)
            q, k, v = (y.reshape(s, b, t, H, C // H).transpose(2, 3) for y in (q, k, v))  # [S, B, H, T, D]
            q, k = self.rotated(q), self.rotated(k)
            if see is not None:
                with torch.autocast(q.device.type, enabled=False):
                    see(self.maps(q.float(), k.float(), l))
            y = self.attend(q, k, v.to(q.dtype), l).transpose(2, 3).reshape(s, b * t, C)
            x = x + torch.bmm(y, self.out[l])
            gate, up = torch.bmm(self.norm(x, 2 * l + 1), self.up[l]).chunk(2, -1)
            x = x + torch.bmm(F.silu(gate) * up, self.down[l])
        return torch.bmm(self.norm(x, 2 * LAYERS), self.head).unflatten(1, (b, t))

    def norm(self, x: Tensor, number: int) -> Tensor:
        """RMSNorm with the number-th weight."""
        return F.rms_norm(x, (C,), eps=1e-6) * self.norms[:, number, None]

    def rotated(self, x: Tensor) -> Tensor:
        """Rotary positions."""
        t = x.shape[-2]
        cos, sin = self.cos[:t].to(x.dtype), self.sin[:t].to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def seen(self, t: int, device: torch.device) -> Tensor:
        """Bool ``[T, T]``: causal, within the window."""
        age = torch.arange(t, device=device)[:, None] - torch.arange(t, device=device)
        return (age >= 0) & (age < (self.variant.window or t))

    def extra(self, like: Tensor, layer: int) -> Tensor | None:
        """The key that no token has, ``[S, B, H, 1, D]``, or None."""
        if self.variant.attention == "bias":
            return self.bias[layer][:, None, :, None].to(like.dtype).expand(*like.shape[:3], 1, -1)
        return like.new_zeros(*like.shape[:3], 1, like.shape[-1]) if self.variant.attention == "one" else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """The layer's attention, ``[S, B, H, T, D]``."""
        s, b, _, t, _ = q.shape
        if self.variant.attention == "sigmoid":
            weights = (q @ k.mT * q.shape[-1] ** -0.5).sigmoid() * self.seen(t, q.device)
            return weights.to(v.dtype) @ v
        more = self.extra(k, layer)
        if more is not None:  # one row and one column more keep the kernel's causal mask
            q, v = (F.pad(y, (0, 0, 1, 0)) for y in (q, v))
            k = torch.cat((more, k), 3)
        mask = None if self.variant.window is None else self.seen(t, q.device)
        out = F.scaled_dot_product_attention(
            *(y.flatten(0, 1) for y in (q, k, v)), attn_mask=mask, is_causal=mask is None
        )
        return out[..., -t:, :].unflatten(0, (s, b))

    def maps(self, q: Tensor, k: Tensor, layer: int) -> Tensor:
        """The map of the layer, written out."""
        t = q.shape[-2]
        more, seen = self.extra(k, layer), self.seen(t, q.device)
        if more is not None:
            k, seen = torch.cat((more, k), 3), F.pad(seen, (1, 0), value=True)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.variant.attention == "sigmoid":
            return row_normalised(scores.sigmoid() * seen)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@torch.no_grad()
def measured(net: Stack, held: Tensor) -> dict[str, list[float]]:
    """Per seed: held-out loss (nats a byte), rate of token 0 (%, its alpha above 0.3), its mean alpha, the mass of the bias."""
    seeds, rates, alphas, biases = len(net.norms), [], [], []

    def windows(count: int, length: int) -> Tensor:
        at = torch.linspace(0, len(held) - length - 2, count, device=held.device).long()[:, None]
        return held[at + torch.arange(length + 1, device=held.device)]

    def see(maps: Tensor) -> None:
        bias = maps.shape[-1] - maps.shape[-2]
        alpha = reference(maps[..., bias:])[..., 0]  # [S, B, H]
        rates.append((alpha > 0.3).double().mean((1, 2)))
        alphas.append(alpha.double().mean((1, 2)))
        biases.append(maps[..., :bias].double().sum(-1).mean((1, 2, 3)))

    with precision(held.device.type):
        net(windows(TEXTS, PROBED)[None, :, :-1].expand(seeds, -1, -1), see)
        ids = windows(ROWS, T)
        logits = net(ids[None, :, :-1].expand(seeds, -1, -1)).float()
    loss = torch.stack([F.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten()) for x in logits])
    mean = {n: torch.stack(x).mean(0) for n, x in (("rate", rates), ("alpha", alphas), ("bias", biases))}
    found = {"loss": loss, "rate": 100 * mean["rate"], "alpha": mean["alpha"], "bias": mean["bias"]}
    return {name: [round(y, 5) for y in x.tolist()] for name, x in found.items()}


def precision(device: str) -> Any:
    """bfloat16 products on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def train(
    variant: Variant, seeds: Sequence[int], steps: int, every: int, device: str, rows: int = ROWS
) -> dict[str, Any]:
    """Train all seeds at once: the curve by step, and seconds."""
    net = Stack(variant, seeds).to(device)
    data, held = text_bytes(device)
    data = data[: int(variant.share * len(data))]
    draws = [torch.Generator(device).manual_seed(1000 + s) for s in seeds]
    decayed = [p for n, p in net.named_parameters() if not n.startswith(("norms", "bias"))]
    plain = [p for n, p in net.named_parameters() if n.startswith(("norms", "bias"))]
    groups = [{"params": decayed, "weight_decay": variant.decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=variant.rate, betas=(0.9, 0.95), fused=device == "cuda")
    curve, start, warm = [], time.perf_counter(), max(1, min(200, steps // 10))
    span = torch.arange(T + 1, device=device)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            curve.append({"step": step} | measured(net, held))
            spent = time.perf_counter() - start
            print(f"  {variant.name}, step {step}: {curve[-1]}, {spent:.0f} s", flush=True)
        if step == steps:
            break
        at = torch.stack([torch.randint(len(data) - T - 1, (rows,), generator=g, device=device) for g in draws])
        ids = data[at[..., None] + span]
        with precision(device):
            logits = net(ids[..., :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 2), ids[..., 1:].flatten()) * len(
            seeds
        )  # a sum of the seeds' means
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        clip(net)
        share = min(1.0, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = variant.rate * share
        optimiser.step()
    return {"variant": variant.name, "seeds": list(seeds), "seconds": time.perf_counter() - start, "curve": curve}


def clip(net: Stack, most: float = 1.0) -> None:
    """Each seed's gradient to a norm of at most `most`."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
    factor = (most / norm.clamp(min=1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *(1,) * (g.ndim - 1)))


def emergence(a: argparse.Namespace, names: Sequence[str], steps: int, since: float) -> list[Figure]:
    """Train the named variants (each is kept as soon as it is done) and say what became of token 0."""
    seeds, every, rows = (0, 1, 2), max(1, steps // 16), ROWS
    if a.quick:
        seeds, steps, every, rows = (0, 1), 2, 1, 2
    runs = []
    for name in names:
        variant = VARIANTS[name]
        runs.append(
            kept(a, f"emergence-{name}-{steps}", lambda v=variant: train(v, seeds, steps, every, a.device, rows))
        )
        clock(f"{variant.name}: {runs[-1]['curve'][-1]}", since)
        write_json(Path(a.folder).parent / "emergence" / "curves.json", {"steps": steps, "rows": rows, "runs": runs})
    plot(runs, Path(a.folder) / "attention-sink-emergence-training.png")
    return [figure for run in runs for figure in figures(run)]


def figures(run: dict[str, Any]) -> list[Figure]:
    """The end of one variant's run, with its way there in the note."""
    end = run["curve"][-1]

    def each(values: Sequence[float]) -> str:
        return ", ".join(f"{x:.3g}" for x in values)

    way = ", ".join(
        f"{c['step']}: {statistics.mean(c['rate']):.1f}" for c in run["curve"][:: max(1, len(run["curve"]) // 8)]
    )
    out = [
        Figure(f"trained, {run['variant']}: sink rate of token 0", round(statistics.mean(end["rate"]), 2), "%",
               f"seeds: {each(end['rate'])}; mean by step: {way}"),
        Figure(f"trained, {run['variant']}: attention to token 0", round(statistics.mean(end["alpha"]), 4), "",
               f"mean alpha over heads; seeds: {each(end['alpha'])}"),
        Figure(f"trained, {run['variant']}: held-out loss", round(statistics.mean(end["loss"]), 4), "nats/byte",
               f"seeds: {each(end['loss'])}; {end['step']} steps of {ROWS} x {T} bytes in {run['seconds']:.0f} s"),
    ]  # fmt: skip
    if any(end["bias"]):
        note = f"mean over queries and heads; seeds: {each(end['bias'])}"
        out.append(
            Figure(
                f"trained, {run['variant']}: attention to the bias", round(statistics.mean(end["bias"]), 4), "", note
            )
        )
    return out


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Sink rate of token 0 by step, a line per seed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, run in enumerate(runs):
        for s in range(len(run["seeds"])):
            steps, rates = ([c["step"] for c in run["curve"]], [c["rate"][s] for c in run["curve"]])
            axes.plot(steps, rates, color=f"C{i}", label=run["variant"] if s == 0 else None, linewidth=1.2)
    axes.set(xlabel="steps", ylabel="sink rate of token 0 (%)", title="When the sink emerges")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
