"Some of the kills of `make soak-crash`: runs of each case are killed once"
import os, re, subprocess, sys
from pathlib import Path

import pytest
from crash import CASES

@pytest.fixture(scope='module')
def soak():
    "What a soak of 7 kills printed"
    env = os.environ | {'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore'}
    cmd = [sys.executable, Path(__file__).parent/'crash.py', '--kills', '7', '--most', '1', '--jobs', '1']
    res = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=400)
    assert res.returncode==0, res.stdout[-5000:]+res.stderr[-3000:]
    return res.stdout

def test_nothing_is_lost(soak):
    assert int(re.search(r'(\d+) kills in .* the same bits, no unreadable state', soak)[1])>=7

@pytest.mark.parametrize('case', CASES)
def test_killed_runs_end_with_the_same_bits(case, soak):
    "Each case was among them"
    assert int(re.search(rf'^{case} .*?(\d+)$', soak, re.M)[1])>=1
