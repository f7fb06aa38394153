"Some of the kills of `make soak-crash`: runs of each case are killed once"
import re
from functools import partial

import pytest
import crash
from common import into_file
from crash import CASES

@pytest.fixture(scope='module')
def soak(tmp_path_factory):
    "What a soak of 8 kills printed"
    args = ['--kills', '8', '--most', '1', '--jobs', '1']
    code,said = into_file(partial(crash.main, args), tmp_path_factory.mktemp('soak')/'said')
    assert code==0, said[-5000:]
    return said

def test_nothing_is_lost(soak):
    assert int(re.search(r'(\d+) kills in .* the same bits, no unreadable state', soak)[1])>=8

@pytest.mark.parametrize('case', CASES)
def test_killed_runs_end_with_the_same_bits(case, soak):
    "Each case was among them"
    assert int(re.search(rf'^{case} .*?(\d+)$', soak, re.M)[1])>=1
