r"""Text from a `CausalLM`: prefill once, then one token at a time with the state handed on.

Prompts of different lengths are padded on the left. The state is the only memory: of constant size for recurrent operators and
windows, and each row's is its own, so beams are rows that are repeated and reordered (`State.index`).

Axes: B prompts, K beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.core.state import State
from qkv.models.language.causal import CausalLM

Prompts = Sequence[Sequence[int]] | Tensor


class Step(NamedTuple):
    """tokens ``[B]`` just chosen, and the state before them (what a pause must keep)."""

    tokens: Tensor
    state: State


def left_padded(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens ``[B, N]`` and padding (None when all are of one length). Raises `InvalidInput`."""
    rows = [torch.as_tensor(p, dtype=torch.int64) for p in prompts]
    if not rows or any(r.ndim != 1 or not len(r) for r in rows):
        raise InvalidInput("prompts must be rows of tokens, at least one row and at least one token in each")
    length = max(map(len, rows))
    ids = torch.stack([torch.cat((r.new_zeros(length - len(r)), r)) for r in rows])
    if all(len(r) == length for r in rows):
        return ids.to(device), None
    real = torch.arange(length) >= torch.tensor([length - len(r) for r in rows])[:, None]
    return ids.to(device), real.to(device)


@torch.no_grad()
def prefill(
    model: CausalLM, prompts: Prompts, *, state: State | None = None, chunk: int = 4096
) -> tuple[Tensor, State]:
    """Logits ``[B, V]`` of the next token, and the state after the prompts, read in pieces of `chunk` tokens.

    state: the prompts go on from it; they are then of one length.
    """
    if chunk < 1:
        raise InvalidParameter(f"chunk={chunk} must be at least 1 token")
    ids, padding = left_padded(prompts, model.embed.weight.device)
    if padding is not None and state is not None:
        raise InvalidInput("after a state all prompts must have the same length")
    first = chunk if padding is None else max(chunk, ids.shape[1] - int(padding.sum(1).min()) + 1)
    logits, state = _read(model, ids[:, :first], state, None if padding is None else padding[:, :first])
    for at in range(first, ids.shape[1], chunk):
        logits, state = _read(model, ids[:, at : at + chunk], state)
    return logits, state


def _read(model: CausalLM, ids: Tensor, state: State | None, padding: Tensor | None = None) -> tuple[Tensor, State]:
    """Logits ``[B, V]`` after tokens ``[B, N]``, and the state."""
    out = model(ids, padding=padding, state=state, keep=True)
    assert out.state is not None
    return out.logits[:, -1], out.state


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> Tensor:
    """Tokens ``[B]``: the likeliest at temperature 0, else drawn, from the `top_k` likeliest if that is not 0."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def stream(
    model: CausalLM, prompts: Prompts, *, temperature: float = 0.0, top_k: int = 0, seed: int = 0, state: State | None = None,
    chunk: int = 4096,
) -> Iterator[Step]:  # fmt: skip
    """Token after token, without end. Arguments as in `generate` and `prefill`."""
    if temperature < 0 or top_k < 0:
        raise InvalidParameter(f"temperature={temperature} and top_k={top_k} must be at least 0")
    logits, state = prefill(model, prompts, state=state, chunk=chunk)
    draw = torch.Generator(logits.device).manual_seed(seed)
    while True:
        tokens = choose(logits, temperature, top_k, draw)
        yield Step(tokens, state)
        logits, state = _read(model, tokens[:, None], state)


@torch.no_grad()
def generate(
    model: CausalLM, prompts: Prompts, tokens: int, *, temperature: float = 0.0, top_k: int = 0, beams: int = 1, seed: int = 0,
    chunk: int = 4096,
) -> Tensor:  # fmt: skip
    """The next `tokens` tokens ``[B, tokens]`` of every prompt (rows of tokens, of any lengths).

    temperature: 0 takes the likeliest token, above 0 draws. top_k: draw from so many, 0 for all. beams: above 1, search for the
    likeliest continuation with so many beams (temperature 0). chunk: tokens of a prompt read at once. Raises `InvalidInput`,
    `InvalidParameter`.
    """
    if tokens < 1 or beams < 1:
        raise InvalidParameter(f"tokens={tokens} and beams={beams} must be at least 1")
    if beams > 1:
        if temperature:
            raise InvalidParameter(f"beams={beams} search for the likeliest text: temperature={temperature} must be 0")
        return _searched(model, prompts, tokens, beams, chunk)
    steps = stream(model, prompts, temperature=temperature, top_k=top_k, seed=seed, chunk=chunk)
    return torch.stack([next(steps).tokens for _ in range(tokens)], 1)


def _searched(model: CausalLM, prompts: Prompts, tokens: int, beams: int, chunk: int) -> Tensor:
    """Beam search; the likeliest beam of each prompt."""
    logits, state = prefill(model, prompts, chunk=chunk)
    b, v = logits.shape
    rows = torch.arange(b, device=logits.device)
    state = state.index(rows.repeat_interleave(beams))
    scores = logits.new_full((b, beams), -torch.inf, dtype=torch.float64)
    scores[:, 0] = 0.0  # all beams are alike until the first choice
    logits = logits.repeat_interleave(beams, 0)
    texts = rows.new_zeros(b, beams, 0)
    for i in range(tokens):
        every = scores[..., None] + logits.double().log_softmax(-1).view(b, beams, v)
        scores, best = every.flatten(1).topk(beams)  # [B, K]
        parent, token = best // v, best % v
        texts = torch.cat((texts.gather(1, parent[..., None].expand(-1, -1, i)), token[..., None]), 2)
        if i + 1 < tokens:
            state = state.index((rows[:, None] * beams + parent).flatten())
            logits, state = _read(model, token.view(-1, 1), state)
    return texts[:, 0]
