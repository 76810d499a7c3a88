r"""The draft of LongSpec: one layer that looks at its own last tokens and at the target's last keys and values.

    x = embed(token)
    x += SelfAttn(norm1(x))     own q, k, v, o; causal, the newest `window` tokens, rotary
    x += CrossAttn(norm2(x))    own q, o; keys and values are the target's last layer's, already rotated
    x += MLP(norm3(x));         logits = lm_head(x)

Embedding and head are the target's, frozen and never stored. Its own memory is `window` tokens whatever the length of the
text: keys and values of a token follow from the token alone, so a prompt is read by projecting its last tokens.

Axes: B batch, T tokens, C width of the hidden states, H query heads, G key/value heads, D head width, n nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.caches._stores.dense import DenseCache
from qkv.core.attend import sdpa
from qkv.core.cache import Rope
from qkv.core.errors import InvalidInput, Refused, SavedDataError
from qkv.core.site import Site
from qkv.decode._common.loop import Proposal
from qkv.decode._common.target import Target
from qkv.decode._common.tree import hybrid_tree_attention, prefix_attention
from qkv.hosts import sites, stack

FORMAT = "longspec-draft"


@dataclass(frozen=True, kw_only=True)
class GlideShape:
    """Sizes of a draft: those of the target, and its window in tokens."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    vocabulary: int
    window: int = 512
    epsilon: float = 1e-6


def last_site(model: Any) -> Site:
    """The attention site whose keys and values the draft reads. Raises `Refused` for a model it does not fit."""
    found = [s for s in sites(model) if s.cached and s.role == "self"]
    if not found:
        raise Refused(f"longspec: {type(model).__name__} has no causal self-attention with a cache")
    site = max(found, key=lambda s: s.layer or 0)
    if site.reason is not None:
        raise Refused(f"longspec: the last layer's keys cannot be read: {site.reason}")
    rope = site.geometry.rope
    if rope is None or not rope.fixed:
        kind = "nothing that qkv can read" if rope is None else f"frequencies that depend on the length ({rope.kind})"
        raise Refused(f"longspec: its draft turns queries as the target turns its keys; {site.name} rotates by {kind}")
    if site.window is not None:
        raise Refused(
            f"longspec: the last layer {site.name} sees only {site.window} tokens; its draft needs all of them"
        )
    return site


class GlideDraft(nn.Module):
    """The trained part of the draft; the target is handed in where it is needed."""

    def __init__(self, shape: GlideShape) -> None:
        super().__init__()
        self.shape = s = shape
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(s.hidden, s.epsilon) for _ in range(3))
        self.q = nn.Linear(s.hidden, s.heads * s.head_dim)
        self.k = nn.Linear(s.hidden, s.kv_heads * s.head_dim)
        self.v = nn.Linear(s.hidden, s.kv_heads * s.value_dim)
        self.o = nn.Linear(s.heads * s.value_dim, s.hidden, bias=False)
        self.cross_q = nn.Linear(s.hidden, s.heads * s.head_dim)
        self.cross_o = nn.Linear(s.heads * s.value_dim, s.hidden, bias=False)
        self.gate = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.up = nn.Linear(s.hidden, s.intermediate, bias=False)
        self.down = nn.Linear(s.intermediate, s.hidden, bias=False)

    @classmethod
    def of(cls, model: Any, *, window: int = 512, seed: int = 0) -> GlideDraft:
        """An untrained draft for a target, on its device and in its dtype."""
        site, config = last_site(model), model.config.get_text_config()
        hidden = model.get_input_embeddings().weight.shape[1]
        shape = GlideShape(
            hidden=hidden, intermediate=getattr(config, "intermediate_size", None) or 4 * hidden, heads=site.heads,
            kv_heads=site.kv_heads, head_dim=site.head_dim, value_dim=site.value_dim, vocabulary=config.vocab_size,
            window=window, epsilon=getattr(config, "rms_norm_eps", 1e-6),
        )  # fmt: skip
        rng = torch.random.get_rng_state()
        try:
            torch.manual_seed(seed)
            draft = cls(shape)
        finally:
            torch.random.set_rng_state(rng)
        return draft.to(model.device, model.dtype)

    def fits(self, model: Any) -> None:
        """Raise `Refused` unless the draft has the target's sizes."""
        site = last_site(model)
        s, config = self.shape, model.config.get_text_config()
        mine = (s.hidden, s.heads, s.kv_heads, s.head_dim, s.value_dim, s.vocabulary)
        its = (
            model.get_input_embeddings().weight.shape[1], site.heads, site.kv_heads, site.head_dim, site.value_dim,
            config.vocab_size,
        )  # fmt: skip
        if mine != its:
            names = ("hidden width", "query heads", "KV heads", "head width", "value width", "vocabulary")
            wrong = next(i for i in range(len(mine)) if mine[i] != its[i])
            raise Refused(
                f"longspec: the draft was made for another target: its {names[wrong]} is {mine[wrong]}, the model's "
                f"{its[wrong]}"
            )

    # -- parts ----------------------------------------------------------------------------------------------------

    def own_keys(self, x: Tensor, position: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys ``[B, G, T, D]``, rotated, and values ``[B, G, T, E]`` of embeddings ``[B, T, C]``."""
        s, y = self.shape, self.norm1(x)
        k = self.k(y).unflatten(-1, (s.kv_heads, s.head_dim)).transpose(1, 2)
        v = self.v(y).unflatten(-1, (s.kv_heads, s.value_dim)).transpose(1, 2)
        return rope.rotate(k, position.unsqueeze(1).expand(k.shape[:3])), v

    def _queries(self, project: nn.Linear, y: Tensor, position: Tensor, rope: Rope) -> Tensor:
        q = project(y).unflatten(-1, (self.shape.heads, self.shape.head_dim)).transpose(1, 2)
        return rope.rotate(q, position.unsqueeze(1).expand(q.shape[:3]))

    def queries(self, x: Tensor, position: Tensor, rope: Rope) -> Tensor:
        """Queries ``[B, H, T, D]`` of the self-attention."""
        return self._queries(self.q, self.norm1(x), position, rope)

    def cross_queries(self, x: Tensor, position: Tensor, rope: Rope) -> Tensor:
        """Queries ``[B, H, T, D]`` to the target's keys; x after the self-attention."""
        return self._queries(self.cross_q, self.norm2(x), position, rope)

    def after(self, x: Tensor, out: Tensor, project: nn.Linear) -> Tensor:
        """The residual stream behind an attention ``[B, H, T, E]``."""
        return x + project(out.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        """The residual stream behind the MLP."""
        y = self.norm3(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def forward(self, x: Tensor, position: Tensor, k: Tensor, v: Tensor, j: int, rope: Rope, scale: float) -> Tensor:
        """Training: hidden states ``[B, T, C]`` of embeddings ``[B, T, C]``; k, v ``[B, G, T, .]`` of the target; j: see
        `shifted_cross_attention`.
        """
        keys, values = self.own_keys(x, position, rope)
        t, w = x.shape[1], self.shape.window
        i = torch.arange(t, device=x.device)
        near = None if t <= w else ((i[:, None] >= i) & (i[:, None] - i < w))[None, None]
        out = sdpa(self.queries(x, position, rope), keys, values, mask=near, causal=near is None, scale=self.own_scale)
        x = self.after(x, out, self.o)
        x = self.after(
            x, shifted_cross_attention(self.cross_queries(x, position, rope), k, v, j, scale=scale), self.cross_o
        )
        return self.mlp(x)

    @property
    def own_scale(self) -> float:
        """Softmax scale of the self-attention."""
        return self.shape.head_dim**-0.5

    # -- folders --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, model: Any, notes: dict[str, Any] | None = None) -> None:
        """Write weights (safetensors) and sizes (JSON) with the fingerprint of the target it was trained for; atomic."""
        manifest = {
            "kind": FORMAT,
            "shape": asdict(self.shape),
            "target": target_fingerprint(model),
            "notes": notes or {},
        }
        stack.write_folder(path, manifest, dict(self.state_dict()))

    @classmethod
    def load(cls, path: str | Path, model: Any) -> GlideDraft:
        """The inverse. Raises `SavedDataError` for a damaged folder, or one saved for a target with other weights."""
        manifest, tensors = stack.read_folder(path)
        if manifest.get("kind") != FORMAT:
            raise SavedDataError(f"{path} holds no draft of longspec")
        try:
            with torch.device("meta"):
                draft = cls(GlideShape(**manifest["shape"]))
            draft.load_state_dict(tensors, assign=True)
        except (KeyError, TypeError, RuntimeError) as error:
            raise SavedDataError(f"{path} is not a whole draft: {error}") from error
        got = target_fingerprint(model)
        if manifest.get("target") != got:
            raise SavedDataError(
                f"{path} was trained for a target with other weights (fingerprint {str(manifest.get('target'))[:12]}, this "
                f"{type(model).__name__} has {got[:12]}); train a draft for this model"
            )
        draft.fits(model)
        return draft.to(model.device, model.dtype).eval()


def target_fingerprint(model: Any) -> str:
    """A hash of the target's weights in bfloat16, the same for every precision it is loaded in."""
    return stack.fingerprint(_Rounded(model))


class _Rounded(nn.Module):
    """Shows the fingerprint a model's weights in one precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As the model's, floating-point tensors rounded."""
        found = self.__dict__["model"].state_dict()
        return {k: x.detach().to(torch.bfloat16) if x.is_floating_point() else x for k, x in found.items()}


def shifted_cross_attention(q: Tensor, k: Tensor, v: Tensor, j: int, *, scale: float | None = None) -> Tensor:
    """Query i sees the keys 0 .. i - j; the first j queries see none and give 0: causal attention of the shifted pair.

    q ``[B, H, T, D]``, k, v ``[B, G, T, .]`` -> ``[B, H, T, E]``. It imitates that the newest j tokens of a text that is being
    generated have no keys of the target yet.
    """
    t = q.shape[2]
    if not 0 <= j or k.shape[2] != t:
        raise InvalidInput(
            f"shifted_cross_attention needs as many keys as queries and j >= 0; got {k.shape[2]}, {t}, j={j}"
        )
    if j >= t:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    out = sdpa(q[:, :, j:], k[:, :, : t - j], v[:, :, : t - j], causal=True, scale=scale)
    return F.pad(out, (0, 0, j, 0))


def anchor_offset_positions(
    n: int, max_position: int, *, sinks: int = 4, generator: torch.Generator | None = None
) -> Tensor:
    """Positions ``[n]`` of a short training text: the first few stay anchors, the others move far away together.

    [0 .. s - 1, s + o, s + 1 + o, ...] with s ~ U{0 .. sinks} and o ~ U{0 .. min(30000, max_position - 1000) - n}; a model
    that knows fewer than 1000 positions more than the text gives o ~ U{0 .. max_position - n}. Raises `InvalidInput` for a
    text longer than max_position.
    """
    if not 0 < n <= max_position:
        raise InvalidInput(f"a text of n={n} tokens does not fit into max_position={max_position} positions")
    far = min(30000, max_position - 1000) - n
    far = max_position - n if far < 0 else far
    s = int(torch.randint(0, sinks + 1, (), generator=generator))
    o = int(torch.randint(0, far + 1, (), generator=generator))
    place = torch.arange(n)
    return torch.where(place < s, place, place + o)


# -- inference ------------------------------------------------------------------------------------------------------


class GlideProposer:
    """Grows a tree of guesses with a `GlideDraft` (see `Proposer`).

    widths: nodes per depth. At depth 1 the likeliest tokens after the newest certain one; deeper, of all children of the
    nodes above, those with the largest log-probability of the whole path.
    """

    def __init__(self, draft: GlideDraft, target: Target, widths: Sequence[int]) -> None:
        self.draft, self.target, self.widths = draft, target, tuple(widths)
        self.trees = any(w > 1 for w in widths)
        site = last_site(target.model)
        assert site.geometry.rope is not None and site.layer is not None
        self.rope = Rope(site.geometry.rope.frequencies.to(target.device))
        self.scale = draft.shape.head_dim**-0.5 if site.scale is None else site.scale
        self.layer = target.cache.layers[site.layer]
        self.embed, self.head = target.model.get_input_embeddings(), target.model.get_output_embeddings()
        self.keys: Tensor | None = None  # [1, G, <= window, D], of the newest certain tokens
        self.values: Tensor | None = None
        self.length = 0  # certain tokens, all of them
        self.checked = target.prompt.shape[1]  # of these, the first that the target has keys of
        self._memory()

    def _memory(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the target's last layer, capacity included."""
        memory = getattr(self.layer, "memory", None)
        held = self.layer if memory is None else memory
        keys, values = getattr(held, "keys", None), getattr(held, "values", None)
        if not isinstance(memory, (DenseCache, type(None))) or keys is None or values is None:
            raise Refused(
                "longspec: its draft reads all keys of the target's last layer, which "
                f"{type(memory or self.layer).__name__} does not keep; leave that layer out: where=range(layers - 1)"
            )
        return keys, values

    def _certain(self, fresh: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Take in certain tokens: embedding ``[1, 1, C]`` and position ``[1, 1]`` of the newest."""
        window, device = self.draft.shape.window, self.target.device
        self.length += len(fresh)
        last = fresh[-window:]
        x = self.embed(torch.tensor([last], device=device)).to(self.draft.o.weight.dtype)
        position = torch.arange(self.length - len(last), self.length, device=device).unsqueeze(0)
        k, v = self.draft.own_keys(x, position, self.rope)
        if self.keys is not None and self.values is not None:
            k, v = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        self.keys, self.values = k[:, :, -window:], v[:, :, -window:]
        return x[:, -1:], position[:, -1:]

    def _look(
        self, x: Tensor, position: Tensor, depth: int, k: Tensor, v: Tensor, tree: Tensor, far: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Log-probabilities ``[n, V]`` behind the nodes of one depth. k, v: of all nodes so far; tree: bool ``[n, nodes]``."""
        draft, window = self.draft, self.draft.shape.window
        assert self.keys is not None and self.values is not None
        start = max(0, self.keys.shape[2] + depth - window)  # a node sees `window` tokens, its own path among them
        out = hybrid_tree_attention(
            draft.queries(x, position, self.rope), self.keys[:, :, start:], self.values[:, :, start:], k, v, tree,
            scale=draft.own_scale,
        )  # fmt: skip
        x = draft.after(x, out, draft.o)
        out, _ = prefix_attention(draft.cross_queries(x, position, self.rope), *far, scale=self.scale)
        x = draft.mlp(draft.after(x, out, draft.cross_o))
        return self.head(x.to(self.head.weight.dtype))[0].float().log_softmax(-1)

    def propose(self, fresh: Sequence[int], room: int) -> Proposal:
        """See `Proposer`."""
        x, position = self._certain(fresh)
        keys, values = (y[:, :, : self.checked] for y in self._memory())
        far = keys.to(x.dtype), values.to(x.dtype)
        k, v = (y[:, :, :0] for y in (self.keys, self.values))  # type: ignore[index]
        device, above = x.device, torch.zeros(1, 0, dtype=torch.bool, device=x.device)
        scores, base = torch.zeros(1, device=device), -1
        tokens: list[Tensor] = []
        parents: list[Tensor] = []
        for depth, width in enumerate(self.widths[:room]):
            paths = scores.unsqueeze(-1) + self._look(x, position, depth, k, v, above, far)
            vocabulary = paths.shape[-1]
            scores, index = paths.flatten().topk(min(width, paths.numel()))
            parent, token = index // vocabulary, index % vocabulary
            tokens.append(token)
            parents.append(parent + base)
            base = 0 if base < 0 else base + paths.shape[0]
            if depth + 1 == len(self.widths[:room]):
                break
            n, position = token.shape[0], position[:, :1].expand(1, token.shape[0]) + 1
            x = self.embed(token.unsqueeze(0)).to(k.dtype)
            more = self.draft.own_keys(x, position, self.rope)
            k, v = torch.cat((k, more[0]), 2), torch.cat((v, more[1]), 2)
            above = torch.cat((above[parent], torch.eye(n, dtype=torch.bool, device=device)), 1)
        if not self.trees:
            return Proposal(torch.cat(tokens))
        return Proposal(torch.cat(tokens), torch.cat(parents).tolist())

    def verified(self, certain: int, kept: Sequence[int]) -> None:
        """The target's last layer keeps what it computed for the accepted nodes, so that the draft sees it at once.

        Its next pass reads these tokens again and writes the same keys.
        """
        seen = self.target.seen
        self.checked = seen + len(kept)
        if kept:
            place = torch.tensor(kept, device=self.target.device) + seen
            for x in self._memory():
                x[:, :, seen : seen + len(kept)] = x[:, :, place]
