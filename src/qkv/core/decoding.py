"""Decoding: how tokens are produced, on top of a model and its cache.

A `Decoding` is a frozen configuration with a `generate` of its own: it drives the model's forward pass instead of
`model.generate`. What it needs beside the model (a draft, workers) is a keyword of its `generate`; the model may carry methods
(`qkv.apply`), and is afterwards exactly as before, also when the generation was interrupted.

Axes: B batch, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from qkv.core.errors import InvalidInput, InvalidParameter
from qkv.core.spec import Method, Spec

Progress = Callable[[int, int, str], None]
"""``progress(done, total, note)``, called as new tokens become certain."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is taken from logits. temperature: 0 takes the likeliest; top_k, top_p: restrict what may be drawn.

    A token is drawn from ``softmax(logits / temperature)``, of which the `top_k` likeliest stay, of which the fewest that
    hold at least `top_p` of the probability stay.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0 or self.temperature == float("inf"):
            raise InvalidParameter(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidParameter(f"top_k={self.top_k} must be at least 1, or None")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InvalidParameter(f"top_p={self.top_p} must lie in (0, 1], or be None")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[..., V]`` float32 (float64 for float64): the distribution that a token is drawn from; greedy: a single 1."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.greedy:
            return torch.zeros_like(wide).scatter_(-1, wide.argmax(-1, keepdim=True), 1.0)
        p = (wide / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p is None:
            return p
        order = p.argsort(dim=-1, descending=True, stable=True)
        ranked = p.gather(-1, order)
        if self.top_k is not None:
            ranked = torch.where(torch.arange(p.shape[-1], device=p.device) < self.top_k, ranked, 0.0)
        if self.top_p is not None:
            share = ranked / ranked.sum(-1, keepdim=True)
            ranked = torch.where(share.cumsum(-1) - share < self.top_p, ranked, 0.0)
        kept = torch.zeros_like(p).scatter_(-1, order, ranked)
        return kept / kept.sum(-1, keepdim=True)


GREEDY = Sampling()


@dataclass(frozen=True)
class Generated:
    """What a generation gave.

    sequences: ``[B, prompt + new]`` int64, prompt columns as given; a row that ended early is filled with its end token.
    prompt: columns of the prompt. lengths: new tokens of each row, the end token included. passes: forward passes of the
    model, the prompt's included. seconds: wall time. notes: plain data about the run (tokens gained per pass ...).
    """

    sequences: Tensor
    prompt: int
    lengths: tuple[int, ...]
    passes: int
    seconds: float
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        """``[B, new]``: the continuation."""
        return self.sequences[:, self.prompt :]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        rows = [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths, strict=True)]
        return {
            "tokens": rows,
            "prompt": self.prompt,
            "passes": self.passes,
            "seconds": self.seconds,
            "notes": dict(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class DecodingSpec(Spec):
    """Facts about a decoding method; the laws are read from them.

    lossless: the tokens are those of plain decoding of the same model under the same applied methods, whatever else is given.
    samples: it takes a `Sampling` that is not greedy. caches: settings of applied methods under which the laws repeat
    "lossless". use: the lines of Python on its page that follow ``m = qkv.method(id)``, where what it needs is not plain from
    the names of its keywords. example: ``example(model) -> {name: keywords of generate}`` for the laws' model: several where
    losslessness must hold for any of them (a random draft, an adversarial one, the model itself). model: ``model(device, dtype,
    seed, vocabulary)``, the laws' tiny model; None is a small random causal decoder. vocabulary of 5 is used for sampling.
    """

    kind: ClassVar[str] = "decoding"
    lossless: bool = False
    samples: bool = False
    caches: tuple[str, ...] = ()
    use: str = ""
    example: Callable[[Any], Mapping[str, Mapping[str, Any]]]
    model: Callable[[str, torch.dtype, int, int], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Decoding(Method):
    """Base of decoding configurations."""

    spec: ClassVar[DecodingSpec]

    @abstractmethod
    def generate(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        sampling: Sampling = GREEDY,
        eos_token_id: int | tuple[int, ...] | None = None,
        seed: int | None = None,
        progress: Progress | None = None,
        **needs: Any,
    ) -> Generated:
        """Continue ``[B, T]`` token ids. A method names each of its `needs` as a keyword of its own.

        attention_mask: ``[B, T]``, 0 = padding on the left. eos_token_id: a row ends with any of these; None: never. seed: of
        every draw; None takes torch's global generator. Raises `InvalidInput` and `Refused` before anything is changed.
        """


def check_prompt(
    who: str, model: Any, input_ids: Any, attention_mask: Any, max_new_tokens: Any, *, extra: int = 0
) -> Tensor:
    """The mask ``[B, T]`` bool of a prompt, or `InvalidInput` with what is wrong about it.

    model: read for its vocabulary and its longest text. extra: positions needed beyond the new tokens (a draft's lookahead).
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InvalidInput(f"{who}: input_ids must be an integer tensor [B, T], got {got}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise InvalidInput(f"{who}: input_ids must be [B, T] with at least one token, got {tuple(input_ids.shape)}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InvalidInput(f"{who}: max_new_tokens={max_new_tokens!r} must be an int of at least 1")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    vocabulary = getattr(config, "vocab_size", None)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise InvalidInput(f"{who}: token ids lie in [0, {vocabulary}); the prompt has {low if low < 0 else high}")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidInput(f"{who}: attention_mask must be [B, T] = {tuple(input_ids.shape)}, got {got}")
    mask = mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InvalidInput(f"{who}: padding must be on the left and leave every row at least one token")
    reach = getattr(config, "max_position_embeddings", None)
    longest = int(mask.sum(-1).max())
    if reach is not None and longest + max_new_tokens + extra > reach:
        more = f" and {extra} of lookahead" if extra else ""
        raise InvalidInput(
            f"{who}: {longest} prompt tokens, {max_new_tokens} new ones{more} exceed the {reach} positions this model knows"
        )
    return mask


def end_tokens(eos_token_id: int | tuple[int, ...] | list[int] | None) -> frozenset[int]:
    """The end tokens as a set."""
    if eos_token_id is None:
        return frozenset()
    return frozenset((eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id)


def joined(prompt: Tensor, rows: list[list[int]], ends: frozenset[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Prompt ``[B, T]`` and continuations as ``[B, T + new]`` and the rows' lengths; short rows repeat their end token."""
    width = max(map(len, rows))
    full = [row + [row[-1] if row and row[-1] in ends else 0] * (width - len(row)) for row in rows]
    fresh = torch.tensor(full, dtype=prompt.dtype, device=prompt.device).reshape(len(rows), width)
    return torch.cat((prompt, fresh), 1), tuple(map(len, rows))


def generator_of(seed: int | None, device: torch.device) -> torch.Generator | None:
    """The generator of every draw of one generation, or None for torch's global one."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)
