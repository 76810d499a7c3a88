"""Hydra on real text as a masked language model, on pictures read pixel by pixel, and its speed against softmax attention.

python benchmarks/real/hydra.py [--device cuda]

An encoder of four blocks over bytes guesses the 15 % that are hidden. The blocks differ in one thing: Hydra's shifted scans, the
same scans added without a shift (so that a token's own contribution counts in both), or the forward scan alone.
"""

from __future__ import annotations

import math
import statistics
import time

import torch
import torch.nn.functional as F
from _vision import Choice, arguments, compare, digits
from torch import Tensor, nn

import qkv
from qkv.bench.assets import long_text
from qkv.bench.fitting import fit
from qkv.bench.record import Figure, record
from qkv.layers._hydra import HydraLayer
from qkv.ops._common.decayed import decayed_linear_attention

HIDDEN, MASK = 0.15, 256


def forward_only(
    q: Tensor, k: Tensor, v: Tensor, *, dt: Tensor, rate: Tensor, diagonal: Tensor, **rest: Tensor
) -> Tensor:
    """The forward scan, each token reading itself as well, and the diagonal."""
    out = decayed_linear_attention(
        q, k, v * dt.unsqueeze(-1), log_decay=dt * rate[:, None], chunk_size=256, sub_chunk=1
    ).out
    return out + diagonal.unsqueeze(-1) * v


def added(q: Tensor, k: Tensor, v: Tensor, *, dt: Tensor, back_dt: Tensor, back_q: Tensor, back_k: Tensor, rate: Tensor,
          diagonal: Tensor, **rest: Tensor) -> Tensor:  # fmt: skip
    """Both scans without the shift, added, and the diagonal."""
    none = torch.zeros_like(diagonal)
    turned = (x.flip(2) for x in (back_q, back_k, v))
    back = forward_only(*turned, dt=back_dt.flip(2), rate=rate, diagonal=none).flip(2)
    return forward_only(q, k, v, dt=dt, rate=rate, diagonal=diagonal) + back


class Attention(nn.Module):
    """Softmax attention with rotated positions, as a yardstick."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = (
            heads,
            nn.Linear(width, 3 * width, bias=False),
            nn.Linear(width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        d, n = q.shape[-1], q.shape[-2]
        angle = torch.arange(n, device=x.device)[:, None] * 1e4 ** (-torch.arange(0, d, 2, device=x.device) / d)

        def turned(z: Tensor) -> Tensor:
            even, odd = z[..., ::2], z[..., 1::2]
            return torch.cat((even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()), -1)

        return self.out(F.scaled_dot_product_attention(turned(q), turned(k), v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Bytes to logits of bytes."""

    def __init__(self, mixers: list[nn.Module], width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.mixers = nn.ModuleList(mixers)
        self.up = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in mixers)
        self.down = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in mixers)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for mixer, up, down in zip(self.mixers, self.up, self.down, strict=True):
            x = x + mixer(F.rms_norm(x, x.shape[-1:]))
            x = x + down(F.silu(up(F.rms_norm(x, x.shape[-1:]))))
        return self.head(F.rms_norm(x, x.shape[-1:]))


def encoder(name: str, width: int, parameters: int, seed: int) -> Encoder:
    """Four blocks; the width of the channel mixers makes the number of parameters the same."""
    kinds = {"hydra": None, "scans added": added, "forward scan only": forward_only}

    def mixers() -> list[nn.Module]:
        if name == "softmax":
            return [Attention(width, 4) for _ in range(4)]
        return [HydraLayer(width, state_size=16, head_width=32, operator=kinds[name]) for _ in range(4)]

    bare = sum(p.numel() for p in Encoder(mixers(), width, 1).parameters())
    torch.manual_seed(seed)
    return Encoder(mixers(), width, 1 + round((parameters - bare) / (8 * width)))


def hidden(data: Tensor, rows: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows of bytes with some hidden, and targets of -1 where nothing is asked."""
    at = torch.randint(len(data) - length, (rows, 1), generator=rng, device=data.device)
    ids = data[at + torch.arange(length, device=data.device)].long()
    gone = torch.rand(ids.shape, generator=rng, device=data.device) < HIDDEN
    return ids.masked_fill(gone, MASK), ids.masked_fill(~gone, -1)


def masked(name: str, a, seed: int) -> tuple[float, float, int]:
    """Held-out loss (nats a hidden byte), ms a step, parameters."""
    steps, rows, length = (2, 2, 64) if a.quick else (600, 32, 256)
    data = torch.frombuffer(bytearray(long_text().encode()), dtype=torch.uint8).to(a.device)
    train, held = data[: -len(data) // 10], data[-len(data) // 10 :]
    net = encoder(name, 128, 1_000_000, seed).to(a.device)
    rng = torch.Generator(a.device).manual_seed(seed)

    def loss(ids: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(net(ids).flatten(0, 1).float(), target.flatten(), ignore_index=-1)

    done = fit(net, loss, lambda i: hidden(train, rows, length, rng), steps, rate=2e-3, decay=0.05)
    rng, losses = torch.Generator(a.device).manual_seed(1), []
    with torch.no_grad():
        for _ in range(1 if a.quick else 20):
            ids, target = hidden(held, rows, length, rng)
            losses.append(loss(ids, target).item())
    print(
        f"  {name}, seed {seed}: {statistics.mean(losses):.4f} nats a byte, {1e3 * done.seconds:.1f} ms a step {done.reason}",
        flush=True,
    )
    return statistics.mean(losses), 1e3 * done.seconds, sum(p.numel() for p in net.parameters())


@torch.no_grad()
def speed(a) -> list[Figure]:
    """Forward time of the mixers alone, 8k and 32k tokens, heads of 64, against torch's softmax attention."""
    figures = []
    kind = torch.bfloat16 if a.device.startswith("cuda") else torch.float32
    for n in (256,) if a.quick else (8192, 32768):
        h = 4
        q, k, v, bq, bk = (torch.randn(1, h, n, 64, device=a.device, dtype=kind) for _ in range(5))
        dt, back = (0.1 * torch.rand(1, h, n, device=a.device, dtype=kind) for _ in range(2))
        rate = -torch.ones(h, device=a.device, dtype=kind)
        more = {"dt": dt, "back_dt": back, "rate": rate, "back_q": bq, "back_k": bk}
        times: dict[str, float] = {"hydra": math.inf, "softmax": math.inf}
        for _ in range(5):
            for name in times:
                start = time.perf_counter()
                if name == "hydra":
                    qkv.attention(q, k, v, method="hydra", causal=False, **more)
                else:
                    F.scaled_dot_product_attention(q, k, v)
                if a.device.startswith("cuda"):
                    torch.cuda.synchronize()
                times[name] = min(times[name], time.perf_counter() - start)
        note = f"one row, {h} heads of 64, state 64, forward, {str(kind).removeprefix('torch.')} on {a.device.split(':')[0]}"
        figures += [Figure(f"{n} tokens, {name}", round(1e3 * best, 3), "ms", note) for name, best in times.items()]
    return figures


def main() -> None:
    """Train, time, record."""
    a = arguments(__doc__)
    table, seeds = [], 1 if a.quick else 3
    for name in ("hydra", "scans added", "forward scan only", "softmax"):
        found = [masked(name, a, seed) for seed in range(seeds)]
        losses = [x[0] for x in found]
        table.append({
            "mixer": name, "loss (nats/hidden byte)": round(statistics.mean(losses), 4),
            "spread over seeds": round(max(losses) - min(losses), 4), "ms per step": round(found[0][1], 2),
            "parameters": found[0][2],
        })  # fmt: skip
    note = "plays, 15 % of the bytes hidden, 256 bytes, held out, equal parameters and steps, 3 seeds"
    figures = [Figure(f"loss, {row['mixer']}", row["loss (nats/hidden byte)"], "nats/byte", note) for row in table]
    data = digits(a.device)
    choices = [Choice("softmax", "full"), Choice("hydra", "hydra", key_width=16)]
    for name, result in compare(choices, data, a, steps=250).items():
        said = "64 pixels in a row, 3 seeds, equal parameters and steps"
        figures.append(Figure(f"accuracy, digits, {name}", result.row["accuracy"], "", said))
    figures += speed(a)
    claim = "both directions beat one, and the shifted scans are no worse than scans that are added"
    record("hydra", claim=claim, figures=figures, table=table, command="python benchmarks/real/hydra.py", seed=0,
           folder=a.folder)  # fmt: skip
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
