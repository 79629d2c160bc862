"""Real processes of one distributed run, over gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
FOLDER, RANK, WORLD = {folder!r}, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
"""
END = """
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def run_in_processes(body: str, folder: Path, *, processes: int = 2, timeout: float = 400) -> None:
    """Run a script in several processes, or in one without a process group, and check that all of them end well.

    Args:
        body: the script. It finds `torch`, `FOLDER`, `RANK` and `WORLD`.
        folder: where it lies and may write.
        processes: how many.
        timeout: seconds.
    """
    script = folder / f"script{processes}.py"
    script.write_text(BEGIN.format(root=str(ROOT), folder=str(folder)) + body + END)
    launch = [sys.executable, "-W", "ignore"]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, str(script)], env=environment, timeout=timeout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
