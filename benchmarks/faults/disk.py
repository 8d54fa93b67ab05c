"""A disk that fills up or breaks, at every place where a run writes: exit 1, what was finished intact, resumable.

    python benchmarks/faults/disk.py                      # ENOSPC and EIO at every operation of a run
    python benchmarks/faults/disk.py --every 8 --offset 3 # an eighth of them: eight processes do all

A full disk stays full until the run has ended; a broken sector (EIO) is met once. Some operations are dispensable
(a line of the log, tidying up), and then the run ends well, with the same policy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults.harness import Harness, check_whole, finished_trials, harness, words

FAULTS = ("full", "broken")
SAID = ("the disk is full", "the disk has an input/output error")
"""SQLite calls a sync that fails an input/output error, whatever it failed of."""


def disk_campaign(
    server: Harness,
    folder: Path,
    *,
    fault: str,
    every: int = 1,
    offset: int = 0,
    strategy: str = "random",
    trials: int = 2,
) -> dict[str, Any]:
    """One run for each `every`-th operation of the unbroken one, with a fault there; then it is resumed."""
    whole = folder / "whole"
    unbroken = server.run(*words(whole, strategy, trials), below=whole)
    assert unbroken.status == 0, unbroken.said
    policy, expected = (whole / "policy.json").read_bytes(), finished_trials(whole)
    outcomes: Counter[str] = Counter()
    for at in range(offset, unbroken.operations, every):
        place = folder / f"at{at}"
        broken = server.run(*words(place, strategy, trials), below=place, fault=fault, at=at)
        where = f"operation {at} ({broken.site}): status {broken.status}, {broken.said}"
        assert broken.status in (0, 1), where
        assert "Traceback" not in broken.said, where
        assert broken.said.count("amc: ") == broken.status, where
        assert broken.status == 0 or any(said in broken.said for said in SAID), where
        known = finished_trials(place)
        check_whole(place)
        if broken.status == 1:
            resumed = server.run(*words(place, strategy, trials), below=place)
            assert resumed.status == 0, f"{where}; resumed: {resumed.said}"
        assert known.items() <= finished_trials(place).items(), where
        assert finished_trials(place) == expected, where
        assert (place / "policy.json").read_bytes() == policy, where
        outcomes["stopped and resumed" if broken.status else "did without"] += 1
        shutil.rmtree(place)
    return {"fault": fault, "operations": unbroken.operations, "tried": sum(outcomes.values()), **outcomes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, harness() as server:
        for fault in FAULTS:
            found = disk_campaign(
                server, Path(folder, fault), fault=fault, every=arguments.every, offset=arguments.offset
            )
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
