from __future__ import annotations

import argparse
import faulthandler
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.run import SECONDS, Outcome, run_case, run_cases, table
from tests.fuzz.targets import TARGETS, make_originals, quiet


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="TARGET", help=", ".join(t.name for t in TARGETS))
    parser.add_argument("--again", nargs=2, metavar=("TARGET", "CASE"), help="run one case again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        originals, work = Path(folder, "originals"), Path(folder, "work")
        originals.mkdir()
        with quiet():
            make_originals(originals)
        if arguments.again:
            target = next(t for t in TARGETS if t.name == arguments.again[0])
            print(run_case(target, arguments.again[1], originals, work, {}))
            return 0
        cases, begin = [], time.time()
        numbers = range(arguments.first, arguments.first + arguments.cases)
        for case in run_cases(numbers, originals, work, seed=arguments.seed, only=arguments.only):
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # a hang that no signal ends
            cases.append(case)
            if case.outcome.is_fault or case.outcome is Outcome.FOREIGN:
                print(case, flush=True)
        faulthandler.cancel_dump_traceback_later()
        print(table(cases))
        print(f"{len(cases)} cases in {time.time() - begin:.0f} s")
        return int(any(case.outcome.is_fault for case in cases))


if __name__ == "__main__":
    sys.exit(main())
