"""What a decode step spends its time on: the model, or the engine around it.

    python scripts/bench_engine.py [--model FOLDER] [--batch-size 8] [--num-tokens 200] [--num-threads 0]

Prints medians over the decode steps, and the 10 % and 90 % quantiles of the whole step. The greedy tokens of the batch
are compared with those of each prompt alone first: a fast wrong engine is of no use.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from time import perf_counter

import numpy as np

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.installation import DEMO_MODEL
from fastdeploy_dsa.step import StepMetadata

BLOCK_SIZE = 64
KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "top-p": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    "greedy, stop string": SamplingParams(temperature=0.0, stop="\x00\x00\x00"),
}


def prompts_of(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Random token ids; prompts differ in length, as in service."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, min(256, llm.config.vocab_size), length + number).tolist() for number in range(count)]


def params_of(kind: SamplingParams, num_tokens: int) -> SamplingParams:
    fields = {name: getattr(kind, name) for name in kind.__dataclass_fields__}
    return SamplingParams(**(fields | {"max_tokens": num_tokens, "ignore_eos": True}))


def decode_steps(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> np.ndarray:
    """[steps, 5] seconds: model, schedule, sample, detokenize, all of the step as the caller sees it."""
    columns = ["model", "schedule", "sample", "detokenize", "num_steps"]
    snapshots = []
    for received, _ in enumerate(llm.stream(prompts, params), 1):
        if received % len(prompts) == 0:  # every request got a token: one step is over
            times = llm.time_split()
            snapshots.append((*(getattr(times, column) for column in columns), perf_counter()))
    table = np.diff(np.array(snapshots), axis=0)
    if not (table[:, 4] == 1).all():
        raise RuntimeError("a row of the table is not one step")
    return np.delete(table, 4, axis=1)


def seconds_of_step_tensors(batch_size: int, length: int) -> float:
    """Median time to build the tensors of a decode step, which the split counts as the model's."""
    width = -(-length // BLOCK_SIZE)
    inputs = StepInputs(
        token_ids=np.zeros(batch_size, np.int64),
        positions=np.full(batch_size, length - 1, np.int32),
        request_ids=np.arange(batch_size, dtype=np.int32),
        block_table=np.arange(batch_size * width, dtype=np.int32).reshape(batch_size, width),
        logits_rows=np.arange(batch_size),
    )
    times = []
    for _ in range(300):
        begin = perf_counter()
        StepMetadata.build(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            request_ids=inputs.request_ids,
            block_table=inputs.block_table,
            block_size=BLOCK_SIZE,
        )
        times.append(perf_counter() - begin)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--num-tokens", type=int, default=200)
    parser.add_argument("--num-threads", type=int, default=0)
    parser.add_argument("--cache-dtype", default="auto")
    options = parser.parse_args()

    llm = LLM(
        options.model,
        num_threads=options.num_threads,
        cache_dtype=options.cache_dtype,
        max_num_seqs=options.batch_size,
        # All prompts in one step, so that every later step is a decode step of the whole batch.
        max_num_batched_tokens=options.batch_size * (options.prompt_tokens + options.batch_size),
        block_size=BLOCK_SIZE,
    )
    prompts = prompts_of(llm, options.batch_size, options.prompt_tokens)
    check = params_of(KINDS["greedy"], 8)
    together = [output.token_ids for output in llm.generate(prompts, check)]
    alone = [llm.generate([prompt], check)[0].token_ids for prompt in prompts]
    if together != alone:
        raise RuntimeError("the batch changes tokens")

    threads = options.num_threads or len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    print(f"batch {options.batch_size}, prompt {options.prompt_tokens}, {threads} threads, load {load:.1f}")
    parts = "model ms  schedule us  sample us  detokenize us  other us  engine share"
    print(f"{'':20s}  step ms  (10 % .. 90 %)   {parts}")
    for name, kind in KINDS.items():
        table = decode_steps(llm, prompts, params_of(kind, options.num_tokens))
        model, schedule, sample, detokenize, step = np.median(table, axis=0)
        low, high = np.quantile(table[:, 4], [0.1, 0.9])
        outside = np.median(table[:, 4] - table[:, 0])
        other = np.median(table[:, 4] - table[:, :4].sum(axis=1))
        print(
            f"{name:20s}  {step * 1e3:7.2f}  ({low * 1e3:5.2f} .. {high * 1e3:6.2f})  {model * 1e3:9.2f}"
            f"  {schedule * 1e6:11.0f}  {sample * 1e6:9.0f}  {detokenize * 1e6:13.0f}  {other * 1e6:8.0f}"
            f"  {outside / step:11.1%}"
        )
    tensors = seconds_of_step_tensors(options.batch_size, options.prompt_tokens + options.num_tokens)
    print(f"of the model's time, the step's tensors take {tensors * 1e6:.0f} us")


if __name__ == "__main__":
    main()
