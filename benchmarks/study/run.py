# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
The studies: causal attention, MMCA, merged MMCA and others, with and without numbered images, trained on the same data.

    python -m benchmarks.study.run scratch     # all models are trained from scratch
    python -m benchmarks.study.run pretrained  # a pretrained vision tower and a pretrained decoder, which stay frozen

Both are for two CPU cores; the second uses a GPU that CUDA finds. Finished jobs are saved in `--output` and not repeated, so
run the command again to resume an interrupted study. At the end it writes the results as JSON to `--docs`, and from that
`study.md` and its figures. Results of the same grid that are there already are not computed again: so a study can be
published in part (`--publish`) and go on elsewhere. `--grid tiny` checks that everything works; the study from scratch also
has `--grid wide`, which is larger.
"""

import argparse
import os
import threading
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType

from benchmarks.study.jobs import Job, Scale, read_result, restore, work
from benchmarks.study.report import STUDIES, read_results, write_document, write_results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--grid", default="published")
    parser.add_argument("--output", type=Path, help="folder for models and results; default outputs/study/STUDY/GRID")
    parser.add_argument("--docs", type=Path, help="folder for the report; default docs for the published grid, else OUTPUT")
    parser.add_argument("--processes", type=int, default=2, help="number of processes, with one thread each")
    parser.add_argument("--publish", action="store_true", help="write the report of the jobs that are finished, and stop")
    args = parser.parse_args(argv)
    study, _, _ = STUDIES[args.study]
    if args.grid not in study.GRIDS:
        parser.error(f"the study {args.study!r} has no grid {args.grid!r}, it has {', '.join(study.GRIDS)}")
    output = args.output or Path("outputs/study") / args.study / args.grid
    docs = args.docs or (Path("docs") if args.grid == "published" else output)
    scale = study.GRIDS[args.grid]
    if (published := read_results(args.study, docs)) and published["grid"] == args.grid:
        restore(published["results"], scale, study.LEAVE_FILES, output)
    results = collect(study, scale, output) if args.publish else run_jobs(study, scale, output, args.processes)
    write_results(args.study, args.grid, results, docs)
    write_document(docs)
    print(f"The report is {docs / 'study.md'}")


def run_jobs(study: ModuleType, scale: Scale, output: Path, processes: int) -> list[dict]:
    """
    Runs all jobs, and prints the progress.

    Args:
        study (`ModuleType`): The module with the jobs.
        scale ([`Scale`]): The size of the study.
        output (`Path`): Folder for models and results.
        processes (`int`): How many jobs run at a time.

    Returns:
        `list[dict]`: The results, each with the fields of its job.

    Raises:
        RuntimeError: If a job fails. The error names the job. The results of finished jobs stay.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # for the worker processes
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several GPUs the Trainer would use all, with larger batches
    stages = study.list_jobs(scale)
    seconds, waiting = defaultdict(list), [job for stage in stages for job in stage]
    total, results = len(waiting), {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        for stage in stages:
            futures = {pool.submit(work, study.perform, job, scale, output): job for job in stage}
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
                left = _seconds_left(study, waiting, seconds, scale) / processes / 60
                progress = f"[{len(results)}/{total}] {job.name}: {accuracy}{result['seconds']:.0f} s"
                print(f"{progress}; about {left:.0f} min left", flush=True)
    return [results[job] for stage in stages for job in stage]


def end_with_parent() -> None:
    """Ends this worker process when its parent is gone. Else the jobs of a killed study would go on beside the next."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def collect(study: ModuleType, scale: Scale, output: Path) -> list[dict]:
    """The results of the jobs that are finished."""
    jobs = [job for stage in study.list_jobs(scale) for job in stage]
    results = [{**asdict(job), **result} for job in jobs if (result := read_result(job, scale, output))]
    print(f"{len(results)} of {len(jobs)} jobs are finished")
    return results


def _seconds_left(study: ModuleType, waiting: list[Job], seconds: dict[str, list[float]], scale: Scale) -> float:
    """Estimates the remaining seconds from finished jobs of the same kind, or from training steps if there are none."""
    means = {kind: sum(values) / len(values) for kind, values in seconds.items()}
    per_step = sum(means.values()) / sum(study.count_steps(kind, scale) for kind in means)
    return sum(means.get(job.kind, per_step * study.count_steps(job.kind, scale)) for job in waiting)


if __name__ == "__main__":
    main()
