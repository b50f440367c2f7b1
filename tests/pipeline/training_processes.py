"""One of several processes that train together: trains each file of a list.

`python -m tests.pipeline.training_processes LIST RESULT`: LIST is JSON, with a path and a family
for each training. RESULT gets the folder of each trained file, or the problem. With a third
argument COPY, the only training is copied there, restarted and stopped after four steps.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from mechdsl.base.runtime import exit_process, read_launch
from mechdsl.execute import training
from mechdsl.fits import sparse_training
from mechdsl.fits.processes import join_processes
from tests.pipeline.test_own_trainers import train
from tests.pipeline.test_trained_rotations import interrupt_training


def train_all(listed: Path) -> list[str]:
    """Train each file in batches of one or two rows; features become idle after two steps."""
    sparse_training.IDLE_STEPS = 2
    training.split_prompts = partial(training.split_prompts, tokens=16)
    found = []
    for path, family in json.loads(listed.read_text("utf-8")):
        try:
            (one,) = train(Path(path), family)
            found.append(str(one.folder))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def interrupt(listed: Path, folder: Path, copy: Path) -> None:
    """Copy a trained folder, and leave only a checkpoint of its training."""
    [[path, _]] = json.loads(listed.read_text("utf-8"))
    shutil.copytree(folder, copy)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_training(Path(path), folder, patch)
    shutil.rmtree(folder)


def train_together(listed: Path, result: Path) -> list[str]:
    """Train each file together with the other processes; the first one writes the result."""
    torch.set_num_threads(1)
    with join_processes(read_launch()[1], cpu=True) as processes:
        done = train_all(listed)
        assert processes.agree(done) == done
        if processes.is_first:
            result.write_text(json.dumps(done), "utf-8")
    return done


if __name__ == "__main__":
    done = train_together(Path(sys.argv[1]), Path(sys.argv[2]))
    if len(sys.argv) > 3:
        interrupt(Path(sys.argv[1]), Path(done[0]), Path(sys.argv[3]))
    exit_process(0)
