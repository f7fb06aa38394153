"`find_batch_size` finds what fits; a probe leaves nothing"
import pytest, torch
from fastai.basics import set_seed
from torch import nn
from fastai_callbacks_ext.batch_size import BatchSize, find_batch_size
from fastai_callbacks_ext.test_utils import digits_learner
from common import fit
from test_memory import OPTS, odd_learner, roomy, same

def wide(bs=16, **kwargs):
    set_seed(5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2000), nn.BatchNorm1d(2000), nn.ReLU(), nn.Dropout(),
                        nn.Linear(2000, 10))
    return digits_learner(n=600, bs=bs, model=net, **kwargs)

def by_hand(bs):
    "Bytes of weights, gradients, two states of Adam, and the four activations that a step keeps"
    return 4*(4*(64*2000+3*2000+2000*10+10)) + bs*2000*4*4

def test_it_finds_what_fits(capsys, on_cpu):
    n = find_batch_size(wide(), limit_MB=8, margin=0.)
    assert isinstance(n, int) and n==n.bs and type(n) is BatchSize
    t = n.table
    assert t.fits[n] and not t.fits.all() and (t['training MB'][t.fits]<=8).all()
    assert t.index[~t.fits].min()-n<=max(1, n//16)
    ratio = t['training MB'][n]*2**20/by_hand(n)
    assert .8<ratio<1.5, ratio
    assert t['training MB'].is_monotonic_increasing and (t['validation MB']<t['training MB']).all()
    assert f'find_batch_size: {n} items take' in capsys.readouterr().out
    n.plot()

@pytest.mark.parametrize('opt', OPTS)
def test_the_fit_afterwards_is_that_without_it(on_cpu, opt):
    def run(probe):
        learn = wide(opt_func=OPTS[opt])
        n = find_batch_size(learn, limit_MB=6, max_bs=128) if probe else 0
        learn.dls.loaders = [dl.new(bs=int(n) or run.n) for dl in learn.dls.loaders]
        run.n = int(n)
        return fit(learn, 2, 'fit_one_cycle')
    assert same(run(True), run(False))

def test_after_a_fit_too(on_cpu):
    def run(probe):
        learn = fit(roomy())
        if probe: find_batch_size(learn, limit_MB=20, max_bs=64)
        return fit(learn)
    assert same(run(True), run(False))

def test_real_errors_of_memory_count():
    "A step that raises does not fit, whatever the limit"
    n = find_batch_size(roomy(k=40, where='both'), limit_MB=1000)
    assert 38<=n<=40 and n.table['training MB'].isna().any()

def test_plain_loaders_and_max_bs(capsys):
    n = find_batch_size(odd_learner(), limit_MB=100, max_bs=50)
    assert n==50 and 'batch_size=50' in capsys.readouterr().out

def test_find_batch_size_refuses():
    with pytest.raises(ValueError, match='not even one item fits'): find_batch_size(wide(), limit_MB=.1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='limit_MB=None'): find_batch_size(wide())
    with pytest.raises(ValueError, match='max_bs=0'): find_batch_size(wide(), max_bs=0, limit_MB=9)
    with pytest.raises(ValueError, match='margin=1'): find_batch_size(wide(), margin=1, limit_MB=9)
