"""What the small models share: blocks around any operator, initial weights from a seed, folders, operators as data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.core import registry
from qkv.core.errors import InvalidParameter, QKVError, SavedDataError
from qkv.core.spec import Method, near
from qkv.core.state import State
from qkv.hosts.stack import read_folder, write_folder
from qkv.layers._mixer import Mixer, MixingLayer, check_mixing

M = TypeVar("M", bound="Saved")


@dataclass(frozen=True, kw_only=True)
class SavedConfig:
    """Base of the small models' configurations: frozen, comparable, plain data in JSON.

    operators: one setting per layer.
    """

    operators: tuple[Method | str, ...] = ("gla", "gla", "gla", "gla")

    def __post_init__(self) -> None:
        given = self.operators
        if isinstance(given, (str, Method)) or not isinstance(given, Iterable) or not tuple(given):
            raise InvalidParameter(
                f"operators={given!r} must be a list with one setting per layer, e.g. ('gla', 'full')"
            )
        object.__setattr__(self, "operators", tuple(registry.method(x) for x in given))
        self.check()
        for method in self.methods:
            self.admit(method)

    def check(self) -> None:
        """Checks of the numbers; raise `InvalidParameter`."""

    def admit(self, method: Method) -> None:
        """Raise `Refused` unless a layer of such a model can be made of the method."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """The operators, one per layer."""
        return self.operators  # type: ignore[return-value]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.operators)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `from_dict` reads, every parameter of every operator written out."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return out | {"operators": [json.loads(m.to_json()) for m in self.methods]}

    @classmethod
    def from_dict(cls, data: Any) -> Any:
        """The configuration that `to_dict` wrote. Raises `SavedDataError`."""
        if not isinstance(data, dict) or not isinstance(data.get("operators"), list):
            raise SavedDataError(f"this is no configuration of a {cls.__name__}: {str(data)[:80]}")
        known = {f.name for f in dataclasses.fields(cls)}
        for name in data:
            if name not in known:
                raise SavedDataError(f"a {cls.__name__} has no {name!r}{near(str(name), known)}")
        try:
            fields: dict[str, Any] = data | {"operators": tuple(registry.from_dict(m) for m in data["operators"])}
            return cls(**fields)
        except (QKVError, TypeError) as error:
            raise SavedDataError(f"its configuration is not valid here: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` into a folder, beside weights that another library saved there."""
        (Path(folder) / "config.json").write_text(
            json.dumps(self.to_dict(), indent=1, sort_keys=True), encoding="utf-8"
        )

    def positive(self, *names: str) -> None:
        """Raise `InvalidParameter` unless these fields are ints of at least 1."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidParameter(f"{name}={value!r} must be an int of at least 1")

    def natural(self, *names: str) -> None:
        """Raise `InvalidParameter` unless these fields are ints of at least 1, or 0."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidParameter(f"{name}={value!r} must be an int of at least 1, or 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(SavedConfig):
    """Base of the configurations of models whose layers all have one width and take operators.

    operators: one setting per layer (``"gla"``, ``"full"``, ``"sliding-window:window=128"``, ``"base-conv"``, or a
    configuration). width: of the residual stream. heads: of every operator, divide the width. kv_heads: key/value heads, divide
    the heads; 0 for as many. inner: width of the gated layers, 0 for 8/3 of the width in steps of 32. key_width: D of every
    head, 0 for what each operator asks for.
    """

    width: int = 256
    heads: int = 4
    kv_heads: int = 0
    inner: int = 0
    key_width: int = 0
    causal: ClassVar[bool] = True

    def check(self) -> None:
        """See `SavedConfig.check`."""
        self.positive("width", "heads")
        self.natural("kv_heads", "inner", "key_width")
        if self.width % self.heads:
            raise InvalidParameter(f"width={self.width} must be a multiple of heads={self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise InvalidParameter(f"kv_heads={self.kv_heads} must divide heads={self.heads}, or be 0 for as many")

    def admit(self, method: Method) -> None:
        """See `SavedConfig.admit`."""
        check_mixing(method, causal=self.causal, grouped=0 < self.kv_heads < self.heads)


class Block(nn.Module):
    """A mixer and a gated layer, each on the normalised residual stream.

    A mixer that says so (``mixes_stream``) is given the stream too and returns the new one: its gates decide what stays.
    """

    def __init__(self, mixer: nn.Module, width: int, inner: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.mixer = mixer
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, *, padding: Tensor | None = None, state: State | None = None, keep: bool = False,
        losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        """Residual stream ``[B, N, W]`` and, when `keep`, the mixer's state after it. losses: takes what the mixer learns by."""
        if getattr(self.mixer, "mixes_stream", False):
            x, state = self.mixer(self.before(x), padding=padding, state=state, keep=keep, stream=x, losses=losses)
        else:
            mixed, state = self.mixer(self.before(x), padding=padding, state=state, keep=keep)
            x = x + mixed
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), state


def mixer(method: Method, config: Any, layer: int, **more: Any) -> nn.Module:
    """What mixes the tokens in a layer of a model of this configuration: a `Mixer`, or a module of its own."""
    if isinstance(method, MixingLayer):
        return method.build(config.width)
    return Mixer(
        method, config.width, config.heads, kv_heads=config.kv_heads, layer=layer, layers=config.layers,
        key_width=config.key_width or None, **more,
    )  # fmt: skip


def gated_width(width: int, inner: int) -> int:
    """`inner`, or 8/3 of the width in steps of 32 when it is 0."""
    return inner or -(-8 * width // 3 // 32) * 32


def initialise(model: nn.Module, layers: int, seed: int) -> None:
    """Weights from a seed: normal with variance 1 / (3 fan-in), smaller where they write into the residual stream.

    Biases, norms and what operators learn keep what they were made with. The global random state is not touched.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            fan = module.weight[0].numel()
            shrink = (2 * layers) ** -0.5 if name.endswith((".out", ".down")) and "learnt" not in name else 1.0
            nn.init.normal_(module.weight, std=shrink * (3 * fan) ** -0.5, generator=draw)
            if module.bias is not None and "learnt" not in name:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=draw)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Modules made here draw their weights on the CPU from `seed` (None: as they like); the global random state stays."""
    with torch.random.fork_rng(devices=[]) if seed is not None else nullcontext():
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


def fitted(config: Any, parameters: int, count: Any) -> Any:
    """`config` with the width of its gated layers chosen so that `count(config)` comes closest to `parameters`."""
    one, two = (count(dataclasses.replace(config, inner=i)) for i in (1, 2))
    inner = 1 + round((parameters - one) / (two - one))
    if inner < 8:
        raise InvalidParameter(
            f"{parameters} parameters leave no room for the gated layers of {', '.join(map(str, config.methods))}: "
            f"{one} are taken without them"
        )
    return dataclasses.replace(config, inner=inner)


class Saved(nn.Module):
    """A model with a configuration that is written to and read from a folder (JSON and safetensors, all at once)."""

    kind: ClassVar[str]
    config_class: ClassVar[type[SavedConfig]]
    config: Any

    def save_pretrained(self, path: str | Path, **notes: Any) -> None:
        """Write configuration and weights. notes: plain data kept beside them. Raises `SavedDataError`."""
        manifest = {"model": self.kind, "config": self.config.to_dict(), "notes": notes}
        write_folder(path, manifest, self.state_dict())

    @classmethod
    def from_pretrained(
        cls: type[M], path: str | Path, *, config: SavedConfig | None = None, device: str | torch.device = "cpu"
    ) -> M:
        """The model that `save_pretrained` wrote, in evaluation mode.

        config: what the folder must hold; another one (another operator in a layer, another width) is refused. Raises
        `SavedDataError`.
        """
        manifest, tensors = read_folder(path)
        kind = manifest.get("model")
        if kind != cls.kind:
            raise SavedDataError(f"{path} holds {f'a {kind} model' if kind else 'no model'}, not a {cls.kind} one")
        try:
            found = cls.config_class.from_dict(manifest.get("config"))
        except SavedDataError as error:
            raise SavedDataError(f"{path}: {error}") from error
        if config is not None and config != found:
            raise SavedDataError(f"{path} holds another model: {'; '.join(differences(found, config))}")
        with torch.device("meta"):
            model = cls(found)
        wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        given = {k: tuple(v.shape) for k, v in tensors.items()}
        if given != wanted:
            odd = sorted(k for k in wanted.keys() | given.keys() if wanted.get(k) != given.get(k))
            raise SavedDataError(
                f"{path}: weights do not fit its configuration: {', '.join(odd[:3])}{' ...' * (len(odd) > 3)}"
            )
        model.load_state_dict(tensors, assign=True)
        for p in model.parameters():
            p.requires_grad_(True)
        return model.to(device).eval()


def differences(found: SavedConfig, wanted: SavedConfig) -> list[str]:
    """``name: found instead of wanted`` for every field that differs; operators layer by layer."""
    out = []
    for f in dataclasses.fields(found):
        a, b = getattr(found, f.name), getattr(wanted, f.name, None)
        if f.name == "operators" and len(found.methods) == len(wanted.methods):
            out += [
                f"layer {i}: {x} instead of {y}"
                for i, (x, y) in enumerate(zip(a, wanted.methods, strict=True))
                if x != y
            ]
        elif a != b:
            out.append(f"{f.name}: {_said(a)} instead of {_said(b)}")
    return out


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
