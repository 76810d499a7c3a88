r"""A small masked-diffusion language model, shaped like LLaDA: a bidirectional transformer that fills in masks.

    x += O softmax(R_i Q_i . R_j K_j / sqrt(D)) V,   x += W2 (silu(W1 x) * W3 x),   both of rms(x),   logits = U rms(x)

Every token sees every token; R_i is the rotation of position i (half-split layout, in float32). One token is one byte of UTF-8;
token 256 is the mask. Axes: B batch, R rows computed, L length, H query heads, G key/value heads, D head width, V vocabulary.
Paper: arXiv:2502.09992 (LLaDA).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core.attend import sdpa
from qkv.core.errors import InvalidInput, InvalidParameter, SavedDataError
from qkv.hosts.stack import read_folder, write_folder

BYTES = 256
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, q, k, v) -> out``: q ``[B, H, R, D]`` and k ``[B, G, R, D]`` rotated, v ``[B, G, R, D]``, out as q."""


@final
@dataclass(frozen=True, kw_only=True)
class MaskedDiffusionConfig:
    """Shape of a `MaskedDiffusionLM`. inner: width of the gated layer, 0 for 8/3 of the width in steps of 32."""

    vocabulary: int = BYTES + 1
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 4
    inner: int = 0
    length: int = 512
    rope_base: float = 10000.0
    mask_token: int = BYTES

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = float if field.name == "rope_base" else int
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or value < (field.name != "inner"):
                raise InvalidParameter(f"{field.name}={value!r} must be a positive {kind.__name__}")
        if self.width % self.heads or self.heads % self.kv_heads or (self.width // self.heads) % 2:
            raise InvalidParameter(
                f"width={self.width} must be heads={self.heads} times an even number, and kv_heads={self.kv_heads} divide heads"
            )
        if self.mask_token >= self.vocabulary:
            raise InvalidParameter(f"mask_token={self.mask_token} lies outside the vocabulary of {self.vocabulary}")

    @property
    def vocab_size(self) -> int:
        """`vocabulary`, by the name that other libraries' configurations use."""
        return self.vocabulary

    @property
    def max_position_embeddings(self) -> int:
        """`length`, likewise."""
        return self.length

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @property
    def gated(self) -> int:
        """Width of the gated layer."""
        return self.inner or -(-8 * self.width // 3 // 32) * 32


class Block(nn.Module):
    """Attention and a gated layer, each on the normalised residual stream."""

    def __init__(self, config: MaskedDiffusionConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        w, d = config.width, config.width // config.heads
        self.before, self.between = nn.RMSNorm(w, eps=1e-6), nn.RMSNorm(w, eps=1e-6)
        self.query, self.out = nn.Linear(w, config.heads * d, bias=False), nn.Linear(config.heads * d, w, bias=False)
        self.key, self.value = (nn.Linear(w, config.kv_heads * d, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(w, config.gated, bias=False) for _ in range(2))
        self.down = nn.Linear(config.gated, w, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Residual stream x ``[B, R, width]``; turn: cosine and sine ``[B, 1, R, D/2]`` of the rows' positions."""
        b, r, _ = x.shape
        y = self.before(x)
        q, k, v = (p(y).view(b, r, -1, x.shape[-1] // self.config.heads).transpose(1, 2)
                   for p in (self.query, self.key, self.value))  # fmt: skip
        mixed = attend(self.layer, rotate(q, turn), rotate(k, turn), v)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, r, -1))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Vectors ``[B, H, R, D]`` turned by (cosine, sine) ``[B, 1, R, D/2]``, in float32 or wider."""
    cos, sin = turn
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def everything(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain bidirectional attention among the computed rows."""
    return sdpa(q, k, v)


class MaskedDiffusionLM(nn.Module):
    """See the module. A fresh model is random; `load` reads a trained one."""

    kind: ClassVar[str] = "masked-diffusion"

    def __init__(self, config: MaskedDiffusionConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.layers)])
        self.last = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        draw = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                shrink = (2 * config.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(p, std=0.02 * shrink, generator=draw)

    @property
    def mask_token(self) -> int:
        """The token that stands for a byte still unknown."""
        return self.config.mask_token

    def forward(self, ids: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Logits ``[B, R, V]`` of the rows computed.

        ids: ``[B, R]`` tokens. positions: ``[B, R]`` their places in the text, default 0..R-1. attend: the attention to run
        instead of a plain one among these rows (a cache brings the other rows' keys and values).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        wide = torch.promote_types(self.embed.weight.dtype, torch.float32)
        half = torch.arange(0, self.config.width // self.config.heads, 2, device=ids.device, dtype=torch.float64)
        frequencies = self.config.rope_base ** (-half * self.config.heads / self.config.width)
        angle = (positions[:, None, :, None] * frequencies).to(wide)  # [B, 1, R, D/2]
        turn = angle.cos(), angle.sin()
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, turn, attend or everything)
        return self.head(self.last(x))

    def save(self, path: str | Path, **notes: Any) -> None:
        """Write configuration and weights to a folder (JSON and safetensors, all at once). notes: plain data beside them."""
        manifest = {"model": self.kind, "config": self.config.to_dict(), "notes": notes}
        write_folder(path, manifest, self.state_dict())

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> MaskedDiffusionLM:
        """The model that `save` wrote, in evaluation mode. Raises `SavedDataError`."""
        manifest, tensors = read_folder(path)
        model = cls.of(manifest, tensors, path)
        return model.to(device).eval()

    @classmethod
    def of(cls, manifest: dict[str, Any], tensors: dict[str, Tensor], path: str | Path) -> MaskedDiffusionLM:
        """A model from what `read_folder` gave; sizes are compared before anything is allocated."""
        if manifest.get("model") != cls.kind or not isinstance(manifest.get("config"), dict):
            raise SavedDataError(f"{path} does not hold a {cls.kind} language model")
        try:
            config = MaskedDiffusionConfig(**manifest["config"])
            with torch.device("meta"):
                wanted = {k: tuple(v.shape) for k, v in cls._skeleton(config).items()}
        except (TypeError, InvalidParameter, RuntimeError) as error:
            raise SavedDataError(f"{path}: its configuration is not that of a {cls.kind} model: {error}") from error
        given = {k: tuple(v.shape) for k, v in tensors.items()}
        if given != wanted:
            odd = sorted(k for k in wanted.keys() | given.keys() if wanted.get(k) != given.get(k))
            raise SavedDataError(
                f"{path}: weights do not fit its configuration: {', '.join(odd[:3])}{' ...' * (len(odd) > 3)}"
            )
        model = cls(config).to(next(iter(tensors.values())).dtype)
        model.load_state_dict(tensors)
        return model

    @staticmethod
    def _skeleton(config: MaskedDiffusionConfig) -> dict[str, Tensor]:
        """Names and (meta) tensors of a model of this configuration."""
        blocks = {f"blocks.{i}.{k}": v for i in range(config.layers) for k, v in Block(config, i).state_dict().items()}
        w, v = config.width, config.vocabulary
        return blocks | {
            "embed.weight": torch.empty(v, w),
            "last.weight": torch.empty(w),
            "head.weight": torch.empty(v, w),
        }


def encode(text: str, device: str | torch.device = "cpu") -> Tensor:
    """The UTF-8 bytes of `text` as tokens ``[1, L]``. Raises `InvalidInput` on an empty text."""
    if not text:
        raise InvalidInput("there is nothing to encode: the text is empty")
    return torch.tensor([list(text.encode())], device=device)


def decode(tokens: Tensor | Sequence[int]) -> str:
    """Text of tokens ``[L]``; a mask is written as ``_``."""
    values = cast(list[int], tokens.tolist() if isinstance(tokens, Tensor) else list(tokens))
    return bytes(t if t < BYTES else ord("_") for t in values).decode(errors="replace")
