"Layers: norms, updates, noise scale and activations are those that brute force finds; the run stays the same"
import contextlib, io
from math import hypot

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import SGD, Adam, Callback, DataLoaders, Learner, OptimWrapper, set_seed
from fastai.callback import training
from fastai.callback.hook import ActivationStats as FastaisStats
from fastai.callback.core import CancelStepException
from torch import nn
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.rows import read_rows
from fastai_callbacks_ext.layers import _frozen_parts
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner, text_learner
from common import fit, quiet
from crash import digests
from test_safety import AnyMixedPrecision

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def digits(cbs, **kwargs): return digits_learner(cbs, n=200, bs=16, **kwargs)      # 10 batches in an epoch
def scaler(): return AnyMixedPrecision(torch.float32, 2.**10)

def module_norms(learn, tensors):
    "Norm of each module's own tensors, in its order"
    res = {}
    for name,m in learn.model.named_modules():
        if own := [tensors[p] for p in m._parameters.values() if p in tensors]:
            res[name] = torch.cat([o.flatten() for o in own]).norm().item()
    return res

class Brute(Callback):
    "Copies everything around each step"
    order,run_valid = 10**6,False
    def before_fit(self): self.rows,self.parts,self.before_clip = [],[],None
    def after_backward(self): self.parts.append([p.grad.clone() for p in self.learn.model.parameters()])
    def before_step(self):
        ps = list(self.learn.model.parameters())
        self.weights,self.grads = {p: p.detach().clone() for p in ps},{p: p.grad.clone() for p in ps}
    def after_step(self):
        update = {p: p.detach()-o for p,o in self.weights.items()}
        row = {k: module_norms(self.learn, v) for k,v in
               dict(weight_norm=self.weights, grad_norm=self.grads, update_norm=update).items()}
        self.rows.append(row | dict(parts=self.parts))
        self.parts = []

class BeforeClip(Callback):
    "After the loss scale is divided out, before a clip"
    order,run_valid = 10.2,False
    def before_fit(self): self.norms = []
    def before_step(self):
        self.norms.append(hypot(*(p.grad.norm().item() for p in self.learn.model.parameters())))

torch_adam = lambda params, lr, **kwargs: OptimWrapper(params, torch.optim.Adam, lr=lr)
RUNS = dict(sgd=(SGD, list), adam=(Adam, list), torchs=(torch_adam, list),
            clip=(Adam, lambda: [GradientClip(.1)]), fastais_clip=(SGD, lambda: [training.GradientClip(.1)]),
            window=(Adam, lambda: [GradientAccumulation(32)]),
            fastais_window=(SGD, lambda: [training.GradientAccumulation(32)]),
            scaler=(Adam, lambda: [scaler(), training.GradientClip(.1)]),
            scaled_window=(SGD, lambda: [scaler(), GradientAccumulation(32)]),
            fast=(Adam, lambda: [FastLoop(), SAM(), GradientCentralization()]))

@pytest.mark.parametrize('run', RUNS)
def test_each_measured_step_is_as_brute_force_finds_it(run):
    opt_func,cbs = RUNS[run]
    brute,clip,stats = Brute(),BeforeClip(),LayerStats(every=2)
    learn = fit(digits([*cbs(), brute, clip, stats], opt_func=opt_func))
    steps = 5 if 'window' in run else 10
    assert len(brute.rows)==steps==stats.steps
    assert [o['optimizer_step'] for o in stats.rows]==[*range(2, steps+1, 2)]
    for row in stats.rows:
        want = brute.rows[row['optimizer_step']-1]
        for k in ('weight_norm','grad_norm','update_norm'):
            assert dict(zip(row['names'], row[k]))==pytest.approx(want[k], rel=1e-4), k
        ratios = [u/w for u,w in zip(row['update_norm'], row['weight_norm'])]
        assert row['update_ratio']==ratios and row['grad_norm_total']==pytest.approx(hypot(*row['grad_norm']))
        clipped = row.get('grad_norm_total_before_clip')
        if not run.endswith(('clip','scaler')): assert clipped is None
        else: assert clipped==pytest.approx(clip.norms[row['optimizer_step']-1], rel=1e-4) and clipped>.1
    assert list(stats.table().update_norm)==stats.rows[-1]['update_norm']
    assert 'step' not in vars(learn.opt)

@pytest.mark.parametrize('cbs', [lambda: [GradientAccumulation(64)],
                                 lambda: [training.GradientAccumulation(64)],
                                 lambda: [scaler(), GradientAccumulation(64)]])
def test_noise_scale_is_the_papers(cbs):
    "From the gradients of 4 batches of 16, of steps 2 and 4 (or 3, of fewer)"
    brute,stats = Brute(),LayerStats(every=2)
    fit(digits([*cbs(), brute, stats]), 2)
    noise,signal,found = 0,0,[o['noise_scale'] for o in stats.rows]
    for row,got in zip(stats.rows, found):
        parts = brute.rows[row['optimizer_step']-1]['parts']
        sums = [torch.cat([g.flatten() for g in o]).double() for o in parts]
        parts = [b-a for a,b in zip([0*sums[0], *sums], sums)]
        unit = row['grad_norm_total']/sums[-1].norm()      # of the loss scale, and of the sum
        n,b = len(parts),16
        small,big = sum((unit*n*o).norm()**2 for o in parts)/n,(unit*sums[-1]).norm()**2
        noise += (small-big)/(1/b-1/(n*b))
        signal += (n*b*big-b*small)/(n*b-b)
        assert got==pytest.approx((noise/signal).item(), rel=1e-3)
    assert len(found)==len(stats.rows)>=2

def test_noise_scale_where_it_is_known():
    "Gradients are w-x for normal x: with 50 weights, variance 4 and |w-mean| = 10, it is 50*4/100 = 2"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1280, 50, generator=g)*2 + 10/50**.5
    batches = [(o,o) for o in x.split(8)]
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(50))
        def forward(self, x): return self.w.expand_as(x)
    loss = lambda pred,x: ((pred-x)**2).sum(1).mean()/2
    learn = Learner(DataLoaders(batches, []), Net(), loss, opt_func=SGD,
                    cbs=[training.GradientAccumulation(32), stats := LayerStats(every=2)])
    fit(learn, 1, lr=0.)
    assert len(stats.rows)==20 and stats.rows[-1]['noise_scale']==pytest.approx(2, rel=.1)
    assert stats.rows[0]['names']==['model']

def test_no_noise_scale_where_it_is_not_known():
    "One batch a step; the noise hides the gradient; gradients of before are in the sum; no number of items"
    stats = LayerStats(every=1)
    fit(digits(stats))
    assert not any('noise_scale' in o for o in stats.rows)
    def found(parts, total, before=0.):
        stats._noise,row = [],{}
        micro = [(o, total, before) for o in parts]
        stats._add_noise(row, [16]*len(parts), dict(micro=micro, before=1.))
        return row
    assert found([1.,1.,1.,1.], 1.9)=={} and found([1.,1.], 1.9, before=.1)=={} and found([0.,0.], 0.)=={}
    assert found([1.,1.], 2.)=={'noise_scale': 0.} and found([1.,1.], 1.9)['noise_scale']>0
    fit(digits([training.GradientAccumulation(32), stats]), cbs=OddTargets())
    assert len(stats.rows)==5 and not any('noise_scale' in o for o in stats.rows)

class OddTargets(Callback):
    "Targets of a form that fastai's `find_bs` does not know, while `LayerStats` looks"
    order,run_valid = 0,False
    def before_backward(self): self.kept,self.learn.yb = self.learn.yb,(torch.tensor(1.),)
    def after_backward(self): self.learn.yb = self.kept

def test_a_skipped_batch_is_not_in_the_noise_scale():
    seen = {}
    class Counts(LayerStats):
        def _add_noise(self, row, items, numbers): seen[row['optimizer_step']] = [*items],numbers['micro']
    fit(digits([GradientAccumulation(48), SkipNonFinite(), PoisonBatch(4), Counts(every=1)]))
    assert seen and all(len(items)==len(micro) and np.isfinite(micro).all() for items,micro in seen.values())
    assert [sum(items) for items,_ in seen.values()][0]==48

def with_both(every=1): return [LayerStats(every), ActivationStats(True, every=every)]

@pytest.mark.parametrize('cbs', [lambda: [], lambda: [FastLoop(), GradientAccumulation(32), GradientClip(.1)],
                                 lambda: [AnyMixedPrecision(), EMA()]])
def test_the_run_stays_the_same(cbs):
    def run(*more): return digests(fit(digits([*cbs(), *more]), 2))
    assert run(*with_both())==run()

class Skips(Callback):
    "Cancels some steps, late"
    order,run_valid = 500,False
    def before_step(self):
        if self.train_iter in (1,4): raise CancelStepException
    def after_batch(self): assert 'step' not in vars(self.opt)

def test_a_cancelled_step_is_no_step():
    stats = LayerStats(every=2)
    learn = fit(digits([stats, Skips()]))
    assert stats.steps==8 and [o['optimizer_step'] for o in stats.rows]==[2,4,6,8]
    class Interrupts(Callback):
        order,run_valid = 400,False
        def before_step(self):
            assert 'step' in vars(self.opt)
            raise KeyboardInterrupt
    stats.every = 1
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Interrupts())
    assert 'step' not in vars(learn.opt)

def test_a_step_of_someone_else_is_put_back():
    learn,calls = digits(LayerStats(every=1)),[]
    learn.create_opt()
    real = learn.opt.step
    learn.opt.step = own = lambda: (calls.append(1), real())
    fit(learn)
    assert learn.opt.step is own and len(calls)==10

def test_a_measurement_that_fails_does_no_harm(capsys, monkeypatch):
    def fails(*args): raise RuntimeError('no memory\nand much more')
    for cls,name in ((LayerStats,'_after'), (LayerStats,'_before'), (ActivationStats,'_call'),
                     (ActivationStats,'_sum_up')):
        with monkeypatch.context() as m:
            m.setattr(cls, name, fails)
            learn = fit(digits(cb := cls(every=1)))
        said = [o for o in capsys.readouterr().out.splitlines() if cb.name in o]
        assert len(said)==len(cb.records)==1 and said[0].endswith('RuntimeError: no memory')
        assert learn.recorder.values and not learn.model[0]._forward_hooks

class Part(nn.Module):
    "Has weights that are never used, and a scale that begins small"
    def __init__(self):
        super().__init__()
        self.unused,self.scale = nn.Linear(4, 4),nn.Parameter(torch.full((1,), 1e-6))
    def forward(self, x): return x*(1+self.scale)

def said(cb): return {r.what: r.why for r in cb.records}

def test_what_is_told(capsys):
    "Only what has held in three measured steps; once"
    stats = LayerStats(every=1)
    learn = digits(stats, model=nn.Sequential(*digits_learner(n=64).model, Part()), opt_func=SGD)
    learn.model[0].weight.requires_grad_(False)
    learn.create_opt()
    learn.model[0].bias.requires_grad_(False)
    learn.model.late = nn.Identity()
    learn.model.late.weight = nn.Parameter(torch.ones(3))
    fit(learn, 2, lr=1e-3)
    found = said(stats)
    why = found['found 2 of the parameters without a gradient']
    assert why.startswith('9.unused.weight, 9.unused.bias got none in 3')
    assert found['found 1 of the parameters not trained'].startswith('late.weight')
    assert found['found 2 of 14 parameters frozen']=='0'
    assert len(stats.records)==len(capsys.readouterr().out.splitlines())
    assert all('9.unused' not in o['names'] and '0' not in o['names'] for o in stats.rows)
    stats = LayerStats(every=9)      # one measured step: said at the end
    learn.remove_cb(learn.layer_stats)
    fit(learn, cbs=stats)
    assert 'in 1 measured steps' in said(stats)['found 2 of the parameters without a gradient']

def test_a_module_that_changes_fast():
    def run(lr):
        learn = digits(stats := LayerStats(every=2), opt_func=SGD)
        learn.model[8].bias.data.zero_()
        learn.create_opt()
        fit(learn, lr=lr)
        return stats
    class Fast(Callback):
        run_valid = False
        def before_step(self): self.learn.model[8].weight.grad *= 3000
    assert not run(1e-3).records
    learn = digits([stats := LayerStats(every=2), Fast()], opt_func=SGD)
    fit(learn, lr=1e-3)
    assert list(said(stats))==['found that 8 changes fast'] and stats.records[0].batch in (5,6)

def test_groups_with_larger_rates_are_meant_so():
    def groups(m): return [list(m[:8].parameters()), list(m[8:].parameters())]
    learn = digits(stats := LayerStats(every=2), opt_func=SGD, splitter=groups)
    with quiet(learn): learn.fit_one_cycle(2, slice(1e-4, 1.))
    table = stats.table().update_ratio
    assert table['8']>40*table.iloc[0] and not stats.records

def test_what_is_frozen():
    norm = lambda n: nn.BatchNorm1d(n)
    body = nn.Sequential(nn.Linear(3, 3), norm(3), nn.Sequential(nn.Linear(3, 3), norm(3)))
    model = nn.Sequential(body, nn.Linear(3, 2))
    def parts(*frozen): return _frozen_parts(model, {p for m in frozen for p in m.parameters(recurse=False)})
    assert parts()==[] and parts(*model.modules())==['the whole model'] and parts(*body.modules())==['0']
    assert parts(body[0], body[2][0])==['0 (but for batch norm)'] and parts(body[1])==['0.1']
    assert parts(body[0], body[1])==['0.0','0.1']
    assert _frozen_parts(model, {model[1].bias})==['1.bias']
    stats = LayerStats(every=1)
    learn = digits(stats, splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())])
    with quiet(learn): learn.fine_tune(1)
    assert list(said(stats).values())[0]=='0, 3'       # batch norm is trained

class Fancy(nn.Module):
    "Tied, complex, half-precision and sparse parameters, and a parametrized one"
    def __init__(self):
        super().__init__()
        self.emb,self.out = nn.EmbeddingBag(20, 8, sparse=True, mode='sum'),nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.out.weight
        self.wave = nn.Parameter(torch.ones(8, dtype=torch.complex64))
        self.short = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
        self.spec = nn.utils.parametrizations.weight_norm(nn.Linear(8, 2))
    def forward(self, x):
        x = self.again(self.out(self.emb(x))) * self.wave.real + self.short.float()
        return dict(deep=[self.spec(x)])

def test_odd_parameters_and_outputs():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 20, (64,6), generator=g)
    batches = list(zip(x.split(8), (x.sum(1)%2).split(8)))
    set_seed(1)
    model = Fancy()
    sgd = lambda params,lr,**kwargs: OptimWrapper(params, torch.optim.SGD, lr=lr)
    stats,acts = LayerStats(every=2),ActivationStats(every=2, include_paramless=True)
    loss = lambda p,y: F.cross_entropy(p['deep'][0], y)
    learn = Learner(DataLoaders(batches, []), model, loss, opt_func=sgd,
                    cbs=[stats, acts, training.GradientAccumulation(16)])
    fit(learn, 1, lr=.1)
    table = stats.table()
    assert not [*stats.records, *acts.records]
    assert list(table.index)==['model','emb','out','again','spec'] and (table.update_norm>0).all()
    assert (table.update_norm/table.grad_norm).tolist()==pytest.approx([.1]*5, rel=.02)
    assert {'emb','out','again','spec'}<={*acts.names}

# --- activations --------------------------------------------------------------------------------
class Outputs(Callback):
    "Keeps what comes out of some modules"
    run_valid = False
    def __init__(self, *names): self.names = names
    def before_fit(self):
        self.kept,modules = [],dict(self.learn.model.named_modules())
        def keep(n): return lambda m,i,o: self._keep(n, o)
        self.hooks = [modules[n].register_forward_hook(keep(n)) for n in self.names]
    def _keep(self, n, o):
        if self.learn.training: self.kept[-1].setdefault(n, []).append(o)
    def before_batch(self): self.kept.append({})
    def after_fit(self): [o.remove() for o in self.hooks]

def test_activations_are_as_brute_force_finds_them():
    outs = Outputs('0','2','5','8')
    stats = ActivationStats(with_hist=True, every=3, window=2)
    learn = digits([outs, stats])
    learn.model[2].register_forward_hook(lambda m,i,o: o*(torch.arange(16, device=o.device).view(-1,1,1)>9))
    fit(learn)
    assert len(stats.stats)==4 and stats.names==['0','1','2','3','4','5','8']
    edges = torch.tensor(stats.bins, dtype=torch.float)
    assert len(edges)==62 and edges.flip(0).neg().allclose(edges)
    for i,row in zip(range(0, 10, 3), stats.stats):
        for name in outs.names:
            o,got = outs.kept[i][name][0].cpu(),row[stats.names.index(name)]
            assert got['mean']==pytest.approx(o.mean().item(), abs=1e-6)
            assert got['std']==pytest.approx(o.std().item(), rel=1e-5)
            assert got['near_zero']==pytest.approx((o.abs()<=.05).float().mean().item(), rel=1e-5)
            counts = torch.stack([((o>=a)&(o<b)).sum() for a,b in zip(edges, edges[1:])])
            assert (torch.from_numpy(got['hist'])-counts).abs().sum()<=4      # on an edge, rounding decides
            alive = torch.stack([(outs.kept[j][name][0]!=0).transpose(0, 1).flatten(1).any(1)
                                 for j in (i-3,i) if j>=0]).any(0)
            assert got['dead_units']==(None if i==0 else (~alive).sum().item()) and got['units']==len(alive)
    assert stats.stats[-1][2]['dead_units']>=10 and list(said(stats))==['found dead units in 2']
    assert list(stats.table().dead_units)==[o['dead_units'] for o in stats.stats[-1]]
    assert not any(m._forward_hooks for m in learn.model[3:])

def test_fastais_methods():
    "A number means the same layer as there"
    theirs,ours = FastaisStats(with_hist=True),ActivationStats(with_hist=True, every=1)
    learn = fit(digits([theirs, ours]))
    for i in (0,-1,-2):
        a,b = theirs.layer_stats(i),ours.layer_stats(i)
        for k in (0,1): assert list(b[k])==pytest.approx(list(a[k]), rel=1e-4, abs=1e-6)
        assert ours.hist(i).shape==(61,10)
    assert ours.layer_stats('2')[2][0]>.05
    assert ours.hist('2').exp().sum(0)[0]-61==pytest.approx(16*16*16, rel=1e-4)
    assert ours.color_dim(0).get_ylabel() and ours.plot_layer_stats(0) is None
    with pytest.raises(ValueError, match="idx='22'.*did you mean"): ours.hist('22')
    with pytest.raises(ValueError, match='with_hist'): ActivationStats().hist(0)

@pytest.mark.parametrize('bad,error', [(dict(modules='9'), "modules='9'"),
                                       (dict(modules=nn.ReLU()), 'modules=ReLU')])
def test_unknown_modules(bad, error):
    with pytest.raises(ValueError, match=error): fit(digits(ActivationStats(**bad)))

def test_bad_arguments():
    for kwargs in (dict(every=0), dict(window=0), dict(keep=0)):
        with pytest.raises(ValueError, match=next(iter(kwargs))): ActivationStats(**kwargs)
    for kwargs in (dict(modules=3), dict(with_hist=1)):
        with pytest.raises(TypeError, match=next(iter(kwargs))): ActivationStats(**kwargs)
    for kwargs in (dict(every=0), dict(keep=0)):
        with pytest.raises(ValueError, match=next(iter(kwargs))): LayerStats(**kwargs)

class Sequences(nn.Module):
    "Channels are second after `conv`, last after `lin`; `shared` is called twice; `attn` calls no `out_proj`"
    def __init__(self):
        super().__init__()
        self.conv,self.act,self.lin,self.act2 = nn.Conv1d(1, 6, 1),nn.ReLU(),nn.Linear(6, 6),nn.ReLU()
        self.shared,self.never = nn.Linear(6, 6),nn.Linear(2, 2)
        self.attn = nn.MultiheadAttention(6, 1, batch_first=True)
    def forward(self, x):
        x = self.act(self.conv(x.flatten(1)[:,None,::8])).transpose(1, 2)
        x = self.act2(self.lin(x))
        x = self.shared(x) + 3*self.shared(2*x)
        return F.pad(self.attn(x, x, x)[0].mean(1), (0,4))

def test_units_of_sequences():
    outs = Outputs('shared','act2')
    stats = ActivationStats(every=1, window=1)
    model = Sequences()
    with torch.no_grad(): model.lin.bias[:2],model.conv.bias[:] = -100,1
    fit(digits([outs, stats], model=model))
    units = dict(zip(stats.names, [o['units'] for o in stats.stats[0]]))
    assert units==dict(conv=6, act=6, lin=6, act2=6, shared=6, attn=6, never=None)
    last = outs.kept[-1]['act2'][0]
    assert stats.table().dead_units.act2==(last==0).all(0).all(0).sum()>=2 and stats.table().dead_units.act==0
    both,got = torch.cat(outs.kept[0]['shared']),dict(zip(stats.names, stats.stats[0]))['shared']
    assert got['mean']==pytest.approx(both.mean().item(), abs=1e-5)
    assert got['std']==pytest.approx(both.std().item(), rel=1e-5)
    assert said(stats)['has no numbers of 1 layers'].startswith('never gave no tensor')

def test_awd_lstm():
    stats = ActivationStats(every=4)
    learn = text_learner(n=1500)
    learn.add_cb(stats)
    fit(learn)
    assert stats.names==['0.encoder_dp','0.rnns.0.module','1.decoder'] and not stats.records
    assert stats.table()['std'].gt(0).all()

def test_modules_and_memory():
    learn = digits_learner(n=200, bs=16)
    stats = ActivationStats(modules=[learn.model[0], '8'], every=1, keep=3)
    layers = LayerStats(every=1, keep=3)
    fit(learn, 1, cbs=[stats, layers])
    assert stats.names==['0','8'] and len(stats.stats)==len(layers.rows)==3
    assert stats._late is None and not stats._layers and layers._lent is None
    assert len(layers.plot().lines)==5 and list(LayerStats().table())==list(layers.table())
    assert LayerStats().plot().get_yscale()=='log' and len(ActivationStats().table())==0
    full = ActivationStats(include_paramless=True, every=5)
    fit(learn, 1, cbs=full)
    assert full.names==[str(i) for i in range(9)]

def test_a_compiled_model_is_not_compiled_again():
    "As often as without; the numbers are those of the plain model"
    from torch._dynamo.testing import CompileCounter
    def run(cb, compiled=True):
        torch._dynamo.reset()
        counter = CompileCounter()
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        set_seed(7)
        for m in model[1],model[3]: m.reset_parameters()
        learn = digits_learner(cb, n=80, bs=16, model=model)
        if compiled: learn.model = torch.compile(model, backend=counter)
        return digests(fit(learn)),counter.frame_count
    compiled,plain = ActivationStats(every=2),ActivationStats(every=2)
    assert run(compiled)==run([]) and not compiled.records
    run(plain, False)
    assert compiled.names==plain.names==['1','2','3'] and len(plain.stats)==len(compiled.stats)==2
    for a,b in zip(compiled.stats, plain.stats):
        assert [o['mean'] for o in a]==pytest.approx([o['mean'] for o in b], abs=1e-5)

def test_what_cannot_be_undone_is_not_measured_aside():
    class Counts(nn.Module):
        class State:
            def __init__(self): self.n,self.it = 0,iter(())
            def __iter__(self): return self
            def __next__(self): return 0
        def __init__(self): super().__init__(); self.state = self.State()
        def forward(self, x): return x
    learn = digits_learner(stats := ActivationStats(every=2), n=64, bs=16)
    learn.model.append(Counts())
    learn.model._compiled_call_impl = learn.model._call_impl        # as of a compiled module
    fit(learn)
    assert 'cannot undo a second forward pass' in stats.records[0].why and not stats.stats

def alike(a, b):
    "The same; on a GPU numbers nearly, as the same fit rounds in other ways each time"
    if isinstance(a, dict): return a.keys()==b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(alike, a, b))
    if isinstance(a, float) and torch.cuda.is_available(): return a==pytest.approx(b, rel=.02, abs=1e-3)
    return a==b

def test_a_resumed_run_ends_with_the_same_numbers():
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.train_iter==13: raise KeyboardInterrupt
    def run(folder, *cbs):
        layers,acts,log = LayerStats(every=2),ActivationStats(every=2, window=4),RunLog(f'{folder}/log')
        learn = digits([layers, acts, log, Checkpoint(folder, steps=4, background=False), *cbs,
                        GradientAccumulation(32)])
        with contextlib.suppress(KeyboardInterrupt): fit(learn, 3)
        rows = [] if cbs else read_log(f'{folder}/log').rows
        rows = [{k: v for k,v in o.items() if k!='t'} for o in rows if o['kind'] in ('layers','activations')]
        return layers.state_dict(),acts.state_dict(),rows
    want = run('whole')
    run('parts', Stop())
    got = run('parts')
    assert alike(got[2], want[2]) and len(want[2])>10 and alike(got[0], want[0])
    assert got[1].keys()==want[1].keys() and got[1]['_seen']==want[1]['_seen']
    for k,v in want[1]['_quiet'].items(): assert torch.equal(got[1]['_quiet'][k], v)
    assert any('noise_scale' in o for o in want[2])

def test_upgrade(capsys):
    learn = digits_learner([FastaisStats(with_hist=True, every=4)], n=64)
    upgrade(learn)
    assert type(learn.activation_stats) is ActivationStats
    assert (learn.activation_stats.with_hist, learn.activation_stats.every)==(True, 4)
    learn = digits_learner([FastaisStats(is_forward=False)], n=64)
    upgrade(learn)
    assert type(learn.activation_stats) is FastaisStats and 'gradients' in capsys.readouterr().out
