r"""Which proposed tokens the target keeps, and what comes after them: the rules that make speculation lossless.

Chain of tokens d_1 .. d_n drawn from q_1 .. q_n (classic speculative sampling, arXiv:2211.17192):

    d_i is kept with probability min(1, p_i(d_i) / q_i(d_i));  at the first that is not, draw from norm(max(p_i - q_i, 0))

Tree of tokens that were chosen, not drawn (arXiv:2502.17421): a node's children are visited in order and child x is kept with
probability p(x), else p(x) becomes 0 and the rest is renormalised; when none is kept, draw from what is left. Then child c_i
is kept with probability prod_{j<i} (1 - p'(c_j)) p'(c_i) = p(c_i): the same as one draw from p that is kept when it names a
child. So `walk` draws one token at every node and follows it as far as the tree goes. (The ratio test p/q, which the
published code applies to such children, is not lossless: they were not drawn from q.)

Greedy decoding is either rule with p = 1 at the likeliest token.

Axes: n proposed tokens, V vocabulary; row 0 of logits belongs to the newest certain token, row 1 + i to proposed token i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.core.decoding import Sampling


def take(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """One token from each row of ``[n, V]``: ``[n]``."""
    if sampling.greedy:
        return logits.argmax(-1)
    return torch.multinomial(sampling.probabilities(logits), 1, generator=generator).squeeze(-1)


def visit(p: Tensor, children: Sequence[int], uniform: Sequence[float]) -> tuple[int | None, Tensor]:
    """The definition for one node: (index of the kept child or None, what is left of p ``[V]`` to draw from)."""
    p = p.clone()
    for i, token in enumerate(children):
        if uniform[i] < float(p[token]):
            return i, p
        p[token] = 0.0
        p = p / p.sum()
    return None, p


def walk(drawn: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> tuple[list[int], int]:
    """Follow the tokens drawn at each node down the tree: (indices of the kept nodes, the token after them).

    drawn: ``n + 1`` tokens, one after the newest certain token and one after each node. parents: index of each node's parent, -1
    for the roots; a parent comes before its children.
    """
    child = {(parent, token): i for i, (token, parent) in reversed(list(enumerate(zip(tokens, parents, strict=True))))}
    kept, at = [], -1
    while (at, drawn[at + 1]) in child:
        at = child[at, drawn[at + 1]]
        kept.append(at)
    return kept, drawn[at + 1]


def accept_chain(p: Tensor, tokens: Tensor, q: Tensor, generator: torch.Generator | None = None) -> tuple[int, int]:
    """How many of the tokens ``[n]`` drawn from q ``[n, V]`` are kept under p ``[n + 1, V]``, and the token after them."""
    n = tokens.shape[0]
    at = tokens.unsqueeze(-1)
    ratio = p[:n].gather(-1, at).squeeze(-1) / q.gather(-1, at).squeeze(-1)
    uniform = torch.rand(n, generator=generator, device=p.device, dtype=p.dtype)
    kept = int((uniform < ratio).long().cumprod(0).sum())
    if kept == n:
        return n, int(torch.multinomial(p[n], 1, generator=generator))
    rest = (p[kept] - q[kept]).clamp(min=0)
    if not float(rest.sum()) > 0:  # p = q but for rounding
        rest = p[kept]
    return kept, int(torch.multinomial(rest, 1, generator=generator))
