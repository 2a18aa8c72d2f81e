"""Runs one case again, or many: python -m tests.fuzz KIND|all [--seed S] [--cases N] [--case C]"""

import argparse
import sys
import tempfile
from pathlib import Path
from time import monotonic

from tests.fuzz import materials
from tests.fuzz.kinds import KINDS
from tests.fuzz.play import BATCH, Server, draw, play_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=BATCH, help="at most that many of each kind and seed")
    parser.add_argument("--case", type=int, help="this one alone")
    asked = parser.parse_args()
    num_failed = 0
    with tempfile.TemporaryDirectory(prefix="hpc-train-fuzz-") as name, Server() as server:
        stock, place = Path(name) / "materials", Path(name) / "cases"
        stock.mkdir()
        place.mkdir()
        materials.make(stock, server)
        for kind in KINDS if asked.kind == "all" else [asked.kind]:
            began_s = monotonic()
            cases = list(enumerate(draw(KINDS[kind], asked.seed)))
            chosen = cases[: asked.cases] if asked.case is None else [cases[asked.case]]
            failed = play_all(kind, chosen, asked.seed, server, stock, place)
            print(*failed, sep="\n\n")
            print(f"{kind}: {len(chosen)} cases, {len(failed)} failed, {monotonic() - began_s:.1f} s", flush=True)
            num_failed += len(failed)
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main()
