"Two processes (gloo, CPU): what `any_rank` promises"
import json, os, subprocess, sys
from pathlib import Path

import pytest

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
    assert [r[:3] for r in a['records']]==[r[:3] for r in b['records']]==[[0,3,3]]
    assert a['finite'] and b['finite'] and a['weights']==b['weights']
    assert res.stdout.count('stopped the fit')==1      # the first process speaks for all
    if where!='grad': assert 'another process' in a['records'][0][3] and 'the loss is nan' in b['records'][0][3]

def test_fails_without_asking(tmp_path):
    "The test above can fail: a process that decides for itself leaves the other one waiting, until its connection breaks"
    try: code = torchrun(tmp_path, 'loss', 'alone', seconds=60).returncode
    except subprocess.TimeoutExpired: code = 'hung'
    assert code!=0
