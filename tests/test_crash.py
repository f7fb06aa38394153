"Some of the kills of `make soak-crash`: each case is killed at least twice"
import os, re, subprocess, sys
from pathlib import Path

import pytest

@pytest.mark.parametrize('case', ['tabular', 'cnn', 'language', 'accumulation', 'workers', 'teacher', 'ranks'])
def test_killed_runs_end_with_the_same_bits(case):
    env = os.environ | {'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore'}
    cmd = [sys.executable, Path(__file__).parent/'crash.py', '--kills', '2', '--jobs', '1', '--cases', case,
           '--seed', '1']
    res = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=400)
    assert res.returncode==0, res.stdout[-5000:]+res.stderr[-3000:]
    assert int(re.search(r'(\d+) kills in .* the same bits, no unreadable state', res.stdout)[1])>=2
