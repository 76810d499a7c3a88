"""ActQKV on real text: is the needle's block fetched, by which probe, and what that does to answers and perplexity.

python benchmarks/real/actqkv.py [--device cuda]
"""

from __future__ import annotations

import time

import torch
from _passkey import Hidden, hidden, score
from _streams import applied, arguments, clock, divergence, load, losses, perplexity, tokens

from qkv.bench.record import Figure, record
from qkv.caches.actqkv import ActQKV, activation_bias, probe_query
from qkv.hosts import observe

PROBES = ("activation", "mean", "last", "random")


@torch.no_grad()
def fetched(model, case: Hidden, *, window: int, block: int, sinks: int, local: int, most: list[int]) -> dict:
    """{(probe, n): share of the layers whose best n blocks hold one of the needle's}, for the window that ends the prompt."""
    ids = torch.cat((case.haystack, case.question), 1).to(model.device)
    start = (ids.shape[1] - 1) // window * window
    needle = set(range(case.begin // block, (case.end - 1) // block + 1))
    hits: dict = {(name, n): [] for name in PROBES for n in most}
    draw = torch.Generator().manual_seed(0)

    def look(site, call) -> None:
        rope = site.geometry.rope
        q, k = call.q[:, :, start:].float(), call.k.float()
        q = rope.rotate(q, -torch.arange(start, ids.shape[1], device=q.device).expand(1, q.shape[1], -1))
        k = rope.rotate(k, -torch.arange(k.shape[2], device=k.device).expand(1, k.shape[1], -1))
        blocks = k.shape[2] // block
        means = k[:, :, : blocks * block].unflatten(2, (blocks, block)).mean(3)  # [1, G, P, D]
        bias = activation_bias(q.transpose(1, 2).flatten(2))
        mean = q.mean(2)
        noise = torch.randn(mean.shape, generator=draw).to(q.device)
        probes = {
            "activation": probe_query(q, bias, 1.0),
            "mean": mean,
            "last": q[:, :, -1],
            "random": noise / noise.norm(dim=-1, keepdim=True) * mean.norm(dim=-1, keepdim=True),
        }
        free = torch.arange(-(-sinks // block), max(0, start - local) // block, device=q.device)
        for name, probe in probes.items():
            grouped = probe.unflatten(1, (k.shape[1], -1))  # [1, G, R, D]
            worth = (grouped @ means.mT).sum((1, 2))[0, free]
            order = free[worth.argsort(descending=True)].tolist()
            for n in most:
                hits[name, n].append(bool(needle & set(order[:n])))

    with observe(model, look):
        model(ids, use_cache=False, logits_to_keep=1)
    return {key: sum(x) / len(x) for key, x in hits.items()}


def main() -> None:
    a = arguments(__doc__)
    model, tokenizer = load(a)
    length, new, window, block, sinks, local = (4096, 96, 512, 64, 128, 512)
    depths, trials, most = (0.2, 0.4, 0.6, 0.8), 3, [4, 8, 16]
    if a.quick:
        length, new, window, block, sinks, local, depths, trials, most = 768, 8, 128, 16, 32, 64, (0.5,), 1, [4, 8]
    started = time.perf_counter()
    cases = hidden(tokenizer, length, depths, trials)
    sizes = {"window": window, "block": block, "sinks": sinks, "local": local, "most": most}
    every = [fetched(model, case, **sizes) for case in cases]
    free = ((length - 1) // window * window - local) // block - -(-sinks // block)
    table = []
    for name in PROBES:
        row: dict[str, object] = {"probe": name}
        for n in most:
            row[f"needle fetched, {n} blocks"] = round(sum(x[name, n] for x in every) / len(every), 4)
        table.append(row)
    clock("probes", started)
    budget = most[1] * block
    mine = {"window": window, "block_size": block, "sinks": sinks, "local": local, "budget": budget}
    settings = {
        "full": None,
        "activation": ActQKV(**mine),
        "mean": ActQKV(**mine, probe="mean"),
        "last": ActQKV(**mine, probe="last"),
        "activation, uniform": ActQKV(**mine, cutoff="uniform"),
        "sinks and window of that size": f"streamingllm:sinks={sinks},window={local + budget}",
    }
    asked = cases[: 2 * trials : trials] if a.quick else cases[::trials]
    ids, base, figures = tokens(tokenizer, length + new, 20000), torch.empty(0), []
    note = f"{new} tokens decoded after a prompt of {length}; {budget} of {length} tokens fetched"
    for name, method in settings.items():
        with applied(model, method):
            loss, logits = losses(model, ids, prompt=length, chunk=1)
            right = score(model, tokenizer, asked, new=6)
        base = logits if method is None else base
        kl, same = divergence(base, logits)
        figures += [
            Figure(f"perplexity, {name}", perplexity(loss), "", note),
            Figure(f"KL to full, {name}", kl, "nats/token", f"{note}; top-1 agreement {same}"),
            Figure(f"passkey, {name}", right, "", f"{len(asked)} depths at {length} tokens"),
        ]
        clock(name, started)
    chance = f"mean over layers and {len(cases)} prompts; of {free} blocks, of which the needle touches 1 or more"
    figures += [
        Figure(
            f"needle fetched by the {row['probe']} probe, {n} blocks", row[f"needle fetched, {n} blocks"], "", chance
        )  # type: ignore[arg-type]
        for row in table
        for n in most
    ]
    record("actqkv", claim="the activation probe fetches the needle's block more often than the mean query, and a random vector "
           "not more often than chance", figures=figures, table=table, command="python benchmarks/real/actqkv.py", seed=0,
           folder=a.folder)  # fmt: skip
    for row in table:
        print(row)
    for figure in figures:
        print(figure.name, figure.value)


if __name__ == "__main__":
    main()
