r"""TransMLA: pretrained grouped-query attention becomes multi-head latent attention.

    merge    k in R^L, L = G D, all heads as one key; q_h acts on block h // (H/G): the same scores
    rotate   per group of f neighbouring frequencies, U = eigenvectors of E[z z^T] over the G f (real, imaginary) pairs z, by
             falling energy; k' = T k with T orthogonal. f = 1 commutes with RoPE: the same scores
    drop     the first rope_dim channels of k' keep RoPE (k_rope, one key for all heads); the others lose it (k_nope)
    compress z = [k_nope / rho ; v], rho = mean norm of a k_nope channel over that of a v channel; R = eigenvectors of E[z z^T];
             c = R^T z cut to kv_rank; W_UK, W_UV = the blocks of R, cut alike

Only `drop` and the cut are approximate. The collapse c = D / rope_dim > 1 rotates the kept component of frequency group j by
every c-th frequency. rope_dim may also be m D: then m components per frequency keep RoPE, and with m = G none is dropped, so at
full rank (2 L - rope_dim) the converted model is its source. c + k_rope (kv_rank + rope_dim numbers a token) replace 2 L.

Axes: B batch, H query heads, G key/value heads, T tokens, D head width, P = D/2 frequencies theta_p, J = P/f groups.
arXiv:2502.07864. Unlike the released code: the latent is cached, not expanded keys and values; values weigh in rho with all their
channels; the norm's weight is the mean RMS and not its reciprocal; pairs stay (i, i + D/2) throughout; the up-projection is
stored once per KV head, not once per query head; multiples of I are not added before an eigendecomposition they cannot change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from qkv.convert._common.attention import (
    Moments,
    perplexity,
    plain_projections,
    quiet,
    real_tokens,
    record,
    rotated,
    run,
    softmax_scales,
)
from qkv.convert._common.saving import noted, saved
from qkv.core.attend import causal_mask
from qkv.core.cache import Geometry, require
from qkv.core.conversion import Conversion, ConversionSpec, batches
from qkv.core.errors import InvalidInput, SavedDataError
from qkv.core.site import Site
from qkv.core.spec import Limit, param
from qkv.layers.mla import MLAShape


def reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, basis: Tensor, *, rope_dim: int, scale: float
) -> Tensor:
    """Causal attention after merge, rotate and drop, written with the joint key.

    q ``[B, H, T, D]``, k and v ``[B, G, T, D]`` before RoPE; cos, sin ``[B|1, T, D]`` of the source; basis: T ``[L, L]``. Returns
    ``[B, H, T, D]``. With a basis of `components` at f = 1 and rope_dim = L this is the source's attention.
    """
    (h, d), g = q.shape[1::2], k.shape[1]
    joint = k.transpose(1, 2).flatten(2) @ basis.T  # [B, T, L]
    blocks = basis.unflatten(1, (g, d)).repeat_interleave(h // g, dim=1)  # [L, H, D]
    query = torch.einsum("bhtd,lhd->bhtl", q, blocks)
    stride, repeat = max(1, d // rope_dim), max(1, rope_dim // d)
    c, s = (x[..., : d // 2 : stride].repeat(1, 1, 2 * repeat) for x in (cos, sin))
    turn = [torch.cat((rotated(x[..., :rope_dim], c, s), x[..., rope_dim:]), -1) for x in (query, joint.unsqueeze(1))]
    scores = (turn[0] @ turn[1].mT * scale).masked_fill(~causal_mask(q.shape[2], q.shape[2], q.device), -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(h // g, dim=1)


# -- the formula ------------------------------------------------------------------------------------------------------


def rorope(keys: Tensor, kv_heads: int, head_dim: int, freqfold: int) -> Tensor:
    """U of every frequency group ``[J, G f, G f]``, columns by falling energy, from the keys' second moments ``[L, L]``.

    Rows are (head, frequency within the group). The real and the imaginary part of a pair are two samples of one vector.
    """
    f = freqfold
    x = keys.reshape(kv_heads, 2, -1, f, kv_heads, 2, head_dim // 2 // f, f)
    covariance = torch.einsum("gcjshcjt->jgsht", x).flatten(3).flatten(1, 2)  # [J, G f, G f]
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1)


def components(vectors: Tensor, kv_heads: int, head_dim: int, freqfold: int, rope_dim: int) -> Tensor:
    """T ``[L, L]``: rows are new key channels, columns those of the joint key (head, then channel).

    The first rope_dim rows are the leading components of every group, real parts then imaginary parts, ordered so that channel i
    turns with frequency ``(i * max(1, D / rope_dim)) mod P``; the rest follow.
    """
    groups, width = vectors.shape[:2]
    lead, repeat = rope_dim * freqfold // head_dim, max(1, rope_dim // head_dim)
    rows = vectors.mT.reshape(groups, width, kv_heads, freqfold)
    part, group = (
        torch.eye(2, dtype=rows.dtype, device=rows.device),
        torch.eye(groups, dtype=rows.dtype, device=rows.device),
    )
    t = torch.einsum("jigs,pP,jJ->pjigPJs", rows, part, group).reshape(2, groups, width, -1)  # [2, J, G f, L]
    kept = t[:, :, :lead].reshape(2, groups, repeat, lead // repeat, -1).transpose(1, 2)
    length = t.shape[-1]
    return torch.cat((kept.reshape(rope_dim, length), t[:, :, lead:].reshape(length - rope_dim, length)))


def balance_ratio(kv: Tensor, t: Tensor, rope_dim: int, balance: float | None) -> float:
    """The ratio rho from the second moments ``[2L, 2L]``; 1 without balancing or without channels to balance."""
    n = t.shape[0]
    nope = t[rope_dim:]
    if balance is None or not nope.shape[0]:
        return 1.0
    norms = [x.clamp(min=0).sqrt().mean() for x in (((nope @ kv[:n, :n]) * nope).sum(-1), kv[n:, n:].diagonal())]
    return float(norms[0] / norms[1]) * balance if min(norms) > 0 else 1.0


def joint_basis(kv: Tensor, t: Tensor, rope_dim: int, rho: float) -> Tensor:
    """R ``[2L - rope_dim, 2L - rope_dim]`` of z = [k_nope / rho ; v], columns by falling energy."""
    n = t.shape[0]
    to_z = torch.block_diag(t[rope_dim:] / rho, torch.eye(n, dtype=t.dtype, device=t.device))
    return torch.linalg.eigh(to_z @ kv @ to_z.T).eigenvectors.flip(-1)


def weights(
    module: Any, shape: MLAShape, t: Tensor, r: Tensor, rho: float, scale: float, q: Tensor | None
) -> dict[str, Tensor]:
    """The MLA layer's tensors, float64, from the source's projections. r: ``[2L - rope_dim, kv_rank]`` cut of R.

    scale: the source's softmax scale; the layer's own is folded into the queries. q: ``[H D, q_rank]`` cut of the queries'
    eigenvectors, or None. Biases travel as one more column.
    """
    wq, wk, wv = (_with_bias(getattr(module, n)) for n in ("q_proj", "k_proj", "v_proj"))
    (h, g, p), length = (shape.heads, shape.kv_heads, shape.rope_dim), t.shape[0]
    d = length // g
    own = (shape.nope_dim + p) ** -0.5
    down = r.T @ torch.cat((t[p:] @ wk / rho, wv))  # [r, W (+ 1)]
    out = _split("kv_a_proj_with_mqa", torch.cat((down, t[:p] @ wk)), shape.bias)
    blocks = t.unflatten(1, (g, d)).transpose(0, 1)  # [G, L, D]: what of a head's key each new channel takes
    nope = rho * blocks[:, p:].mT @ r[: length - p] if shape.nope_dim else r.new_zeros(g, 0, r.shape[1])
    value = r[length - p :].unflatten(0, (g, d))
    out["kv_b_proj.weight"] = torch.cat((nope, value), dim=1).flatten(0, 1)
    heads = (wq if q is None else q).unflatten(0, (h, d))  # [H, D, W] or [H, D, q_rank]
    rope = blocks[:, :p].repeat_interleave(h // g, dim=0) @ heads  # [H, p, .]
    up = torch.cat((heads, rope) if shape.nope_dim else (rope,), dim=1).flatten(0, 1) * (scale / own)
    if q is None:
        out |= _split("q_proj", up, shape.bias)
    else:
        out |= _split("q_a_proj", q.T @ wq, shape.bias) | {"q_b_proj.weight": up}
    return out | {f"o_proj.{n}": x.detach().to(torch.float64, copy=True) for n, x in module.o_proj.named_parameters()}


def _with_bias(linear: Any) -> Tensor:
    w = linear.weight.detach().to(torch.float64)
    return w if linear.bias is None else torch.cat((w, linear.bias.detach().to(torch.float64).unsqueeze(-1)), dim=-1)


def _split(name: str, w: Tensor, bias: bool) -> dict[str, Tensor]:
    return {f"{name}.weight": w[:, :-1], f"{name}.bias": w[:, -1]} if bias else {f"{name}.weight": w}


FOLD_TOKENS = 8192  # of the calibration data, on which the candidates for `freqfold` are compared


# -- the method -------------------------------------------------------------------------------------------------------


def _source(site: Site, module: Any) -> dict[str, Any]:
    """The sizes of an MLA layer that its source decides."""
    return {
        "width": module.q_proj.in_features,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "value_dim": site.value_dim,
        "bias": module.q_proj.bias is not None,
        "out_bias": module.o_proj.bias is not None,
    }


def converted_module(site: Site, module: Any, shape: MLAShape, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The converted module around `tensors`; nothing else is allocated."""
    from qkv.hosts.transformers_mla import TransformersMLA

    out = TransformersMLA(
        shape, module.config, module.layer_idx, stride=max(1, site.head_dim // shape.rope_dim),
        repeat=max(1, shape.rope_dim // site.head_dim), full_width=site.kv_heads * (site.head_dim + site.value_dim),
        dropout=getattr(module, "attention_dropout", 0.0), device="meta",
    )  # fmt: skip
    out.load_state_dict(dict(tensors), assign=True)
    out.requires_grad_(module.q_proj.weight.requires_grad)
    return out.train(module.training)


def _rungs(length: int) -> list[int]:
    return sorted({max(1, length * k // 6) for k in range(1, 7)})


def _folds(head_dim: int, rope_dim: int) -> list[int]:
    collapse, pairs = max(1, head_dim // rope_dim), head_dim // 2
    return [f for f in range(collapse, pairs + 1, collapse) if pairs % f == 0]


def _doubled(fold: int, head_dim: int, rope_dim: int) -> bool:
    times = fold // max(1, head_dim // rope_dim)
    return times & (times - 1) == 0


def _frequencies(site: Site, rope_dim: int) -> list[float]:
    """The frequencies of the kept channels, ``rope_dim / 2`` numbers."""
    assert site.geometry.rope is not None
    mine = site.geometry.rope.frequencies[:: max(1, site.head_dim // rope_dim)]
    return mine.repeat(max(1, rope_dim // site.head_dim)).tolist()


def _sizes(site: Site, module: Any, shape: MLAShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the layer and its shape; allocates nothing."""
    from qkv.layers.mla import LatentProjections

    return {k: tuple(v.shape) for k, v in LatentProjections(shape, device="meta").state_dict().items()}


def _some(data: Sequence[Mapping[str, Tensor]], tokens: int) -> list[Mapping[str, Tensor]]:
    """The first rows of the data, until they hold `tokens`."""
    out, left = [], tokens
    for batch in data:
        rows = min(batch["input_ids"].shape[0], -(-left // batch["input_ids"].shape[1]))
        out.append({k: v[:rows] for k, v in batch.items()})
        left -= rows * batch["input_ids"].shape[1]
        if left <= 0:
            break
    return out


def _set_norms(
    model: Any, sites: Sequence[Site], data: Sequence[Mapping[str, Tensor]], parts: Mapping[str, Any]
) -> None:
    """Constant norm weights: the mean RMS of the source's latents, which leaves them as they are, on average."""
    sums: dict[tuple[str, str], list[float]] = {}
    now: dict[str, Tensor] = {}
    handles = []

    def hook(site: str, shape: MLAShape, tensors: dict[str, Tensor]) -> Any:
        def run_hook(module: Any, args: Any) -> None:
            x = args[0][now["real"].to(args[0].device)].to(torch.float64)
            for norm, source in (("kv_a_layernorm", "kv_a_proj_with_mqa"), ("q_a_layernorm", "q_a_proj")):
                if f"{norm}.weight" in tensors:
                    rank = tensors[f"{norm}.weight"].shape[0]
                    y = x @ tensors[f"{source}.weight"][:rank].T
                    y = y + tensors[f"{source}.bias"][:rank] if shape.bias else y
                    total = sums.setdefault((site, norm), [0.0, 0.0])
                    total[0] += float(y.square().mean(-1).sqrt().sum())
                    total[1] += y.shape[0]

        return run_hook

    try:
        for s in sites:
            shape, _, tensors = parts[s.name]
            handles.append(model.get_submodule(s.name).k_proj.register_forward_pre_hook(hook(s.name, shape, tensors)))
        with quiet(model):
            for batch in data:
                now["real"] = real_tokens(batch)
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for (site, norm), (total, count) in sums.items():
        parts[site][2][f"{norm}.weight"].fill_(total / count)


@final
@dataclass(frozen=True, kw_only=True)
class TransMLA(Conversion):
    """Sizes of the latent, and how the rotation is folded. After it, heal: `qkv.distill.heal` (see `spec.heal`)."""

    spec: ClassVar[ConversionSpec] = ConversionSpec(
        id="transmla",
        title="TransMLA: Multi-head Latent Attention Is All You Need",
        paper="arXiv:2502.07864",
        source="code",
        summary="Turns the keys and values of a rotary attention into one latent and one shared rotary key per token.",
        limits=(
            Limit("full", {}, "rope_dim = kv_heads * head_dim and kv_rank = kv_heads * head_dim: the source, up to rounding"),
        ),
        shown="SmolLM2: exact at full rank, perplexity rises smoothly as the rank falls, RoRoPE far better than dropping RoPE",
        honest="unhealed, SmolLM2 goes from perplexity 39 to 43 by dropping RoPE, to 58 at half the cache; no faster on a CPU",
        stores=True,
        exact=lambda x: {"rope_dim": x.kv_heads * x.head_dim, "kv_rank": x.kv_heads * x.head_dim, "q_rank": None,
                         "freqfold": 1, "norm": False},
        small=lambda x: {"rope_dim": x.head_dim, "kv_rank": x.kv_heads * x.head_dim - x.head_dim // 2},
        ladder=lambda x: [
            {"rope_dim": x.kv_heads * x.head_dim, "kv_rank": r, "q_rank": None, "freqfold": 1, "norm": False}
            for r in _rungs(x.kv_heads * x.head_dim)
        ],
        heal={
            "objective": "healing",
            "arguments": {
                "max_steps": 2000, "per_device_train_batch_size": 32, "learning_rate": 1e-4, "lr_scheduler_type": "cosine",
                "warmup_steps": 0.03, "weight_decay": 0.01,
            },
            "row": 512, "trains": "the converted layers",
            "paper": "cross-entropy on 6e9 tokens of pretraining text, learning rate 2e-5 cosine, warm-up 3 %, batch 128 x 4096",
        },
        trials=({"freqfold": 1}, {"freqfold": "auto", "q_rank": 19, "norm": True}, {"freqfold": 2, "balance": None}),
    )  # fmt: skip
    kv_rank: int | None = param(
        None,
        "numbers of the latent a token; None: 512 (the paper's), or half the full rank 2 L - rope_dim where less",
        low=1,
    )
    rope_dim: int = param(64, "channels that keep RoPE: head_dim / c, or head_dim * m up to all of them", low=2)
    q_rank: int | None = param(None, "width of a latent for queries too; None: queries are projected at once", low=1)
    freqfold: int | Literal["auto"] = param(
        "auto",
        "neighbouring frequencies rotated as one; auto: doubled while the perplexity on the data (its first 8192 tokens) falls",
        low=1,
    )
    balance: float | None = param(
        1.0, "factor on rho, which levels keys and values; None: no levelling (rho = 1)", low=1e-6
    )
    norm: bool = param(False, "RMSNorm on the latents, near identity at first (as DeepSeek's layers have it)")

    def validate(self) -> None:
        """An even rotary width."""
        require(
            self.rope_dim % 2 == 0, f"transmla: rope_dim={self.rope_dim} must be even: rotary channels come in pairs"
        )

    def fits(self, site: Site, module: Any) -> str | None:
        """See `Conversion.fits`."""
        reason = plain_projections(site, module)
        if reason is not None:
            return reason
        g, d, p = site.kv_heads, site.head_dim, self.rope_dim
        length = g * d
        valid = [x for x in range(2, d, 2) if d % x == 0] + [d * m for m in range(1, g + 1)]
        if p not in valid:
            return f"rope_dim={p} must be head_dim / c or head_dim * m: one of {', '.join(map(str, valid))}"
        if self.rank(site.geometry) > 2 * length - p:
            return f"kv_rank={self.kv_rank} exceeds the full rank 2 * {length} - {p} = {2 * length - p}"
        if self.freqfold != "auto" and self.freqfold not in _folds(d, p):
            return (
                f"freqfold={self.freqfold} must divide the {d // 2} frequencies and be a multiple of the collapse "
                f"head_dim / rope_dim = {max(1, d // p)}: one of {', '.join(map(str, _folds(d, p)))}"
            )
        full = min(site.heads * d, module.q_proj.in_features)
        if self.q_rank is not None and self.q_rank > full:
            return f"q_rank={self.q_rank} exceeds the full rank {full} of the queries"
        return None

    def rank(self, geometry: Geometry) -> int:
        """The latent's width at a site."""
        full = 2 * geometry.kv_heads * geometry.head_dim - self.rope_dim
        return min(512, full // 2) if self.kv_rank is None else self.kv_rank

    def build(self, model: Any, sites: Sequence[Site], data: Any) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        """See `Conversion.build`."""
        given = batches(data, self.id, model)
        scales = softmax_scales(model, sites, given[0], self.id)
        moments = record(model, sites, given, self.id, queries=self.q_rank is not None)
        tokens = min(m.tokens for m in moments.values())
        need = max(self.rank(s.geometry) for s in sites)
        if tokens < need:
            raise InvalidInput(
                f"{self.id}: data= holds {tokens} tokens, fewer than the kv_rank={need} directions to be found; some 30 thousand "
                "tokens of ordinary text serve well"
            )
        fold, tried = self._fold(model, sites, given, moments, scales)
        parts = {
            s.name: self.assemble(s, model.get_submodule(s.name), moments[s.name], scales[s.name], fold) for s in sites
        }
        if self.norm:
            _set_norms(model, sites, given, parts)
        built, facts = {}, {}
        for s in sites:
            module, (shape, rho, tensors) = model.get_submodule(s.name), parts[s.name]
            like = module.q_proj.weight
            made = {k: v.to(like.device, like.dtype).contiguous() for k, v in tensors.items()}
            if any(not bool(torch.isfinite(x).all()) for x in made.values()):
                raise InvalidInput(f"{self.id}: the converted weights of {s.name} do not fit into {like.dtype}")
            built[s.name] = converted_module(s, module, shape, made)
            facts[s.name] = {"shape": shape.to_dict(), "rope_frequencies": _frequencies(s, self.rope_dim), "rho": rho}
        return built, {"freqfold": fold, "tokens": tokens, "perplexity": tried, "sites": facts}

    def assemble(
        self, site: Site, module: Any, moments: Moments, scale: float, fold: int, basis: Tensor | None = None
    ) -> tuple[MLAShape, float, dict[str, Tensor]]:
        """Shape, rho and tensors (float64) of one converted site. basis: T, or None for RoRoPE's."""
        g, d, p = site.kv_heads, site.head_dim, self.rope_dim
        length, rank = g * d, self.rank(site.geometry)
        t = components(rorope(moments.kv[:length, :length], g, d, fold), g, d, fold, p) if basis is None else basis
        rho = balance_ratio(moments.kv, t, p, self.balance)
        r = joint_basis(moments.kv, t, p, rho)[:, :rank]
        q = None
        if self.q_rank is not None:
            assert moments.q is not None
            q = torch.linalg.eigh(moments.q).eigenvectors.flip(-1)[:, : self.q_rank]
        shape = MLAShape(
            **_source(site, module), kv_rank=rank, rope_dim=p, nope_dim=d if p < length else 0, q_rank=self.q_rank,
            norm=self.norm, eps=float(getattr(module.config, "rms_norm_eps", 1e-6)),
        )  # fmt: skip
        tensors = weights(module, shape, t, r, rho, scale, q)
        if self.norm:
            ranks = {"kv_a_layernorm.weight": rank} | ({} if q is None else {"q_a_layernorm.weight": q.shape[1]})
            tensors |= {name: torch.ones(n, dtype=torch.float64, device=t.device) for name, n in ranks.items()}
        return shape, rho, tensors

    def _fold(
        self, model: Any, sites: Sequence[Site], data: Sequence[Mapping[str, Tensor]], moments: Mapping[str, Moments],
        scales: Mapping[str, float],
    ) -> tuple[int, dict[str, float]]:  # fmt: skip
        """The fold, and for ``auto`` the perplexities tried: doubled from the collapse on while it improves."""
        if self.freqfold != "auto":
            return self.freqfold, {}
        if all(self.rope_dim == s.kv_heads * s.head_dim for s in sites):
            return 1, {}  # nothing is dropped, and a fold of 1 is exact
        data = _some(data, FOLD_TOKENS)
        wide = max(sites, key=lambda s: s.head_dim)
        folds = [f for f in _folds(wide.head_dim, self.rope_dim) if _doubled(f, wide.head_dim, self.rope_dim)]
        if len(folds) == 1:
            return folds[0], {}
        tried: dict[str, float] = {}
        best, least = folds[0], float("inf")
        for f in folds:
            tried[str(f)] = found = self._partial(model, sites, data, moments, scales, f)
            if not found < least:
                break
            best, least = f, found
        return best, tried

    def _partial(
        self, model: Any, sites: Sequence[Site], data: Sequence[Mapping[str, Tensor]], moments: Mapping[str, Moments],
        scales: Mapping[str, float], fold: int,
    ) -> float:  # fmt: skip
        """Perplexity on the data with RoPE dropped and nothing cut."""
        before = {s.name: model.get_submodule(s.name) for s in sites}
        try:
            for s in sites:
                module = before[s.name]
                whole = self.replace(kv_rank=2 * s.kv_heads * s.head_dim - self.rope_dim, q_rank=None, norm=False)
                assert isinstance(whole, TransMLA)
                shape, _, tensors = whole.assemble(s, module, moments[s.name], scales[s.name], fold)
                like = module.q_proj.weight
                model.set_submodule(
                    s.name,
                    converted_module(s, module, shape, {k: v.to(like.device, like.dtype) for k, v in tensors.items()}),
                )
            return perplexity(model, data)
        finally:
            for name, module in before.items():
                model.set_submodule(name, module)

    def rebuild(
        self, model: Any, sites: Sequence[Site], tensors: Mapping[str, Tensor], notes: Mapping[str, Any]
    ) -> dict[str, nn.Module]:
        """See `Conversion.rebuild`."""
        facts = noted(self.id, sites, tensors, notes)
        return {s.name: self._restored(s, model.get_submodule(s.name), facts[s.name], tensors) for s in sites}

    def _restored(self, site: Site, module: Any, facts: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
        reason = self.fits(site, module)
        if reason is not None:
            raise SavedDataError(f"{self.id}: {site.name} is not what was converted: {reason}")
        shape = MLAShape(
            **_source(site, module), kv_rank=self.rank(site.geometry), rope_dim=self.rope_dim, q_rank=self.q_rank, norm=self.norm,
            nope_dim=site.head_dim if self.rope_dim < site.kv_heads * site.head_dim else 0,
            eps=float(getattr(module.config, "rms_norm_eps", 1e-6)),
        )  # fmt: skip
        before = facts.get("shape") if isinstance(facts, Mapping) else None
        if before != shape.to_dict():
            raise SavedDataError(
                f"{self.id}: {site.name} was saved as {before}, this model and method give {shape.to_dict()}"
            )
        if facts.get("rope_frequencies") != _frequencies(site, self.rope_dim):
            raise SavedDataError(f"{self.id}: {site.name} was saved with other rotary frequencies than this model has")
        mine = saved(self.id, site.name, tensors, _sizes(site, module, shape))
        like = module.q_proj.weight
        return converted_module(site, module, shape, {k: v.to(like.device, like.dtype) for k, v in mine.items()})
