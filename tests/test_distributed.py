"Several processes (gloo, CPU): what `any_rank` promises, and what the guards do together"
import json, os, subprocess, sys
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from fastai.torch_core import set_seed
from torch import nn
from distributed_gradients import batches, cases
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

@pytest.mark.parametrize('world,n', [(2,5), (4,4)])
def test_faults_on_one_process(world, n):
    "A part of the soak: no hang, the same weights and the same decisions everywhere"
    found = launch(world, 1000, n, 240)
    assert list(check(found))==[] and sum(bool(o['told']) for o in found[0])>=n//2

def test_check_can_fail():
    a = dict(seed=0, finite=True, weights='a', told=[], lines=0)
    for other in (dict(finite=False), dict(weights='b'), dict(told=[1]), dict(lines=1)): assert list(check([[a], [a | other]]))

@pytest.fixture(scope='module')
def gradients(tmp_path_factory):
    "What two processes saw, by case"
    out = tmp_path_factory.mktemp('gradients')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', here/'distributed_gradients.py', out]
    res = subprocess.run(cmd, env=os.environ | {'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore'}, capture_output=True, text=True, timeout=180)
    assert res.returncode==0, res.stderr[-3000:]
    a,b = [json.loads((out/f'{r}.json').read_text()) for r in (0,1)]
    return {k: (a[k], b[k]) for k in cases}

@pytest.mark.parametrize('case', cases)
def test_same_weights(case, gradients):
    a,b = gradients[case]
    assert a['weights']==b['weights'] and a['grads']==b['grads'] and a['syncs'] and b['syncs']

@pytest.mark.parametrize('case,windows', [('windows',[0,12,24,36,48]), ('left_over',[0,18,36,48]), ('cut_short',[0,30,42])])
def test_windows_of_all_processes(case, windows, gradients):
    "The gradient is that of one batch of the targets of all; it is shared once a window"
    found,_ = gradients[case]
    xs,ys = zip(*([torch.cat(o) for o in zip(*batches(rank))] for rank in (0,1)))
    set_seed(0)
    model = nn.Linear(5, 4)
    for got,i,j in zip(found['grads'], windows[:-1], windows[1:], strict=True):
        loss = F.cross_entropy(model(torch.cat([x[i:j] for x in xs])), torch.cat([y[i:j] for y in ys]))
        want = torch.cat([o.flatten() for o in torch.autograd.grad(loss, list(model.parameters()))])
        torch.testing.assert_close(torch.tensor(got), want, rtol=1e-4, atol=1e-6)
    assert found['shared']==len(windows)-1 - (case=='cut_short')

def test_sam_of_each_process(gradients):
    "Each process goes its own way; the gradient is the mean"
    from test_sam import published
    set_seed(0)
    model = nn.Linear(5, 4)
    each = [[published(model, x, y, 0.5, False, 0)[0] for x,y in batches(rank)] for rank in (0,1)]
    for got,a,b in zip(gradients['sam'][0]['grads'], *each, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.cat([((a[n]+b[n])/2).flatten() for n,_ in model.named_parameters()]), rtol=1e-4, atol=1e-6)
