"""Which cases of tests are too slow for `make test`: reads pytest's durations, writes tests/slow.txt.

    python -m pytest -m "not slow or measured" -n 3 --dist loadfile --no-loadscope-reorder \
        --durations=0 --durations-min=0.3 > durations.txt
    python scripts/slow_cases.py durations.txt

A case is slow if its call takes longer than SLOW. So that each test function keeps a case in `make test`, its cheapest
one may take ONLY. What proves a whole way of use from end to end stays in `make test` at any price: KEPT.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

SLOW, ONLY = 1.5, 3.0  # seconds
KEPT = (
    "test_beside.py::test_trained_and_resumed[editing]",
    "test_cli.py::test_generate_writes_what_it_says",
    "test_convert.py::test_a_pickle_is_read_by_its_tensors_alone",
    "test_convert.py::test_folder_to_single_file_and_back",
    "test_data_command.py::test_training_refuses_what_check_refuses",
    "test_scenes_64.py::test_draws_what_it_is_asked_for",
    "test_dit.py::test_trained_from_nothing",
    "test_faults.py::test_signals_save_and_stop[SIGINT in a step]",
    "test_few_steps.py::test_the_student_draws",
    "test_flow_finetune.py::test_a_lora_is_learnt_and_drawn_with[Z-Image]",
    "test_flow_finetune.py::test_what_is_cached_is_what_is_computed",
    "test_loop.py::test_it_learns",
    "test_manual.py::test_the_readmes_python",
    "test_server.py::test_the_command_from_start_to_signal",
)
LINE = re.compile(r"([\d.]+)s call +tests/(\S.*)")
ROOT = Path(__file__).parents[1]
TARGET = ROOT / "tests" / "slow.txt"
HEAD = "# Cases that take seconds: `make test` leaves them out. Written by scripts/slow_cases.py\n"


def slow_cases(seconds: dict[str, float]) -> list[str]:
    """The names of the slow cases among those that were measured."""
    by_function = defaultdict(list)
    for case, duration in seconds.items():
        by_function[case.partition("[")[0]].append((duration, case))
    cheapest = {min(cases) for cases in by_function.values()}
    spared = {case for duration, case in cheapest if duration <= ONLY} | set(KEPT)
    return sorted(case for case, duration in seconds.items() if duration > SLOW and case not in spared)


def main() -> None:
    lines = Path(sys.argv[1]).read_text().splitlines()
    seconds = {match[2]: float(match[1]) for match in map(LINE.fullmatch, map(str.strip, lines)) if match}
    if unknown := sorted(set(KEPT) - seconds.keys()):
        sys.exit(f"not measured: {', '.join(unknown)}")
    if of_here := [case for case in seconds if str(ROOT) in case]:  # such a case has another name elsewhere
        sys.exit(f"a path is part of a case's name: {', '.join(of_here)}")
    cases = slow_cases(seconds)
    TARGET.write_text(HEAD + "".join(f"{case}\n" for case in cases))
    print(f"{len(cases)} of {len(seconds)} cases that take 0.3 s or more are slow")


if __name__ == "__main__":
    main()
