"""``fewbits generate``: continue a prompt."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from fewbits.cli.base import Debug, Json, emit, stderr
from fewbits.errors import CheckpointError, RequestError
from fewbits.runtime import lean


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense or quantized checkpoint.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from; - reads stdin.")],
    max_tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    dtype: Annotated[str | None, typer.Option(help="What the model computes in; default: its own.")] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="G", help="Keys and values in few bits: int8, int4, int2, fp8; none. Default: what MODEL says."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt; the text is streamed to stdout (to stderr with --json).

    [bold]Examples[/bold]

        fewbits generate ./smollm2-int4 "The capital of France is"

        fewbits generate ./smollm2-int4 "Why is the sky blue?" --chat --max-tokens 200 --temperature 0.7
    """
    if max_tokens < 1:
        raise RequestError(f"--max-tokens {max_tokens} makes no text; give 1 or more")
    if not temperature >= 0:
        raise RequestError(f"--temperature {temperature} is not possible; give 0 or more")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise RequestError("the prompt is empty; give some text")
    started = time.perf_counter()
    check_cache(kv_cache)
    loaded, tokenizer = load(model, dtype)
    cache = make_cache(loaded, kv_cache)
    ids = encode(tokenizer, text, chat)
    ready = time.perf_counter()
    stream = sys.stderr if as_json else sys.stdout
    if not chat:
        stream.write(text)
    new = decode(loaded, tokenizer, ids, (max_tokens, temperature, seed), stream, cache)
    seconds = time.perf_counter() - ready
    stderr(
        f"[loaded in {ready - started:.1f} s, {len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s]"
    )
    if as_json:
        emit(
            {
                "model": model,
                "prompt": text,
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "tokens": len(new),
                "load_seconds": ready - started,
                "seconds": seconds,
                "tokens_per_s": len(new) / seconds,
            }
            | ({} if cache is None else {"kv_cache": cache.kind, "kv_cache_bytes": cache.nbytes})
        )


def check_cache(kind: str | None) -> None:
    """RequestError for a cache that does not exist, before the model is loaded."""
    from fewbits.runtime.kvcache import OFF, scheme

    if kind not in (None, OFF):
        scheme(kind)


def make_cache(model: Any, asked: str | None) -> Any:
    """An empty cache of the kind asked for, by default of what the checkpoint states; None for the usual one."""
    from fewbits.runtime.kvcache import QuantizedCache, chosen

    kind = chosen(model.config, asked)
    return None if kind is None else QuantizedCache(model.config, kind)


def load(model: str, dtype: str | None) -> tuple[Any, Any]:
    """Model and tokenizer; RequestError for an unknown dtype."""
    import torch

    from fewbits.runtime import load as load_checkpoint

    wanted = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not isinstance(wanted, torch.dtype):
        raise RequestError(f"dtype {dtype!r} is unknown; give float32, bfloat16 or float16")
    try:
        loaded, tokenizer = load_checkpoint(model, dtype=wanted)
    except CheckpointError as e:
        if not (isinstance(e.__cause__, NotImplementedError) and lean.restore_meta()):
            raise
        loaded, tokenizer = load_checkpoint(model, dtype=wanted)
    if tokenizer is None:
        raise RequestError(f"{model} has no tokenizer; copy the tokenizer files of the original model into it")
    return loaded, tokenizer


def encode(tokenizer: Any, text: str, chat: bool) -> Any:
    """Prompt ids ``[1, T]``; RequestError when ``chat`` is asked of a model without a template."""
    if not chat:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    if not tokenizer.chat_template:
        raise RequestError("--chat needs a chat template and this model has none; leave --chat out")
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def decode(
    model: Any, tokenizer: Any, ids: Any, how: tuple[int, float, int], stream: Any, cache: Any = None
) -> list[int]:
    """New token ids, written to ``stream`` as they come."""
    import torch
    from transformers import TextStreamer

    from fewbits.runtime.decode import generate

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            stream.write(text + ("\n" if stream_end else ""))
            stream.flush()

    max_tokens, temperature, seed = how
    torch.manual_seed(seed)
    streamer = Stream(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return generate(model, ids, max_tokens, temperature, streamer, cache)
