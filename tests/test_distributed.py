"Several processes (gloo, CPU): what `any_rank` promises, and what the guards do together"
import json, os, subprocess, sys
from pathlib import Path

import pytest
from distributed_safety import check, launch

here = Path(__file__).parent

def torchrun(*args, seconds):
    env = os.environ | {'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore'}
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', here/'distributed_nan.py', *args]
    return subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=seconds)

@pytest.mark.parametrize('where', ['loss','grad','input'])
def test_all_stop_in_the_same_batch(where, tmp_path):
    res = torchrun(tmp_path, where, seconds=120)
    assert res.returncode==0, res.stderr[-3000:]
    a,b = [json.loads((tmp_path/f'{r}.json').read_text()) for r in (0,1)]
    assert a['answers']==b['answers']==[False, True, True]
    assert a['records']==b['records'] and [r[:3] for r in a['records']]==[[0,3,3]]
    assert a['finite'] and b['finite'] and a['weights']==b['weights']
    assert res.stdout.count('stopped the fit')==1      # the first process speaks for all
    assert a['records'][0][3].startswith('process 1: the ' + dict(loss='loss is nan', grad='gradient of 8.bias', input='input has 2,048')[where])

def test_fails_without_asking(tmp_path):
    "The test above can fail: a process that decides for itself leaves the other one waiting, until its connection breaks"
    try: code = torchrun(tmp_path, 'grad', 'alone', seconds=60).returncode
    except subprocess.TimeoutExpired: code = 'hung'
    assert code!=0

@pytest.mark.parametrize('world,n', [(2,8), (4,6)])
def test_faults_on_one_process(world, n):
    "A part of the soak: no hang, the same weights and the same decisions everywhere"
    found = launch(world, 1000, n, 240)
    assert list(check(found))==[] and sum(bool(o['told']) for o in found[0])>=n//2

def test_check_can_fail():
    a = dict(seed=0, finite=True, weights='a', told=[], lines=0)
    for other in (dict(finite=False), dict(weights='b'), dict(told=[1]), dict(lines=1)): assert list(check([[a], [a | other]]))
