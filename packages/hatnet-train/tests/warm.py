"""A process that has imported everything, and forks the processes of a launch from itself.

What it forks are processes like any others, with a session, an environment and an exit of their own; only the ten
seconds of imports are not spent again for each of them. It reads requests from standard input, a JSON value a line,
and answers each with one.
"""

import gc
import importlib
import json
import os
import sys

import torch

IMPORTS = ("hatnet_train.train", "sklearn.datasets", "matplotlib.figure", "matplotlib.backends.backend_agg")


def main() -> int:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # else every process copies the memory of all these modules when it looks for garbage
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                answers.close()
                return become(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def become(module: str, function: str, arguments: list[str], environ: dict[str, str], output: str, folder: str) -> int:
    """Be a process of its own; its exit status.

    Args:
        module: where the function is that it runs.
        function: takes a list of arguments, returns the exit status.
        arguments: of that program, as on a command line.
        environ: added to the environment.
        output: file that gets standard output and error.
        folder: to run in.
    """
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environ)
    if "OMP_NUM_THREADS" in environ:  # which was read when torch was imported
        torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    os.chdir(folder)
    sys.argv = [module, *arguments]
    return getattr(importlib.import_module(module), function)(arguments)


if __name__ == "__main__":
    sys.exit(main())
