r"""MiniLM: the student imitates how one upper layer of the teacher relates tokens to tokens; depth and width are free.

    R_mn = softmax(X_m X_n^T / sqrt(W))  per relation head,    m, n in {q, k, v}
    loss = sum over pairs of  w_mn  mean_b  1 / (R |x_b|)  sum_{r, t}  KL(R_mn^T[r, t] || R_mn^S[r, t])

Version 1 (arXiv 2002.10957): the attention maps themselves, pair (q, k) with the model's own heads, and the value relation
(v, v), both of the last layers. Version 2 (arXiv 2012.15828): (q, q), (k, k), (v, v) of one upper teacher layer, each matrix
cut anew into R relation heads. Rows and columns run over real tokens only.

Nothing past v of the student's layer gets a gradient (no o_proj, no feed-forward), so a sentence encoder needs
`hidden_weight` or fine-tuning afterwards. Differences from the papers: ``average="token"`` gives tokens instead of sequences
equal weight; `hidden_weight` (0 in both papers) adds a squared error between last hidden states, through a learned map where
widths differ; with rotary positions, version 2 takes q and k before the rotation, which would mix positions into a relation.

Axes: B batch, H query heads, G key/value heads, R relation heads, N tokens, D head width, W relation head width, C width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, final

import torch
from torch import Tensor, nn

from qkv.core.errors import InvalidParameter
from qkv.core.objective import Batch, Loss, Needs, Net, Objective, ObjectiveSpec, Projections, Trace
from qkv.core.site import Site
from qkv.core.spec import param
from qkv.distill.objectives._common.relation import regroup, relation_kl, visible

PAIRS = {1: ("qk", "vv"), 2: ("qq", "kk", "vv")}
UPPER = {"roberta": 19, "xlm-roberta": 19}  # of 24 layers, counted from 1; 21 for BERT and everything else


def reference(
    objective: Objective, teacher: Trace, student: Trace, batch: Batch, helper: nn.Module | None = None
) -> Tensor:
    """The definition, one sequence, relation head and token at a time."""
    method = cast("MiniLM", objective)
    at = method.layers(teacher.net, student.net)
    causal, total, weight = method.is_causal(teacher.net, student.net), 0.0, 0.0
    for b, real in enumerate(student.real):
        tokens = real.nonzero().flatten().tolist()
        for pair, w in zip(method.chosen, method.factors, strict=True):
            count = method.count(pair, teacher.net, student.net)
            maps = []
            for trace, layer in zip((teacher, student), at, strict=True):
                x = (trace.attention if method.rotated else trace.projections)[layer]
                left, right = (getattr(x, letter)[b] for letter in pair)
                if pair[0] != pair[1]:  # a key/value head serves H / G query heads
                    left, right = (y.repeat_interleave(x.q.shape[1] // y.shape[0], 0) for y in (left, right))
                left, right = (y.transpose(0, 1).flatten(1) for y in (left, right))  # [N, heads * D]
                width = left.shape[1] // count
                scale = x.scale if method.is_map(pair, trace.net.site(layer), count) else width**-0.5
                maps.append((left, right, width, scale))
            for r in range(count):
                for t in tokens:
                    seen = [s for s in tokens if s <= t or not causal]
                    window = method.window(pair, teacher.net, student.net)
                    seen = [s for s in seen if window is None or t - s < window]
                    p, q = (
                        (right[seen, r * n : r * n + n] @ left[t, r * n : r * n + n] * scale).softmax(0)
                        for left, right, n, scale in maps
                    )
                    size = w / (count * len(tokens)) * (len(tokens) if method.average == "token" else 1)
                    total = total + size * (p * (p / q).log()).sum()
        if method.hidden_weight and tokens:
            z = student.hidden[student.net.layers][b, tokens]
            z = z if helper is None else helper(z)
            size = 1 / len(tokens) if method.average == "sequence" else 1
            error = (teacher.hidden[teacher.net.layers][b, tokens] - z).square().mean(-1).sum()
            total = total + method.hidden_weight * size * error
        weight += bool(tokens) if method.average == "sequence" else len(tokens)
    return torch.as_tensor(total / weight)


def operands(x: Projections, pair: str, count: int, is_map: bool) -> tuple[Tensor, Tensor, float]:
    """Left and right ``[B, R, N, W]`` of a relation and its scale; an attention map keeps the model's own."""
    left, right = (getattr(x, letter) for letter in pair)
    if pair[0] != pair[1]:
        left, right = (y.repeat_interleave(x.q.shape[1] // y.shape[1], 1) for y in (left, right))
    left, right = regroup(left, count), regroup(right, count)
    return left, right, x.scale if is_map else left.shape[-1] ** -0.5


@final
@dataclass(frozen=True, kw_only=True)
class MiniLM(Objective):
    """Match the token relations of one layer of each; the published settings are the defaults."""

    version: Literal[1, 2] = param(2, "1: attention maps and value relations; 2: q-q, k-k and v-v relations")
    relation_heads: int | None = param(
        None, "version 2: relation heads R, dividing both widths; None: 48, or 64 for a teacher 1,024 or wider", low=1
    )
    kv_relation_heads: int | None = param(
        None, "version 2: relation heads of k-k and v-v, where keys and values are narrower (GQA); None: R", low=1
    )
    teacher_layer: int | None = param(
        None, "teacher layer from 0, -1 = last; None: last, in version 2 above 12 layers 7/8 up (RoBERTa-large: 18)"
    )
    student_layer: int = param(-1, "student layer from 0, -1 = last")
    pairs: tuple[str, ...] | None = param(None, "relations, two letters of q, k, v each; None: those of the version")
    weights: tuple[float, ...] | None = param(None, "one weight per pair; None: 1 each", low=0)
    average: Literal["sequence", "token"] = param("sequence", "what counts alike in a batch: sequences, or tokens")
    causal: bool | None = param(None, "hide later tokens; None: as both models do")
    after_rope: bool | None = param(None, "take q and k after rotary positions; None: version 1 yes, version 2 no")
    hidden_weight: float = param(0.0, "weight of the squared error between last hidden states (papers: 0)", low=0)

    spec: ClassVar[ObjectiveSpec] = ObjectiveSpec(
        id="minilm",
        title="MiniLM: deep self-attention distillation (versions 1 and 2)",
        paper="arXiv:2002.10957",
        source="paper",
        summary="Teaches a student of any depth and width the token relations of one upper teacher layer.",
        shown="a sentence encoder cut to half its layers keeps the taught relations on unseen sentences; with a hidden term "
        "its embeddings follow the teacher's far better than untaught layers do",
        honest="relations say nothing about what follows the last value projection: pooled embeddings need a hidden term, "
        "which in a short run does as much alone",
        reference=reference,
        trials=(
            {},
            {"version": 1},
            {"version": 1, "average": "token", "after_rope": False},
            {"relation_heads": 8, "kv_relation_heads": 6, "pairs": ("qq", "vv"), "weights": (0.5, 2.0)},
            {"relation_heads": 6, "pairs": ("qk", "kv"), "teacher_layer": 1, "student_layer": 1, "average": "token"},
            {"relation_heads": 12, "hidden_weight": 0.5, "causal": True},
        ),
    )

    def validate(self) -> None:
        """Pairs name q, k, v, each once; one weight per pair; version 1 has the model's own heads."""
        for pair in self.chosen:
            if len(pair) != 2 or not set(pair) <= set("qkv"):
                raise InvalidParameter(f"minilm: pair {pair!r} must be two letters of q, k, v, such as 'qq' or 'qk'")
        if not self.chosen or len(set(self.chosen)) < len(self.chosen):
            raise InvalidParameter(f"minilm: pairs={self.pairs!r} must name at least one relation, each once")
        if len(self.factors) != len(self.chosen):
            raise InvalidParameter(f"minilm: {len(self.factors)} weights for {len(self.chosen)} pairs {self.chosen}")
        if not sum(self.factors) and not self.hidden_weight:
            raise InvalidParameter("minilm: every weight is 0, so there is nothing to learn")
        if self.version == 1 and not (self.relation_heads is None and self.kv_relation_heads is None):
            raise InvalidParameter("minilm: version 1 relates the model's own heads; relation_heads is for version 2")

    # -- settings, resolved on a pair of networks ------------------------------------------------------------------

    @property
    def chosen(self) -> tuple[str, ...]:
        """The relations."""
        return PAIRS[self.version] if self.pairs is None else self.pairs

    @property
    def factors(self) -> tuple[float, ...]:
        """The weight of each relation."""
        return (1.0,) * len(self.chosen) if self.weights is None else self.weights

    @property
    def rotated(self) -> bool:
        """Whether q and k are taken as the attention sees them."""
        return self.version == 1 if self.after_rope is None else self.after_rope

    def layers(self, teacher: Net, student: Net) -> tuple[int, int]:
        """Teacher and student layer, from 0."""
        upper = self.teacher_layer
        if upper is None and self.version == 2 and teacher.layers > 12:
            upper = round(teacher.layers * 7 / 8) - 1
            if teacher.layers == 24:
                upper = UPPER.get(teacher.family, 21) - 1
        return teacher.layer(-1 if upper is None else upper), student.layer(self.student_layer)

    def is_causal(self, teacher: Net, student: Net) -> bool:
        """Whether later tokens are hidden."""
        t, s = self.layers(teacher, student)
        return (teacher.site(t).causal or student.site(s).causal) if self.causal is None else self.causal

    def count(self, pair: str, teacher: Net, student: Net) -> int:
        """Relation heads of a pair."""
        narrow = pair in ("kk", "vv")
        if self.version == 1:
            site = teacher.site(self.layers(teacher, student)[0])
            return site.kv_heads if narrow else site.heads
        wide = self.relation_heads or (64 if teacher.width >= 1024 else 48)
        return self.kv_relation_heads or wide if narrow else wide

    def is_map(self, pair: str, site: Site, count: int) -> bool:
        """Whether a relation is the layer's own attention map: queries with keys, in its own heads."""
        return pair == "qk" and count == site.heads

    def window(self, pair: str, teacher: Net, student: Net) -> int | None:
        """The sliding window of an attention map, which is the model's own; other relations have none."""
        site = teacher.site(self.layers(teacher, student)[0])
        return site.window if self.is_map(pair, site, self.count(pair, teacher, student)) else None

    # -- the objective ---------------------------------------------------------------------------------------------

    def needs(self, teacher: Net, student: Net) -> tuple[Needs, Needs]:
        """q, k, v of one layer of each, and the last hidden states where they count."""
        out = []
        for net, layer in zip((teacher, student), self.layers(teacher, student), strict=True):
            hidden = (net.layers,) if self.hidden_weight else ()
            out.append(
                Needs(attention=(layer,), hidden=hidden) if self.rotated else Needs(projections=(layer,), hidden=hidden)
            )
        return out[0], out[1]

    def refusals(self, teacher: Net, student: Net) -> list[str]:
        """Relation heads that do not divide a width, attention maps of other heads or windows, another direction."""
        at = self.layers(teacher, student)
        sites = teacher.site(at[0]), student.site(at[1])
        out = []
        if self.causal is None and sites[0].causal != sites[1].causal:
            out.append("one of them is causal and the other is not; say causal=True or causal=False")
        for pair in self.chosen:
            count = self.count(pair, teacher, student)
            widths = []
            for net, site in zip((teacher, student), sites, strict=True):
                dims = [site.value_dim if letter == "v" else site.head_dim for letter in pair]
                heads = [site.heads if letter == "q" or pair[0] != pair[1] else site.kv_heads for letter in pair]
                if dims[0] != dims[1]:
                    out.append(f"{pair}: heads of {net.name} are {dims[0]} and {dims[1]} wide, so they have no product")
                widths.append(dims[0] * heads[0])
                if self.version == 1 and heads[0] != count:
                    out.append(
                        f"{pair}: version 1 needs equal head counts, the teacher has {count} and the student {heads[0]}; "
                        "use version=2, whose relation heads are free"
                    )
            if self.version == 2 and any(width % count for width in widths):
                name = "kv_relation_heads" if pair in ("kk", "vv") else "relation_heads"
                out.append(
                    f"{pair}: {count} relation heads do not divide the widths {widths[0]} (teacher) and {widths[1]} "
                    f"(student); choose {name} among the divisors of {math.gcd(*widths)}"
                )
            windows = [site.window for site in sites]
            if self.is_map(pair, sites[0], count) and windows != [None, None]:
                if windows[0] != windows[1] or not self.is_causal(teacher, student):
                    out.append(
                        f"{pair}: attention maps over sliding windows {windows[0]} and {windows[1]} do not compare"
                    )
        return out

    def row_weights(self, real: Tensor) -> Tensor:
        """1 per sequence, or its number of real tokens."""
        return real.sum(-1).float() if self.average == "token" else real.any(-1).float()

    def helper(self, teacher: Net, student: Net) -> nn.Module | None:
        """A linear map from the student's width to the teacher's, where hidden states of unequal width are compared."""
        if not self.hidden_weight or teacher.width == student.width:
            return None
        return nn.Linear(student.width, teacher.width, bias=False)

    def recipe(self) -> dict[str, Any]:
        """Adam and schedule of the papers; they train 400,000 steps of 256 to 1,024 sequences of 512 tokens."""
        return {
            "learning_rate": 5e-4 if self.version == 1 else 6e-4,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-6,
            "weight_decay": 0.01,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.01,
        }

    def loss(self, teacher: Trace, student: Trace, batch: Batch, helper: nn.Module | None) -> Loss:
        """See `qkv.core.objective.Objective.loss`; parts: one per pair, and ``hidden``."""
        nets = teacher.net, student.net
        at, causal, real = self.layers(*nets), self.is_causal(*nets), student.real
        taps: list[Mapping[int, Projections]] = [
            x.attention if self.rotated else x.projections for x in (teacher, student)
        ]
        per_token: dict[str, Tensor] = {}
        for pair in self.chosen:
            count = self.count(pair, *nets)
            left, right = (
                operands(tap[layer], pair, count, self.is_map(pair, net.site(layer), count))
                for tap, layer, net in zip(taps, at, nets, strict=True)
            )
            seen = visible(real, causal=causal, window=self.window(pair, *nets))
            per_token[pair] = relation_kl(left, right, real, seen)
        if self.hidden_weight:
            want, got = (x.hidden[x.net.layers] for x in (teacher, student))
            wide = torch.promote_types(got.dtype, torch.float32)
            got = got.to(wide) if helper is None else helper(got.to(wide))
            error = (want.to(wide) - got).masked_fill(~real[..., None], 0.0)
            per_token["hidden"] = error.square().mean(-1)
        weights = self.row_weights(real).to(next(iter(per_token.values())).dtype)
        rows = weights / weights.sum() / real.sum(-1).clamp(min=1)  # [B]
        parts = {name: (x.sum(-1) * rows).sum() for name, x in per_token.items()}
        factors = dict(zip(self.chosen, self.factors, strict=True)) | {"hidden": self.hidden_weight}
        return Loss(torch.stack([factors[name] * part for name, part in parts.items()]).sum(), parts)
