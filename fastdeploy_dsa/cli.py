"""Command line: parsing only; the work is done by the modules that each command names."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastdeploy_dsa import __version__
from fastdeploy_dsa.byte_sizes import read_bytes
from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from fastdeploy_dsa.pipeline_stages import PIPELINE_INDEX_MODES

USER_ERROR = 2
INTERRUPTED = 130

_PROG = "fastdeploy-dsa"
_MAX_NUM_SEQS = 32


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        _complain(message)
        raise SystemExit(USER_ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit status: 0, 2 after a user's mistake (one line on stderr), or the command's own.
    """
    options = build_parser().parse_args(arguments)
    # Importing paddle asks for a tool of its own builder.
    warnings.filterwarnings("ignore", message="No ccache found")
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, NotImplementedError, ArithmeticError) as error:
        _complain(str(error))
        return USER_ERROR
    except MemoryError as error:
        _complain(f"this machine has too little memory for what was asked: {str(error) or 'an allocation failed'}")
        return USER_ERROR
    except ImportError as error:
        _complain(f"{error} ('{_PROG} check' says what is missing)")
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def _complain(message: str) -> None:
    sys.stderr.write(f"{_PROG}: error: {' '.join(message.split())}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROG, description="DeepSeek Sparse Attention inference.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    check = commands.add_parser("check", help="report what is installed and what is missing", allow_abbrev=False)
    check.set_defaults(run=_check)

    generate = commands.add_parser("generate", help="continue prompts", allow_abbrev=False)
    generate.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to continue")
    generate.add_argument("--model", type=_folder, help="model folder (default: the demo model of the package)")
    generate.add_argument("--max-tokens", type=int, default=64, help="per prompt at most (default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens that sum to this")
    generate.add_argument("--seed", type=int, default=0, help="of the random choices (default: %(default)s)")
    generate.add_argument("--max-num-seqs", type=int, help="prompts that run at a time (default: all, at most 32)")
    generate.add_argument("--stats", action="store_true", help="say on stderr what cache and drafts did")
    _add_cache(generate)
    _add_common(generate)
    generate.set_defaults(run=_generate)

    _add_serve(commands.add_parser("serve", help="answer OpenAI's API over HTTP", allow_abbrev=False))

    logits = commands.add_parser("logits", help="save logits and selections of a prompt", allow_abbrev=False)
    logits.add_argument("model", metavar="MODEL", type=_folder, help="model folder")
    logits.add_argument("--token-ids", type=Path, required=True, help="JSON file with the prompt, a list of token ids")
    logits.add_argument("--chunk-size", type=int, help="prompt tokens of a step (default: all)")
    logits.add_argument("--steps", type=int, default=0, help="greedy decode steps (default: %(default)s)")
    logits.add_argument("--save", type=Path, required=True, help="safetensors file to write")
    _add_common(logits)
    logits.set_defaults(run=_logits)

    _add_inspect(commands.add_parser("inspect", help="what a configuration means for serving", allow_abbrev=False))
    return parser


def _folder(text: str) -> Path:
    if not text:  # Path("") is the current folder, which nobody meant
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text)


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--model", type=_folder, help="model folder (default: the demo model of the package)")
    serve.add_argument("--served-model-name", help="what clients call the model (default: the folder's name)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    serve.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template (default: the model's own)")
    serve.add_argument("--max-model-len", type=int, help="tokens of a request (default: max_position_embeddings)")
    serve.add_argument("--max-num-seqs", type=int, help="sequences that run at a time (default: 32)")
    serve.add_argument("--max-num-batched-tokens", type=int, default=512, help="of a step (default: %(default)s)")
    serve.add_argument("--max-waiting", type=int, default=512, help="sequences that may wait (default: %(default)s)")
    serve.add_argument("--request-timeout", type=float, metavar="SECONDS", help="of a request (default: none)")
    serve.add_argument("--cache-memory", default="1GiB", help="for the cache (default: %(default)s)")
    serve.add_argument("--seed", type=int, default=0, help="of requests without their own (default: %(default)s)")
    _add_cache(serve)
    _add_common(serve)
    serve.set_defaults(run=_serve)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--block-size", type=int, help="tokens of a cache block (default: the model's own)")
    parser.add_argument("--num-blocks", type=int, help="cache blocks (default: enough for all that run)")
    parser.add_argument("--swap-space", default="0", help="host memory for blocks that leave the cache, such as 1GiB")
    parser.add_argument(
        "--speculative-config",
        metavar="JSON",
        help='draft tokens, such as \'{"method": "mtp", "num_speculative_tokens": 3}\' (default: none)',
    )
    parser.add_argument("--no-prefix-caching", action="store_true", help="compute prefixes seen before again")


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument("model", metavar="PATH_OR_JSON", help="model folder, its config.json, or the JSON itself")
    inspect.add_argument("--hf-overrides", metavar="JSON", help="object whose keys replace those of the config")
    inspect.add_argument("--memory", metavar="BYTES", help="for the caches of one device, such as 80GiB")
    inspect.add_argument("--max-len", type=int, help="tokens of a request (default: max_position_embeddings)")
    inspect.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default: %(default)s)")
    inspect.add_argument("--pp", type=int, default=1, help="pipeline stages (default: %(default)s)")
    inspect.add_argument(
        "--pp-index-mode",
        choices=PIPELINE_INDEX_MODES,
        default="carry",
        help="what a stage does that begins with a shared layer (default: %(default)s)",
    )
    inspect.add_argument(
        "--cache-dtype", choices=CACHE_FORMATS, default="fp8", help="number format of the cache (default: %(default)s)"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    inspect.add_argument("--plot", metavar="FILE", type=Path, help="save a picture, too")
    inspect.set_defaults(run=_inspect)


def _add_common(parser: argparse.ArgumentParser) -> None:
    formats = ("auto", *CACHE_FORMATS)
    parser.add_argument("--device", default="cpu", help="Paddle's name of a device, such as gpu:0 (default: cpu)")
    parser.add_argument("--cache-dtype", choices=formats, default="auto", help="number format of the cache")
    parser.add_argument("--num-threads", type=int, default=0, help="0 (default) uses every processor")


def _check(_options: argparse.Namespace) -> int:
    from rich.console import Console  # noqa: PLC0415

    from fastdeploy_dsa.installation import check_installation, exit_status, render  # noqa: PLC0415 - imports paddle

    findings = check_installation()
    render(findings, Console())
    return exit_status(findings)


def _inspect(options: argparse.Namespace) -> int:
    from rich.console import Console  # noqa: PLC0415

    from fastdeploy_dsa.inspection import InspectionOptions, inspect_model  # noqa: PLC0415
    from fastdeploy_dsa.inspection_plot import save_plot  # noqa: PLC0415
    from fastdeploy_dsa.inspection_view import render  # noqa: PLC0415

    deployment = InspectionOptions(
        cache_format=options.cache_dtype,
        memory_bytes=None if options.memory is None else read_bytes("memory", options.memory),
        max_len=options.max_len,
        tensor_parallel=options.tp,
        pipeline_parallel=options.pp,
        pp_index_mode=options.pp_index_mode,
    )
    logging.getLogger(__package__).setLevel(logging.ERROR)  # the inspection has the warnings itself
    inspection = inspect_model(options.model, options.hf_overrides, deployment)
    if options.plot is not None:
        save_plot(inspection, options.plot)
    if options.json:
        sys.stdout.write(json.dumps(inspection.as_json()) + "\n")
    else:
        render(inspection, Console())
    return 0


def _generate(options: argparse.Namespace) -> int:
    from fastdeploy_dsa.engine import LLM, SamplingParams  # noqa: PLC0415 - imports paddle
    from fastdeploy_dsa.installation import DEMO_MODEL  # noqa: PLC0415

    # One seed for all prompts would give equal prompts equal texts: the engine derives one for each.
    params = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p)
    llm = LLM(
        options.model or DEMO_MODEL,
        device=options.device,
        cache_dtype=options.cache_dtype,
        num_threads=options.num_threads,
        seed=options.seed,
        max_num_seqs=_max_num_seqs(options),
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        swap_space=options.swap_space,
        enable_prefix_caching=not options.no_prefix_caching,
        speculative_config=options.speculative_config,
    )
    for output in llm.generate(options.prompts, params):
        sys.stdout.buffer.write(f"{output.text}\n".encode())  # whatever encoding the terminal is said to have
    if options.stats:
        sys.stderr.write(llm.cache_stats().table())
        if options.speculative_config is not None:
            sys.stderr.write(llm.speculative_stats().table() + llm.time_split().table())
    return 0


def _serve(options: argparse.Namespace) -> int:
    from fastdeploy_dsa.installation import DEMO_MODEL, SERVER_DISTRIBUTIONS  # noqa: PLC0415

    try:
        from fastdeploy_dsa.server.serving import ServerOptions, serve  # noqa: PLC0415 - imports paddle
    except ModuleNotFoundError as error:
        if str(error.name).replace("_", "-") not in SERVER_DISTRIBUTIONS:
            raise
        raise ValueError(f"serve needs the extra 'server': pip install 'fastdeploy-dsa[server]' ({error})") from error
    serve(
        options.model or DEMO_MODEL,
        ServerOptions(
            host=options.host,
            port=options.port,
            served_model_name=options.served_model_name,
            chat_template=options.chat_template,
            max_waiting=options.max_waiting,
            request_timeout=options.request_timeout,
        ),
        device=options.device,
        cache_dtype=options.cache_dtype,
        num_threads=options.num_threads,
        seed=options.seed,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        cache_memory=options.cache_memory,
        swap_space=options.swap_space,
        enable_prefix_caching=not options.no_prefix_caching,
        speculative_config=options.speculative_config,
    )
    return 0


def _max_num_seqs(options: argparse.Namespace) -> int:
    """What was asked for, or no more than there are prompts: a smaller cache is there sooner."""
    asked: int | None = options.max_num_seqs
    return min(len(options.prompts), _MAX_NUM_SEQS) if asked is None else asked


def _logits(options: argparse.Namespace) -> int:
    from fastdeploy_dsa.engine.trace import check_save_path, read_token_ids, trace  # noqa: PLC0415 - imports paddle

    token_ids = read_token_ids(options.token_ids)
    check_save_path(options.save)
    result = trace(
        options.model,
        token_ids,
        device=options.device,
        cache_dtype=options.cache_dtype,
        chunk_size=options.chunk_size,
        steps=options.steps,
        num_threads=options.num_threads,
    )
    result.save(options.save)
    return 0
