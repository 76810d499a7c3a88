"""The ordered stack of methods on a model, host-independent: roles, clashes, plans, reports, saved folders."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qkv
from qkv.core import registry
from qkv.core.attend import sdpa
from qkv.core.cache import CacheMethod, Compute
from qkv.core.errors import InvalidInput, InvalidParameter, NeverFired, Refused, SavedDataError, UnknownName
from qkv.core.files import sha256_of, whole_folder, write_whole
from qkv.core.operator import Operator
from qkv.core.pattern import Pattern
from qkv.core.reader import Reader
from qkv.core.site import Site
from qkv.core.spec import Method
from qkv.core.steering import Running, Steering

FORMAT = 1
ROLES = {
    "operator": "computes",
    "pattern": "computes",
    "cache": "stores",
    "steering": "steers",
    "conversion": "converts",
}
SORTS = {"self": "a causal", "encoder": "a bidirectional", "cross": "a cross-"}


@dataclass(frozen=True, slots=True)
class Call:
    """One attention as an observer sees it; axes as in `qkv.core.cache.Compute`, G key heads not expanded."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    out: Tensor


@dataclass
class Entry:
    """One method of the stack, the sites it acts on, and what it brought along (tensors for `save`)."""

    method: Method
    where: Any
    sites: list[Site]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tally:
    """What happened at a site since `apply`."""

    calls: int = 0
    bytes: int = 0
    full_bytes: int = 0
    kept: int = 0
    seen: int = 0
    resident: int = 0


@dataclass
class SiteState:
    """What the dispatcher needs at a site: which methods act there, the attention they make up, and the tally."""

    site: Site
    session: Any
    operator: Operator | None = None
    pattern: Pattern | None = None
    cache: CacheMethod | None = None
    steering: list[Steering] = field(default_factory=list)
    observers: list[Callable[[Site, Call], None]] = field(default_factory=list)
    instead: Callable[..., Tensor] | None = None  # a generation loop's own attention, see `qkv.hosts.attending`
    tally: Tally = field(default_factory=Tally)
    applied: bool = False

    @property
    def plain(self) -> bool:
        """Whether this site still computes plain exact attention (observers only look on)."""
        altered = self.operator is not None and self.operator.id != "full"
        return not (altered or self.pattern is not None or self.steering)

    def compute(self, dropout: float = 0.0, running: Running | None = None) -> Compute | None:
        """The attention of this site, or None for plain exact attention.

        dropout: for plain attention in training. running: what steerings keep along the generation that this call is part of.
        """
        run: Compute | None = None
        if self.operator is not None and self.operator.id != "full":
            run = _operator_compute(self.operator)
        if self.pattern is not None:
            run = self.pattern.attention
        for method in self.steering:
            inner = run or sdpa
            run = method.wrap(self.site, inner) if running is None else method.wrap_running(self.site, inner, running)
        for callback in self.observers:
            run = _observed(self.site, run or (functools.partial(sdpa, dropout=dropout) if dropout else sdpa), callback)
        return run


def _operator_compute(operator: Operator) -> Compute:
    def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        padding = None
        if mask is not None:
            if mask.shape[-2] != 1 and not causal and bool((mask == mask[..., :1, :]).all()):
                mask = mask[..., :1, :]  # the padding of an encoder, written out for every query
            if mask.shape[-2] != 1 or mask.shape[1] != 1:
                raise Refused(f"{operator.id} takes padding only, not a mask of shape {tuple(mask.shape)}")
            padding = mask[:, 0, 0].expand(q.shape[0], -1)
        more: dict[str, Any] = {"scale": scale} if operator.spec.scale is not None else {}
        return operator(q, k, v, causal=causal, padding=padding, **more)

    return run


def _observed(site: Site, compute: Compute, callback: Callable[[Site, Call], None]) -> Compute:
    def run(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        out = compute(q, k, v, mask=mask, causal=causal, scale=scale)
        callback(site, Call(q, k, v, mask, causal, scale, out))
        return out

    return run


# -- planning ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether one method acts at one site; reason is None when it does."""

    method: Method
    site: Site
    reason: str | None


@dataclass(frozen=True)
class Plan:
    """What `apply` would do. Printing it shows every site that refuses, with the reason."""

    verdicts: tuple[Verdict, ...]
    refusal: str | None = None

    def accepted(self, method: Method) -> list[Site]:
        """The sites where a method acts."""
        return [v.site for v in self.verdicts if v.method == method and v.reason is None]

    @property
    def ok(self) -> bool:
        """Whether `apply` would succeed."""
        return self.refusal is None

    def __str__(self) -> str:
        lines = []
        for method in dict.fromkeys(v.method for v in self.verdicts):
            mine = [v for v in self.verdicts if v.method == method]
            good = [v for v in mine if v.reason is None]
            lines.append(f"{method}: {len(good)} of {len(mine)} attention sites accept")
            reasons: dict[str, list[str]] = {}
            for v in mine:
                if v.reason is not None:
                    reasons.setdefault(v.reason, []).append(v.site.name)
            for reason, names in reasons.items():
                shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} sites)"
                lines.append(f"  refused at {shown}: {reason}")
        if self.refusal:
            lines.append(f"cannot be applied: {self.refusal}")
        return "\n".join(lines)


def coerce(methods: Sequence[Method | str]) -> list[Method]:
    """Configurations from configurations or settings (``"h2o:budget=0.25"``)."""
    if not methods:
        raise InvalidInput("no method was given; pass at least one, e.g. qkv.method('streamingllm')")
    out = []
    for m in methods:
        if isinstance(m, str):
            m = registry.method(m)
        if not isinstance(m, Method):
            raise InvalidInput(f"expected a method or its id, got {type(m).__name__}; build one with qkv.method('h2o')")
        out.append(m)
    return out


def fits(method: Method, site: Site) -> str | None:
    """None, or why the method cannot act at the site. Host-independent rules; hosts add theirs."""
    if site.reason is not None:
        return site.reason
    if isinstance(method, CacheMethod):
        if not site.cached:
            return f"{SORTS[site.role]} attention that keeps no growing cache has nothing to compress"
        if site.window is not None:
            return f"it already keeps only its own sliding window of {site.window} tokens"
        return method.serves(site.geometry)
    plain = isinstance(method, Operator) and method.id == "full"
    if site.geometry.slopes is not None and not plain:
        return f"it adds linear position biases (ALiBi) to its logits, which {method.id} does not compute"
    if isinstance(method, Pattern):
        if site.window is not None:
            return f"it already has a sliding window of {site.window} tokens"
        return None
    if isinstance(method, Operator):
        wanted = method.spec.causal_needs if site.causal else ()
        needed = [name for name, extra in method.spec.extras.items() if extra.required or name in wanted]
        if needed:
            return (
                f"{method.id} needs {', '.join(needed)}, which this model does not produce; a conversion or a layer trained "
                "with it does"
            )
        if method.spec.causal == "only" and not site.causal:
            return f"{method.id} is causal and this attention is bidirectional"
        if method.spec.causal == "never" and site.causal:
            return f"{method.id} is bidirectional and this attention is causal"
        return None
    if isinstance(method, Steering):
        return method.fits(site)
    return None


def clash(entries: Sequence[tuple[Method, Sequence[Site]]]) -> str | None:
    """None, or why the stack does not fit together."""
    taken: dict[tuple[str, str], Method] = {}
    for method, at in entries:
        role = ROLES.get(method.spec.kind)
        for site in at:
            own = method.id if role is None or role == "steers" else role
            for does in (own, "stores") if getattr(method.spec, "stores", False) else (own,):
                other = taken.get((site.name, does))
                if other is not None:
                    if other == method:
                        return f"{method} is applied twice at {site.name}; once is enough (`qkv.revert` takes it out)"
                    return (
                        f"{other} and {method} both want to be what {does if role else 'acts'} at {site.name}; apply one of "
                        "them, or give them different `where`"
                    )
                taken[site.name, does] = method
            reason = _lost(taken.get((site.name, "computes")), taken.get((site.name, "stores")), site)
            if reason is not None:
                return f"{reason} (at {site.name})"
    return None


def _lost(pattern: Method | None, cache: Method | None, site: Site) -> str | None:
    """None, or why a pattern does not find in what a cache hands over the tokens that it means."""
    if not isinstance(pattern, Pattern) or not isinstance(cache, CacheMethod) or cache.spec.columns:
        return None
    if pattern.spec.dynamic:
        here = torch.zeros(1, site.geometry.kv_heads, 1, dtype=torch.int64)
        windows = isinstance(cache, Reader) and cache.prefill(site.geometry) is not None
        if pattern.spec.masks == "any" or not (windows or cache.sees(site.geometry, here[:, 0], here) is not None):
            return None
        return (
            f"{pattern} chooses what the queries of a prompt see, and {cache} does so too; apply one of them, or give them "
            "different `where`"
        )
    return (
        f"{pattern} goes by the distance between tokens, and {cache} hands over those that it reads in an order of its own; "
        "take a cache that keeps such a window (streamingllm, window), a pattern that goes by content (xattention), or give "
        "them different `where`"
    )


# -- reporting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteReport:
    """What happened at one site: calls, bytes held after the last call, bytes a plain cache would hold, tokens kept; resident:
    the bytes of them that stay with the model, where a method puts others into host memory or on disk.
    """

    site: Site
    methods: tuple[str, ...]
    calls: int
    bytes: int
    full_bytes: int
    kept: int
    seen: int
    resident: int = 0


@dataclass(frozen=True)
class Report:
    """Sums over the sites, and the sites. `kept` and `seen` are the largest over the sites."""

    sites: tuple[SiteReport, ...]

    @property
    def calls(self) -> int:
        """Attention calls at all applied sites."""
        return sum(s.calls for s in self.sites)

    @property
    def bytes(self) -> int:
        """Cache bytes held after the last call."""
        return sum(s.bytes for s in self.sites)

    @property
    def resident(self) -> int:
        """Bytes of them that stay with the model (see `SiteReport`)."""
        return sum(s.resident for s in self.sites)

    @property
    def full_bytes(self) -> int:
        """Bytes that an uncompressed cache of the same tokens holds."""
        return sum(s.full_bytes for s in self.sites)

    @property
    def kept(self) -> int:
        """Most tokens stored at any site."""
        return max((s.kept for s in self.sites), default=0)

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return max((s.seen for s in self.sites), default=0)

    @property
    def ratio(self) -> float:
        """Bytes / full_bytes, or 1.0 when nothing was cached."""
        return self.bytes / self.full_bytes if self.full_bytes else 1.0

    def __str__(self) -> str:
        return (
            f"{self.calls} calls at {len(self.sites)} sites; {self.bytes / 1e6:.2f} MB held of {self.full_bytes / 1e6:.2f} MB "
            f"({self.ratio:.1%}); {self.kept} of {self.seen} tokens kept"
        )


def summarise(states: Sequence[SiteState], names: Callable[[SiteState], tuple[str, ...]]) -> Report:
    """The report, or `NeverFired` when an applied site was never called."""
    silent = [s for s in states if s.applied and not s.tally.calls]
    if silent:
        which = silent[0].site.name + (f" and {len(silent) - 1} more" if len(silent) > 1 else "")
        raise NeverFired(
            f"{which} never ran since `apply`: run the model (a forward pass or generate) before `report`; if it "
            "did run, that module is not on its path (the vision tower of a prompt without images) and the method has no "
            "effect there: leave it out with `where`"
        )
    rows = tuple(
        SiteReport(
            s.site,
            names(s),
            s.tally.calls,
            s.tally.bytes,
            s.tally.full_bytes,
            s.tally.kept,
            s.tally.seen,
            s.tally.resident,
        )
        for s in states
        if s.applied
    )
    return Report(rows)


# -- saved folders ----------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """A hash over every parameter's name, shape, dtype and 512 evenly spaced elements (quick, tells models apart)."""
    h = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        h.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        flat = x.detach().reshape(-1)
        if flat.numel():
            picks = torch.linspace(0, flat.numel() - 1, min(512, flat.numel()), device=flat.device, dtype=torch.float64)
            sample = flat[picks.long()].to("cpu", torch.float64 if flat.is_floating_point() else torch.int64)
            h.update(sample.numpy().tobytes())
    return h.hexdigest()


def write_folder(path: str | Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write manifest and tensors to `path` at once: either the whole folder appears or nothing changes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not (path / "qkv.json").is_file():
            raise SavedDataError(f"{path} exists and is not a folder saved by qkv; choose another, or remove it first")
    try:
        with whole_folder(path) as temporary:
            files = {}
            if tensors:
                target = temporary / "tensors.safetensors"
                save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, target)
                files["tensors.safetensors"] = {"bytes": target.stat().st_size, "sha256": sha256_of(target)}
            manifest = {"format": FORMAT, "qkv": qkv.__version__, "files": files, **manifest}
            write_whole(temporary / "qkv.json", json.dumps(manifest, indent=1, sort_keys=True))
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        raise SavedDataError(
            f"{path} could not be written ({error}); nothing was changed. Free some space or choose another place"
        ) from error


def read_folder(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors of a saved folder, checked; nothing in it is executed and no path in it leaves the folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    file = path / "qkv.json"
    if not file.is_file():
        raise SavedDataError(f"{path} holds no qkv.json: not a folder saved by qkv.save")
    if file.stat().st_size > 16 << 20:
        raise SavedDataError(f"{file} is {file.stat().st_size} bytes; a manifest is small: refused")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, endless digits or brackets
        raise SavedDataError(f"{file} is damaged: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int or manifest["format"] < 1:
        raise SavedDataError(f"{file} is not a manifest of qkv (no 'format', a whole number from 1)")
    if manifest["format"] > FORMAT:
        raise SavedDataError(
            f"{path} was saved by qkv {manifest.get('qkv')} in format {manifest['format']}; this qkv "
            f"{qkv.__version__} reads up to {FORMAT}: update qkv"
        )
    files, tensors = manifest.get("files", {}), {}
    if not isinstance(files, dict) or any(Path(name).name != name or name in ("", ".", "..") for name in files):
        raise SavedDataError(f"{file} names files outside its folder: refused")
    for name, facts in files.items():
        target = path / name
        if not target.is_file() or target.is_symlink():
            raise SavedDataError(f"{target} is missing")
        if not isinstance(facts, dict) or target.stat().st_size != facts.get("bytes"):
            raise SavedDataError(
                f"{target} has {target.stat().st_size} bytes, the manifest says {facts}: truncated or damaged"
            )
        if sha256_of(target) != facts.get("sha256"):
            raise SavedDataError(f"{target} is damaged: its checksum differs from the manifest's")
        try:
            # Copied: as mapped they would change with the file, and lie at addresses where products may round otherwise.
            tensors |= {key: x.clone() for key, x in load_file(target).items()}
        except SafetensorError as error:
            raise SavedDataError(f"{target} is not a safetensors file: {error}") from error
    return manifest, tensors


def load(path: str | Path, model: Any, *, resolve: Callable[..., Any], **options: Any) -> Any:
    """See `qkv.load`. resolve: gives (model, tokenizer) for the name of a base model."""
    manifest, tensors = read_folder(path)
    library = manifest.get("library")
    if library not in ("transformers",):
        raise SavedDataError(f"{path} was saved for the library {library!r}, which this qkv has no host for")
    host = importlib.import_module(f"qkv.hosts.{library}")
    return host.restore(path, manifest, tensors, model, resolve, **options)


def methods_of(manifest: dict[str, Any], path: str | Path) -> list[tuple[Method, Any, dict[str, Any]]]:
    """The saved stack: (method, names of its sites, notes), validated."""
    stack = manifest.get("stack")
    if not isinstance(stack, list) or not stack:
        raise SavedDataError(f"{path}: the manifest has no stack of methods")
    out = []
    for item in stack:
        names = item.get("sites") if isinstance(item, dict) else None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise SavedDataError(f"{path}: an entry of the stack is damaged: {str(item)[:80]}")
        try:
            out.append((registry.from_dict(item.get("method")), names, item.get("notes", {})))
        except UnknownName as error:
            raise SavedDataError(f"{path} needs a method that this qkv {qkv.__version__} lacks: {error}") from error
        except (InvalidParameter, RecursionError) as error:
            raise SavedDataError(f"{path}: the settings of a method are damaged: {error}") from error
        if not names:
            raise SavedDataError(f"{path}: an entry of the stack is damaged: {out[-1][0]} has no sites")
    return out
