"""``qwen2x run``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2x.cli.machine import peak_memory_bytes
from qwen2x.cli.memory_plan import show_footprint
from qwen2x.cli.options import (
    json_option,
    model_options,
    open_model,
    prompt_cache_option,
    quantize_options,
    sampling_for,
    sampling_options,
    system_option,
    take_sampling,
    yarn_option,
)
from qwen2x.cli.output import log, prefill_progress, print_json
from qwen2x.cli.prompt import read_prompt
from qwen2x.cli.speculating import (
    speculating,
    speculation_of,
    speculation_options,
    speculation_text,
)

if TYPE_CHECKING:
    from qwen2x.runtimes.generate import Generation

# What a chat template and a system prompt of its own add to a prompt, generously.
_TEMPLATE_TOKENS = 256

_EXAMPLES = """\b
Example: qwen2x run qwen-int4 "Why is the sky blue?" --temperature 0
         cat story.txt | qwen2x run qwen-int4 "Summarize this text."
"""


@click.command("run", epilog=_EXAMPLES)
@click.argument("model")
@click.argument("prompt", required=False)
@model_options
@quantize_options
@sampling_options
@click.option(
    "--stop",
    multiple=True,
    help="A string that ends the text and is not shown. Repeatable. Default: none.",
)
@system_option
@yarn_option
@prompt_cache_option
@speculation_options
@click.option("--raw", is_flag=True, help="Continue the text as it is, without chat template.")
@click.option("--dry-run", is_flag=True, help="Only show tokens, KV cache and memory.")
@click.option("-v", "--verbose", is_flag=True, help="Show tokens and speed on standard error.")
@json_option
def command(
    model: str,
    prompt: str | None,
    max_tokens: int | None,
    stop: tuple[str, ...],
    system: str | None,
    yarn: Any,
    raw: bool,
    prompt_cache: Path | None,
    dry_run: bool,
    speculate: bool,
    draft: Path | None,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT with MODEL: a bundle, a Hugging Face folder, or a hub id.

    Without PROMPT, or with -, standard input is read. With PROMPT, a file or text that is piped in
    goes before it, with an empty line between; a pipe that stays silent for a second is left
    alone. A checkpoint is exported once (float, or with --bits) into the cache, and that bundle is
    used from then on.
    """
    from qwen2x.runtimes.generate import generate
    from qwen2x.runtimes.prompt_cache import PromptCache

    if raw and system is not None:
        raise click.UsageError(
            "--raw has no place for --system; write it into the prompt", click.get_current_context()
        )
    given = take_sampling(options)
    text = read_prompt(prompt)
    if dry_run:
        show_footprint(
            model,
            text,
            system=system,
            raw=raw,
            max_tokens=max_tokens,
            yarn=yarn,
            as_json=as_json,
            **options,
        )
        return
    kept = PromptCache(prompt_cache) if prompt_cache else None
    started = time.perf_counter()
    guessing: dict[str, Any] = {"speculate": speculate, "draft": draft}
    guessing["threads"] = options["threads"]
    # A token is a byte at least; a chat template adds some.
    length = len(f"{system or ''}{text}".encode()) + _TEMPLATE_TOKENS
    room = None if max_tokens is None else length + max_tokens
    opening = open_model(model, yarn=yarn, room=room, **options)
    with opening as runtime, speculating(runtime, **guessing) as ahead:
        load_s = time.perf_counter() - started
        runtime.on_prefill = prefill_progress(is_verbose=verbose, quiet=as_json)
        answer = generate(
            runtime,
            text,
            max_tokens=max_tokens,
            sampling=sampling_for(runtime, given),
            stop=stop,
            system=system,
            raw=raw,
            yarn=yarn,
            prompt_cache=kept,
            speculate=ahead,
        )
        try:
            if as_json:
                print_json(result_of(answer.run(), load_s))
            else:
                _stream(answer)
        finally:
            # After Ctrl-C too: reading the prompt may have taken minutes.
            if kept is not None and kept.save(runtime, answer.prompt_ids) and verbose:
                log(f"wrote {kept.path}")
        if verbose:
            _log_speed(answer, load_s)


def _stream(answer: Generation) -> None:
    """Prints an answer as it comes."""
    for piece in answer:
        click.echo(piece.text, nl=False)
    click.echo()


def result_of(answer: Generation, load_s: float) -> dict[str, Any]:
    """The object that ``run --json`` prints, of an answer that is complete."""
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "prompt_tokens": len(answer.prompt_ids),
        "cached_tokens": answer.cached_tokens,
        "new_tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "rope_factor": answer.rope_factor,
        "prefilled_again": answer.prefilled_again,
        "backend": answer.runtime.backend,
        "device": answer.runtime.device,
        "timings": timings_of(answer, load_s),
        "speculation": speculation_of(answer),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _log_speed(answer: Generation, load_s: float) -> None:
    timings = timings_of(answer, load_s)
    log(
        f"{len(answer.prompt_ids)} prompt tokens ({answer.cached_tokens} cached) at "
        f"{timings['prefill_tokens_per_s']:.1f}/s, {len(answer.token_ids)} new at "
        f"{timings['decode_tokens_per_s']:.1f}/s, "
        f"ended by {answer.finish_reason}, loaded in {load_s:.2f} s{rope_text(answer)}"
        f"{speculation_text(answer)}"
    )


def rope_text(answer: Generation) -> str:
    """Which YaRN factor was taken, and what had to be read again for it; nothing without YaRN."""
    if len(answer.runtime.rope_contexts) == 1:
        return ""
    again = answer.prefilled_again
    reread = f" ({again} tokens read again, as another one had been in use)" if again else ""
    return f", YaRN factor {answer.runtime.rope_factor:g}{reread}"


def timings_of(answer: Generation, load_s: float) -> dict[str, float]:
    """The ``timings`` of ``run --json``, of an answer whose runtime has just made it."""
    prefilled = len(answer.prompt_ids) - answer.cached_tokens
    # Not one per new token: the first comes with the prefill, the end token is none.
    decoded = answer.runtime.cache_length - len(answer.prompt_ids)
    return {
        "load_s": load_s,
        "prefill_s": answer.prefill_s,
        "decode_s": answer.decode_s,
        "prefill_tokens_per_s": prefilled / answer.prefill_s if answer.prefill_s else 0.0,
        "decode_tokens_per_s": decoded / answer.decode_s if answer.decode_s else 0.0,
    }
