"""Replay requests against a server that speaks OpenAI's API, this package's or any other: latencies and throughput.

    python scripts/bench_serving.py --num-requests 200 --rate inf --max-tokens 32
    python scripts/bench_serving.py --trace requests.jsonl --base-url http://127.0.0.1:8188/v1 --json result.json

A trace is a file of JSON lines, one per request:

    {"at": 0.25, "prompt": "text or token ids", "max_tokens": 32}

"at" is the second at which the request is sent. Without --trace one is made: Poisson arrivals, prompts of random words
behind one of a few shared prefixes. Sampling is greedy.

Every request is streamed. TTFT is the time from sending to the first text, TPOT the time from there to the last text
over the tokens behind the first, latency the time to the end. The share of prompt tokens found in the prefix cache is
what the server's usage says (prompt_tokens_details.cached_tokens), null if it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import openai

WORDS = (
    "the",
    "a",
    "of",
    "in",
    "to",
    "and",
    "box",
    "code",
    "red",
    "blue",
    "token",
    "cache",
    "block",
    "layer",
    "query",
)
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class TraceRequest:
    """A line of a trace."""

    at: float
    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True)
class Outcome:
    """What became of a request; seconds are None if there was no text, or only one token for TPOT.

    Attributes:
        error: Empty if it ended well.
        num_cached_tokens: None if the server does not tell.
    """

    error: str
    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_s: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int | None = None


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file.

    Raises:
        ValueError: A line is something else; the message names it.
    """
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            request = TraceRequest(**json.loads(line))
            requests.append(TraceRequest(float(request.at), request.prompt, request.max_tokens))
        except (ValueError, TypeError) as error:
            expected = '{"at": seconds, "prompt": ..., "max_tokens": ...}'
            raise ValueError(f"{path}, line {number}: expected {expected}: {error}") from error
    if not requests:
        raise ValueError(f"{path}: expected at least one request, got an empty file")
    return requests


def make_trace(options: argparse.Namespace) -> list[TraceRequest]:
    """Random requests; equal options give equal ones."""
    rng = random.Random(options.seed)

    def text(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    prefixes = [text(options.shared_words) for _ in range(options.num_prefixes)]
    requests, at = [], 0.0
    for _ in range(options.num_requests):
        prompt = f"{rng.choice(prefixes)} {text(options.prompt_words)}".strip()
        requests.append(TraceRequest(at, prompt, options.max_tokens))
        at += 0.0 if math.isinf(options.rate) else rng.expovariate(options.rate)
    return requests


async def send(client: openai.AsyncOpenAI, model: str, request: TraceRequest, *, chat: bool) -> Outcome:
    """Send a request and read its stream to the end."""
    common: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = perf_counter()
    first = last = None
    usage = None
    try:
        if chat:
            messages = [{"role": "user", "content": request.prompt}]
            stream = await client.chat.completions.create(messages=messages, **common)
        else:
            stream = await client.completions.create(prompt=request.prompt, **common)
        async for chunk in stream:
            usage = chunk.usage or usage
            if chunk.choices and (chunk.choices[0].delta.content if chat else chunk.choices[0].text):
                last = perf_counter()
                first = first or last
    except openai.APIError as error:
        return Outcome(error=f"{getattr(error, 'status_code', None) or type(error).__name__}")
    if usage is None:
        return Outcome(error="no usage")
    details = usage.prompt_tokens_details
    num_after_first = usage.completion_tokens - 1
    return Outcome(
        error="",
        ttft_s=None if first is None else first - begin,
        tpot_s=(last - first) / num_after_first if first and last and num_after_first > 0 else None,
        latency_s=perf_counter() - begin,
        num_prompt_tokens=usage.prompt_tokens,
        num_output_tokens=usage.completion_tokens,
        num_cached_tokens=None if details is None else details.cached_tokens,
    )


async def replay(options: argparse.Namespace, trace: Sequence[TraceRequest]) -> tuple[list[Outcome], float]:
    """Send every request at its time, as far as the concurrency allows.

    Returns:
        Outcomes in the order of the trace, and the seconds it took.
    """
    slots = asyncio.Semaphore(options.concurrency)
    async with openai.AsyncOpenAI(
        base_url=options.base_url, api_key=options.api_key, max_retries=0, timeout=options.timeout
    ) as client:
        model = options.model or (await client.models.list()).data[0].id
        begin = perf_counter()

        async def send_at(request: TraceRequest) -> Outcome:
            await asyncio.sleep(max(0.0, request.at - (perf_counter() - begin)))
            async with slots:
                return await send(client, model, request, chat=options.chat)

        outcomes = await asyncio.gather(*map(send_at, trace))
        return list(outcomes), perf_counter() - begin


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Figures of a replay; times in milliseconds."""
    good = [outcome for outcome in outcomes if not outcome.error]
    prompt = sum(outcome.num_prompt_tokens for outcome in good)
    output = sum(outcome.num_output_tokens for outcome in good)
    cached = [outcome.num_cached_tokens for outcome in good]
    knows_hits = bool(good) and None not in cached
    return {
        "num_requests": len(outcomes),
        "num_completed": len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "seconds": seconds,
        "num_prompt_tokens": prompt,
        "num_output_tokens": output,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (prompt + output) / seconds,
        "prefix_hit_rate": sum(map(int, filter(None, cached))) / prompt if knows_hits and prompt else None,
        "ttft_ms": _spread([outcome.ttft_s for outcome in good]),
        "tpot_ms": _spread([outcome.tpot_s for outcome in good]),
        "latency_ms": _spread([outcome.latency_s for outcome in good]),
    }


def _spread(seconds: Sequence[float | None]) -> dict[str, float] | None:
    known = [1e3 * value for value in seconds if value is not None]
    if not known:
        return None
    quantiles = {name: float(np.quantile(known, share)) for name, share in QUANTILES.items()}
    return {"mean": float(np.mean(known)), **quantiles, "max": max(known)}


def table(figures: dict[str, Any]) -> str:
    """Figures for people."""
    return "\n".join(f"{name:<20} {_written(value)}" for name, value in figures.items())


def _written(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_written(number)}" for name, number in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return str(value)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first that the server has")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--chat", action="store_true", help="chat completions; prompts must be texts")
    parser.add_argument("--concurrency", type=int, default=1024, help="requests in flight (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a request (default: %(default)s)")
    parser.add_argument("--trace", type=Path, help="requests to replay")
    parser.add_argument("--save-trace", type=Path, help="write the requests that were sent")
    parser.add_argument("--json", type=Path, help="write figures, options and outcomes")
    made = parser.add_argument_group("without --trace")
    made.add_argument("--num-requests", type=int, default=64)
    made.add_argument("--rate", type=float, default=math.inf, help="arrivals per second (default: all at once)")
    made.add_argument("--prompt-words", type=int, default=16, help="of a request alone (default: %(default)s)")
    made.add_argument("--shared-words", type=int, default=64, help="of a prefix (default: %(default)s)")
    made.add_argument("--num-prefixes", type=int, default=4, help="different prefixes (default: %(default)s)")
    made.add_argument("--max-tokens", type=int, default=32)
    made.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, low in (("concurrency", 1), ("num_requests", 1), ("num_prefixes", 1), ("prompt_words", 0)):
        if getattr(options, name) < low:
            parser.error(f"--{name.replace('_', '-')}: expected {low} or more, got {getattr(options, name)}")
    if not options.rate > 0:
        parser.error(f"--rate: expected more than 0, got {options.rate}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay and report.

    Returns:
        Exit status: 0, 1 if a request failed, 2 if nothing could be sent.
    """
    options = parse(arguments)
    try:
        trace = read_trace(options.trace) if options.trace else make_trace(options)
        if options.save_trace:
            lines = (json.dumps(asdict(request)) + "\n" for request in trace)
            options.save_trace.write_text("".join(lines), encoding="utf-8")
        outcomes, seconds = asyncio.run(replay(options, trace))
    except (ValueError, OSError, openai.APIError) as error:
        print(f"bench_serving: error: {error}", file=sys.stderr)
        return 2
    figures = summary(outcomes, seconds)
    if options.json:
        known = {name: str(value) for name, value in vars(options).items() if name != "api_key"}
        content = {"figures": figures, "options": known, "outcomes": [asdict(outcome) for outcome in outcomes]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(figures))
    return int(bool(figures["errors"]))


if __name__ == "__main__":
    raise SystemExit(main())
