"""Print the GPU, its driver and the machine, for the record of `benchmarks.gpu_check`."""

import os
import platform
import shutil
import subprocess

from benchmarks import messages

FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "clocks.max.sm", "power.limit")


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    messages.send("fact", what="host", text=f"{cores} cores, {platform.platform()}")
    if shutil.which("nvidia-smi"):
        try:
            done = subprocess.run(
                ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"],
                capture_output=True, text=True, timeout=10, check=True,
            )  # fmt: skip
            for number, line in enumerate(done.stdout.strip().splitlines()):
                values = zip(FIELDS, line.split(","), strict=False)
                text = ", ".join(f"{field} {value.strip()}" for field, value in values)
                messages.send("fact", what=f"nvidia-smi, GPU {number}", text=text)
        except (OSError, subprocess.SubprocessError) as error:
            messages.send("failed", what="nvidia-smi", why=str(error))
    import xpnet  # imported last, because it may fail

    for what, text in xpnet.get_backend("gpu").describe():
        messages.send("fact", what=what, text=text)


if __name__ == "__main__":
    main()
