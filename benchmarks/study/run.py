# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The study: causal attention, MMCA and merged MMCA, with and without numbered keys, trained on the same data.

    python -m benchmarks.study.run

Everything is made from nothing, on two CPU cores. What was done lies in `--output` and is not done again, so a run that
was stopped goes on. At the end `--docs` holds `study_results.json`, and `study.md` and its pictures, which are written
from it. `--grid wide` is the same with more seeds and more data; `--grid tiny` checks that all parts work.
"""

import argparse
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from benchmarks.study.report import write_report
from benchmarks.study.runs import GRIDS, Job, Scale, count_steps, list_jobs, work


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="published", choices=GRIDS)
    parser.add_argument("--output", type=Path, help="folder of models and results; outputs/study/GRID by default")
    parser.add_argument("--docs", type=Path, help="folder of the report; docs for the published grid, else OUTPUT")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    args = parser.parse_args(argv)
    output = args.output or Path("outputs/study") / args.grid
    docs = args.docs or (Path("docs") if args.grid == "published" else output)
    results = run_jobs(GRIDS[args.grid], output, args.processes)
    write_report(args.grid, results, docs)
    print(f"The report is {docs / 'study.md'}")


def run_jobs(scale: Scale, output: Path, processes: int) -> list[dict]:
    """
    Does all jobs, and says how far it is.

    Returns:
        `list[dict]`: The results, each with the fields of its job.

    Raises:
        RuntimeError: If a job fails, with its name. What the others have finished stays.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    stages = list_jobs(scale)
    seconds, waiting = defaultdict(list), [job for stage in stages for job in stage]
    total, results = len(waiting), {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for stage in stages:
            futures = {pool.submit(work, job, scale, output): job for job in stage}
            for future in as_completed(futures):
                job = futures[future]
                try:
                    result = future.result()
                except Exception as error:
                    pool.shutdown(cancel_futures=True)
                    raise RuntimeError(f"{job.name} failed: {error}") from error
                results[job] = {**asdict(job), **result}
                waiting.remove(job)
                seconds[job.kind].append(result["seconds"])
                accuracy = f"accuracy {result['accuracy']:.3f}, " if "accuracy" in result else ""
                left = _seconds_left(waiting, seconds, scale) / processes / 60
                progress = f"[{len(results)}/{total}] {job.name}: {accuracy}{result['seconds']:.0f} s"
                print(f"{progress}; about {left:.0f} min left", flush=True)
    return [results[job] for stage in stages for job in stage]


def _seconds_left(waiting: list[Job], seconds: dict[str, list[float]], scale: Scale) -> float:
    """By the mean of the jobs of the same kind; of a kind that has none yet, by its training steps."""
    means = {kind: sum(values) / len(values) for kind, values in seconds.items()}
    per_step = sum(means.values()) / sum(count_steps(kind, scale) for kind in means)
    return sum(means.get(job.kind, per_step * count_steps(job.kind, scale)) for job in waiting)


if __name__ == "__main__":
    main()
