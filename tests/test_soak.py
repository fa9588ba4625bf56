"""Killed again and again, at random moments: the labels are still those of an unbroken run."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny import assert_same_assignments, tiny

from raydc import family

RUN = """
import sys
from tiny import tiny
from raydc import family
family.pretrain(tiny(sys.argv[1], epochs=12, num_workers=1))
"""
KILLS = 10


@pytest.mark.soak
@pytest.mark.usefixtures("local_ray")
def test_ten_kills_of_the_whole_process_group(tmp_path):
    family.pretrain(tiny(tmp_path / "whole", epochs=12, num_workers=1))
    moments, kills = random.Random(0), 0
    while not (tmp_path / "killed" / "result.json").exists():
        command = [sys.executable, "-c", RUN, str(tmp_path / "killed")]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        if kills < KILLS:
            config = tmp_path / "killed" / "config.json"
            while not config.exists() and running.poll() is None:  # Ray's own start is not what is tested
                time.sleep(0.05)
            time.sleep(moments.uniform(4, 14))
        else:
            running.wait()
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            kills += 1
        running.wait()
    print(f"{kills} kills")
    assert kills >= 3  # else the moments came too late to test anything
    assert_same_assignments(tmp_path / "whole", tmp_path / "killed")
