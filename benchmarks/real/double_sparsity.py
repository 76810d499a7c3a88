"""Double Sparsity on real text: calibrated channels against those of the prompt, random ones, and the least important.

python benchmarks/real/double_sparsity.py [--device cuda]
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from _reads import DEPTHS, figures, passkeys
from _streams import arguments, compare, load, tokens
from torch import Tensor

from qkv.bench.record import Figure, record
from qkv.caches._channels import Channels
from qkv.caches.double_sparsity import DoubleSparsity
from qkv.hosts import observe
from qkv.probes._key_channels import calibrate_channels


@torch.no_grad()
def recall(model, ids: Tensor, orders: dict[str, Channels], r: int, k: int) -> dict[str, list[float]]:
    """Per layer the share of the true top-k tokens (by the KV group's summed logits) that r channels find; last 16 queries."""
    found: dict[str, list[float]] = {name: [] for name in orders}

    def look(site, call) -> None:
        b, h, t, d = call.q.shape
        g = call.k.shape[1]
        q, keys = call.q[:, :, -16:].reshape(b, g, h // g, 16, d).sum(2).float(), call.k.float()
        best = (q @ keys.mT).topk(k, dim=-1).indices
        for name, channels in orders.items():
            order = torch.tensor(channels.order[site.layer], device=q.device)[:, :r]
            at = [x.gather(-1, order[None, :, None].expand(b, g, x.shape[2], r)) for x in (q, keys)]
            mine = (at[0] @ at[1].mT).topk(k, dim=-1).indices
            marked = torch.zeros(b, g, 16, t, dtype=torch.bool, device=q.device).scatter(-1, mine, True)
            found[name].append(round(marked.gather(-1, best).float().mean().item(), 4))

    with observe(model, look):
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    return found


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    prompt, new, windows, length = (256, 4, 1, 256) if a.quick else (4096, 64, 2, 4096)
    texts, factor, k = (4, 8, prompt // 16) if a.quick else (64, 8, prompt // 16)
    data = [{"input_ids": tokens(tokenizer, 512, 300000 + 600 * i)} for i in range(texts)]
    good = calibrate_channels(model, data)
    draw = torch.Generator().manual_seed(0)
    shuffled = [[torch.randperm(good.head_dim, generator=draw).tolist() for _ in layer] for layer in good.order]
    orders = {
        "calibrated": good, "random channels": dataclasses.replace(good, order=shuffled),
        "least important channels": dataclasses.replace(good, order=[[h[::-1] for h in layer] for layer in good.order]),
    }  # fmt: skip
    per_layer = recall(model, tokens(tokenizer, prompt, 20000), orders, good.head_dim // factor, k)
    with tempfile.TemporaryDirectory() as folder:
        base = f"double-sparsity:budget={k},channel_factor={factor},channels="
        methods: dict[str, object] = {
            name: base + str(c.save(Path(folder) / f"{i}.json")) for i, (name, c) in enumerate(orders.items())
        }
        methods |= {
            "calibrated, 16 bits": f"{methods['calibrated']},label_bits=16", "channels of the prompt": base + "prompt",
            "sinks + window": f"streamingllm:window={k - 4}",
        }  # fmt: skip
        table = compare(model, tokenizer, methods, prompt=prompt, new=new, windows=windows)
        some = ("calibrated", "channels of the prompt", "least important channels", "sinks + window")
        passkeys(
            model,
            tokenizer,
            table,
            {n: methods[n] for n in some},
            length=length,
            depths=DEPTHS[2:3] if a.quick else DEPTHS,
        )
    for row in table:
        mine = per_layer.get(row["method"])
        row["recall of the top tokens"] = round(sum(mine) / len(mine), 4) if mine else ""
    note = f"{k} of {prompt} tokens read by {good.head_dim // factor} of {good.head_dim} channels; {windows} x {new} tokens"
    found = figures(table, ["full", *some], note)
    found += [
        Figure(
            f"recall of the top {k}, {name}",
            round(sum(x) / len(x), 4),
            "",
            "mean over layers; last 16 queries of a text",
        )
        for name, x in per_layer.items()
    ]
    found += [
        Figure("recall of the calibrated channels per layer", " ".join(f"{x:.2f}" for x in per_layer["calibrated"]))
    ]
    record("double-sparsity", claim=DoubleSparsity.spec.shown, figures=found, table=table,
           command="python benchmarks/real/double_sparsity.py", seed=0, folder=a.folder)  # fmt: skip
    for row in table:
        print(row)
    print(per_layer)


if __name__ == "__main__":
    main()
