"""`qkv generate`: text from a model under a stack of methods."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qkv.cli._shared import (
    DEVICE,
    DTYPE,
    JSON,
    METHOD,
    MODEL,
    SEED,
    load_model,
    messages,
    methods_of,
    pick_device,
    print_json,
)

EXAMPLES = (
    'qkv generate smollm2 --prompt "The capital of France is"',
    'qkv generate smollm2 -m kivi:bits=2 --chat --prompt "Why is the sea salty?"',
    "qkv generate smollm2 -m h2o:budget=256 --prompt-file long.txt --tokens 200",
    "qkv generate smollm2 -m snapkv:budget=0.25 --prompt-file long.txt --save-cache notes/",
    'qkv generate smollm2 -m snapkv:budget=0.25 --cache notes/ --prompt "Who wrote it?"',
)


def command(
    model: Annotated[str, MODEL],
    method: Annotated[list[str] | None, METHOD] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt; - reads it from stdin.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", metavar="FILE", help="A UTF-8 file that holds the prompt.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Most tokens to generate.")] = 100,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=1e-3, help="With --sample.")] = 1.0,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", metavar="DIR", help="Go on from a saved cache: the prompt follows its text.", show_default=False
        ),
    ] = None,
    save_cache: Annotated[
        Path | None,
        typer.Option(
            "--save-cache", metavar="DIR", help="Keep the prompt's compressed cache in DIR.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, SEED] = 0,
    dtype: Annotated[str | None, DTYPE] = None,
    device: Annotated[str | None, DEVICE] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Generate text; several -m are applied together, in order. What the cache held is told on stderr.

    MODEL may also be the folder of a model that `qkv train` made.
    """
    from qkv.core.errors import Refused
    from qkv.models import saved_kind

    words = _prompt(prompt, prompt_file)
    if saved_kind(model) == "causal-lm":
        if method or chat or cache or save_cache or dtype:
            raise Refused("a model of `qkv train` computes with its own operators: -m, --chat, --cache, --save-cache and --dtype "
                          "do not apply to it")  # fmt: skip
        _run_own(model, words, tokens, temperature if sample else 0.0, seed, pick_device(device), json)
        return
    chosen = methods_of(method or ["full"])
    network, tokenizer = load_model(model, dtype, device)
    how = {"do_sample": sample, "temperature": temperature}
    _run(network, tokenizer, chosen, words, tokens, chat, how, seed, json, (cache, save_cache))


def _prompt(prompt: str | None, file: Path | None) -> str:
    from qkv.core.errors import InvalidInput

    if (prompt is None) == (file is None):
        raise InvalidInput(
            "give the prompt with --prompt TEXT (- for stdin) or with --prompt-file FILE, one of the two"
        )
    if file is not None:
        try:
            words = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"cannot read {file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{file} is not UTF-8 text (byte {error.start})") from error
    else:
        words = sys.stdin.read() if prompt == "-" else prompt or ""
    if not words.strip():
        raise InvalidInput("the prompt is empty; there is nothing to go on from")
    return words


def _run(
    model: Any,
    tokenizer: Any,
    methods: Any,
    words: str,
    tokens: int,
    chat: bool,
    how: dict[str, Any],
    seed: int,
    json: bool,
    folders: tuple[Path | None, Path | None],
) -> None:
    """folders: of the cache to go on from, and to keep the prompt's cache in."""
    import torch

    import qkv
    from qkv.core.errors import InvalidInput

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInput("this model has no chat template; leave --chat out")
        turn = [{"role": "user", "content": words}]
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(words, return_tensors="pt")
    ids = inputs["input_ids"].to(model.device)
    how = how if how["do_sample"] else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    torch.manual_seed(seed)
    streamer = None if json else _streamer(tokenizer)
    with qkv.applied(model, *methods):  # pyright: ignore[reportGeneralTypeIssues]
        start = time.perf_counter()
        ids, cache = _before(model, ids, tokens, *folders)
        length = ids.shape[1]
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                streamer=streamer,
                past_key_values=cache,
                **how,
            )
        seconds = time.perf_counter() - start
        done = qkv.report(model)
    fresh = out[0, length:]
    if json:
        print_json({
            "prompt_tokens": length, "tokens": fresh.tolist(), "text": tokenizer.decode(fresh, skip_special_tokens=True),
            "methods": [m.to_dict() for m in methods], "seconds": seconds, "held_bytes": done.bytes,
            "full_bytes": done.full_bytes,
        })  # fmt: skip
        return
    sys.stdout.flush()
    said = f"{len(fresh)} tokens in {seconds:.1f} s after {length}; {', '.join(map(str, methods))}: {done}"
    messages().print(said, style="dim", markup=False, soft_wrap=True)


def _run_own(folder: str, words: str, tokens: int, temperature: float, seed: int, device: str, json: bool) -> None:
    """Text from a model of bytes; its state, of the size told at the end, is all it keeps."""
    import codecs

    from qkv.models.language.causal import CausalLM
    from qkv.models.language.generating import stream

    model = CausalLM.from_pretrained(folder, device=device)
    prompt, start = list(words.encode()), time.perf_counter()
    steps = stream(model, [prompt], temperature=temperature, seed=seed)
    text, fresh, held, read = [], [], 0, codecs.getincrementaldecoder("utf-8")("replace")
    for _ in range(tokens):
        step = next(steps)
        fresh.append(int(step.tokens))
        held = step.state.bytes
        text.append(read.decode(bytes((fresh[-1],))))
        if not json:
            print(text[-1], end="", flush=True)
    seconds = time.perf_counter() - start
    if json:
        print_json({"prompt_tokens": len(prompt), "tokens": fresh, "text": "".join(text), "seconds": seconds, "held_bytes": held,
                    "methods": [m.to_dict() for m in model.config.methods]})  # fmt: skip
        return
    print(flush=True)
    layers = ", ".join(map(str, model.config.methods))
    said = f"{tokens} bytes in {seconds:.1f} s after {len(prompt)}; {layers}: a state of {held} bytes"
    messages().print(said, style="dim", markup=False, soft_wrap=True)


def _before(model: Any, ids: Any, tokens: int, source: Path | None, target: Path | None) -> tuple[Any, Any]:
    """(all token ids, the cache to go on from or None): the prompt after a saved text, its own cache kept where asked for."""
    import torch

    from qkv import hosts
    from qkv.core.errors import InvalidInput

    saved, prompt = None, ids
    if source is not None:
        saved = hosts.load_cache(model, source)
        if saved.input_ids is None:
            raise InvalidInput(
                f"{source} was saved without its token ids, so no text can follow it; save it with input_ids"
            )
        ids = torch.cat((saved.input_ids.expand(len(ids), -1), ids), 1)
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if reach is not None and ids.shape[1] + tokens > reach:
        raise InvalidInput(
            f"{ids.shape[1]} prompt tokens and {tokens} new ones exceed the {reach} positions this model knows"
        )
    if target is None:
        return ids, saved.cache if saved else None
    cache = saved.cache if saved else hosts.fresh_cache(model, ids.shape[1])
    if prompt.shape[1] < 2:
        raise InvalidInput("a cache is kept of all prompt tokens but the last; give a prompt of at least two tokens")
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    hosts.save_cache(model, cache, target, ids[:, :-1])
    return ids, cache


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
