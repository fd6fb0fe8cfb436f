"""One row of the accelerator's table, in a process of its own: `python -m mae_dist.benchmark.row`.

It reads its options as a line of JSON and prints lines of JSON: `{"figures": {…}}` as it finds them, at the end
`{"status": …, "reason": …}`. Figures named `faults` are what is wrong, in words.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from absl import logging

from mae_dist import hardware
from mae_dist.benchmark import continuation, correctness, speeds
from mae_dist.benchmark.options import NotHere, Options
from mae_dist.benchmark.turns import Result

ROWS: dict[str, Callable[[Options], Iterator[Result]]] = {
    "device": correctness.device,
    "gradients": correctness.gradients,
    "attention": correctness.fused_attention,
    "remat": correctness.remat,
    "training": correctness.training,
    "resume": lambda options: continuation.resume(options, deterministic=False),
    "resume_deterministic": lambda options: continuation.resume(options, deterministic=True),
    "to_cpu": continuation.to_cpu,
    "vit_s16": lambda options: speeds.by_batch(options, "s16", first=256),
    "vit_b16": lambda options: speeds.by_batch(options, "b16", first=128),
    "vit_l16": lambda options: speeds.by_batch(options, "l16", first=64),
    "vit_h14": lambda options: speeds.by_batch(options, "h14", first=32),
    "hf_b16": lambda options: speeds.against_hf(options, "b16", batch=256),
    "hf_l16": lambda options: speeds.against_hf(options, "l16", batch=128),
    "input_b16": lambda options: speeds.with_input(options, "b16", batch=256),
}


def main() -> None:
    options = Options(**json.loads(sys.stdin.readline()))
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the log

    def send(**line: object) -> None:
        print(json.dumps(line), file=lines, flush=True)

    hardware.keep_libtpu_from_starting()
    logging.set_verbosity(logging.INFO)
    try:
        for figures in ROWS[options.name](options):
            print(figures, file=sys.stderr, flush=True)
            send(figures=figures)
        send(status="done")
    except NotHere as reason:
        send(status="skipped", reason=str(reason))
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).strip().splitlines() or [""])[0]
        send(status="failed", reason=f"{type(error).__name__}: {first_line[:300]}")


if __name__ == "__main__":
    main()
