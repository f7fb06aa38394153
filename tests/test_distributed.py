"Several processes (gloo, CPU), started once: they stop together, guard together, go on to the same bits"
import random

import pytest, torch
import torch.nn.functional as F
from fastai.torch_core import default_device, set_seed
from torch import nn
from distributed_gradients import batches, cases
from common import public_callbacks
from distributed_safety import check
from ranks import launch

names = [o.__name__ for o in public_callbacks()]
seeds = 79,1000,1001      # in 79, `GradientClip` alone looks at each step
together = {*random.Random(0).sample(names, 2), 'Checkpoint'}       # all of them in the soak

@pytest.fixture(scope='session')
def seen(tmp_path_factory):
    "What two processes saw, by part"
    out = tmp_path_factory.mktemp('ranks')
    parts = dict(nan=['loss','grad','input'], gradients=None, stopping=None, checkpoint=None,
                 safety=list(seeds), contract=sorted(together))
    return launch(2, out, 400, **parts)

@pytest.mark.parametrize('where', ['loss','grad','input'])
def test_all_stop_in_the_same_batch(where, seen):
    a,b = [o[where] for o in seen['nan']]
    assert a['answers']==b['answers']==[False, True, True]
    assert a['records']==b['records'] and [r[:3] for r in a['records']]==[[0,3,3]]
    assert a['finite'] and b['finite'] and a['weights']==b['weights']
    assert a['said'].count('stopped the fit')==1 and not b['said']      # the first process speaks for all
    what = dict(loss='loss is nan', grad='gradient of 8.bias', input='input has 2,048')[where]
    assert a['records'][0][3].startswith(f'process 1: the {what}')

def test_all_stop_together(seen):
    "One process has a reason to stop: its clock, a file, a metric, its patience, its samples"
    first,second = seen['stopping']
    assert first.keys()=={'clock','schedule','file','metric','patience','samples'}
    for what,a in first.items():
        b = second[what]
        assert [r[:4] for r in a['records']]==[r[:4] for r in b['records']] and a['records'], what
        assert (a['batches'],a['rows'],a['best'])==(b['batches'],b['rows'],b['best']) and a['rows']<6, what
        assert a['weights']==b['weights'], what
        assert len(a['said'].splitlines())==len(a['records']) and not b['said']     # the first speaks for all
    assert 'another process' in first['clock']['records'][0][4]
    assert '1 minutes' in second['clock']['records'][0][4]
    assert first['file']['batches']==6 and first['samples']['batches']==5
    for o in (first['metric'], second['metric']):
        assert 'diverged: valid_loss is inf' in o['records'][0][4] and o['rows']==3 and o['best']<2

@pytest.mark.parametrize('how', ['fit','fine_tune'])
def test_both_go_on(how, seen):
    "From checkpoints, in later epochs too, whose order the loader inside the distributed one draws"
    for rank,cases in enumerate(seen['checkpoint']):
        found = cases[how]
        assert found['got']==found['want']==found['again'] and not found['lock']
        assert [o.count('resumed') for o in found['said']]==([1]*2 if rank==0 else [0]*2), found['said']
        assert found['finished'].count('found the fit finished')==(rank==0)*(1+(how=='fine_tune'))

def test_faults_on_one_process(seen):
    "A part of the soak: no hang, the same weights and the same decisions everywhere"
    assert list(check(seen['safety']))==[] and sum(bool(o['told']) for o in seen['safety'][0])>=len(seeds)//2

def test_check_can_fail():
    a = dict(seed=0, finite=True, weights='a', told=[], lines=0)
    for other in (dict(finite=False), dict(weights='b'), dict(told=[1]), dict(lines=1)):
        assert list(check([[a], [a | other]]))

@pytest.mark.parametrize('name', sorted(together))
def test_contract(name, seen):
    "Under `distrib_ctx`: the same weights everywhere, and an interrupted run goes on to the same bits"
    assert [o[name] for o in seen['contract']]==['', '']

@pytest.fixture
def gradients(seen): return {k: tuple(o[k] for o in seen['gradients']) for k in cases}

@pytest.mark.parametrize('case', cases)
def test_same_weights(case, gradients):
    a,b = gradients[case]
    assert a['weights']==b['weights'] and a['grads']==b['grads'] and a['syncs'] and b['syncs']

windows = dict(windows=[0,12,24,36,48], left_over=[0,18,36,48], cut_short=[0,30,42])

@pytest.mark.parametrize('case,windows', windows.items(), ids=windows)
def test_windows_of_all_processes(case, windows, gradients):
    "The gradient is that of one batch of the targets of all; it is shared once a window"
    found,_ = gradients[case]
    xs,ys = zip(*([torch.cat(o) for o in zip(*batches(rank))] for rank in (0,1)))
    set_seed(0)
    model = nn.Linear(5, 4).to(default_device())
    for got,i,j in zip(found['grads'], windows[:-1], windows[1:], strict=True):
        loss = F.cross_entropy(model(torch.cat([x[i:j] for x in xs])), torch.cat([y[i:j] for y in ys]))
        want = torch.cat([o.flatten() for o in torch.autograd.grad(loss, list(model.parameters()))])
        torch.testing.assert_close(torch.tensor(got), want.cpu(), rtol=1e-4, atol=1e-6)
    assert found['shared']==len(windows)-1 - (case=='cut_short')

def test_sam_of_each_process(gradients):
    "Each process goes its own way; the gradient is the mean"
    from test_sam import published
    set_seed(0)
    model = nn.Linear(5, 4).to(default_device())
    each = [[published(model, x, y, 0.5, False, 0)[0] for x,y in batches(rank)] for rank in (0,1)]
    for got,a,b in zip(gradients['sam'][0]['grads'], *each, strict=True):
        want = torch.cat([((a[n]+b[n])/2).flatten() for n,_ in model.named_parameters()])
        torch.testing.assert_close(torch.tensor(got), want.cpu(), rtol=1e-4, atol=1e-6)
