"""What a figure was measured on: processor, cores, versions and date, for the head of every table. Never a host name."""

from __future__ import annotations

import datetime
import platform

from siftune.study.machine import cores, processor


def describe() -> str:
    """One line: processor, cores, GPU if any, torch, transformers and Python versions, torch threads, date."""
    import torch
    import transformers

    parts = [processor(), f"{cores()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    elif torch.backends.mps.is_available():
        parts.append("Apple GPU (MPS)")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return "; ".join([*parts, versions, f"{torch.get_num_threads()} torch threads", date])


if __name__ == "__main__":
    print(describe())
