"""How long `import siftune` takes in a fresh interpreter, and whether it loaded torch. The bar: < 0.3 s, no torch.

Run: python benchmarks/import_time.py [--runs 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from machine import describe

PROBE = (
    "import sys, time; start = time.perf_counter(); import siftune; spent = time.perf_counter() - start; "
    "print(spent, any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    spent, heavy = [], False
    for _ in range(runs + 1):  # the first writes the compiled files
        said = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
        spent.append(float(said[0]))
        heavy |= said[1] == "True"
    figures = {"median_s": statistics.median(spent[1:]), "worst_s": max(spent[1:]), "torch_or_numpy_loaded": heavy}
    print(f"{describe()}\n")
    print("| `import siftune` | median | worst | torch or numpy loaded | bar |")
    print("|---|---|---|---|---|")
    print(f"| {runs} runs | {figures['median_s']:.3f} s | {figures['worst_s']:.3f} s | {heavy} | < 0.3 s, no torch |")
    print(f"\n```json\n{json.dumps(figures)}\n```")


if __name__ == "__main__":
    main()
